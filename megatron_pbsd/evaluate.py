"""Evaluate a policy folder without a learner: engines, coordinator, verifier."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_pbsd import summary
from megatron_pbsd.components import check_engines, score, start_coordinator, start_engines
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.runtime import open_runtime
from megatron_pbsd.environments import build_environment
from megatron_pbsd.prompts import evaluation_requests


def evaluate(config: RunConfig) -> dict[str, float]:
    """`config.evaluation` of the policy at `config.model.path`: eval/exact_match, eval/f1, eval/turns."""
    check_engines(config)
    environment = build_environment(config.environment, config.model.path)
    tasks = environment.tasks(config.evaluation.split)
    with tempfile.TemporaryDirectory(prefix="pbsd-evaluate-") as folder:
        with open_runtime(config.runtime, Path(folder), config.ray_port) as runtime:
            coordinator = start_coordinator(runtime, config, start_engines(runtime, config, Path(folder)))
            groups = runtime.result(coordinator.call(
                "collect", evaluation_requests(tasks, config), step=0, seed=config.seed,
                temperature=config.evaluation.temperature))
    return summary.of_evaluation(score(environment, groups, {task.task_id: task for task in tasks}))
