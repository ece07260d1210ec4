"""From a configuration to an engine with its server, and to that server's parts on further machines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.engines.sglang.arguments import server_arguments, server_environment
from megatron_pbsd.rollout.engines.sglang.engine import SGLangEngine
from megatron_pbsd.rollout.engines.sglang.lifeline import Meeting
from megatron_pbsd.rollout.engines.sglang.member import Member
from megatron_pbsd.rollout.engines.sglang.processes import Launch


def build_sglang_engine(
    model_path: str, config: RolloutConfig, *, name: str, logs: str, load_weights: bool, routed_experts: bool,
    device: int | None = None, meeting: Meeting | None = None
) -> SGLangEngine:
    """name: ends with the engine's number. logs: folder of `<name>.sglang.log`, the server's output; beside it is what
    the machines of a server on several tell each other.

    routed_experts: whether chunks will ask for them. device: see `server_arguments`. meeting: see `Launch`.
    """
    launch = launch_of(model_path, config, name, logs, load_weights, routed_experts, device, meeting)
    if meeting is not None:
        # What an engine of that name has left that was killed.
        shutil.rmtree(launch.shared, ignore_errors=True)
        launch.shared.mkdir(parents=True)
    return SGLangEngine(
        model_path, name=name, launch=launch, slots=config.slots, max_context=config.max_context,
        has_weights=load_weights)


def build_member(
    model_path: str, config: RolloutConfig, *, name: str, number: int, logs: str, load_weights: bool,
    routed_experts: bool, device: int | None, meeting: Meeting
) -> Member:
    """The same on the server's further machine `number`, from 1."""
    return Member(name, launch_of(
        model_path, config, name, logs, load_weights, routed_experts, device, meeting), number)


def launch_of(model_path: str, config: RolloutConfig, name: str, logs: str, load_weights: bool, routed_experts: bool,
              device: int | None, meeting: Meeting | None) -> Launch:
    engine, section = name.partition(".")[0], config.sglang
    number = int(engine.rpartition("-")[2])
    arguments = server_arguments(
        config, model_path, number=number, load_weights=load_weights, routed_experts=routed_experts, device=device)
    launch = Launch(
        section.python, arguments, Path(logs) / f"{name}.sglang.log", server_environment(section),
        None if section.port is None else section.port + number, section.start_deadline_s, config.deadline_s)
    return launch if meeting is None else replace(
        launch, meeting=meeting, shared=Path(logs).parent / "engines" / engine)
