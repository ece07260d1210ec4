"""Policies live: four embedded engines in processes of their own, long-tailed answers, one rollout after the other.

Each round, 192 requests in groups of 16 go through 4 engines of 8 slots: a small Qwen3 with random weights, prompts of
32 tokens. Such a model has no lengths of its own, so they are prescribed, each round others: lognormal, in the
proportions of `configs/workloads/qwen2_vl_72b.yaml` scaled down (sigma 0.8, nine tenths of the variance between groups,
a mean of 96 tokens, a limit of 512). The scheduler knows the limit alone. Everything else is what `pbsd train` does.

live_speedup_steps, live_speedup_seconds  `context_aware` over `group_pinned`, all rounds together: forward passes of
    the engine that has the most of them, and wall clock; with `_<policy>` appended, that policy over `group_pinned`.
    Where the machine has fewer cores than engines, these wait for each other: an uneven load then costs no time as long
    as no core is idle
live_speedup_seconds_paced  the same when every step of an engine takes at least 20 ms, most of which it waits, so that
    engines are as independent as on devices of their own; the first rounds only
live_<policy>  means over rounds: steps, seconds, tail_s (on the last tenth of the requests alone), idle (share of the
    engines' time), moves, moved_tokens (of KV, between engines), recomputed_tokens
live_bound_steps  the mean of what no schedule beats: the longest request, or all tokens with all slots full
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import Handle, Runtime, open_runtime
from megatron_pbsd.environments.protocol import Reply, Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import CollectStatistics, Coordinator, RolloutRequest
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult
from megatron_pbsd.simulation.workload import RequestFacts, jobs
from megatron_pbsd.trajectory import Turn

ENGINES, SLOTS, VOCABULARY = 4, 8, 2048
FACTS = RequestFacts(groups=12, group_size=16, prompt=32, mean=96, limit=512, sigma=0.8, correlation=0.9)
BASELINE = "group_pinned"
POLICIES = (BASELINE, "least_loaded", "divided", "context_aware", "longest_remaining")
PACED = (BASELINE, "context_aware", "longest_remaining")
ROUNDS, PACED_ROUNDS, PACE_S = 3, 2, 0.02
POOL_BYTES = 64 * 2**20


class PrescribedEngine(EmbeddedEngine):
    """Ends every trajectory at the length that is prescribed for it.

    lengths: request id → generated tokens. step_s: what a step takes at least.
    """

    def __init__(self, *, lengths: Mapping[str, int], step_s: float, **arguments: Any):
        super().__init__(**arguments)
        self._step_s = step_s
        self._ends = {request_id: FACTS.prompt + length for request_id, length in lengths.items()}
        self._last: set[str] = set()

    def submit(self, chunks: Sequence[Chunk]) -> None:
        cut = []
        for chunk in chunks:
            left = self._ends[chunk.request_id] - len(chunk.tokens)
            (self._last.add if left <= chunk.max_new_tokens else self._last.discard)(chunk.request_id)
            cut.append(replace(chunk, max_new_tokens=min(left, chunk.max_new_tokens)))
        super().submit(cut)

    def _step(self) -> None:
        end = time.perf_counter() + self._step_s
        super()._step()
        time.sleep(max(0.0, end - time.perf_counter()))

    def collect(self) -> list[ChunkResult]:
        return [replace(result, finish_reason="stop")
                if result.request_id in self._last and result.finish_reason == "length" else result
                for result in super().collect()]


@dataclass(frozen=True)
class OneTurn:
    """An environment in which whatever is said first is the answer."""

    stop_token_ids: tuple[int, ...] = ()

    def prompt(self, task: Task) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(int(task.task_id))
        return tuple(torch.randint(VOCABULARY, (FACTS.prompt,), generator=generator).tolist())

    def privileged_prompt(self, task: Task, answer: str) -> tuple[int, ...]:
        return self.prompt(task)

    def reply(self, task: Task, turns: Sequence[Turn], tokens: Sequence[int]) -> Reply:
        return Reply("answer", (), True)


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'live_rollout' reads no configuration, so {overrides[0]} means nothing to it")
    # Step 0 warms up.
    rounds = [{f"{step}/{job.request_id}": job.tokens for job in jobs(FACTS, seed=step)} for step in range(ROUNDS + 1)]
    return summary(measure(POLICIES, 0.0, rounds), measure(PACED, PACE_S, rounds[: PACED_ROUNDS + 1]), rounds[1:])


def measure(policies: Sequence[str], step_s: float,
            rounds: Sequence[Mapping[str, int]]) -> dict[str, list[CollectStatistics]]:
    lengths = {request_id: tokens for drawn in rounds for request_id, tokens in drawn.items()}
    asked = [RolloutRequest(str(g), Task(str(g), "", ("",), 1), FACTS.group_size, "") for g in range(FACTS.groups)]
    measured: dict[str, list[CollectStatistics]] = {policy: [] for policy in policies}
    with (tempfile.TemporaryDirectory() as folder, SharedFolder() as pool,
          open_runtime("ray", Path(folder) / "logs") as runtime):
        save_model(folder)
        place = PoolPlace(pool.path, POOL_BYTES, shared=True)
        engines = start_engines(runtime, folder, lengths=lengths, step_s=step_s, kv_pool=place)
        for step in range(len(rounds)):
            for policy in policies if step else policies[:1]:
                coordinator = Coordinator(engines, OneTurn(), config(policy), runtime.client)
                coordinator.collect(asked, step=step, seed=0, temperature=1.0)
                if step:
                    measured[policy].append(coordinator.statistics())
    return measured


def save_model(folder: str) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)).save_pretrained(folder)


def config(policy: str) -> RolloutConfig:
    return RolloutConfig(policy=policy, slots=SLOTS, max_turns=1, max_turn_tokens=FACTS.limit,
                         max_context=FACTS.prompt + FACTS.limit)


def start_engines(runtime: Runtime, folder: str, **arguments: Any) -> list[Handle]:
    handles = [
        runtime.spawn(f"engine-{i}", EngineHost, PrescribedEngine, name=f"engine-{i}", model_path=folder, slots=SLOTS,
                      max_context=FACTS.prompt + FACTS.limit, **arguments)
        for i in range(ENGINES)]
    for handle in handles:
        runtime.result(handle.ready())
    return handles


Measured = Mapping[str, Sequence[CollectStatistics]]


def summary(measured: Measured, paced: Measured, rounds: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    def mean(policy: str, counter: str, of: Measured = measured) -> float:
        return fmean(getattr(statistics, counter) for statistics in of[policy])

    numbers: dict[str, Any] = {}
    for policy in ("context_aware", *(p for p in POLICIES if p not in (BASELINE, "context_aware"))):
        suffix = "" if policy == "context_aware" else f"_{policy}"
        numbers[f"live_speedup_steps{suffix}"] = mean(BASELINE, "engine_steps") / mean(policy, "engine_steps")
        numbers[f"live_speedup_seconds{suffix}"] = mean(BASELINE, "wall_seconds") / mean(policy, "wall_seconds")
        if policy in paced:
            numbers[f"live_speedup_seconds_paced{suffix}"] = (
                mean(BASELINE, "wall_seconds", paced) / mean(policy, "wall_seconds", paced))
    for policy, runs in measured.items():
        numbers[f"live_{policy}"] = {
            "steps": mean(policy, "engine_steps"), "seconds": mean(policy, "wall_seconds"),
            "tail_s": mean(policy, "tail_seconds"), "idle": mean(policy, "engine_idle_share"),
            "moves": mean(policy, "moves"), "moved_tokens": fmean(run.kv.moved_in_tokens for run in runs),
            "recomputed_tokens": mean(policy, "recomputed_tokens")}
    bounds = [max(*lengths.values(), sum(lengths.values()) / (ENGINES * SLOTS)) for lengths in rounds]
    return numbers | {"live_bound_steps": fmean(bounds)}
