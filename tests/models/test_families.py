"""What is read from config.json, against transformers and Megatron-core."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from tiny_models import TINY, YARN, make_tiny, tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import ModelError, family
from megatron_pbsd.models.decoder import initial_value, kept_in_float32
from megatron_pbsd.models.hf_config import read
from megatron_pbsd.models.parameters import coordinates
from megatron_pbsd.models.transformer_engine import parameter_names
from megatron_pbsd.platform.cpu import Cpu

ONE = ParallelConfig(world_size=1, tp=1)
SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4,
           "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
VARIANTS = [
    ("llama", {}),
    ("llama", SMOLLM2),
    ("mistral", {}),
    ("mixtral", {}),
    ("mixtral", {"tie_word_embeddings": True, "head_dim": None}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "tie_word_embeddings": True}),
    ("glm4_moe", {}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "first_k_dense_replace": 3}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 1}),
]
CHECKPOINT = {"architectures": ["X"], "torch_dtype": "bfloat16", "rope_scaling": None, "use_cache": True}
"""Fields as transformers 4 wrote them."""


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_tensors_are_those_that_transformers_writes(tmp_path, model_type, changes):
    folder = make_tiny(model_type, tmp_path, **changes)
    hf = read(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert family(hf).hf_tensors(hf) == stored


def test_heads_share_the_hidden_size_where_head_dim_is_missing():
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = tiny_config("qwen3_moe", head_dim=...)
    state = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert family(hf).hf_tensors(hf)[name] == tuple(state[name].shape) == (16, 32)


@pytest.mark.parametrize("model_type", TINY)
def test_new_tensors_start_as_in_transformers(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    state = model.state_dict()
    for name in family(hf).hf_tensors(hf):
        name = name.replace("block_sparse_moe", "mlp")
        if name not in state:  # an expert's part of a tensor that transformers fuses in memory
            name = f"{name.partition('.experts.')[0]}.experts.down_proj"
        value = initial_value(name)
        if value is None:
            assert state[name].std() == pytest.approx(hf["initializer_range"], rel=0.25), name
        else:
            assert (state[name] == value).all(), name


def test_score_biases_are_kept_in_float32_by_transformers_too(tmp_path):
    """And routers since 5.24, in memory: published checkpoints have them in the model's dtype."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny("glm4_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if not name.endswith(".mlp.gate.weight"):
            assert kept_in_float32(name) == (tensor.dtype == torch.float32), name


def megatron_config(hf):
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    fields = family(hf).transformer_config(hf)
    kind = MLATransformerConfig if "kv_lora_rank" in fields else TransformerConfig
    return kind(**fields | {"activation_func": getattr(torch.nn.functional, fields["activation_func"])})


ROUTING = st.one_of(
    st.builds(lambda k, normalise: ("qwen3_moe", {"num_experts_per_tok": k, "norm_topk_prob": normalise}),
              st.integers(2, 8), st.booleans()),
    st.builds(lambda k: ("mixtral", {"num_experts_per_tok": k}), st.integers(2, 8)),
    st.just(("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False})),
    st.builds(lambda k, scale: ("glm4_moe", {"num_experts_per_tok": k, "routed_scaling_factor": scale}),
              st.integers(2, 8), st.sampled_from([1.0, 2.5])),
    st.just(("glm4_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False})),
    st.sampled_from([("glm4_moe", {"n_group": n, "topk_group": k, "num_experts_per_tok": 2 * k})
                     for n, k in ((2, 1), (4, 1), (4, 2), (4, 3))]),
    st.just(("glm4_moe", {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 3})))


@settings(max_examples=60)
@given(variant=ROUTING, seed=st.integers(0, 99))
def test_megatron_routes_as_transformers_does(variant, seed):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from transformers import AutoConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    model_type, changes = variant
    hf = tiny_config(model_type, **changes)
    router = {"qwen3_moe": Qwen3MoeTopKRouter, "glm4_moe": Glm4MoeTopkRouter, "mixtral": MixtralTopKRouter}[
        model_type](AutoConfig.for_model(**hf))
    torch.manual_seed(seed)
    bias = None
    with torch.no_grad():
        router.weight.normal_()
        if model_type == "glm4_moe":
            bias = router.e_score_correction_bias.normal_()
        logits, weights, chosen = router(torch.randn(50, hf["hidden_size"]))
    config = megatron_config(hf)
    probs, routed = topk_routing_with_score_function(
        logits, config.moe_router_topk, use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups, group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor, score_function=config.moe_router_score_function,
        expert_bias=bias)
    assert config.moe_router_enable_expert_bias == (bias is not None)
    torch.testing.assert_close(probs, torch.zeros_like(probs).scatter(1, chosen, weights))
    assert torch.equal(routed, torch.zeros_like(routed).scatter(1, chosen, True))


@pytest.mark.parametrize(("model_type", "changes", "expected"), [
    ("qwen3_moe", {"mlp_only_layers": [2]}, [1, 1, 0, 1]),
    ("qwen3_moe", {"mlp_only_layers": [3], "decoder_sparse_step": 2}, [0, 1, 0, 0]),
    ("glm4_moe", {"first_k_dense_replace": 2}, [0, 0, 1, 1]),
])
def test_layers_with_experts_are_those_of_transformers(model_type, changes, expected):
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = tiny_config(model_type, **changes)
    assert megatron_config(hf).moe_layer_freq == expected
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    assert [int(hasattr(layer.mlp, "experts")) for layer in model.model.layers] == expected


@pytest.mark.parametrize(("changes", "factor"), [
    ({}, 0.5),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75}}, 0.75),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "partial_rotary_factor": 0.25}, 0.25),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 0.5),
    ({"rope_parameters": ..., "rope_theta": 1e5, "partial_rotary_factor": 1.0}, 1.0),
])
def test_rotary_embeddings_turn_what_transformers_turns(changes, factor):
    from transformers import AutoConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    hf = tiny_config("glm4_moe", **changes)
    arguments = family(hf).gpt_model(hf, ONE)
    assert arguments["rotary_percent"] == factor
    dimensions = int(hf["head_dim"] * factor)
    expected = arguments["rotary_base"] ** -(torch.arange(0, dimensions, 2) / dimensions)
    torch.testing.assert_close(Glm4MoeRotaryEmbedding(AutoConfig.for_model(**hf)).inv_freq, expected)


