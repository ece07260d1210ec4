"""From a configuration to an engine with its server."""

from __future__ import annotations

from pathlib import Path

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.engines.sglang.arguments import ranks, server_arguments, server_environment
from megatron_pbsd.rollout.engines.sglang.engine import SGLangEngine
from megatron_pbsd.rollout.engines.sglang.server import Launch


def build_sglang_engine(
    model_path: str, config: RolloutConfig, *, name: str, logs: str, load_weights: bool, routed_experts: bool
) -> SGLangEngine:
    """name: ends with the engine's number. logs: folder of `<name>.sglang.log`, the server's output.

    routed_experts: whether chunks will ask for them.
    """
    number, section = int(name.rpartition("-")[2]), config.sglang
    arguments = server_arguments(
        config, model_path, number=number, load_weights=load_weights, routed_experts=routed_experts)
    launch = Launch(
        section.python, arguments, Path(logs) / f"{name}.sglang.log", server_environment(section),
        None if section.port is None else section.port + number, section.start_deadline_s, config.deadline_s)
    return SGLangEngine(
        model_path, name=name, launch=launch, slots=config.slots, max_context=config.max_context, ranks=ranks(section),
        has_weights=load_weights)
