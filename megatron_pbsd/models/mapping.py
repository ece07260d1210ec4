"""The parameter map of a decoder: Megatron-core's names for the parts of one rank, and what lies in them."""

from __future__ import annotations

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.decoder import Decoder, ExpertNames, Experts, hf_tensors
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.layout import layout_problems
from megatron_pbsd.models.parameters import (
    ParameterMap,
    Piece,
    Placement,
    RankCoordinates,
    local_experts,
    paired,
    stage_layers,
)


def pieces(decoder: Decoder, parallel: ParallelConfig, at: RankCoordinates, chunk: int) -> ParameterMap:
    """Parameters and stored buffers of model chunk `chunk`, 0 … vpp - 1, of the rank at `at`, by Megatron's name.

    Names are those of a GPTModel of Megatron's own layers with one module per expert; `transformer_engine.py` has the
    names of the fused ones. ModelError when the model cannot be divided like this.
    """
    if problems := layout_problems(decoder, parallel):
        raise ModelError("; ".join(problems))
    shapes = hf_tensors(decoder)
    dense = Placement(shapes, at.tp, parallel.tp, primary=at.cp == 0 and at.dp == 0)
    expert = Placement(shapes, at.etp, parallel.etp, primary=at.expert_dp == 0)
    first = at.pp == 0 and chunk == 0
    last = at.pp == parallel.pp - 1 and chunk == parallel.vpp - 1
    local: dict[str, list[Piece]] = {}
    if first:
        local["embedding.word_embeddings.weight"] = dense.vocabulary("model.embed_tokens.weight")
    for i, layer in enumerate(stage_layers(decoder.num_hidden_layers, parallel, at.pp, chunk)):
        source, target = f"model.layers.{layer}", f"decoder.layers.{i}"
        local |= _attention(decoder, dense, source, target)
        if decoder.experts is not None and decoder.has_experts(layer):
            held = local_experts(decoder.experts.num_experts, parallel, at.ep)
            block = f"{source}.{decoder.experts.names.mlp}"
            local |= _experts(decoder.experts, held, dense, expert, block, f"{target}.mlp")
        else:
            local |= _mlp(dense, f"{source}.mlp", f"{target}.mlp")
    if last:
        local["decoder.final_layernorm.weight"] = dense.whole("model.norm.weight")
        if not decoder.tie_word_embeddings:
            local["output_layer.weight"] = dense.vocabulary("lm_head.weight")
        elif not first:
            # The last stage keeps a copy of the tied embedding for its logits.
            local["output_layer.weight"] = dense.vocabulary("model.embed_tokens.weight", primary=False)
    return local


def _attention(decoder: Decoder, place: Placement, source: str, target: str) -> ParameterMap:
    """Attention with the norms before and after it."""
    attention, inner = f"{source}.self_attn", f"{target}.self_attention"
    projections = _latent_projections if decoder.latent else _projections
    return {
        f"{target}.input_layernorm.weight": place.whole(f"{source}.input_layernorm.weight"),
        **projections(decoder, place, attention, inner),
        f"{inner}.linear_proj.weight": place.part(f"{attention}.o_proj.weight", 1),
        f"{target}.pre_mlp_layernorm.weight": place.whole(f"{source}.post_attention_layernorm.weight"),
    }


def _projections(decoder: Decoder, place: Placement, attention: str, inner: str) -> ParameterMap:
    rows = _qkv_rows(decoder, place)
    local = {}
    for kind in ("weight", "bias") if decoder.qkv_bias else ("weight",):
        local[f"{inner}.linear_qkv.{kind}"] = place.stacked(
            [(f"{attention}.{name}.{kind}", span) for name, span in rows])
    if decoder.qk_norm:
        local[f"{inner}.q_layernorm.weight"] = place.whole(f"{attention}.q_norm.weight")
        local[f"{inner}.k_layernorm.weight"] = place.whole(f"{attention}.k_norm.weight")
    return local


def _latent_projections(decoder: Decoder, place: Placement, attention: str, inner: str) -> ParameterMap:
    """Every rank has the down projections whole, and of the up projections the rows of its heads."""
    latent = decoder.latent
    assert latent is not None
    if latent.q_lora_rank is None:
        local = {f"{inner}.linear_q_proj.weight": _latent_queries(decoder, place, f"{attention}.q_proj.weight")}
    else:
        local = {
            f"{inner}.linear_q_down_proj.weight": place.whole(f"{attention}.q_a_proj.weight"),
            f"{inner}.q_layernorm.weight": place.whole(f"{attention}.q_a_layernorm.weight"),
            f"{inner}.linear_q_up_proj.weight": _latent_queries(decoder, place, f"{attention}.q_b_proj.weight"),
        }
    down = place.whole(f"{attention}.kv_a_proj_with_mqa.weight")
    return local | {
        f"{inner}.linear_kv_down_proj.weight":
            down if latent.rope_interleave else paired(down[0], latent.kv_lora_rank),
        f"{inner}.kv_layernorm.weight": place.whole(f"{attention}.kv_a_layernorm.weight"),
        f"{inner}.linear_kv_up_proj.weight": place.part(f"{attention}.kv_b_proj.weight", 0),
    }


def _latent_queries(decoder: Decoder, place: Placement, name: str) -> list[Piece]:
    """Megatron turns neighbouring dimensions of each head."""
    latent = decoder.latent
    assert latent is not None
    if latent.rope_interleave:
        return place.part(name, 0)
    size, heads = latent.qk_head_dim, place.share(decoder.num_attention_heads)
    rows = place.stacked([(name, slice(head * size, (head + 1) * size)) for head in range(heads.start, heads.stop)])
    return [piece for head in rows for piece in paired(head, latent.qk_nope_head_dim)]


def _qkv_rows(decoder: Decoder, place: Placement) -> list[tuple[str, slice]]:
    """Megatron interleaves by key-value head: the queries that share it, then its key, then its value."""
    head, heads = decoder.head_dim, decoder.num_key_value_heads
    queries = decoder.num_attention_heads // heads * head
    rows = []
    for group in range(*place.share(heads).indices(heads)):
        rows += [
            ("q_proj", slice(group * queries, (group + 1) * queries)),
            ("k_proj", slice(group * head, (group + 1) * head)),
            ("v_proj", slice(group * head, (group + 1) * head)),
        ]
    return rows


def _mlp(place: Placement, source: str, target: str, names: ExpertNames = ExpertNames()) -> ParameterMap:
    halves = [f"{source}.{half}.weight" for half in (names.gate, names.up)]
    return {
        f"{target}.linear_fc1.weight": place.stacked([(name, place.share(place.shapes[name][0])) for name in halves]),
        f"{target}.linear_fc2.weight": place.part(f"{source}.{names.down}.weight", 1),
    }


def _experts(
    experts: Experts, held: range, dense: Placement, expert: Placement, source: str, target: str
) -> ParameterMap:
    """Router, the experts `held` by this rank, and the shared one; the two outer ones are dense layers."""
    local = {f"{target}.router.weight": dense.whole(f"{source}.gate.weight")}
    if experts.score_bias:
        local[f"{target}.router.expert_bias"] = dense.whole(f"{source}.gate.e_score_correction_bias")
    for i, number in enumerate(held):
        local |= _mlp(expert, f"{source}.experts.{number}", f"{target}.experts.local_experts.{i}", experts.names)
    if experts.shared_intermediate_size is not None:
        local |= _mlp(dense, f"{source}.shared_experts", f"{target}.shared_experts")
    return local
