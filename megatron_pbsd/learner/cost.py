"""What a sequence costs the learner, as a function of its length. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

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
    def of(cls, hf: Mapping[str, Any], predicted: float = 1.0) -> Cost:
        """From a Hugging Face config: decoders with causal attention over the whole sequence, by grouped queries or
        latent, and gated MLPs, dense or with experts. KeyError naming the field that is missing.

        predicted: share of positions whose logits are computed, between 0 and 1.

        6 operations per position and active matrix weight (PaLM, arXiv 2204.02311, appendix B): 2 forward, 4 backward.
        A router's k experts and the shared ones are active; the embedding is looked up. Attention scores and their
        product with the values take 2 * heads * (key + value width) * T^2 per layer forward (Megatron-LM, arXiv
        2104.04473, appendix), half of it under a causal mask, and three times that with the backward pass.
        """
        hidden, layers, heads = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
        attention, widths = (_latent_attention if hf.get("kv_lora_rank") else _attention)(hf)
        weights = sum(attention + _mlp_weights(hf, layer) for layer in range(layers))
        return cls(linear=6.0 * (weights + predicted * hidden * hf["vocab_size"]),
                   quadratic=3.0 * layers * heads * widths)


def _attention(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Weights of a layer's projections; widths of a head's keys and of its values, added."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    head = hf.get("head_dim") or hidden // heads
    return 2 * hidden * head * (heads + (hf.get("num_key_value_heads") or heads)), 2 * head


def _latent_attention(hf: Mapping[str, Any]) -> tuple[int, int]:
    """The same of multi-head latent attention (DeepSeek's fields)."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    keys, values = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"], hf["v_head_dim"]
    rank = hf.get("q_lora_rank")
    queries = rank * (hidden + heads * keys) if rank else hidden * heads * keys
    latent = hf["kv_lora_rank"] * (hidden + heads * (hf["qk_nope_head_dim"] + values))
    return queries + latent + hidden * hf["qk_rope_head_dim"] + heads * values * hidden, keys + values


def _mlp_weights(hf: Mapping[str, Any], layer: int) -> int:
    """Weights of a layer's MLP that a token meets: gate, up and down projection, in the experts it is routed to."""
    hidden = hf["hidden_size"]
    experts = next((hf[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if hf.get(name)), 0)
    if not experts or _is_dense(hf, layer):
        return 3 * hidden * hf["intermediate_size"]
    inner = hf.get("moe_intermediate_size") or hf["intermediate_size"]
    gated_shared = hf.get("shared_expert_intermediate_size") or 0
    shared = gated_shared or inner * (hf.get("n_shared_experts") or 0)
    router = hidden * (experts + bool(gated_shared))
    return router + 3 * hidden * (inner * hf["num_experts_per_tok"] + shared)


def _is_dense(hf: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture-of-experts model has none (Qwen-MoE's and DeepSeek's fields)."""
    return (layer in (hf.get("mlp_only_layers") or ())
            or (layer + 1) % (hf.get("decoder_sparse_step") or 1) != 0
            or layer < (hf.get("first_k_dense_replace") or 0))
