"""How the tests start SGLang on a CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.engines.sglang.build import build_sglang_engine
from megatron_pbsd.rollout.engines.sglang.engine import SGLangEngine

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))
STAND_INS = Path(__file__).with_name("stand_ins")
ARGS: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_cuda_graph": True,
    "dtype": "float32", "max_total_tokens": 4096, "enable_deterministic_inference": True, "sleep_on_idle": True}
ENVIRONMENT = {"PYTHONPATH": str(STAND_INS), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1",
               "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_COMPILE_DISABLE": "1"}


def section(**changes: Any) -> dict[str, Any]:
    """`rollout.sglang` of a configuration."""
    return {"python": PYTHON, "args": ARGS, "environment": ENVIRONMENT, "start_deadline_s": 600.0} | changes


def start(model: Path, logs: Path, *, name: str = "engine-0", slots: int = 8, max_context: int = 120,
          load_weights: bool = True, routed_experts: bool = False, **changes: Any) -> SGLangEngine:
    """An engine over a server of its own. changes: keys of `rollout.sglang`."""
    config = RolloutConfig(engine="sglang", slots=slots, max_context=max_context, sglang=section(**changes))
    return build_sglang_engine(
        str(model), config, name=name, logs=str(logs), load_weights=load_weights, routed_experts=routed_experts)
