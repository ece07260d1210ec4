"""What a learner rank keeps of its forward pass for the backward pass, and what the loss needs.

Korthikanti et al., arXiv 2205.05198, count a layer of a GPT: equations 1 (no parallelism), 2 (tensor parallelism), 4
(with sequence parallelism), 5 (without scores of attention), and the layer's input where all of it is recomputed. These
are what `kept` gives with `Kernels(flash=False, dropout=True)`: an MLP of 4 h units without a gate keeps as much as one
of 8 h / 3 units with one. Grouped queries, latent attention, experts and kernels that keep less or more are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_pbsd.models.decoder import Decoder, Experts, LatentAttention

Recompute = Literal["none", "selective", "full"]
FLOAT32 = 4


@dataclass(frozen=True)
class Kernels:
    """What modules are made of.

    width:    bytes of an activation.
    fused:    gates, rotations and routers are one kernel each, which keeps its input only; Megatron-core's own modules
              on a CPU keep results in between too.
    flash:    attention keeps no scores.
    dropout:  after attention and MLP, and of scores: masks of one byte, and dropped scores.
    """

    width: int = 2
    fused: bool = True
    flash: bool = True
    dropout: bool = False


@dataclass(frozen=True)
class Shares:
    """How a rank's activations are divided. sequence: sequence parallelism, over the `tp` ranks."""

    tp: int = 1
    etp: int = 1
    sequence: bool = False

    @property
    def outside(self) -> int:
        """Ranks that share what lies between tensor-parallel layers."""
        return self.tp if self.sequence else 1


@lru_cache(maxsize=4096)
def kept(
    decoder: Decoder, routed: bool, shares: Shares, kernels: Kernels, recompute: Recompute, length: int = 0
) -> Mapping[str, float]:
    """Bytes for each token position of a micro-batch that a layer keeps, by part; `routed`: a layer with experts.

    Micro-batches of a rank have positions of its own, whatever the context parallelism is. length: of a sequence, for
    attention that keeps scores. Experts get equally many tokens each.
    """
    w, h = kernels.width, decoder.hidden_size / shares.outside
    if recompute == "full":
        return {"input": w * h}
    parts = {"norms": (2 if kernels.fused else 4) * w * h}
    parts |= (_latent(decoder, decoder.latent, shares, kernels) if decoder.latent
              else _queries(decoder, shares, kernels))
    if recompute != "selective":
        scores = FLOAT32 if kernels.flash else length * (w + (1 + w) * kernels.dropout)
        parts["core attention"] = scores * decoder.num_attention_heads / shares.tp
    parts |= (_experts(decoder, decoder.experts, shares, kernels) if routed and decoder.experts
              else {"mlp": w * h + _gated(decoder.intermediate_size / shares.tp, kernels)})
    if kernels.dropout:
        parts["dropout"] = 2 * h
    return parts


def _queries(decoder: Decoder, shares: Shares, kernels: Kernels) -> dict[str, float]:
    """The projections' input; queries, keys and values as they are attended to, and before their norms; the result."""
    head = decoder.head_dim / shares.tp
    queries, keys = decoder.num_attention_heads * head, decoder.num_key_value_heads * head
    numbers = 2 * queries + 2 * keys
    if decoder.qk_norm:
        numbers += queries + keys
    if not kernels.fused:
        # Values are a part of what the projection made, all of which stays. Norms keep their normalised inputs.
        numbers += queries + keys + (queries if decoder.qk_norm else 0)
        numbers += 4 * decoder.head_dim * decoder.rotary_factor
    return {"attention": kernels.width * (decoder.hidden_size / shares.outside + numbers)}