@settings(max_examples=60)
@given(
    scaling=st.none() | st.builds(
        lambda factor, low, ratio, original: {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio,
            "original_max_position_embeddings": original},
        st.floats(1, 64), st.floats(0.1, 4), st.floats(1.01, 10), st.integers(8, 2**17)),
    theta=st.floats(100, 1e7), head=st.integers(1, 64), family_name=st.sampled_from(["llama", "qwen2", "mixtral"]))
def test_frequencies_are_those_of_transformers_to_the_last_bit(scaling, theta, head, family_name):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default"} | (scaling or {})
    hf = tiny_config("llama", head_dim=2 * head, rope_parameters=rope | {"rope_theta": theta})
    expected = LlamaRotaryEmbedding(AutoConfig.for_model(**hf))
    hf = tiny_config(family_name, head_dim=2 * head, rope_parameters=..., rope_theta=theta, rope_scaling=scaling)
    assert expected.attention_scaling == 1
    assert torch.equal(family(hf).inverse_frequencies(hf), expected.inv_freq)


@pytest.mark.parametrize("model_type", TINY)
def test_config_as_transformers_4_and_5_write_it(model_type):
    from transformers import AutoConfig

    newer = AutoConfig.for_model(model_type, head_dim=64, **{"sliding_window": None} if model_type == "mistral" else {})
    newer = json.loads(newer.to_json_string(use_diff=False))
    assert family(newer).gpt_model(newer, ONE)["rotary_base"] == newer["rope_parameters"]["rope_theta"]
    older = tiny_config(model_type, rope_parameters=..., rope_theta=5e5, **CHECKPOINT)
    if model_type == "qwen3_moe":
        older["num_experts"] = older.pop("num_local_experts")
    assert family(older).gpt_model(older, ONE)["rotary_base"] == 5e5


