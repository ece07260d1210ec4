"""Megatron-core's model, optimizer and schedule from the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_pbsd import config
from megatron_pbsd.learner.context_parallel import SelfAttention
from megatron_pbsd.learner.routing import Positions, Router, RoutingContext, routers
from megatron_pbsd.losses.log_probs import token_statistics, top_tokens
from megatron_pbsd.models import Family
from megatron_pbsd.models.decoder import LATENT_NORM_EPS
from megatron_pbsd.platform import Platform


@dataclass(frozen=True)
class Query:
    """What is asked of the model at N positions. Tensors on the model's device.

    selected:    int64 [N], indices into the flattened [S, B] positions, sequence parallelism not counted.
    targets:     int64 [N], the tokens predicted there.
    candidates:  int64 [N, K] further tokens whose log-probabilities are asked for, or None.
    values:      ask the value head too.
    top:         ask for this many likeliest tokens instead.
    """

    selected: torch.Tensor
    targets: torch.Tensor
    candidates: torch.Tensor | None = None
    values: bool = False
    top: int = 0


class PolicyModel(GPTModel):
    """GPTModel that answers queries about tokens instead of returning logits.

    Logits exist only where a prediction is asked for, and only for `logits_tokens` positions at a time: prompts and
    observations are read but not predicted, and for small models with large vocabularies the logits that nobody reads
    would be the larger part of the work.
    """

    def __init__(self, *args: Any, logits_tokens: int, tokens: int, value_head: bool, **kwargs: Any):
        """tokens: size of the vocabulary without the padding that `vocab_size` includes."""
        super().__init__(*args, **kwargs)
        self.logits_tokens, self.tokens = logits_tokens, tokens
        if self.post_process and value_head:
            self.value_head = torch.nn.Linear(self.config.hidden_size, 1, dtype=self.config.params_dtype)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
        self.routing = RoutingContext()
        for router in routers([self]):
            router.context = self.routing

    def forward(
        self, inputs: torch.Tensor, query: Query, packed: PackedSeqParams | None, positions: Positions | None
    ) -> torch.Tensor:
        """inputs: [B, S] token ids. positions: for the routers of a mixture-of-experts model.

        The last pipeline stage returns float32 [rows, N]: log-probability and entropy, then the value if asked for,
        then K candidates' log-probabilities; or, if the `top` tokens are asked for, their log-probabilities and then
        their ids. Other stages return hidden states [S, B, H].
        """
        self.routing.positions = positions
        # GPTModel carries loss_mask to _postprocess and reads it only for multi-token prediction.
        return super().forward(
            inputs, position_ids=None, attention_mask=None, packed_seq_params=packed, loss_mask=query)

    def _postprocess(self, hidden_states, *args: Any, loss_mask: Query, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        query, group = loss_mask, self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group)
        hidden = hidden_states.flatten(0, 1).index_select(0, query.selected)
        weight = (self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights
                  else self.output_layer.weight)
        if query.top:
            ids, log_probs = top_tokens(
                hidden, weight, query.top, group, rows=self.logits_tokens, vocabulary=self.tokens)
            return torch.cat([log_probs.T, ids.T.float()])
        found = token_statistics(
            hidden, weight, query.targets, group, rows=self.logits_tokens, vocabulary=self.tokens,
            candidates=query.candidates)
        rows = [found.log_probs[None], found.entropy[None]]
        if query.values:
            rows.append(self.value_head(hidden).float().T)
        if query.candidates is not None:
            rows.append(found.candidate_log_probs.T)
        return torch.cat(rows)


def transformer_config(
    family: Family, hf: Mapping[str, Any], settings: config.LearnerConfig, platform: Platform
) -> TransformerConfig:
    parallel, moe = settings.parallel, settings.moe
    fields = family.transformer_config(hf) | platform.transformer_flags()
    fields["activation_func"] = getattr(torch.nn.functional, fields["activation_func"])
    if experts := fields.get("num_moe_experts") is not None:
        fields |= {
            "expert_model_parallel_size": parallel.ep,
            "expert_tensor_parallel_size": parallel.etp,
            "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss_coefficient else "none",
            "moe_aux_loss_coeff": moe.aux_loss_coefficient,
            "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        }
    if parallel.vpp > 1:
        # Batched point-to-point messages are silently wrong with two interleaved stages.
        fields |= {"virtual_pipeline_model_parallel_size": parallel.vpp, "overlap_p2p_comm": True,
                   "batch_p2p_comm": False, "deallocate_pipeline_outputs": platform.frees_pipeline_outputs}
    if settings.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif settings.recompute == "selective":
        fields["recompute_granularity"] = "selective"
    dtype = platform.dtype(settings.precision)
    latent = fields.get("multi_latent_attention", False)
    if latent and fields["rope_type"] != "yarn":
        fields["apply_rope_fusion"] = False  # Core fuses latent attention's rotation for yarn only.
    return (MLATransformerConfig if latent else TransformerConfig)(
        **fields,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        pipeline_model_parallel_layout=family.pipeline_layout(hf, parallel),
        context_parallel_size=parallel.cp,
        sequence_parallel=divides_sequences(parallel, experts or latent, platform),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # Micro-batches of one call differ in shape; core allows that with this dispatcher only, dense models too.
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall")


def divides_sequences(parallel: config.ParallelConfig, needed: bool, platform: Platform) -> bool:
    """Whether sequence parallelism is on. It is `needed` for experts and for latent attention: under tensor parallelism
    Megatron-core trains them with it only."""
    if parallel.sequence_parallel is not None:
        return parallel.sequence_parallel
    return parallel.tp > 1 and (needed or platform.sequence_parallel)


def build_model(
    family: Family, hf: Mapping[str, Any], settings: config.LearnerConfig, platform: Platform, value_head: bool
) -> list[PolicyModel]:
    """This rank's part of the model, a chunk for each virtual pipeline stage; its weights are not yet set."""
    transformer = transformer_config(family, hf, settings, platform)
    chunks = []
    for chunk in range(settings.parallel.vpp):
        stage = chunk if settings.parallel.vpp > 1 else None
        specs = platform.layer_specs(transformer, stage)
        for layer in specs.layer_specs:
            if hasattr(layer.submodules.mlp.submodules, "router"):
                layer.submodules.mlp.submodules.router = Router
            if settings.parallel.dynamic_cp:
                layer.submodules.self_attention.module = SelfAttention
        chunks.append(PolicyModel(
            config=transformer,
            transformer_layer_spec=specs,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            logits_tokens=settings.logits_tokens,
            tokens=hf["vocab_size"],
            value_head=value_head,
            vp_stage=stage,
            **family.gpt_model(hf, settings.parallel)))
        if transformer.multi_latent_attention:
            set_latent_norms(chunks[-1])
        else:
            # Core has Llama 3's scaling for one choice of its constants only. Latent attention rotates in its layers.
            chunks[-1].rotary_pos_emb.inv_freq = family.inverse_frequencies(hf)
        for name, parameter in chunks[-1].named_parameters():
            if ".mlp.experts." in name:
                # Core takes experts for ordinary parameters when expert parallelism is 1. With etp < tp, ranks that
                # see different tokens would then keep their gradients to themselves: silently wrong weights.
                parameter.allreduce = False
    return chunks