def _latent(decoder: Decoder, latent: LatentAttention, shares: Shares, kernels: Kernels) -> dict[str, float]:
    """Latents before and after their norms; queries, keys and values of each head; the result."""
    heads = decoder.num_attention_heads / shares.tp
    ranks = latent.kv_lora_rank + (latent.q_lora_rank or 0)
    down = (2 if kernels.fused else 3) * ranks + latent.qk_rope_head_dim
    numbers = down / shares.outside + heads * 2 * (latent.qk_head_dim + latent.v_head_dim)
    if not kernels.fused:
        # Values are padded for a kernel of equal widths, and its result is copied.
        numbers += heads * (2 * latent.qk_head_dim - latent.v_head_dim) + 4 * latent.qk_rope_head_dim
    return {"attention": kernels.width * (decoder.hidden_size / shares.outside + numbers)}


def _gated(inner: float, kernels: Kernels) -> float:
    """Gate and up projection, and their product; with what the activation and the product keep."""
    return kernels.width * inner * (3 if kernels.fused else 5)


def _experts(decoder: Decoder, experts: Experts, shares: Shares, kernels: Kernels) -> dict[str, float]:
    """Router; tokens as they come to a rank's experts, and what these keep; shared experts.

    A token is sent to `num_experts_per_tok` of all ranks' experts, and every rank of a tensor-parallel expert has it.
    """
    w, chosen = kernels.width, experts.num_experts_per_tok / shares.outside
    inner = experts.moe_intermediate_size
    # Results are weighted before the down projection.
    each = w * decoder.hidden_size * shares.etp + _gated(inner, kernels) + FLOAT32 * shares.etp
    if not kernels.fused:
        each += w * inner
    parts = {
        "mlp": w * decoder.hidden_size / shares.outside,
        # Logits, scores, probabilities and their choice.
        "router": 4 * FLOAT32 * experts.num_experts / shares.outside,
        "experts": chosen * each}
    if experts.shared_intermediate_size is not None:
        parts["shared experts"] = _gated(experts.shared_intermediate_size / shares.tp, kernels)
    return parts


@lru_cache(maxsize=4096)
def working(
    decoder: Decoder, routed: bool, shares: Shares, kernels: Kernels, recompute: Recompute, length: int = 0
) -> float:
    """Bytes for each position of what exists for a while in the backward pass of a layer: gradients of the hidden
    states and of the widest part of its MLP, the inputs of a tensor-parallel layer brought together and their gradient,
    and all that a recomputed layer keeps."""
    w, whole = kernels.width, decoder.hidden_size
    found = 2 * w * whole / shares.outside + (2 * w * whole if shares.sequence else 0)
    if routed and decoder.experts:
        chosen = decoder.experts.num_experts_per_tok / shares.outside
        found += w * chosen * (2 * whole * shares.etp + 3 * decoder.experts.moe_intermediate_size)
    else:
        found += w * 3 * decoder.intermediate_size / shares.tp
    if recompute == "full":
        found += sum(kept(decoder, routed, shares, kernels, "none", length).values())
    return found


def logits(decoder: Decoder, tokens: int, rows: int, shares: Shares, kernels: Kernels) -> tuple[float, float]:
    """Bytes of the final norm and the loss of a micro-batch, `rows` positions at a time (`losses/log_probs.py`): those
    that are kept for the backward pass, and those that exist for a while in it."""
    w, h, share = kernels.width, decoder.hidden_size, decoder.vocab_size / shares.tp
    chunk = min(rows, tokens)
    normed = w * h * tokens / shares.outside * (1 if kernels.fused else 2)
    held = normed + w * h * tokens + (FLOAT32 * chunk * share if tokens <= rows else 0)
    rounded = w if w < FLOAT32 else 0
    return held, (chunk * share * (rounded + (FLOAT32 if tokens > rows else 0)) + share * h * (FLOAT32 + rounded)
                  + w * h * tokens)


def in_flight(pp: int, stage: int, vpp: int, micro_batches: int) -> int:
    """Passes of a model chunk that a rank of `stage` has made and not yet taken back: of the 1F1B schedule pp - stage,
    of the interleaved one (arXiv 2205.05198, section 4.2.3) up to pp vpp + pp - 1 passes of a vpp-th of its layers."""
    warm = pp - stage if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return min(warm, micro_batches * vpp)
