"""A decoder-only transformer in the words of Hugging Face configurations, and the tensors its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for contexts longer than those a model was first trained on; fields by their usual names.

    factor:  by how much the slowest rotations are slowed down.
    """

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071, section 3.2): a pair of dimensions with frequency f, which turns r times within the
    original context, gets g f + (1 - g) f / factor, with g = 1 for r > beta_fast and 0 for r < beta_slow. Between these
    g falls evenly from one pair to the next, where the paper has (r - beta_slow) / (beta_fast - beta_slow).

    With m(s) = 0.1 s ln(factor) + 1 (section 3.4), rotated dimensions are multiplied by m(mscale) / m(mscale_all_dim),
    and attention scores, where they are scaled for it, by m(mscale_all_dim)^2.
    """

    mscale: float
    mscale_all_dim: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's: rotations that turn fewer than low_freq_factor times within the original context are slowed down,
    those that turn more than high_freq_factor times are not, and between there is a blend."""

    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the MLP of a layer with experts, and the projections of each expert."""

    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the dense MLP of some layers; fields by their usual names in config.json.

    layers:         for each decoder layer, whether it has experts.
    scores:         of the experts for a token: softmax over all of them, or the sigmoid of each logit.
    norm_topk_prob: the weights of the chosen experts are divided by their sum, before routed_scaling_factor.
    n_group:        experts are divided into so many groups; a token chooses from the topk_group groups whose two
                    best experts have the highest sum (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    score_bias:     a stored number per expert is added to the scores for the choice, not for the weights.
    shared_intermediate_size:  width of the MLP that every token passes besides; None where there is none.
    names:          in checkpoints.
    """

    layers: tuple[bool, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    scores: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    score_bias: bool = False
    shared_intermediate_size: int | None = None
    names: ExpertNames = ExpertNames()


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention in place of grouped queries (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19).

    Of a position's hidden state h, and for each head i:

        c = norm(W_DKV h)    the latent, kv_lora_rank wide     d = norm(W_DQ h)    that of queries, q_lora_rank wide
        k_i = [W_UK_i c ; RoPE(W_KR h)]                        q_i = [W_UQ_i d ; RoPE(W_QR_i d)]
        v_i = W_UV_i c       v_head_dim wide

    Keys and queries are qk_nope_head_dim dimensions without position, then qk_rope_head_dim rotated ones, which all
    heads' keys share. Scores are q_i k_i / sqrt(qk_nope_head_dim + qk_rope_head_dim), further scaled by `YarnScaling`.
    The norms stand in the text (section 3.1.2). In checkpoints W_DKV and W_KR are kv_a_proj_with_mqa, W_UK and W_UV
    kv_b_proj, W_DQ is q_a_proj, W_UQ and W_QR are q_b_proj.

    q_lora_rank:      None: d is h itself, and the projection is q_proj.
    rope_interleave:  rotation turns neighbouring dimensions; False: one of the first half with one of the second.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever rms_norm_eps is."""


@dataclass(frozen=True)
class Decoder:
    """RMSNorm, rotary positions, grouped-query attention and SiLU-gated MLPs; fields by their names in config.json.

    latent:         attention of another kind, whose rotated dimensions are then `head_dim`; each head has keys.
    rope_scaling:   None where frequencies are those of rope_theta alone; `rope.py` has the formulas.
    rotary_factor:  share of each head's dimensions that are rotated, the first ones.
    qkv_bias:       queries, keys and values have biases; no other projection has.
    qk_norm:        queries and keys are normalised per head.
    experts:        None for a dense model.
    mtp_layers:     layers after the last, for multi-token prediction, which a checkpoint may hold. They take no part
                    in the next token's probability: they are neither read nor trained nor published.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    attention_dropout: float
    tie_word_embeddings: bool
    rope_theta: float
    qk_norm: bool
    rope_scaling: RopeScaling | None = None
    latent: LatentAttention | None = None
    qkv_bias: bool = False
    rotary_factor: float = 1.0
    experts: Experts | None = None
    mtp_layers: int = 0

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]


