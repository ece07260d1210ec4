"""Over-sampling live: what ending a step early saves, what it wastes, and which lengths it favours.

Per step 12 groups of 4 are trained on, over 4 embedded engines of 8 slots in processes of their own. Lengths are
prescribed and long-tailed as in `live_rollout`, half as long: lognormal, sigma 0.8, a mean of 48 tokens, a limit of
256. A step of an engine takes at least 20 ms, most of which it waits, as if it had a device of its own. Between two
steps weights are published (the same ones: what they cost is that all KV is computed anew). Training itself takes no
time here. One step to warm up, then STEPS.

    synchronous   every step waits for its 12 groups
    drop          18 groups in flight, the first 12 are trained on, the others dropped
    carry_<k>     18 groups in flight, the others go on in the next step; max_staleness k

partial_<mode>  over all steps:
    tokens_per_s          trained on, per second of rollout; relative: over `synchronous`
    tokens_per_step, tokens_per_step_relative  the same per forward pass of the engine that had most of them
    idle                  share of the engines' time
    wasted                tokens of dropped groups, as a share of all that were generated
    bias, first_bias      mean length of what was trained on over the true mean length of what was asked for, which the
                          prescription has, also of what was dropped or is unfinished; in all steps, and in the first
    estimated_low, estimated_high  the same as the run estimates it (`length_bias/low`, `/high`), mean over steps
    asked_estimate        estimated mean length of what was asked for over the true one, mean over steps
    staleness_mean, staleness_max, stale_tokens   as in metrics.jsonl, over steps
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file

from launcher.bench.live_rollout import FACTS, SLOTS, OneTurn, save_model, start_engines
from megatron_pbsd import staleness
from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import Handle, Runtime, open_runtime
from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.prompts import Stream
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_memory import Segment, SharedFolder, attach
from megatron_pbsd.rollout.coordinator import CollectStatistics, Coordinator, RolloutRequest
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.simulation.workload import jobs
from megatron_pbsd.trajectory import trajectories_of

GROUPS, GROUP_SIZE, STEPS, STEP_S = 12, 4, 6, 0.02
LENGTHS = FACTS.model_copy(update={"groups": 3 * GROUPS, "group_size": GROUP_SIZE, "mean": 48, "limit": 256})
MODES = {"synchronous": (1.0, 0), "drop": (1.5, 0), "carry_1": (1.5, 1), "carry_3": (1.5, 3)}
"""Name → rollout.over_sampling, rollout.max_staleness."""


@dataclass
class Measured:
    """Of one mode, step by step. trained, asked: true lengths."""

    statistics: list[CollectStatistics] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'partial' reads no configuration, so {overrides[0]} means nothing to it")
    lengths = {f"{step}/{job.request_id}": job.tokens for step in range(STEPS + 1) for job in jobs(LENGTHS, seed=step)}
    with (tempfile.TemporaryDirectory() as folder, SharedFolder() as pool,
          open_runtime("ray", Path(folder) / "logs") as runtime):
        save_model(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        described = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
        segment = Segment(layout("", described).nbytes)
        manifest = layout(segment.name, described)
        for name, tensor in attach(manifest).items():
            tensor.copy_(tensors[name])
        engines = start_engines(runtime, folder, lengths=lengths, step_s=STEP_S,
                                kv_pool=PoolPlace(pool.path, 0, shared=False))
        measured = {name: measure(runtime, engines, manifest, lengths, *mode) for name, mode in MODES.items()}
        segment.close()
    return summary(measured)


def measure(runtime: Runtime, engines: Sequence[Handle], manifest: WeightsManifest, lengths: dict[str, int],
            over_sampling: float, max_staleness: int) -> Measured:
    config = RolloutConfig(
        slots=SLOTS, prompts_per_step=GROUPS, group_size=GROUP_SIZE, max_turns=1, max_turn_tokens=LENGTHS.limit,
        max_context=LENGTHS.prompt + LENGTHS.limit, over_sampling=over_sampling, max_staleness=max_staleness)
    coordinator = Coordinator(engines, OneTurn(), config, runtime.client)
    stream, measured = Stream(), Measured()
    for step in range(STEPS + 1):
        for future in [engine.call("update_weights", manifest, step - 1) for engine in engines]:
            runtime.result(future)
        taken = {group.group_id for group in stream.carried}
        free = [str(number) for number in range(LENGTHS.groups) if str(number) not in taken]
        asked = [RolloutRequest(name, Task(name, "", ("",), 1), GROUP_SIZE, "")
                 for name in free[: config.prompts_in_flight - len(taken)]]
        groups = coordinator.collect(asked, step=step, seed=0, temperature=1.0, carried=stream.carried,
                                     wanted=GROUPS if over_sampling > 1 else None)
        left = coordinator.left()
        staleness.check(groups, step - 1, max_staleness)
        if step:
            measured.statistics.append(coordinator.statistics())
            measured.trained.append([lengths[t.trajectory_id] for t in trajectories_of(groups)])
            measured.metrics.append(staleness.metrics(config, stream, len(asked), groups, left, step - 1))
            measured.asked.append([lengths[f"{step}/{r.group_id}/{i}"] for r in asked for i in range(GROUP_SIZE)])
        # What warmed up is dropped: the first step that is measured begins with nothing in flight.
        stream = Stream(0, tuple(left) if max_staleness and step else ())
    return measured


def summary(measured: dict[str, Measured]) -> dict[str, Any]:
    found = {name: numbers(of) for name, of in measured.items()}
    baseline = found["synchronous"]
    return {f"partial_{name}": values | {
        "relative": values["tokens_per_s"] / baseline["tokens_per_s"],
        "tokens_per_step_relative": values["tokens_per_step"] / baseline["tokens_per_step"]}
        for name, values in found.items()}


def numbers(of: Measured) -> dict[str, float]:
    def mean(key: str) -> float:
        return fmean(metrics[key] for metrics in of.metrics)

    trained, asked = sum(map(sum, of.trained)), [length for step in of.asked for length in step]
    seconds = sum(s.wall_seconds for s in of.statistics)
    lengths = [length for step in of.trained for length in step]
    return {
        "tokens_per_s": trained / seconds,
        "tokens_per_step": trained / sum(s.engine_steps for s in of.statistics),
        "idle": sum(s.engine_idle_share * s.wall_seconds for s in of.statistics) / seconds,
        "wasted": sum(m["partial/wasted_tokens"] for m in of.metrics) / sum(s.generated_tokens for s in of.statistics),
        "bias": fmean(lengths) / fmean(asked),
        "first_bias": fmean(of.trained[0]) / fmean(of.asked[0]),
        "estimated_low": mean("length_bias/low"), "estimated_high": mean("length_bias/high"),
        "asked_estimate": fmean(m["length_bias/asked_mean"] / fmean(a)
                                for m, a in zip(of.metrics, of.asked, strict=True)),
        "staleness_mean": mean("staleness/mean"), "staleness_max": max(m["staleness/max"] for m in of.metrics),
        "stale_tokens": mean("staleness/stale_tokens"),
    }
