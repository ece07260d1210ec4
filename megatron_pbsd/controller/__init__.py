"""Where components run, and how failures of one become one clear message."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_pbsd.controller.runtime import Runtime


def open_runtime(kind: Literal["ray", "inline"], logs: Path) -> Runtime:
    if kind == "inline":
        from megatron_pbsd.controller.inline import InlineRuntime

        return InlineRuntime()
    from megatron_pbsd.controller.ray_cluster import RayRuntime

    return RayRuntime(logs)
