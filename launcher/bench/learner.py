"""The learner: speed, what PBSD costs beside GRPO, padding, balance, and memory of log-probabilities.

tokens_per_s        tokens read per second of a GRPO step on exactly on-policy data: one forward and one backward pass
pbsd_over_grpo      seconds of a PBSD step over those of a GRPO step on the same trajectories: median of paired steps.
                    One forward pass on top of a forward and a backward pass is 4/3; privileged prompts are longer
padding_waste       of the bench 'balance': padded batches, mean over distributions and ranks
balance_over_bound  of the bench 'balance': packed batches, makespan over its lower bound
logprob_peak_ratio  of the bench 'log_probs': memory of the chunked function over the naive one

Trajectories are the quickstart's demonstrations, as many as one of its steps trains on. The model has the quickstart's
family and tokenizer and random weights, and is `WIDE`, so that time goes to matrix products as it does in models that
people train. `overrides` change the configuration: the layout, or `--model.path` for another model's weights.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.bench import balance, log_probs
from launcher.overrides import load_config
from megatron_pbsd import credit
from megatron_pbsd.components import start_learner
from megatron_pbsd.config import RunConfig, SFTConfig
from megatron_pbsd.controller.runtime import open_runtime
from megatron_pbsd.environments import build_environment
from megatron_pbsd.environments.search_qa.demonstrations import Demonstrator
from megatron_pbsd.learner.group import LearnerGroup
from megatron_pbsd.trajectory import Group, VersionSpan, trajectories_of

CONFIG = Path("configs/quickstart.yaml")
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64}
"""26 M parameters."""
WARM_UP, PAIRS = 1, 5


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--learner.updates_per_step", "1"]
        if not any(argument.startswith("--model.path") for argument in overrides):
            wide = widened(Path(load_config(CONFIG, ()).model.path), Path(folder, "wide"))
            arguments += ["--model.path", str(wide), "--model.initial_weights", "random"]
        return measured([*arguments, *overrides], Path(folder, "logs"))


def widened(source: Path, folder: Path) -> Path:
    """A folder with the configuration of `source`, `WIDE`, and its tokenizer; without weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | WIDE))
    return folder


def measured(arguments: Sequence[str], logs: Path) -> dict[str, Any]:
    by_name = {name: load_config(CONFIG, [*arguments, "--algorithm.name", name]) for name in ("grpo", "pbsd")}
    config = by_name["grpo"]
    groups = demonstrations(config)
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    logs.mkdir()
    with open_runtime(config.runtime, logs, config.ray_port) as runtime:
        learner = start_learner(runtime, config)
        learner.ready()
        for pair in range(WARM_UP + PAIRS):
            # Neither is always the one that runs second.
            for name in sorted(by_name, reverse=bool(pair % 2)):
                taken = step_seconds(learner, by_name[name], groups)
                if pair >= WARM_UP:
                    seconds[name].append(taken)
    tokens = sum(len(t.prompt) + len(t.continuation) for t in trajectories_of(groups))
    privileged = sum(len(t.privileged_prompt) + len(t.continuation) for t in trajectories_of(groups))
    planned = balance.run()
    return {
        "tokens_per_s": round(tokens / statistics.median(seconds["grpo"])),
        "padding_waste": planned["padding_waste"],
        "balance_over_bound": planned["balance_over_bound"],
        "logprob_peak_ratio": log_probs.run()["logprob_peak_ratio"],
        "pbsd_over_grpo": round(statistics.median(
            pbsd / grpo for pbsd, grpo in zip(seconds["pbsd"], seconds["grpo"], strict=True)), 3),
        "privileged_over_plain_tokens": round(privileged / tokens, 3),
        "trained_tokens_share": round(sum(t.generated for t in trajectories_of(groups)) / tokens, 3),
        "grpo_step_s": round(statistics.median(seconds["grpo"]), 3),
        "pbsd_step_s": round(statistics.median(seconds["pbsd"]), 3),
        "layout": config.learner.parallel.model_dump(),
    }


def demonstrations(config: RunConfig) -> list[Group]:
    """Groups as a step of `config` has them, with rewards, as if weights version 0 had sampled them."""
    environment = build_environment(config.environment, config.model.path)
    split, chance = config.environment.train_split, random.Random(config.seed)
    demonstrator = Demonstrator(environment, SFTConfig(privileged_fraction=0), split, config.seed)
    tasks = {task.task_id: task for task in environment.tasks(split)}
    groups = []
    for number in range(config.rollout.prompts_per_step):
        members = []
        for sample in range(config.rollout.group_size):
            found = demonstrator.demonstration(number * config.rollout.group_size + sample)
            task = tasks[found.task_id]
            members.append(replace(
                found, trajectory_id=f"{number}/{sample}", group_id=str(number), reward=float(chance.random() < 0.5),
                privileged_prompt=environment.privileged_prompt(task, task.answers[0]),
                turns=tuple(replace(turn, versions=(VersionSpan(0, 0, len(turn.tokens)),)) for turn in found.turns)))
        groups.append(Group(str(number), tuple(members)))
    return groups


def step_seconds(learner: LearnerGroup, config: RunConfig, groups: Sequence[Group]) -> float:
    """Of the passes before an update on exactly on-policy data, and the update."""
    started = time.perf_counter()
    plan = credit.plan_for(config, groups, version=0)
    batch, _ = credit.prepare(plan, groups, learner, None)
    learner.step(batch, plan.loss)
    return time.perf_counter() - started