def hf_tensors(decoder: Decoder) -> Shapes:
    """Name → shape of every tensor of a checkpoint, in the order of the model; experts have tensors of their own, as
    on disk, and a tied lm_head has none."""
    embedding = (decoder.vocab_size, decoder.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": embedding}
    for layer in range(decoder.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (decoder.hidden_size,)
        attention = _latent_attention if decoder.latent else _attention
        shapes |= attention(decoder, f"{prefix}.self_attn")
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (decoder.hidden_size,)
        if decoder.experts is not None and decoder.has_experts(layer):
            shapes |= _experts(decoder.experts, decoder.hidden_size, f"{prefix}.{decoder.experts.names.mlp}")
        else:
            shapes |= _mlp(decoder.intermediate_size, decoder.hidden_size, f"{prefix}.mlp")
    shapes["model.norm.weight"] = (decoder.hidden_size,)
    if not decoder.tie_word_embeddings:
        shapes["lm_head.weight"] = embedding
    return shapes


def ignored_tensor(decoder: Decoder, name: str) -> bool:
    """Whether a checkpoint may hold this tensor without it being a part of the model: a layer for multi-token
    prediction, the copy that some writers keep of a tied embedding, or rotary frequencies, which config.json gives."""
    if name == "lm_head.weight":
        return decoder.tie_word_embeddings
    layers = range(decoder.num_hidden_layers, decoder.num_hidden_layers + decoder.mtp_layers)
    return name.endswith(".rotary_emb.inv_freq") or name.startswith(tuple(f"model.layers.{layer}." for layer in layers))


def initial_value(name: str) -> float | None:
    """What fills a tensor of a new model: 1 for norms, 0 for biases; None means normal(0, initializer_range)."""
    if name.endswith("norm.weight"):
        return 1.0
    return 0.0 if name.endswith("bias") else None


def kept_in_float32(name: str) -> bool:
    """Whether a tensor is float32 whatever the precision of the model: biases that expert choice depends on."""
    return name.endswith(".e_score_correction_bias")


def _attention(decoder: Decoder, prefix: str) -> Shapes:
    hidden, head = decoder.hidden_size, decoder.head_dim
    queries, keys = decoder.num_attention_heads * head, decoder.num_key_value_heads * head
    shapes: Shapes = {}
    for name, length in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"{prefix}.{name}.weight"] = (length, hidden)
        if decoder.qkv_bias:
            shapes[f"{prefix}.{name}.bias"] = (length,)
    if decoder.qk_norm:
        shapes |= {f"{prefix}.q_norm.weight": (head,), f"{prefix}.k_norm.weight": (head,)}
    shapes[f"{prefix}.o_proj.weight"] = (hidden, queries)
    return shapes


def _latent_attention(decoder: Decoder, prefix: str) -> Shapes:
    latent, hidden, heads = decoder.latent, decoder.hidden_size, decoder.num_attention_heads
    assert latent is not None
    queries, rank = heads * latent.qk_head_dim, latent.q_lora_rank
    shapes: Shapes = {f"{prefix}.q_proj.weight": (queries, hidden)} if rank is None else {
        f"{prefix}.q_a_proj.weight": (rank, hidden),
        f"{prefix}.q_a_layernorm.weight": (rank,),
        f"{prefix}.q_b_proj.weight": (queries, rank),
    }
    return shapes | {
        f"{prefix}.kv_a_proj_with_mqa.weight": (latent.kv_lora_rank + latent.qk_rope_head_dim, hidden),
        f"{prefix}.kv_a_layernorm.weight": (latent.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank),
        f"{prefix}.o_proj.weight": (hidden, heads * latent.v_head_dim),
    }


def _experts(experts: Experts, hidden: int, prefix: str) -> Shapes:
    shapes: Shapes = {f"{prefix}.gate.weight": (experts.num_experts, hidden)}
    if experts.score_bias:
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (experts.num_experts,)
    for expert in range(experts.num_experts):
        shapes |= _mlp(experts.moe_intermediate_size, hidden, f"{prefix}.experts.{expert}", experts.names)
    if experts.shared_intermediate_size is not None:
        shapes |= _mlp(experts.shared_intermediate_size, hidden, f"{prefix}.shared_experts")
    return shapes


def _mlp(inner: int, hidden: int, prefix: str, names: ExpertNames = ExpertNames()) -> Shapes:
    return {
        f"{prefix}.{names.gate}.weight": (inner, hidden),
        f"{prefix}.{names.up}.weight": (inner, hidden),
        f"{prefix}.{names.down}.weight": (hidden, inner),
    }
