"""Over-sampling live: what ending a step early saves, what it wastes, and which lengths it favours.

Per step 12 groups of 4 are trained on, over 4 embedded engines of 8 slots in processes of their own. Lengths are
prescribed and long-tailed as in `live_rollout`, half as long: lognormal, sigma 0.8, a mean of 48 tokens, a limit of
256. A step of an engine takes at least 20 ms, most of which it waits, as if it had a device of its own. Between two
steps weights are published (the same ones: what they cost is that all KV is computed anew). Training itself takes no
time here. One step to warm up, then STEPS, of all modes in turn, so that what else the machine does concerns all alike.

    synchronous   every step waits for its 12 groups
    drop          18 groups in flight, the first 12 are trained on, the others dropped
    carry_<k>     18 groups in flight, the others go on in the next step; max_staleness k

partial_<mode>  over all steps:
    tokens_per_s          trained on, per second of rollout; relative: over `synchronous`
    tokens_per_step, tokens_per_step_relative  the same per forward pass of the engine that had most of them
    idle                  share of the engines' time
    wasted                tokens of dropped groups, as a share of all that were generated
    bias                  mean length of what was trained on over the true mean length of what was asked for, which the
                          prescription has, also of what was dropped or is unfinished; all steps together
    bias_new, bias_carried  the same of trajectories that were trained on in the step that asked, and in later ones
    estimated_low, estimated_high  the same as the run estimates it (`length_bias/low`, `/high`), mean over steps
    asked_estimate        estimated mean length of what was asked for over the true one, mean over steps
    staleness_mean, staleness_max, stale_tokens   as in metrics.jsonl, over steps
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file

from launcher.bench.live_rollout import FACTS, SLOTS, OneTurn, save_model, start_engines
from megatron_pbsd import staleness
from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import open_runtime
from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.prompts import Stream
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.rollout.coordinator import CollectStatistics, Coordinator, RolloutRequest
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.simulation.workload import jobs
from megatron_pbsd.trajectory import trajectories_of

GROUPS, GROUP_SIZE, STEPS, STEP_S = 12, 4, 6, 0.02
LENGTHS = FACTS.model_copy(update={"groups": 3 * GROUPS, "group_size": GROUP_SIZE, "mean": 48, "limit": 256})
MODES = {"synchronous": (1.0, 0), "drop": (1.5, 0), "carry_1": (1.5, 1), "carry_3": (1.5, 3)}
"""Name → rollout.over_sampling, rollout.max_staleness."""


@dataclass
class Mode:
    """A run of its own, on engines that all share. trained, new, asked: true lengths, step by step; new: of what the
    step asked itself."""

    config: RolloutConfig
    coordinator: Coordinator
    lengths: Mapping[str, int]
    stream: Stream = field(default_factory=Stream)
    statistics: list[CollectStatistics] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    new: list[list[int]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)

    def step(self, step: int) -> None:
        config, stream = self.config, self.stream
        taken = {group.group_id for group in stream.carried}
        free = [str(number) for number in range(LENGTHS.groups) if str(number) not in taken]
        asked = [RolloutRequest(name, Task(name, "", ("",), 1), GROUP_SIZE, "")
                 for name in free[: config.prompts_in_flight - len(taken)]]
        groups = self.coordinator.collect(asked, step=step, seed=0, temperature=1.0, carried=stream.carried,
                                          wanted=GROUPS if config.over_sampling > 1 else None)
        left = self.coordinator.left()
        staleness.check(groups, step - 1, config.max_staleness)
        if not step:
            # What warmed up is dropped: the first step that is measured begins with nothing in flight.
            return
        names = [t.trajectory_id for t in trajectories_of(groups)]
        self.trained.append([self.lengths[name] for name in names])
        self.new.append([self.lengths[name] for name in names if name.startswith(f"{step}/")])
        self.asked.append([self.lengths[f"{step}/{r.group_id}/{i}"] for r in asked for i in range(GROUP_SIZE)])
        self.statistics.append(self.coordinator.statistics())
        self.metrics.append(staleness.metrics(config, stream, len(asked), groups, left, step - 1))
        self.stream = Stream(0, tuple(left) if config.max_staleness else ())


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'partial' reads no configuration, so {overrides[0]} means nothing to it")
    lengths = {f"{step}/{job.request_id}": job.tokens for step in range(STEPS + 1) for job in jobs(LENGTHS, seed=step)}
    with (tempfile.TemporaryDirectory() as folder, SharedFolder() as pool,
          open_runtime("ray", Path(folder) / "logs") as runtime):
        save_model(folder)
        engines = start_engines(runtime, folder, lengths=lengths, step_s=STEP_S,
                                kv_pool=PoolPlace(pool.path, 0, shared=False))
        modes = {name: Mode(config(*mode), Coordinator(engines, OneTurn(), config(*mode), runtime.client), lengths)
                 for name, mode in MODES.items()}
        with published(folder) as manifest:
            for step in range(STEPS + 1):
                for mode in modes.values():
                    for future in [engine.call("update_weights", manifest, step - 1) for engine in engines]:
                        runtime.result(future)
                    mode.step(step)
    return summary(modes)


@contextmanager
def published(folder: str) -> Iterator[WeightsManifest]:
    """The weights of the model in `folder`, in shared memory."""
    tensors = load_file(Path(folder) / "model.safetensors")
    described = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    segment = Segment(layout("", described).nbytes)
    manifest = layout(segment.name, described)
    for name, tensor in attach(manifest).items():
        tensor.copy_(tensors[name])
    yield manifest
    segment.close()


def config(over_sampling: float, max_staleness: int) -> RolloutConfig:
    return RolloutConfig(
        slots=SLOTS, prompts_per_step=GROUPS, group_size=GROUP_SIZE, max_turns=1, max_turn_tokens=LENGTHS.limit,
        max_context=LENGTHS.prompt + LENGTHS.limit, over_sampling=over_sampling, max_staleness=max_staleness)


def summary(modes: Mapping[str, Mode]) -> dict[str, Any]:
    found = {name: numbers(mode) for name, mode in modes.items()}
    baseline = found["synchronous"]
    return {f"partial_{name}": values | {
        "relative": values["tokens_per_s"] / baseline["tokens_per_s"],
        "tokens_per_step_relative": values["tokens_per_step"] / baseline["tokens_per_step"]}
        for name, values in found.items()}


def numbers(of: Mode) -> dict[str, float]:
    def mean(key: str) -> float:
        return fmean(metrics[key] for metrics in of.metrics)

    trained, new, asked = ([length for step in steps for length in step] for steps in (of.trained, of.new, of.asked))
    seconds, carried = sum(s.wall_seconds for s in of.statistics), len(trained) - len(new)
    return {
        "tokens_per_s": sum(trained) / seconds,
        "tokens_per_step": sum(trained) / sum(s.engine_steps for s in of.statistics),
        "idle": sum(s.engine_idle_share * s.wall_seconds for s in of.statistics) / seconds,
        "wasted": sum(m["partial/wasted_tokens"] for m in of.metrics) / sum(s.generated_tokens for s in of.statistics),
        "bias": fmean(trained) / fmean(asked),
        "bias_new": fmean(new) / fmean(asked),
        **({"bias_carried": (sum(trained) - sum(new)) / carried / fmean(asked)} if carried else {}),
        "estimated_low": mean("length_bias/low"), "estimated_high": mean("length_bias/high"),
        "asked_estimate": fmean(metrics["length_bias/asked_mean"] / fmean(lengths)
                                for metrics, lengths in zip(of.metrics, of.asked, strict=True)),
        "staleness_mean": mean("staleness/mean"), "staleness_max": max(m["staleness/max"] for m in of.metrics),
        "stale_tokens": mean("staleness/stale_tokens"),
    }
