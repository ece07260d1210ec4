"""What the policy's config.json says, on machines that have its folder and on those that have not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_pbsd.config import ModelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.hf_config import read, read_file


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json of `model.path`; of `model.shape` where that folder is not on this machine.

    ModelError when it cannot be read, and when both are here and describe different models: it names what differs.
    """
    if model.shape is None:
        return read(model.path)
    described = read_file(Path(model.shape))
    if not Path(model.path).is_dir():
        return described
    found = read(model.path)
    if different := _different(found, described):
        raise ModelError(f"model.shape = {model.shape} describes another model than model.path = {model.path}: "
                         + "; ".join(different) + ". Leave model.shape out, or name the file of this model")
    return found


def _different(found: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """A sentence for each field of the decoders that has two values."""
    here, there = (dict(_leaves(family(hf).decoder(hf))) for hf in (found, described))
    return [f"{name} = {there.get(name)!r}, and {here.get(name)!r} in the folder"
            for name in dict.fromkeys((*here, *there)) if here.get(name) != there.get(name)]


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
