"""What transformers and plain torch make of the tests' models and batches."""

from __future__ import annotations

import torch


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def next_token_log_probs(model, tokens) -> torch.Tensor:
    """[T - 1], of tokens[1:] each given those before it, with gradient; `tokens` is int64 [T], numpy."""
    tokens = torch.from_numpy(tokens)
    log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return log_probs[torch.arange(len(tokens) - 1), tokens[1:]]


def sft_loss(model, batch) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood per trained token of the whole batch, with gradient, and how many tokens that are."""
    total, count = torch.zeros(()), 0
    for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
        total = total - (next_token_log_probs(model, tokens) * torch.from_numpy(mask[1:])).sum()
        count += int(mask[1:].sum())
    return total / count, count
