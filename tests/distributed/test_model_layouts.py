"""The parameter map against Megatron-core itself: where ranks lie, and which parameters of which shapes they hold."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.parameters import RankCoordinates, coordinates, local_shape

COORDINATES = [
    {"tp": 4}, {"tp": 1, "cp": 4}, {"tp": 1, "pp": 4, "vpp": 2}, {"tp": 1}, {"tp": 2, "cp": 2}, {"tp": 2, "pp": 2},
    {"tp": 1, "cp": 2}, {"tp": 1, "cp": 2, "pp": 2}, {"tp": 1, "ep": 4}, {"tp": 1, "ep": 2}, {"tp": 2, "ep": 2},
    {"tp": 2, "ep": 4}, {"tp": 2, "etp": 2}, {"tp": 4, "ep": 2, "etp": 2}, {"tp": 1, "cp": 2, "ep": 2},
    {"tp": 1, "pp": 2, "vpp": 2, "ep": 2}, {"tp": 1, "cp": 4, "etp": 2}, {"tp": 1, "ep": 2, "etp": 2},
]
MODELS = [
    ("qwen3", {"tp": 2, "pp": 2, "vpp": 2}, {"tie_word_embeddings": True}),
    ("qwen3", {"tp": 1, "pp": 4}, {}),
    ("qwen3_moe", {"tp": 2, "ep": 4}, {"tie_word_embeddings": True}),
    ("qwen3_moe", {"tp": 1, "pp": 2, "vpp": 2, "ep": 2}, {}),
    ("glm4_moe", {"tp": 2, "ep": 2, "etp": 2}, {"vocab_size": 131}),
    ("qwen3", {"tp": 1, "pp": 4}, {"num_hidden_layers": 5}),
    ("qwen3_moe", {"tp": 1, "pp": 2, "vpp": 2, "ep": 2}, {"num_hidden_layers": 7}),
    ("glm4_moe", {"tp": 1, "pp": 4}, {"num_hidden_layers": 7, "first_k_dense_replace": 2}),
    ("qwen3", {"tp": 4}, {"vocab_size": 131, "num_key_value_heads": 4}),
    ("glm4_moe", {"tp": 2, "pp": 2, "etp": 2}, {"use_qk_norm": False}),
    ("deepseek_v3", {"tp": 2, "pp": 2, "ep": 2}, {}),
    ("deepseek_v3", {"tp": 2, "cp": 2}, {"q_lora_rank": None, "rope_interleave": False}),
]


@contextmanager
def world(rank, rendezvous, parallel):
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=parallel.world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tp, parallel.pp, parallel.vpp if parallel.vpp > 1 else None, context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=parallel.etp,
            create_gloo_process_groups=False)
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def place(rank, rendezvous, parallel):
    with world(rank, rendezvous, parallel) as state:
        return RankCoordinates(
            tp=state.get_tensor_model_parallel_rank(), cp=state.get_context_parallel_rank(),
            dp=state.get_data_parallel_rank(), pp=state.get_pipeline_model_parallel_rank(),
            etp=state.get_expert_tensor_parallel_rank(), ep=state.get_expert_model_parallel_rank(),
            expert_dp=state.get_expert_data_parallel_rank())


@pytest.mark.parametrize("layout", COORDINATES, ids=str)
def test_ranks_lie_where_megatron_puts_them(ranks, layout):
    parallel = ParallelConfig(world_size=4, **layout)
    assert ranks.run(place, 4, parallel) == [coordinates(parallel, rank) for rank in range(4)]


class Norm(torch.nn.RMSNorm):
    """Megatron's own refuses sequence parallelism, which it demands of experts beside tensor parallelism."""

    def __init__(self, config, hidden_size, eps):
        super().__init__(hidden_size, eps=eps)


def build(rank, rendezvous, hf, parallel):
    """Shapes of the parameters and kept buffers of each model chunk, by name."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from megatron_pbsd.platform.cpu import Cpu
    from megatron_pbsd.platform.cpu_modules import CausalAttention

    platform = Cpu()
    platform.prepare(rank)
    with platform.running(), world(rank, rendezvous, parallel):
        platform.seed(0)
        flags = platform.transformer_flags() | {"sequence_parallel": parallel.tp > 1}
        fields = family(hf).transformer_config(hf)
        config = (MLATransformerConfig if "kv_lora_rank" in fields else TransformerConfig)(
            **fields | {"activation_func": torch.nn.functional.silu} | flags,
            tensor_model_parallel_size=parallel.tp, pipeline_model_parallel_size=parallel.pp,
            pipeline_model_parallel_layout=family(hf).pipeline_layout(hf, parallel),
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=parallel.etp,
            pipeline_dtype=torch.float32, moe_token_dispatcher_type="alltoall")
        found = []
        for chunk in range(parallel.vpp):
            stage = chunk if parallel.vpp > 1 else None
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
            spec.layer_norm = Norm
            for layer in spec.layer_specs:
                layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
                attention = layer.submodules.self_attention.submodules
                if config.multi_latent_attention:
                    # As Transformer Engine's layers: whole on every rank. Core's own attention has one width for all.
                    attention.core_attention = CausalAttention
                    attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
                    attention.q_layernorm = attention.kv_layernorm = Norm
                elif config.qk_layernorm:
                    attention.q_layernorm = attention.k_layernorm = Norm
            model = GPTModel(
                config=config, transformer_layer_spec=spec, vp_stage=stage,
                pre_process=chunk == 0 and is_pipeline_first_stage(),
                post_process=chunk == parallel.vpp - 1 and is_pipeline_last_stage(),
                **family(hf).gpt_model(hf, parallel))
            found.append({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
                          if not name.endswith("_extra_state")})
        return found


@pytest.mark.parametrize(("model_type", "layout", "changes"), MODELS, ids=str)
def test_ranks_hold_what_the_map_says(ranks, model_type, layout, changes):
    hf, parallel = tiny_config(model_type, **changes), ParallelConfig(world_size=4, **layout)
    for rank, found in enumerate(ranks.run(build, 4, hf, parallel)):
        for chunk, shapes in enumerate(found):
            pieces = family(hf).pieces(hf, parallel, coordinates(parallel, rank), chunk)
            assert {name: local_shape(parts) for name, parts in pieces.items()} == shapes
