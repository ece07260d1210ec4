"""Log-probability and entropy of tokens from logits whose vocabulary is divided over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

ROWS = 256
"""Tokens whose logits are reduced together: what the entropy needs beside them stays in the cache."""


class _VocabParallelLogProbs(torch.autograd.Function):
    """With z = logits - max, E = exp(z), Z = sum E, p = E / Z:

    log p_y = z_y - log Z,      d log p_y / d z_i = [i = y] - p_i
    H = log Z - sum p_i z_i,    d H / d z_i = -p_i (log p_i + H)

    E replaces the logits in memory, and in the backward pass the gradient replaces E.
    """

    @staticmethod
    def forward(ctx, logits, targets, group):
        highest = logits.amax(-1)
        _all_reduce(highest, dist.ReduceOp.MAX, group)
        column = targets - group.rank() * logits.shape[-1]
        held = (column >= 0) & (column < logits.shape[-1])
        column = torch.where(held, column, 0)[:, None]

        # Columns: z of the target, Z, sum of E z; one all-reduce for the three.
        sums = logits.new_empty(len(logits), 3)
        for first in range(0, len(logits), ROWS):
            span = slice(first, first + ROWS)
            z = logits[span].sub_(highest[span, None])
            sums[span, 0] = z.gather(-1, column[span])[:, 0] * held[span]
            shifted = z.clone()
            exponential = z.exp_()
            sums[span, 1] = exponential.sum(-1)
            sums[span, 2] = torch.linalg.vecdot(exponential, shifted)
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        target, total, weighted = sums.unbind(-1)
        entropy = total.log() - weighted / total
        ctx.save_for_backward(logits, column, held, total, entropy)
        ctx.set_materialize_grads(False)
        return target - total.log(), entropy

    @staticmethod
    def backward(ctx, log_prob_grad, entropy_grad):
        exponential, column, held, total, entropy = ctx.saved_tensors
        scale = torch.zeros_like(total) if log_prob_grad is None else -log_prob_grad
        if entropy_grad is None:
            grad = exponential.mul_((scale / total)[:, None])
        else:
            probability = exponential.div_(total[:, None])
            information = torch.xlogy(probability, probability)
            grad = probability.mul_((scale - entropy_grad * entropy)[:, None])
            grad.sub_(information.mul_(entropy_grad[:, None]))
        if log_prob_grad is not None:
            grad.scatter_add_(-1, column, (log_prob_grad * held)[:, None])
        return grad, None, None


def _all_reduce(values: torch.Tensor, op: dist.ReduceOp, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)


def log_probs_and_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, in nats, float32 [N]; differentiable.

    logits:   [N, V / tp], this rank's share of the vocabulary; float32 logits are overwritten.
    targets:  [N] int64 ids in the whole vocabulary.
    group:    the tensor-parallel group, ranks in the order of their vocabulary shares.
    """
    return _VocabParallelLogProbs.apply(logits.float(), targets, group)
