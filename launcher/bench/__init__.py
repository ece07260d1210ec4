"""`pbsd bench NAME --json`: each module here is a bench, whose `run(overrides)` measures in its own run.

It returns named numbers; a name says its unit (`generated_tokens_per_s`) unless it has none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from megatron_pbsd.errors import UsageError, did_you_mean


def load_bench(name: str) -> Callable[[Sequence[str]], dict[str, Any]]:
    """The `run` of a bench. UsageError naming the benches that exist."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        raise UsageError(f"unknown bench {name!r}, expected one of: {', '.join(names)}{did_you_mean(name, names)}")
    return importlib.import_module(f"{__name__}.{name}").run