@pytest.mark.parametrize(("model_type", "changes", "words"), [
    ("qwen3", {"model_type": "qwen4"}, "did you mean 'qwen3'"),
    ("qwen3", {"attention_bias": True}, "'attention_bias' = True is not implemented"),
    ("qwen3", {"hidden_size_": 3}, "'hidden_size_' = 3 is not known .* did you mean 'hidden_size'"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'rope_parameters.rope_type' = 'yarn'"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "factor": 2}},
     "'rope_parameters.factor'"),
    ("qwen3", {"rope_parameters": {"rope_type": "default"}}, "'rope_theta' is missing"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "'layer_types'"),
    ("qwen3", {"sliding_window": 128, "use_sliding_window": True}, "'use_sliding_window'"),
    ("qwen3", {"rope_scaling": {"type": "yarn"}}, "'rope_parameters' and 'rope_scaling' are two names of one field"),
    ("llama", {"rope_parameters": ..., "rope_theta": 1.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "'rope_scaling.type' = 'linear' is not implemented; supported: 'default', 'llama3'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "original_max_position_embeddings": 64}},
     "'rope_parameters.high_freq_factor' is missing"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0, "low_freq_factor": 4.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
     "low_freq_factor = 4.0 .* is not below high_freq_factor = 4.0"),
    ("llama", {"attention_bias": True}, "'attention_bias' = True is not implemented"),
    ("llama", {"mlp_bias": True}, "'mlp_bias' = True is not implemented"),
    ("llama", {"rope_interleaved": True}, "'rope_interleaved' = True is not implemented"),
    ("qwen2", {"use_sliding_window": True}, "'use_sliding_window' = True is not implemented"),
    ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "'layer_types'"),
    ("mistral", {"sliding_window": 4096}, "'sliding_window' = 4096 is not implemented; supported: None"),
    ("mistral", {"sliding_window": ...}, "'sliding_window' is missing"),
    ("mixtral", {"sliding_window": 4096}, "'sliding_window' = 4096 is not implemented; supported: None"),
    ("mixtral", {"router_jitter_noise": 0.1}, "'router_jitter_noise' = 0.1 is not implemented"),
    ("mixtral", {"num_local_experts": ...}, "'num_local_experts' is missing"),
    ("qwen3", {"head_dim": ..., "rms_norm_eps": ...}, "'rms_norm_eps' is missing; 'head_dim' is missing"),
    ("qwen3", {"num_experts": 8}, "'num_experts' = 8 is not known"),
    ("qwen3_moe", {"attention_bias": True}, "'attention_bias' = True is not implemented"),
    ("qwen3_moe", {"num_local_experts": ..., "num_experts": ...}, "'num_experts' or 'num_local_experts' is missing"),
    ("qwen3_moe", {"num_local_experts": 4, "num_experts": 8}, "two names of one field"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' = 0 is below 1"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is not between 1 and"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob = True with num_experts_per_tok = 1"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob = False with num_experts_per_tok = 2"),
    ("glm4_moe", {"n_group": 4, "topk_group": 2}, "num_experts_per_tok = 2 with topk_group = 2 is not implemented"),
    ("glm4_moe", {"n_group": 8, "topk_group": 1}, "num_experts_per_tok = 2 is more than topk_group = 1 groups have"),
    ("qwen3", {"vocab_size": None, "hidden_size": "32"},
     "'vocab_size' = None is not a whole number; 'hidden_size' = '32' is not a whole number"),
    ("qwen3", {"num_hidden_layers": 0, "rms_norm_eps": -1.0}, "'num_hidden_layers' = 0 is below 1; .* -1.0 is below 0"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta' = None is not a"),
    ("llama", {"rope_parameters": 2, "tie_word_embeddings": 1},
     "= 1 is not true or false; .* = 2 is not an object or null"),
    ("glm4_moe", {"n_group": 3}, "n_group = 3 groups .* do not divide n_routed_experts = 8"),
    ("glm4_moe", {"n_shared_experts": 0}, "'n_shared_experts' = 0 is below 1"),
    ("glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.2}},
     "head_dim = 16 \\* partial_rotary_factor = 0.2 gives 3"),
    ("glm4_moe", {"num_attention_heads": 5}, "num_attention_heads = 5 is not a multiple of num_key_value_heads = 2"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "'quantization_config' = .*pbsd convert"),
    ("deepseek_v3", {"attention_bias": True}, "'attention_bias' = True is not implemented"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "'num_key_value_heads' = 2 is not implemented; supported: 4"),
    ("deepseek_v3", {"head_dim": 16}, "'head_dim' = 16 is not implemented; supported: 8"),
    ("deepseek_v3", {"qk_head_dim": 16}, "'qk_head_dim' = 16 is not implemented; supported: 24"),
    ("deepseek_v3", {"kv_lora_rank": ..., "v_head_dim": ...}, "'kv_lora_rank' is missing; 'v_head_dim' is missing"),
    ("deepseek_v3", {"n_group": None}, "'n_group' = None is not a whole number"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "'scoring_func' = 'softmax' is not implemented; supported: 'sigmoid'"),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.0}}, "'mscale' = 0.0 with 'mscale_all_dim' = 1.0 of yarn"),
    ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "'rope_parameters.attention_factor' = 1.5"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn"}}, "'rope_parameters.factor' is missing"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not implemented; .* 'default', 'yarn'"),
    ("kimi_k2", {"first_k_dense_replace": 4}, "no layer has experts"),
])
def test_what_is_not_implemented_is_named(model_type, changes, words):
    written = {"model_type": model_type} | {name: value for name, value in changes.items() if value is not ...}
    known = "deepseek_v3" if model_type == "kimi_k2" else model_type
    left = tiny_config(known, **{name: value for name, value in changes.items() if value is ...})
    with pytest.raises(ModelError, match=words):
        family(left | written)


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON: "), ("[1]", "is not a JSON object but a list"),
                                              ('"x"', "is not a JSON object but a text"), (None, "does not exist")])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"{tmp_path}/config.json {words}"):
        read(tmp_path)


