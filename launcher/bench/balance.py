"""How well a batch is divided over ranks and micro-batches, against Karmarkar-Karp and first-fit on tokens.

Lengths are drawn from three assumed distributions, 32 sequences per rank; costs are of Qwen3-30B-A3B:

chat       lognormal, median 400, sigma 0.9, between 16 and 4096: many short conversations, few long ones; 8192
           positions per micro-batch.
reasoning  groups of 8 responses to a prompt: lognormal, median 6000, sigma 0.7 between prompts and 0.5 within a group,
           since a hard problem is long for all; those cut off at 32768 pile up there; 32768 per micro-batch.
agentic    groups of 8 trajectories over a prompt of 2000 tokens: a geometric number of turns, at most 40, whose rate is
           the task's (5 to 35 %), each with a lognormal action (median 300, sigma 0.8) and observation (700, 1.0), cut
           off at 65536; 65536 per micro-batch.

Every row is a mean over seeds. `makespan` and `synchronised` (see `learner/balance.py`) are over the bound that no plan
can be below; `waste` is the share of positions that are padding; `seconds` are of the processor, for planning. The
baselines order a rank's micro-batches by tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from megatron_pbsd.errors import UsageError
from megatron_pbsd.learner.balance import MicroBatches, measure, plan
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.packed import first_fit
from megatron_pbsd.learner.padded import cut
from megatron_pbsd.learner.partition import Groups, dealt, differencing
from megatron_pbsd.models.decoder import Decoder, Experts

MODEL = Decoder(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, initializer_range=0.02,
    attention_dropout=0.0, tie_word_embeddings=False, rope_theta=1e6, qk_norm=True,
    experts=Experts(layers=(True,) * 48, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                    scores="softmax", norm_topk_prob=True))
"""Qwen3-30B-A3B."""
RANKS, SEEDS, SEQUENCES_PER_RANK, GROUP = (8, 32, 64, 256), 3, 32, 8

Lengths = Callable[[np.random.Generator, int], np.ndarray]


def chat(random: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(random.lognormal(np.log(400), 0.9, count), 16, 4096).astype(int)


def reasoning(random: np.random.Generator, count: int) -> np.ndarray:
    difficulty = np.repeat(random.normal(0, 0.7, -(-count // GROUP)), GROUP)[:count]
    return np.clip(random.lognormal(np.log(6000) + difficulty, 0.5), 256, 32768).astype(int)


def agentic(random: np.random.Generator, count: int) -> np.ndarray:
    rate = np.repeat(0.05 + 0.3 * random.beta(2, 2, -(-count // GROUP)), GROUP)[:count]
    turns = np.minimum(random.geometric(rate), 40)
    tokens = [random.lognormal(np.log(300), 0.8, n).sum() + random.lognormal(np.log(700), 1.0, n).sum() for n in turns]
    return np.minimum(2000 + np.array(tokens), 65536).astype(int)


DISTRIBUTIONS: dict[str, tuple[Lengths, int]] = {
    "chat": (chat, 8192), "reasoning": (reasoning, 32768), "agentic": (agentic, 65536)}


def karmarkar_karp(lengths: np.ndarray, ranks: int, budget: int, padded: bool) -> MicroBatches:
    """`lengths` in descending order. Tokens are divided over ranks, and over as few micro-batches as hold them."""
    groups = differencing(lengths, ranks)
    if padded:
        return _filled_up([cut(group, lengths, lengths, budget) for group in groups])
    count = max(-(-int(lengths[group].sum()) // budget) for group in groups)
    while True:
        divided = [[[group[i] for i in part] for part in differencing(lengths[group], count)] for group in groups]
        if all(lengths[part].sum() <= budget for rank in divided for part in rank):
            return [sorted(rank, key=lambda part: -lengths[part].sum()) for rank in divided]
        count += 1


def first_fit_decreasing(lengths: np.ndarray, ranks: int, budget: int, padded: bool) -> MicroBatches:
    """`lengths` in descending order. Micro-batches of the whole batch are dealt to the ranks in turn."""
    bins: Groups = cut(range(len(lengths)), lengths, lengths, budget) if padded else first_fit(lengths, budget)
    bins.sort(key=lambda part: -lengths[part].sum())
    return _filled_up([[bins[i] for i in rank] for rank in dealt(bins, ranks)])


def _filled_up(by_rank: list[Groups]) -> MicroBatches:
    count = max(map(len, by_rank))
    return [rank + [[] for _ in range(count - len(rank))] for rank in by_rank]


def compare(lengths: np.ndarray, ranks: int, budget: int, cost: Cost, padded: bool) -> dict[str, dict[str, float]]:
    """Method → what its plan amounts to."""
    methods: dict[str, Callable[[], MicroBatches]] = {
        "ours": lambda: plan(lengths, ranks, budget, cost, padded=padded).micro_batches,
        "ours_synchronised": lambda: plan(
            lengths, ranks, budget, cost, padded=padded, synchronised=True).micro_batches,
        "karmarkar_karp": lambda: karmarkar_karp(lengths, ranks, budget, padded),
        "first_fit": lambda: first_fit_decreasing(lengths, ranks, budget, padded),
    }
    results = {}
    for name, method in methods.items():
        started = time.process_time()
        micro_batches = method()
        seconds = time.process_time() - started
        made = measure(micro_batches, lengths, cost, padded=padded)
        results[name] = {
            "makespan": made.makespan / made.bound, "synchronised": made.synchronised_makespan / made.bound,
            "waste": made.padding_waste, "micro_batches": made.costs.shape[1], "seconds": seconds}
    return results


def run(overrides: Sequence[str] = (), *, ranks: Sequence[int] = RANKS, seeds: int = SEEDS) -> dict[str, Any]:
    """Rows as described above; `balance_over_bound` and `padding_waste` are their means for ours, packed and padded."""
    if overrides:
        raise UsageError(f"the bench 'balance' reads no configuration, so {overrides[0]} means nothing to it")
    cost, rows = Cost.of(MODEL), []
    for name, (lengths_of, budget) in DISTRIBUTIONS.items():
        for size in ranks:
            batches = [np.sort(lengths_of(np.random.default_rng(seed), size * SEQUENCES_PER_RANK))[::-1]
                       for seed in range(seeds)]
            for batching in ("packed", "padded"):
                results = [compare(lengths, size, budget, cost, batching == "padded") for lengths in batches]
                rows += [{"lengths": name, "batching": batching, "dp": size, "method": method,
                          **{key: round(fmean(result[method][key] for result in results), 4) for key in numbers}}
                         for method, numbers in results[0].items()]
    ours = {batching: [row for row in rows if row["method"] == "ours" and row["batching"] == batching]
            for batching in ("packed", "padded")}
    return {
        "balance_over_bound": round(fmean(row["makespan"] for row in ours["packed"]), 4),
        "balance_over_bound_padded": round(fmean(row["makespan"] for row in ours["padded"]), 4),
        "padding_waste": round(fmean(row["waste"] for row in ours["padded"]), 4),
        "planning_s": max(row["seconds"] for row in rows if row["method"].startswith("ours")),
        "rows": rows}
