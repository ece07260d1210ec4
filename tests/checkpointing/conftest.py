from __future__ import annotations

import pytest
from tiny_models import make_tiny

from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from tests.checkpointing.tiny_conversions import MODELS, SMALL


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name → its folder and the checkpoint made of it."""
    made = {}
    for name, (model_type, changes) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (make_tiny(model_type, folder / "hf", **changes) / "tokenizer.json").write_text("{}")
        convert(ToMegatron(folder / "hf", **SMALL), folder / "megatron")
        made[name] = folder / "hf", folder / "megatron"
    return made
