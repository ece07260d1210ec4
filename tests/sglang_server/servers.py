"""How the tests start SGLang on a CPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.config.rollout import SpeculationConfig
from megatron_pbsd.ports import free_port
from megatron_pbsd.rollout.engines.sglang.build import build_member, build_sglang_engine
from megatron_pbsd.rollout.engines.sglang.engine import SGLangEngine
from megatron_pbsd.rollout.engines.sglang.lifeline import Meeting
from megatron_pbsd.rollout.engines.sglang.member import Member

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))
STAND_INS = Path(__file__).with_name("stand_ins")
ARGS: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_cuda_graph": True,
    "dtype": "float32", "max_total_tokens": 4096, "enable_deterministic_inference": True, "sleep_on_idle": True}
DIVIDED: dict[str, dict[str, Any]] = {
    "tp2": {"tp_size": 2}, "ep2": {"tp_size": 2, "ep_size": 2},
    "replicas": {"tp_size": 2, "ep_size": 2, "attn_dp_size": 2, "sleep_on_idle": False}}
"""Two processes with half of each tensor, half of the experts, or half of the experts and all of attention. Replicas
that sleep are a second late."""
ENVIRONMENT = {"PYTHONPATH": str(STAND_INS), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1",
               "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_COMPILE_DISABLE": "1"}


def section(**changes: Any) -> dict[str, Any]:
    """`rollout.sglang` of a configuration."""
    return {"python": PYTHON, "args": ARGS, "environment": ENVIRONMENT, "start_deadline_s": 600.0} | changes


def config_of(slots: int = 8, max_context: int = 120, longest_draft: int | None = None, **changes: Any
              ) -> RolloutConfig:
    """longest_draft: None does not speculate. changes: keys of `rollout.sglang`."""
    config = RolloutConfig(engine="sglang", slots=slots, max_context=max_context, sglang=section(**changes))
    if longest_draft is None:
        return config
    return config.model_copy(update={"speculation": SpeculationConfig(enabled=True, max_draft_tokens=longest_draft)})


def start(model: Path, logs: Path, *, name: str = "engine-0",
          load_weights: bool = True, routed_experts: bool = False, **options: Any) -> SGLangEngine:
    """An engine over a server of its own. options: see `config_of`."""
    return build_sglang_engine(str(model), config_of(**options), name=name, logs=str(logs), load_weights=load_weights,
                               routed_experts=routed_experts)


def start_on_two(model: Path, logs: Path, **options: Any) -> tuple[SGLangEngine, Member]:
    """An engine with half of its ranks on each of two machines, for which addresses of the loopback stand; and the part
    on the second."""
    config = config_of(args=ARGS | DIVIDED["tp2"], environment=ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "0"},
                       **options)
    common = {"model_path": str(model), "config": config, "logs": str(logs), "load_weights": True,
              "routed_experts": False, "device": 0, "meeting": Meeting("127.0.0.2", free_port(), 2)}
    with ThreadPoolExecutor(1) as thread:
        member = thread.submit(build_member, name="engine-0.node1", number=1, **common)
        engine = build_sglang_engine(name="engine-0", **common)
        return engine, member.result()
