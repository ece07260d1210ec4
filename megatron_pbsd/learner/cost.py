"""What a sequence costs the learner, as a function of its length. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_pbsd.models.decoder import Decoder

Positions = TypeVar("Positions", float, np.ndarray)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of the forward and backward pass over T positions: linear * T + quadratic * T^2.

    Recomputing all activations, or the forward pass alone, scales both terms alike, and so do tensor, pipeline and
    context parallelism: balance depends on the ratio only.
    """

    linear: float
    quadratic: float

    def __call__(self, positions: Positions) -> Positions:
        """Of sequences with so many positions each; arrays give an array."""
        return self.linear * positions + self.quadratic * positions * positions

    @classmethod
    def of(cls, decoder: Decoder, predicted: float = 1.0) -> Cost:
        """Of a decoder with causal attention over the whole sequence.

        predicted: share of positions whose logits are computed, between 0 and 1.

        6 operations per position and active matrix weight (PaLM, arXiv 2204.02311, appendix B): 2 forward, 4 backward.
        A router's k experts and the shared ones are active; the embedding is looked up. Attention scores and their
        product with the values take 2 * heads * (key + value width) * T^2 per layer forward (Megatron-LM, arXiv
        2104.04473, appendix), half of it under a causal mask, and three times that with the backward pass.
        """
        layers, heads = decoder.num_hidden_layers, decoder.num_attention_heads
        attention, widths = _attention(decoder)
        weights = sum(attention + _mlp_weights(decoder, layer) for layer in range(layers))
        return cls(linear=6.0 * (weights + predicted * decoder.hidden_size * decoder.vocab_size),
                   quadratic=3.0 * layers * heads * widths)


def _attention(decoder: Decoder) -> tuple[int, int]:
    """Weights of a layer's projections; widths of a head's keys and of its values, added."""
    hidden, heads, latent = decoder.hidden_size, decoder.num_attention_heads, decoder.latent
    if latent is None:
        return 2 * hidden * decoder.head_dim * (heads + decoder.num_key_value_heads), 2 * decoder.head_dim
    queries, rank = heads * latent.qk_head_dim, latent.q_lora_rank
    up = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    weights = hidden * queries if rank is None else rank * (hidden + queries)
    weights += hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim) + latent.kv_lora_rank * up
    return weights + heads * latent.v_head_dim * hidden, latent.qk_head_dim + latent.v_head_dim


def _mlp_weights(decoder: Decoder, layer: int) -> int:
    """Weights of a layer's MLP that a token meets: gate, up and down projection, in the experts it is routed to."""
    hidden, experts = decoder.hidden_size, decoder.experts
    if experts is None or not decoder.has_experts(layer):
        return 3 * hidden * decoder.intermediate_size
    inner = experts.num_experts_per_tok * experts.moe_intermediate_size + (experts.shared_intermediate_size or 0)
    return hidden * (experts.num_experts + 3 * inner)
