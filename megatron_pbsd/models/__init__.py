"""Model families by Hugging Face `model_type`. Pure: imports neither Megatron nor torch.distributed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import qwen3
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import ParameterMap, RankCoordinates

__all__ = ["Family", "ModelError", "family", "layout_problems"]


class Family(Protocol):
    """What a family's module offers; see `models/qwen3.py` for the words."""

    def check_config(self, hf: Mapping[str, Any]) -> None: ...

    def transformer_config(self, hf: Mapping[str, Any]) -> dict[str, Any]: ...

    def gpt_model(self, hf: Mapping[str, Any]) -> dict[str, Any]: ...

    def hf_tensors(self, hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]: ...

    def layout_problems(self, hf: Mapping[str, Any], parallel: ParallelConfig) -> list[str]: ...

    def pieces(self, hf: Mapping[str, Any], parallel: ParallelConfig, at: RankCoordinates) -> ParameterMap: ...


FAMILIES: Mapping[str, Family] = {"qwen3": cast(Family, qwen3)}


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json, whose every field it has accounted for. ModelError when it cannot."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, 1)
        raise ModelError(f"config.json: model_type = {name!r} is not implemented; have {sorted(FAMILIES)}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    chosen = FAMILIES[name]
    chosen.check_config(hf)
    return chosen


def layout_problems(hf: Mapping[str, Any], parallel: ParallelConfig) -> list[str]:
    """What stands in the way of dividing this model like this; empty when nothing does."""
    return family(hf).layout_problems(hf, parallel)
