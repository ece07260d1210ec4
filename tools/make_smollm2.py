"""SmolLM2-135M-Instruct as a Hugging Face folder: python tools/make_smollm2.py FOLDER"""

import sys
from pathlib import Path

from launcher.smollm2 import make_smollm2

if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
