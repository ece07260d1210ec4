"""Statistics of next-token distributions from hidden states, over a vocabulary divided by tensor parallelism.

The output layer is part of these functions, so that the logits of a long sequence never exist as a whole: they are
computed for a chunk of positions at a time, and again in the backward pass, where they become their own gradient.

Precision: products of the given dtype (float32 or bfloat16) are summed to float32 logits, which are never rounded to
bfloat16. Statistics are float32. A bfloat16 backward pass rounds the gradient of the logits for its two products; the
gradient of the weight is summed over chunks in float32, and gradients are returned in the dtype of what they are of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

TILES = 16
"""Parts in which a chunk's logits are reduced: what that needs beside them is this much smaller."""


@dataclass(frozen=True)
class TokenStatistics:
    """Of N positions, in nats, float32; each with gradient.

    log_probs:            [N], of the targets.
    entropy:              [N], of the whole distribution.
    candidate_log_probs:  [N, K], of the candidates, if there were any.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    candidate_log_probs: torch.Tensor | None = None


def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    rows: int,
    vocabulary: int | None = None,
    candidates: torch.Tensor | None = None,
) -> TokenStatistics:
    """Log-probability of targets and candidates and the entropy under softmax(hidden @ weight.T).

    The gradient of `hidden` is summed over the group, as by Megatron's column-parallel output layer. Ranks of a group
    run the same collectives: two in the forward pass, one per chunk in the backward pass.

    hidden:      [N, H], the same on all ranks of the group.
    weight:      [ceil(V / tp), H], this rank's share of the output layer; the dtype of `hidden`.
    targets:     int64 [N] ids in the whole vocabulary.
    group:       the tensor-parallel group, ranks in the order of their vocabulary shares.
    rows:        positions whose logits exist at a time. Up to so many are kept for the backward pass, which computes
                 the logits again if N is larger.
    vocabulary:  V. Rows of the output layer beyond it are padding: they have no logits, and their gradient is 0. At
                 least one row of each rank is none. None: there is no padding.
    candidates:  int64 [N, K] further ids, which may repeat each other and the target.
    """
    ids = targets[:, None] if candidates is None else torch.cat([targets[:, None], candidates], -1)
    log_probs, entropy = _Statistics.apply(hidden, weight, ids, group, rows, _tokens(weight, group, vocabulary))
    return TokenStatistics(log_probs[:, 0], entropy, None if candidates is None else log_probs[:, 1:])


@torch.no_grad()
def top_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, group: dist.ProcessGroup, *, rows: int,
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 1 ≤ k ≤ V most probable tokens of each position: ids int64 [N, k] and log-probabilities float32 [N, k].

    The most probable first, the smaller id first among equals. Arguments as of `token_statistics`; one collective.
    """
    share, tokens = len(weight), _tokens(weight, group, vocabulary)
    ids = group.rank() * share + torch.arange(tokens, device=hidden.device)
    weight, found = weight[:tokens], min(k, tokens)
    # Columns: this rank's sum of exp(logit - its largest logit), and its best tokens; what it lacks of k comes last.
    last = torch.iinfo(torch.int64).min
    best = torch.full((len(hidden), 1 + min(k, share)), last, dtype=torch.int64, device=hidden.device)
    logits = _buffer(hidden, weight, rows)
    for chunk in _spans(len(hidden), rows):
        z = _matmul(hidden[chunk], weight.T, logits[:len(hidden[chunk])])
        for tile in _tiles(z):
            total = (z[tile] - z[tile].amax(-1, keepdim=True)).exp_().sum(-1)
            best[chunk][tile, 0] = _sort_key(total, 0)
            best[chunk][tile, 1 : 1 + found] = _sort_key(z[tile], ids).topk(found).values
    shares = [best]
    if group.size() > 1:
        shares = [torch.empty_like(best) for _ in range(group.size())]
        dist.all_gather(shares, best, group=group)
    values, likeliest = _from_sort_key(torch.cat([share[:, 1:] for share in shares], -1).topk(k).values)
    # Each [N, tp], and of the whole vocabulary [N, 1].
    (totals, highest), _ = _from_sort_key(torch.stack([share[:, :2].T for share in shares], -1))
    top = values[:, :1]
    total = (totals * (highest - top).exp()).sum(-1, keepdim=True)
    return likeliest, values - top - total.log()