def set_latent_norms(chunk: torch.nn.Module) -> None:
    """Gives the norms of latents their epsilon, where core gives all norms that of the others. Transformer Engine has
    these norms within the layers after them."""
    for attention in chunk.modules():
        if isinstance(attention, MultiLatentAttention):
            names = ["kv_layernorm", "linear_kv_up_proj"]
            if attention.config.q_lora_rank is not None:
                names += ["q_layernorm", "linear_q_up_proj"]
            norms = [part for name in names if hasattr(part := getattr(attention, name), "eps")]
            assert len(norms) == len(names) // 2, "each latent has one norm"
            for norm in norms:
                norm.eps = LATENT_NORM_EPS


def build_optimizer(
    chunks: Sequence[PolicyModel], settings: config.LearnerConfig, platform: Platform, total_steps: int
) -> tuple[list[DistributedDataParallel], MegatronOptimizer, OptimizerParamScheduler]:
    """Gradient buffers, optimizer and learning-rate schedule around a model whose weights are set."""
    adam, transformer = settings.optimizer, chunks[0].config
    distributed = (platform.distributed_optimizer if settings.distributed_optimizer is None
                   else settings.distributed_optimizer)
    biases = [(router, router.expert_bias) for router in routers(chunks)]
    wrapped = [
        DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
            Float16Module(transformer, chunk) if transformer.bf16 else chunk,
            disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)]
    for router, bias in biases:
        # Float16Module has replaced them by rounded copies.
        router.expert_bias = bias
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=adam.lr, min_lr=adam.min_lr, weight_decay=adam.weight_decay, adam_beta1=adam.beta1,
            adam_beta2=adam.beta2, adam_eps=adam.eps, clip_grad=adam.clip_grad, bf16=transformer.bf16,
            params_dtype=transformer.params_dtype, use_distributed_optimizer=distributed),
        wrapped, use_gloo_process_groups=platform.backend != "gloo")
    transformer.grad_scale_func = optimizer.scale_loss
    transformer.finalize_model_grads_func = finalize_model_grads
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=adam.lr, min_lr=min(adam.min_lr, adam.lr), lr_warmup_steps=adam.warmup_steps,
        lr_decay_steps=max(total_steps, adam.warmup_steps + 1), lr_decay_style=adam.decay_style,
        start_wd=adam.weight_decay, end_wd=adam.weight_decay, wd_incr_steps=0, wd_incr_style="constant")
    return wrapped, optimizer, scheduler
