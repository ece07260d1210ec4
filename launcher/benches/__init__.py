"""Benches: one module each, whose `run() -> dict[str, float]` measures one part and returns named numbers.

A name says its unit: `decode_tokens_per_s`, `publish_s`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from launcher.schema import did_you_mean
from megatron_pbsd.errors import UsageError


def load_bench(name: str) -> Callable[[], dict[str, float]]:
    """The `run` of a bench. UsageError naming the benches that exist."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        raise UsageError(f"unknown bench {name!r}, expected one of: {', '.join(names)}{did_you_mean(name, names)}")
    return importlib.import_module(f"{__name__}.{name}").run