class _Statistics(torch.autograd.Function):
    """With z = logits - max, E = exp(z), Z = sum E, p = E / Z:

    log p_c = z_c - log Z,      d log p_c / d z_i = [i = c] - p_i
    H = log Z - sum p_i z_i,    d H / d z_i = -p_i (log p_i + H) = -E_i (z_i + H - log Z) / Z
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, group, rows, tokens):
        count = len(hidden)
        columns = ids - group.rank() * len(weight)
        held = (columns >= 0) & (columns < tokens)
        columns = torch.where(held, columns, 0)
        padded, weight = weight, weight[:tokens]

        # Columns: Z, sum of E z, logit of each id; E and z relative to the maximum of this rank until ranks are joined.
        sums = hidden.new_empty(count, 2 + ids.shape[1], dtype=torch.float32)
        highest = hidden.new_empty(count, dtype=torch.float32)
        logits = _buffer(hidden, weight, rows)
        for chunk in _spans(count, rows):
            z = _matmul(hidden[chunk], weight.T, logits[:len(hidden[chunk])])
            sums[chunk, 2:] = z.gather(-1, columns[chunk]) * held[chunk]
            for tile in _tiles(z):
                top = z[tile].amax(-1)
                shifted = z[tile] - top[:, None]
                exponential = shifted.exp()
                highest[chunk][tile] = top
                sums[chunk][tile, 0] = exponential.sum(-1)
                sums[chunk][tile, 1] = torch.linalg.vecdot(exponential, shifted)
        total, weighted, chosen = _join(highest, sums, group)
        entropy = total.log() - weighted / total
        log_probs = chosen - highest[:, None] - total.log()[:, None]

        kept = logits if count <= rows else None
        ctx.save_for_backward(hidden, padded, columns, held, highest, total, entropy, kept)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.rows, ctx.tokens = group, rows, tokens
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, log_probs_grad, entropy_grad):
        hidden, padded, columns, held, highest, total, entropy, kept = ctx.saved_tensors
        weight = padded[: ctx.tokens]
        if log_probs_grad is None:
            log_probs_grad = hidden.new_zeros(held.shape, dtype=torch.float32)
        # The gradient is E (slope z + offset), plus that of the logits of the ids themselves.
        offset, slope = -log_probs_grad.sum(-1) / total, None
        if entropy_grad is not None:
            slope = -entropy_grad / total
            offset = torch.addcmul(offset, slope, entropy - total.log())

        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = hidden.new_empty(hidden.shape) if wants_hidden else None
        grad_weight = padded.new_zeros(padded.shape, dtype=torch.float32) if wants_weight else None
        logits, pending = _buffer(hidden, weight, ctx.rows) if kept is None else kept, []
        for chunk in _spans(len(hidden), ctx.rows):
            z = logits[:len(hidden[chunk])]
            if kept is None:
                _matmul(hidden[chunk], weight.T, z)
            _into_gradient(z, highest[chunk], None if slope is None else slope[chunk], offset[chunk])
            z.scatter_add_(-1, columns[chunk], log_probs_grad[chunk] * held[chunk])
            grad = z.to(weight.dtype)
            if wants_hidden:
                grad_hidden[chunk] = _matmul(grad, weight)
                if ctx.group.size() > 1:
                    # Summed while the gradient of the weight is computed.
                    pending.append(dist.all_reduce(grad_hidden[chunk], group=ctx.group, async_op=True))
            if wants_weight:
                _matmul(grad.T, hidden[chunk], grad_weight[: ctx.tokens], beta=1)
        for work in pending:
            work.wait()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _tokens(weight: torch.Tensor, group: dist.ProcessGroup, vocabulary: int | None) -> int:
    """Rows of this rank's share that stand for a token."""
    share = len(weight)
    return share if vocabulary is None else min(share, vocabulary - group.rank() * share)


def _join(
    highest: torch.Tensor, sums: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Z [N], sum of E z [N] and logits of the ids [N, C] of the whole vocabulary; `highest` becomes its maximum.

    sum E' z' with z' = z + d and E' = E exp(d), where d is the rank's maximum relative to the whole vocabulary's.
    """
    if group.size() > 1:
        local = highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        below = local - highest
        sums[:, 1] += below * sums[:, 0]
        sums[:, :2] *= below.exp()[:, None]
        dist.all_reduce(sums, group=group)
    return sums[:, 0], sums[:, 1], sums[:, 2:]


def _into_gradient(
    z: torch.Tensor, highest: torch.Tensor, slope: torch.Tensor | None, offset: torch.Tensor
) -> None:
    """z ← exp(z - highest) (slope (z - highest) + offset), where no slope is 0."""
    for tile in _tiles(z):
        part, factor = z[tile].sub_(highest[tile, None]), offset[tile, None]
        if slope is not None:
            factor = torch.addcmul(factor, slope[tile, None], part)
        part.exp_().mul_(factor)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None, beta: int = 0) -> torch.Tensor:
    """beta out + a @ b in float32, where a and b are of the same dtype."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    # Products of bfloat16 with a float32 result exist on GPUs only.
    return torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def _buffer(hidden: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Room for the logits of one chunk."""
    return hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=torch.float32)


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(first, first + step) for first in range(0, length, step))


def _tiles(z: torch.Tensor) -> Iterator[slice]:
    return _spans(len(z), -(-len(z) // TILES))


def _sort_key(values: torch.Tensor, ids: torch.Tensor | int) -> torch.Tensor:
    """int64 that sorts like the float32 values, and among equals in the opposite order of the ids, which are < 2³²."""
    bits = (values + 0.0).view(torch.int32)  # -0 + 0 = 0: the two zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - ids


def _from_sort_key(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of `_sort_key`."""
    ids = -keys & 0xFFFFFFFF
    ordered = ((keys + ids) >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), ids
