"""A decoder in the words of Megatron-core 0.16.1: TransformerConfig fields and GPTModel arguments."""

from __future__ import annotations

from typing import Any

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.decoder import (
    Decoder,
    Experts,
    LatentAttention,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from megatron_pbsd.models.parameters import padded_vocabulary, stage_layers


def problems(decoder: Decoder) -> list[str]:
    """One sentence for each thing in which Megatron-core would compute something else; empty when there is none."""
    found = []
    if decoder.num_attention_heads % decoder.num_key_value_heads:
        found.append(f"num_attention_heads = {decoder.num_attention_heads} is not a multiple of "
                     f"num_key_value_heads = {decoder.num_key_value_heads}")
    rotated = int(decoder.head_dim * decoder.rotary_factor)
    if not rotated or rotated % 2:
        found.append(f"rotary embeddings turn pairs of dimensions, but head_dim = {decoder.head_dim} * "
                     f"partial_rotary_factor = {decoder.rotary_factor} gives {rotated} of them")
    scaling = decoder.rope_scaling
    if isinstance(scaling, Llama3Scaling) and not scaling.low_freq_factor < scaling.high_freq_factor:
        found.append(f"low_freq_factor = {scaling.low_freq_factor} of llama3's rotary embeddings is not below "
                     f"high_freq_factor = {scaling.high_freq_factor}")
    return found + (_routing_problems(decoder.experts) if decoder.experts else [])


def _routing_problems(experts: Experts) -> list[str]:
    found = []
    chosen, normalised = experts.num_experts_per_tok, experts.norm_topk_prob
    if not any(experts.layers):
        found.append("no layer has experts, by first_k_dense_replace, mlp_only_layers or decoder_sparse_step; a dense "
                     "family describes such a model")
    if not 1 <= chosen <= experts.num_experts:
        found.append(f"num_experts_per_tok = {chosen} is not between 1 and the number of experts, "
                     f"{experts.num_experts}")
    if chosen == 1 and normalised:
        found.append("norm_topk_prob = True with num_experts_per_tok = 1 makes every weight 1; "
                     "Megatron-core does not normalise one expert; supported: norm_topk_prob = False")
    if experts.scores == "sigmoid" and chosen > 1 and not normalised:
        found.append(f"norm_topk_prob = False with num_experts_per_tok = {chosen} is not implemented: Megatron-core "
                     "normalises sigmoid scores; supported: norm_topk_prob = True")
    if not 1 <= experts.topk_group <= experts.n_group or experts.num_experts % experts.n_group:
        found.append(f"n_group = {experts.n_group} groups with topk_group = {experts.topk_group} do not divide "
                     f"n_routed_experts = {experts.num_experts}")
    elif experts.topk_group < experts.n_group:
        size = experts.num_experts // experts.n_group
        # Hugging Face ranks groups by their two best experts, Megatron-core by their topk // topk_group best.
        if chosen // experts.topk_group != 2:
            found.append(f"num_experts_per_tok = {chosen} with topk_group = {experts.topk_group} is not implemented: "
                         "Megatron-core ranks groups by their best num_experts_per_tok // topk_group experts, "
                         "which must be 2")
        if chosen > size * experts.topk_group:
            found.append(f"num_experts_per_tok = {chosen} is more than topk_group = {experts.topk_group} groups have, "
                         f"of n_group = {experts.n_group} with {size} experts each")
    return found


def transformer_config(decoder: Decoder) -> dict[str, Any]:
    """TransformerConfig fields; the activation (SiLU) goes by its torch.nn.functional name."""
    return {
        "num_layers": decoder.num_hidden_layers,
        "hidden_size": decoder.hidden_size,
        "ffn_hidden_size": decoder.intermediate_size,
        "num_attention_heads": decoder.num_attention_heads,
        "num_query_groups": decoder.num_key_value_heads,
        "kv_channels": decoder.head_dim,
        "layernorm_epsilon": decoder.rms_norm_eps,
        "attention_dropout": decoder.attention_dropout,
        "init_method_std": decoder.initializer_range,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "qk_layernorm": decoder.qk_norm,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": decoder.qkv_bias,
    } | (_latent(decoder.latent, decoder) if decoder.latent else {}) | (
        _routing(decoder.experts) if decoder.experts else {})


def _latent(latent: LatentAttention, decoder: Decoder) -> dict[str, Any]:
    """Fields of MLATransformerConfig."""
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "kv_channels": latent.v_head_dim,
        # Latents are normalised; without this Megatron-core leaves their norms out.
        "qk_layernorm": True,
        "rotary_base": decoder.rope_theta,
    } | _latent_rope(decoder.rope_scaling)


def _latent_rope(scaling: RopeScaling | None) -> dict[str, Any]:
    """Megatron-core's defaults are those of a DeepSeek model; its softmax scale has the factor in it in any case."""
    if not isinstance(scaling, YarnScaling):
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def _routing(experts: Experts) -> dict[str, Any]:
    limited = experts.topk_group < experts.n_group
    return {
        "num_moe_experts": experts.num_experts,
        "moe_layer_freq": [int(has) for has in experts.layers],
        "moe_ffn_hidden_size": experts.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": experts.shared_intermediate_size,
        "moe_router_topk": experts.num_experts_per_tok,
        "moe_router_score_function": experts.scores,
        # A softmax over the chosen logits alone is the softmax over all of them divided by the chosen ones' sum.
        "moe_router_pre_softmax": experts.scores == "softmax" and not experts.norm_topk_prob,
        "moe_router_topk_scaling_factor": experts.routed_scaling_factor,
        "moe_router_num_groups": experts.n_group if limited else None,
        "moe_router_group_topk": experts.topk_group if limited else None,
        "moe_router_enable_expert_bias": experts.score_bias,
        "moe_router_dtype": "fp32",
    }


def pipeline_layout(layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """What TransformerConfig calls pipeline_model_parallel_layout: the parts of each stage, in the order in which the
    model passes the stages. None without a pipeline."""
    if parallel.pp == 1:
        return None
    stages = [["decoder"] * len(stage_layers(layers, parallel, pp, chunk))
              for chunk in range(parallel.vpp) for pp in range(parallel.pp)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def gpt_model(decoder: Decoder, parallel: ParallelConfig) -> dict[str, Any]:
    """GPTModel arguments besides its TransformerConfig."""
    return {
        "vocab_size": padded_vocabulary(decoder.vocab_size, parallel.tp),
        "max_sequence_length": decoder.max_position_embeddings,
        "share_embeddings_and_output_weights": decoder.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": decoder.rope_theta,
        "rotary_percent": decoder.rotary_factor,
    }