def test_tensors_that_a_checkpoint_may_hold_besides():
    hf = tiny_config("glm4_moe", num_nextn_predict_layers=2)
    extra = {"model.layers.4.eh_proj.weight", "model.layers.5.mlp.gate.weight", "model.layers.6.enorm.weight",
             "model.layers.40.enorm.weight", "lm_head.weight"}
    assert {name for name in extra if family(hf).ignored_tensor(hf, name)} == {
        "model.layers.4.eh_proj.weight", "model.layers.5.mlp.gate.weight"}
    tied = tiny_config("qwen3", tie_word_embeddings=True)
    assert {name for name in extra if family(tied).ignored_tensor(tied, name)} == {"lm_head.weight"}


@settings(max_examples=60)
@given(
    factor=st.floats(1, 64), theta=st.floats(100, 1e7), half=st.integers(2, 64), original=st.integers(64, 2**15),
    fast=st.floats(1, 64), slow=st.floats(0.5, 1),
    mscales=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)) | st.just((1, 0)))
def test_yarn_turns_and_scales_as_in_transformers(factor, theta, half, original, fast, slow, mscales):
    import megatron.core.models.common.embeddings.yarn_rotary_pos_embedding as megatron_yarn
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    widths = {"qk_rope_head_dim": 2 * half, "head_dim": 2 * half, "qk_head_dim": 16 + 2 * half}
    hf = tiny_config("deepseek_v3", **widths, rope_parameters={
        "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original,
        "beta_fast": fast, "beta_slow": slow, "mscale": mscales[0], "mscale_all_dim": mscales[1]})
    expected = DeepseekV3RotaryEmbedding(AutoConfig.for_model(**hf))
    found = megatron_config(hf)
    assert found.rope_type == "yarn"
    with Cpu().running():
        turned, scale = megatron_yarn.YarnRotaryEmbedding(
            found.qk_pos_emb_head_dim, rotary_base=found.rotary_base, scaling_factor=found.rotary_scaling_factor,
            original_max_position_embeddings=found.original_max_position_embeddings, beta_fast=found.beta_fast,
            beta_slow=found.beta_slow, mscale=found.mscale, mscale_all_dim=found.mscale_all_dim).get_emb(2)
    torch.testing.assert_close(turned[1, 0, 0, :half], expected.inv_freq)
    assert scale == pytest.approx(expected.attention_scaling)
    softmax = megatron_yarn._yarn_get_mscale(found.rotary_scaling_factor, found.mscale_all_dim) ** 2
    width = found.qk_head_dim + found.qk_pos_emb_head_dim
    assert softmax * width**-0.5 == pytest.approx(DeepseekV3Attention(AutoConfig.for_model(**hf), 0).scaling)


def test_norms_of_latents_move_into_the_up_projections():
    hf, parallel = tiny_config("deepseek_v3"), ParallelConfig(world_size=1, tp=1)
    renamed = parameter_names(family(hf).pieces(hf, parallel, coordinates(parallel, 0), 0))
    layer = "decoder.layers.1"
    assert {old: new for old, new in renamed.items()
            if old.startswith(layer) and "norm" in old} == {
        f"{layer}.input_layernorm.weight": f"{layer}.input_layernorm.weight",
        f"{layer}.self_attention.q_layernorm.weight": f"{layer}.self_attention.linear_q_up_proj.layer_norm_weight",
        f"{layer}.self_attention.kv_layernorm.weight": f"{layer}.self_attention.linear_kv_up_proj.layer_norm_weight",
        f"{layer}.pre_mlp_layernorm.weight": f"{layer}.pre_mlp_layernorm.weight"}


def test_names_of_transformer_engine_modules():
    hf, parallel = tiny_config("glm4_moe"), ParallelConfig(world_size=2, tp=1, ep=2)
    names = family(hf).pieces(hf, parallel, coordinates(parallel, 1), 0)
    renamed = parameter_names(names)
    assert set(renamed) == set(names)
    assert len(set(renamed.values())) == len(names)
    changed = {old: new for old, new in renamed.items() if old != new}
    dense, sparse = "decoder.layers.0", "decoder.layers.1"
    expected = {
        f"{dense}.input_layernorm.weight": f"{dense}.self_attention.linear_qkv.layer_norm_weight",
        f"{dense}.pre_mlp_layernorm.weight": f"{dense}.mlp.linear_fc1.layer_norm_weight",
        f"{sparse}.input_layernorm.weight": f"{sparse}.self_attention.linear_qkv.layer_norm_weight",
        **{f"{sparse}.mlp.experts.local_experts.{i}.linear_fc{k}.weight": f"{sparse}.mlp.experts.linear_fc{k}.weight{i}"
           for i in range(4) for k in (1, 2)}}
    assert {old: new for old, new in changed.items() if old.startswith((dense, sparse))} == expected
