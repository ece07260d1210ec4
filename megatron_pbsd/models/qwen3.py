"""Qwen3 (dense): Hugging Face config and tensors ↔ Megatron-core GPTModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.hf_config import FieldRule, checked, ignored, mapped, only
from megatron_pbsd.models.parameters import ParameterMap, Piece, Placement, RankCoordinates

FIELDS: Mapping[str, FieldRule] = {
    **{name: mapped() for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "initializer_range", "attention_dropout")},
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    "rope_parameters": mapped(),
    "rope_theta": mapped(),
    "rope_scaling": only(None),
    "model_type": only("qwen3"),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "use_sliding_window": only(False),
    "is_encoder_decoder": only(False),
    "chunk_size_feed_forward": only(0),
    "quantization_config": only(None),
    # max_window_layers and sliding_window speak only where use_sliding_window is true.
    **{name: ignored() for name in (
        "sliding_window", "max_window_layers", "architectures", "transformers_version", "dtype", "torch_dtype",
        "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "return_dict",
        "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type")},
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "initializer_range")


def check_config(hf: Mapping[str, Any]) -> None:
    """ModelError naming every field that is missing, unknown, or has a value this family does not implement."""
    layer_types = FieldRule("only", (["full_attention"] * hf.get("num_hidden_layers", 0),))
    checked(hf, {**FIELDS, "layer_types": layer_types}, REQUIRED)
    _rope_theta(hf)


def _rope_theta(hf: Mapping[str, Any]) -> float:
    rope = hf.get("rope_parameters")
    if rope is None:
        if "rope_theta" not in hf:
            raise ModelError("config.json has neither 'rope_parameters' nor 'rope_theta'")
        return hf["rope_theta"]
    checked(rope, {"rope_theta": mapped(), "rope_type": only("default")}, ("rope_theta",), "rope_parameters.")
    return rope["rope_theta"]


def transformer_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields; the activation (SiLU) goes by its torch.nn.functional name."""
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "init_method_std": hf["initializer_range"],
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": False,
    }


def gpt_model(hf: Mapping[str, Any]) -> dict[str, Any]:
    """GPTModel arguments besides its TransformerConfig."""
    return {
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": hf["max_position_embeddings"],
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": _rope_theta(hf),
    }


def hf_tensors(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, in the order of the model; a tied lm_head is not a tensor of its own."""
    hidden, inner, head = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    queries, keys = hf["num_attention_heads"] * head, hf["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf["vocab_size"], hidden)}
    for i in range(hf["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (hf["vocab_size"], hidden)
    return shapes


def layout_problems(hf: Mapping[str, Any], parallel: ParallelConfig) -> list[str]:
    """One sentence for each way in which the model cannot be divided like this; empty when it can."""
    problems = []
    for key, size, names in (
        ("tp", parallel.tp, ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")),
        ("pp", parallel.pp, ("num_hidden_layers",)),
    ):
        if any(hf[name] % size for name in names):
            valid = [n for n in range(1, min(hf[name] for name in names) + 1) if not any(hf[x] % n for x in names)]
            blocking = ", ".join(f"{name} = {hf[name]}" for name in names if hf[name] % size)
            problems.append(
                f"learner.parallel.{key} = {size} does not divide {blocking}; valid for this model: {valid}")
    return problems


def pieces(hf: Mapping[str, Any], parallel: ParallelConfig, at: RankCoordinates) -> ParameterMap:
    """Parameters of the rank at `at`, by Megatron's name: see `Piece`.

    ModelError when the model cannot be divided like this.
    """
    if problems := layout_problems(hf, parallel):
        raise ModelError("; ".join(problems))
    place = Placement(hf_tensors(hf), parallel.tp, at)
    first, last = at.pp == 0, at.pp == parallel.pp - 1
    local: dict[str, list[Piece]] = {}
    if first:
        local["embedding.word_embeddings.weight"] = place.part("model.embed_tokens.weight", 0)
    per_stage = hf["num_hidden_layers"] // parallel.pp
    for i in range(per_stage):
        local |= _layer(hf, place, f"model.layers.{at.pp * per_stage + i}", f"decoder.layers.{i}")
    if last:
        local["decoder.final_layernorm.weight"] = place.whole("model.norm.weight")
        if not hf["tie_word_embeddings"]:
            local["output_layer.weight"] = place.part("lm_head.weight", 0)
        elif not first:
            # The last stage keeps a copy of the tied embedding for its logits.
            local["output_layer.weight"] = place.part("model.embed_tokens.weight", 0, primary=False)
    return local


def _layer(hf: Mapping[str, Any], place: Placement, source: str, target: str) -> ParameterMap:
    return {
        f"{target}.input_layernorm.weight": place.whole(f"{source}.input_layernorm.weight"),
        f"{target}.self_attention.linear_qkv.weight": place.stacked(_qkv(hf, place, f"{source}.self_attn")),
        f"{target}.self_attention.q_layernorm.weight": place.whole(f"{source}.self_attn.q_norm.weight"),
        f"{target}.self_attention.k_layernorm.weight": place.whole(f"{source}.self_attn.k_norm.weight"),
        f"{target}.self_attention.linear_proj.weight": place.part(f"{source}.self_attn.o_proj.weight", 1),
        f"{target}.pre_mlp_layernorm.weight": place.whole(f"{source}.post_attention_layernorm.weight"),
        f"{target}.mlp.linear_fc1.weight": place.stacked(
            [(f"{source}.mlp.{half}_proj.weight", place.share(hf["intermediate_size"])) for half in ("gate", "up")]),
        f"{target}.mlp.linear_fc2.weight": place.part(f"{source}.mlp.down_proj.weight", 1),
    }


def _qkv(hf: Mapping[str, Any], place: Placement, source: str) -> list[tuple[str, slice]]:
    """Megatron interleaves by key-value head: the queries that share it, then its key, then its value."""
    head, heads = hf["head_dim"], hf["num_key_value_heads"]
    queries = hf["num_attention_heads"] // heads * head
    rows = []
    for group in range(*place.share(heads).indices(heads)):
        rows += [
            (f"{source}.q_proj.weight", slice(group * queries, (group + 1) * queries)),
            (f"{source}.k_proj.weight", slice(group * head, (group + 1) * head)),
            (f"{source}.v_proj.weight", slice(group * head, (group + 1) * head)),
        ]
    return rows
