"""Random inputs for losses, and the ways in which a learner divides them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from megatron_pbsd.config import (
    CustomLossConfig,
    GeometricRejectionConfig,
    IcePopConfig,
    JSDLossConfig,
    NoMismatchConfig,
    PBSDConfig,
    PolicyLossConfig,
    ReverseKLLossConfig,
    SequenceMISConfig,
    SequenceTISConfig,
    SFTLossConfig,
    TokenTISConfig,
    ValueLossConfig,
)
from megatron_pbsd.losses import LossInputs, LossOutput

CANDIDATES, VOCABULARY = 4, 11
EXAMPLE = "docs/examples/early_turns_loss.py"

POLICIES = {
    "defaults": PolicyLossConfig(),
    "ppo": PolicyLossConfig(clip_high=0.2, mismatch=NoMismatchConfig(), value=ValueLossConfig(clip=0.1)),
    "value_unclipped": PolicyLossConfig(value=ValueLossConfig(clip=None, coefficient=2)),
    "dapo": PolicyLossConfig(clip_low=0.1, clip_high=0.05, entropy_coefficient=0.1, mismatch=TokenTISConfig(cap=1.1)),
    "dual_clip": PolicyLossConfig(dual_clip=1.3),
    "gspo": PolicyLossConfig(ratio="sequence", mismatch=SequenceTISConfig(cap=1.2)),
    "gspo_wide": PolicyLossConfig(ratio="sequence", clip_low=0.4, clip_high=0.4),
    "gspo_token": PolicyLossConfig(ratio="sequence_token", mismatch=SequenceMISConfig(low=0.8, high=2)),
    "cispo": PolicyLossConfig(objective="cispo", clip_low=0.3, clip_high=0.2, mismatch=IcePopConfig(low=0.8, high=1.2)),
    "cispo_sequence": PolicyLossConfig(objective="cispo", ratio="sequence"),
    "reinforce": PolicyLossConfig(objective="reinforce", mismatch=GeometricRejectionConfig(low=0.97, high=1.03)),
    "kl_k1": PolicyLossConfig(kl_coefficient=0.4, kl_estimator="k1"),
    "kl_k2": PolicyLossConfig(kl_coefficient=0.4, kl_estimator="k2"),
    "kl_k3_reference": PolicyLossConfig(kl_coefficient=0.4, kl_reference="reference"),
}
LOSSES = POLICIES | {
    "sft": SFTLossConfig(),
    "reverse_kl": ReverseKLLossConfig(),
    "jsd": JSDLossConfig(),
    "jsd_forward": JSDLossConfig(beta=0),
    "jsd_reverse": JSDLossConfig(beta=1),
    "custom": CustomLossConfig(file=EXAMPLE, options={"discount": 0.9}),
    "pbsd": PBSDConfig(snr_gate=0.2),
    "pbsd_sums": PBSDConfig(snr_gate=0, normalise_length=False, exclude_answer_span=False, temperature=3),
}


def make_inputs(seed: int = 0, lengths: Sequence[int] = (5, 1, 12, 7),
                dtype: torch.dtype = torch.float64) -> LossInputs:
    """Every field and output that a loss may ask for. Tokens of the sequences are shuffled together."""
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=dtype)

    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    sequence = sequence[torch.randperm(n, generator=random)]
    turn_index = torch.zeros(n, dtype=torch.int64)
    for i, length in enumerate(lengths):
        turn_index[sequence == i] = torch.sort(torch.randint(0, 4, (length,), generator=random)).values
    old = -3 + 0.5 * normal(n)
    outcome = normal(len(lengths))
    return LossInputs(
        log_probs=(old + 0.3 * normal(n)).requires_grad_(),
        entropy=normal(n).abs().requires_grad_(),
        weights=torch.rand(n, generator=random, dtype=dtype) + 0.1,
        sequence=sequence, sequences=len(lengths),
        fields={
            "advantages": outcome[sequence],
            "old_log_probs": old,
            "rollout_log_probs": old + 0.2 * normal(n),
            "reference_log_probs": old + 0.3 * normal(n),
            "teacher_log_probs": old + 0.5 * normal(n),
            "teacher_top_tokens": torch.randint(0, VOCABULARY, (n, CANDIDATES), generator=random),
            "teacher_top_log_probs": normal(n, VOCABULARY).log_softmax(-1)[:, :CANDIDATES],
            "turn_index": turn_index,
            "answer_mask": (torch.rand(n, generator=random) < 0.2).to(dtype),
            "values": normal(n),
            "returns": normal(n),
            "group": sequence // 2,
        },
        values=normal(n).requires_grad_(),
        candidate_log_probs=normal(n, VOCABULARY).log_softmax(-1)[:, :CANDIDATES].requires_grad_())


def leaves(inputs: LossInputs) -> list[torch.Tensor]:
    """What a loss may have a gradient with respect to."""
    return [inputs.log_probs, inputs.entropy, inputs.values, inputs.candidate_log_probs]


def gradients(loss: torch.Tensor, inputs: LossInputs) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves(inputs), allow_unused=True, materialize_grads=True))


def of_tokens(inputs: LossInputs, kept: torch.Tensor) -> LossInputs:
    """The tokens where bool [N] `kept` is; as many sequences as before."""
    return replace(
        inputs, log_probs=inputs.log_probs[kept], entropy=inputs.entropy[kept], weights=inputs.weights[kept],
        sequence=inputs.sequence[kept], fields={name: value[kept] for name, value in inputs.fields.items()},
        values=inputs.values[kept], candidate_log_probs=inputs.candidate_log_probs[kept])


def of_sequences(inputs: LossInputs, chosen: Sequence[int]) -> LossInputs:
    """A micro-batch of these sequences."""
    kept = torch.isin(inputs.sequence, torch.tensor(chosen, dtype=torch.int64))
    part = of_tokens(inputs, kept)
    number = torch.zeros(inputs.sequences, dtype=torch.int64)
    number[list(chosen)] = torch.arange(len(chosen))
    return replace(part, sequence=number[part.sequence], sequences=len(chosen))


def over_context(function: Callable[[LossInputs], LossOutput], inputs: LossInputs, owner: torch.Tensor,
                 ranks: int) -> list[LossOutput]:
    """What each of `ranks` context-parallel ranks computes from the tokens it owns, int64 [N].

    Ranks are threads that meet in `over_context`. They build one autograd graph, so the gradient of the sum of their
    losses is what ranks get that sum gradients in the backward pass.
    """
    barrier = threading.Barrier(ranks, timeout=60)
    shares: list[torch.Tensor | None] = [None] * ranks

    def run(rank: int) -> LossOutput:
        def summed(tensor: torch.Tensor) -> torch.Tensor:
            shares[rank] = tensor
            barrier.wait()
            assert len({share.shape for share in shares}) == 1, "ranks must exchange equal shapes"
            total = torch.stack(shares).sum(0)
            barrier.wait()
            return total

        try:
            return function(replace(of_tokens(inputs, owner == rank), over_context=summed))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
