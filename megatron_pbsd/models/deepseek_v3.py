"""DeepSeek-V3 and R1: latent attention; leading dense layers, then grouped experts chosen by biased sigmoid scores."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from megatron_pbsd.models.decoder import Decoder, Experts, LatentAttention, YarnScaling
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.hf_config import (
    DECODER_FIELDS,
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    either,
    flag,
    ignored,
    mapped,
    number,
    only,
    rope,
    whole,
)

LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ROUTING = (
    "first_k_dense_replace", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor",
    "n_group", "topk_group", "n_shared_experts")
REQUIRED = (*LATENT, *ROUTING, "q_lora_rank")
COUNT = ("n_routed_experts", "num_local_experts")
MTP = ("num_nextn_predict_layers", "num_mtp_layers")
"""transformers 5 writes one or the other."""

ROUTING_FIELDS: Mapping[str, FieldRule] = {
    **{name: whole() for name in (
        "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "n_shared_experts", *COUNT)},
    **{name: whole(least=0) for name in ("first_k_dense_replace", *MTP)},
    "norm_topk_prob": flag(),
    "routed_scaling_factor": number(),
    # learner.moe decides how experts are balanced.
    "output_router_logits": ignored(),
}
"""Fields of leading dense layers, experts, and layers for multi-token prediction."""

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    **ROUTING_FIELDS,
    "model_type": only("deepseek_v3"),
    **{name: whole() for name in LATENT},
    "q_lora_rank": mapped(int, NoneType, least=1),
    "rope_interleave": flag(),
    "attention_bias": only(False),
    # DeepSeek's own code reads these, transformers' has one way.
    "scoring_func": only("sigmoid"),
    "topk_method": only("noaux_tc"),
    "moe_layer_freq": only(1),
    "pretraining_tp": only(1),
    **{name: ignored() for name in ("auto_map", "ep_size", "aux_loss_alpha", "seq_aux")},
}


def check_fields(hf: Mapping[str, Any], fields: Mapping[str, FieldRule] = FIELDS) -> None:
    """See `Family`."""
    derived = {}
    if all(isinstance(hf.get(name), int) for name in (*LATENT, "num_attention_heads")):
        derived = {
            "num_key_value_heads": only(hf["num_attention_heads"], advice="num_attention_heads: each has its own"),
            "head_dim": only(hf["qk_rope_head_dim"], advice="qk_rope_head_dim"),
            "qk_head_dim": only(hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
                                advice="qk_nope_head_dim + qk_rope_head_dim"),
        }
    checked(hf, {**fields, **derived}, (*DECODER_REQUIRED, *REQUIRED))


def grouped_experts(hf: Mapping[str, Any]) -> Experts:
    """Experts in groups after leading dense layers, chosen by biased sigmoid scores (arXiv 2412.19437, section 2.1.2),
    and shared ones beside them."""
    return Experts(
        layers=tuple(layer >= hf["first_k_dense_replace"] for layer in range(hf["num_hidden_layers"])),
        num_experts=either(hf, *COUNT),
        num_experts_per_tok=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        scores="sigmoid",
        norm_topk_prob=hf["norm_topk_prob"],
        routed_scaling_factor=hf["routed_scaling_factor"],
        n_group=hf["n_group"],
        topk_group=hf["topk_group"],
        score_bias=True,
        shared_intermediate_size=hf["n_shared_experts"] * hf["moe_intermediate_size"])


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    latent = LatentAttention(
        q_lora_rank=hf["q_lora_rank"],
        rope_interleave=hf.get("rope_interleave", True),
        **{name: hf[name] for name in LATENT})
    values = decoder_values(hf) | {
        "num_key_value_heads": hf["num_attention_heads"], "head_dim": hf["qk_rope_head_dim"]}
    return Decoder(
        **values,
        **_rope(hf),
        qk_norm=False,
        latent=latent,
        experts=grouped_experts(hf),
        mtp_layers=either(hf, *MTP))


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    found = rope(hf, scalings={"yarn": YarnScaling})
    yarn = found["rope_scaling"]
    if yarn is not None and not (yarn.mscale and yarn.mscale_all_dim) and (yarn.mscale, yarn.mscale_all_dim) != (1, 0):
        # Here DeepSeek's own code and transformers differ.
        raise ModelError(f"config.json: 'mscale' = {yarn.mscale} with 'mscale_all_dim' = {yarn.mscale_all_dim} of yarn "
                         "is not implemented; supported: two numbers other than 0, or 1 and 0")
    return found
