"""Megatron-core's model, optimizer and schedule from the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pbsd import config
from megatron_pbsd.models import Family
from megatron_pbsd.platform import Platform


class PolicyModel(GPTModel):
    """GPTModel whose logits are computed only where a prediction is asked for.

    Prompts and observations are read but not predicted; for small models with large vocabularies the logits that
    nobody reads would be the larger part of the work.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.post_process:
            # The selection below gathers the sequence itself.
            self.output_layer.sequence_parallel = False

    def forward(self, inputs: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """inputs [B, S] ids, selected [N] indices into the flattened [S, B] positions → logits [1, N, V / tp].

        Other pipeline stages than the last return hidden states [S, B, H] instead.
        """
        # GPTModel carries loss_mask to _postprocess and reads it only for multi-token prediction.
        return super().forward(inputs, position_ids=None, attention_mask=None, loss_mask=selected)

    def _postprocess(self, hidden_states, *args: Any, loss_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.post_process:
            if self.config.sequence_parallel:
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp)
            hidden_states = hidden_states.flatten(0, 1).index_select(0, loss_mask).unsqueeze(1)
        return super()._postprocess(hidden_states, *args, **kwargs)


def transformer_config(
    family: Family, hf: Mapping[str, Any], parallel: config.ParallelConfig, platform: Platform
) -> TransformerConfig:
    fields = family.transformer_config(hf) | platform.transformer_flags(parallel.tp)
    fields["activation_func"] = getattr(torch.nn.functional, fields["activation_func"])
    return TransformerConfig(
        **fields,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        params_dtype=platform.dtype,
        pipeline_dtype=platform.dtype,
        bf16=platform.dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # Micro-batches of one call differ in shape; core allows that with this dispatcher only, dense models too.
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall")


def build_model(
    family: Family, hf: Mapping[str, Any], parallel: config.ParallelConfig, platform: Platform
) -> PolicyModel:
    """This rank's part of the model; its weights are not yet set."""
    transformer = transformer_config(family, hf, parallel, platform)
    return PolicyModel(
        config=transformer,
        transformer_layer_spec=platform.layer_specs(transformer),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **family.gpt_model(hf))


def build_optimizer(
    model: PolicyModel, settings: config.OptimizerConfig, platform: Platform, total_steps: int
) -> tuple[DistributedDataParallel, MegatronOptimizer, OptimizerParamScheduler]:
    """Gradient buffers, optimizer and learning-rate schedule around a model whose weights are set."""
    module = Float16Module(model.config, model) if platform.dtype == torch.bfloat16 else model
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=platform.distributed_optimizer),
        module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=settings.lr, min_lr=settings.min_lr, weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1, adam_beta2=settings.beta2, adam_eps=settings.eps,
            clip_grad=settings.clip_grad, bf16=platform.dtype == torch.bfloat16, params_dtype=platform.dtype,
            use_distributed_optimizer=platform.distributed_optimizer),
        [wrapped], use_gloo_process_groups=platform.backend != "gloo")
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=settings.lr, min_lr=min(settings.min_lr, settings.lr),
        lr_warmup_steps=settings.warmup_steps, lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.decay_style, start_wd=settings.weight_decay, end_wd=settings.weight_decay,
        wd_incr_steps=0, wd_incr_style="constant")
    return wrapped, optimizer, scheduler
