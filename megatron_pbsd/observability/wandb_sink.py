"""Metrics to Weights & Biases, for those who ask for it. The package is imported only then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError


class WandbSink:
    """One W&B run per run; a resumed run continues its own."""

    def __init__(self, folder: Path, run: RunConfig):
        mode = run.observability.wandb
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                f"observability.wandb = {mode!r} needs the package wandb, which cannot be imported ({error}): "
                "pip install 'megatron-pbsd[wandb]', or set observability.wandb to 'disabled'") from None
        self._run = wandb.init(project="megatron-pbsd", name=run.name, id=run.name, resume="allow", mode=mode,
                               dir=str(folder), config=run.model_dump(mode="json"))

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()
