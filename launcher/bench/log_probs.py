"""Memory and time of log-probabilities and entropies of a long sequence, and of their gradients.

From hidden states and the output layer's weight, by

ours      losses.log_probs.token_statistics: the logits of ROWS positions at a time, computed again backwards
in_place  the same with the logits of all positions at a time, kept for the backward pass
naive     all logits, log_softmax, gather, -sum of softmax times log_softmax, with the gradients torch derives

logprob_peak_ratio  peak memory of ours over naive's, in both beyond the inputs and including their gradients
logprob_time_ratio  seconds of ours over naive's
NAME_peak_gb        that memory; logits_gb is what the float32 logits of all positions take once
NAME_s              seconds of one forward and backward pass; on a CPU of processor time, which other work on the
                    machine prolongs less
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from megatron_pbsd.errors import UsageError
from megatron_pbsd.losses.log_probs import token_statistics

POSITIONS, VOCABULARY, HIDDEN, ROWS = 4096, 32768, 512, 512
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
"""A tensor-parallel group of one, which communicates nothing."""


class Cost(NamedTuple):
    peak_bytes: int
    seconds: float


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'log_probs' reads no configuration, so {overrides[0]} means nothing to it")
    costs = {
        "ours": measured(partial(forward_backward, partial(chunked, rows=ROWS))),
        "in_place": measured(partial(forward_backward, partial(chunked, rows=POSITIONS))),
        "naive": measured(partial(forward_backward, naive)),
    }
    return {
        "positions": POSITIONS, "vocabulary": VOCABULARY, "hidden": HIDDEN, "rows": ROWS,
        "device": device().type, "threads": torch.get_num_threads(),
        "logits_gb": round(4e-9 * POSITIONS * VOCABULARY, 3),
        **{f"{name}_peak_gb": round(cost.peak_bytes / 1e9, 3) for name, cost in costs.items()},
        **{f"{name}_s": round(cost.seconds, 2) for name, cost in costs.items()},
        "logprob_peak_ratio": round(costs["ours"].peak_bytes / costs["naive"].peak_bytes, 4),
        "logprob_time_ratio": round(costs["ours"].seconds / costs["naive"].seconds, 3),
    }


def chunked(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, [N] each, as the learner computes them."""
    found = token_statistics(hidden, weight, targets, ALONE, rows=rows)
    return found.log_probs, found.entropy


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one would write it down."""
    log_probs = (hidden @ weight.T).float().log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def forward_backward(
    variant: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    positions: int = POSITIONS,
    vocabulary: int = VOCABULARY,
    size: int = HIDDEN,
) -> Callable[[], None]:
    """Inputs made and libraries warm: what is left to do is one forward and backward pass."""
    if positions > 1:
        forward_backward(variant, 1, 64, 64)()
    generator = torch.Generator().manual_seed(0)
    kind = {"device": device(), "dtype": torch.bfloat16 if device().type == "cuda" else torch.float32}
    hidden = torch.randn(positions, size, generator=generator).to(**kind).requires_grad_()
    weight = (torch.randn(vocabulary, size, generator=generator) / size ** 0.5).to(**kind).requires_grad_()
    targets = torch.randint(vocabulary, (positions,), generator=generator).to(device())
    return lambda: sum(variant(hidden, weight, targets)).sum().backward()


def measured(prepare: Callable[[], Callable[[], None]]) -> Cost:
    """Peak memory and seconds of one call of what `prepare()` returns, without those of `prepare`.

    Both run in a fresh process, for memory that earlier work has freed would hide what is used; `prepare` is pickled.
    On a CPU it is the resident set, whose maximum Linux keeps; on a GPU what torch has allocated.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, torch.get_num_threads()).result()


def _measure(prepare: Callable[[], Callable[[], None]], threads: int) -> Cost:
    torch.set_num_threads(threads)
    work = prepare()
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the maximum is forgotten
        before = _status_bytes("VmRSS")
    clock = time.perf_counter if cuda else time.process_time
    started = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - started
    return Cost((torch.cuda.max_memory_allocated() if cuda else _status_bytes("VmHWM")) - before, seconds)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
