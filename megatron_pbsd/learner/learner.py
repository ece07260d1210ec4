"""One learner rank. All ranks are called alike, with the same full batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ModelConfig
from megatron_pbsd.learner import state, weights
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.microbatch import MicroBatch, micro_batches
from megatron_pbsd.learner.model import build_model, build_optimizer
from megatron_pbsd.learner.parallel_state import connect, disconnect
from megatron_pbsd.learner.update import Update
from megatron_pbsd.losses import Loss, LossInputs, LossOutput
from megatron_pbsd.losses.log_probs import log_probs_and_entropy
from megatron_pbsd.models import family
from megatron_pbsd.models.hf_config import read
from megatron_pbsd.platform import Platform, select
from megatron_pbsd.resharding.manifest import WeightsManifest


class TokenColumn:
    """One number per token of a batch, put in by the ranks that compute it and collected on rank 0."""

    def __init__(self, batch: Batch, device: torch.device):
        self._offsets = np.cumsum([0, *batch.lengths])
        self._flat = torch.zeros(int(self._offsets[-1]), device=device)

    def put(self, micro: MicroBatch, values: torch.Tensor) -> None:
        """`values` [N] of the tokens a micro-batch predicts. Tensor-parallel ranks have the same; one of them counts."""
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            index = torch.from_numpy(self._offsets[micro.sequences] + micro.positions)
            self._flat[index.to(self._flat.device)] = values

    def collect(self) -> list[np.ndarray] | None:
        """[T_i] per sequence on rank 0, None elsewhere; every rank calls this."""
        dist.reduce(self._flat, dst=0)
        if dist.get_rank() != 0:
            return None
        return np.split(self._flat.cpu().numpy(), self._offsets[1:-1])


class Learner:
    """Megatron-core model, optimizer and schedule of one rank.

    rank:         global rank, 0 … world_size - 1.
    rendezvous:   'tcp://host:port', the same for all ranks; rank 0 listens there.
    loss:         what `step` minimises.
    total_steps:  optimizer steps over which the learning rate decays.
    """

    def __init__(
        self,
        rank: int,
        rendezvous: str,
        model: ModelConfig,
        config: LearnerConfig,
        loss: Loss,
        seed: int,
        total_steps: int,
        platform: Platform | None = None,
    ):
        self.rank, self.config, self.loss = rank, config, loss
        self.platform = platform or select()
        self.device = self.platform.device(rank)
        hf = read(model.path)
        self._family = family(hf)
        self._shapes = self._family.hf_tensors(hf)
        self.platform.prepare(rank)
        with self.platform.running():
            at = connect(self.platform, config.parallel, rank, rendezvous, config.deadline_s)
            self.platform.seed(seed)
            self._pieces = {
                self.platform.parameter_name(name): parts
                for name, parts in self._family.pieces(hf, config.parallel, at).items()}
            policy = build_model(self._family, hf, config.parallel, self.platform).to(self.device)
            self._parameters = dict(policy.named_parameters())
            weights.fill(self._parameters, self._pieces, (
                weights.stored(model.path, self._shapes) if model.initial_weights == "load"
                else weights.random(self._shapes, hf["initializer_range"], seed)))
            self._policy = policy
            self._model, self._optimizer, self._scheduler = build_optimizer(
                policy, config.optimizer, self.platform, total_steps)
            self._multiple = config.parallel.tp if policy.config.sequence_parallel else 1

    def log_probs(self, batch: Batch) -> list[np.ndarray] | None:
        """Log-probability of each token given those before it (nats), float32 [T_i] per sequence.

        0 at position 0, and wherever the batch has a `loss_mask` that is 0. Rank 0 returns them, other ranks None.
        """
        kept = TokenColumn(batch, self.device)

        def keep(micro: MicroBatch, logits: torch.Tensor, non_loss_data: bool) -> None:
            values, _ = self._token_log_probs(micro, logits)
            kept.put(micro, values)

        self._model.eval()
        with self.platform.running(), torch.no_grad():
            self._schedule(batch, (), keep, forward_only=True)
            return kept.collect()

    def step(self, batch: Batch) -> Update:
        """One optimizer step over the whole batch.

        LearnerError when the loss or the gradient is not finite.
        """
        missing = [name for name in ("loss_mask", *self.loss.fields) if name not in batch]
        if missing:
            raise LearnerError(f"loss {self.loss.name!r} needs the batch fields {missing}, which the batch lacks")
        self._model.train()
        kept = TokenColumn(batch, self.device)
        with self.platform.running():
            self._model.zero_grad_buffer()
            self._optimizer.zero_grad()
            outputs = self._schedule(batch, self.loss.fields, partial(self._loss, kept), forward_only=False)
            metrics = self._global_metrics(outputs)
            self._scheduler.step(1)
            _, grad_norm, _ = self._optimizer.step()
            log_probs = kept.collect()
        metrics["grad_norm"] = float(grad_norm)
        metrics["lr"] = get_canonical_lr_for_logging(self._optimizer.param_groups)
        wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if wrong:
            raise LearnerError(f"optimizer step {self._scheduler.num_steps} is not finite: {wrong}")
        return Update(metrics, log_probs)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face name → dtype, full shape, in the order of the model; a tied lm_head is not separate."""
        dtype = str(self.platform.dtype).removeprefix("torch.")
        return {name: (dtype, shape) for name, shape in self._shapes.items()}

    def publish(self, manifest: WeightsManifest) -> None:
        """Write this rank's part of the weights into the shared segment."""
        weights.publish(self._parameters, self._pieces, manifest)

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Tensors whose published bytes are not what this rank computes with; to be asked once all have published."""
        return weights.differing(self._parameters, self._pieces, manifest)

    def save(self, folder: str) -> None:
        """Write model, optimizer, schedule and random numbers of all ranks into `folder`, readable at any layout."""
        with self.platform.running():
            state.save(folder, self._policy, self._optimizer, self._scheduler, self.platform)

    def load(self, folder: str) -> None:
        """Inverse of `save`. LearnerError when there is nothing to load."""
        with self.platform.running():
            state.load(folder, self._policy, self._optimizer, self._scheduler, self.platform)

    def close(self) -> None:
        """Leave the process groups; the learner is unusable afterwards."""
        disconnect()

    def _schedule(
        self, batch: Batch, fields: Sequence[str], consume: Callable[..., Any], forward_only: bool
    ) -> list[Any]:
        """Run Megatron's pipeline schedule; `consume(micro_batch, logits)` is called on the last stage."""
        parts = micro_batches(
            batch, parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(),
            self.config.micro_batch_tokens, fields, self._multiple)

        def forward_step(iterator, model):
            micro = next(iterator)
            return model(self._tensor(micro.inputs), self._tensor(micro.selected)), partial(consume, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(parts), model=[self._model],
            num_microbatches=len(parts), seq_length=parts[0].inputs.shape[1],
            micro_batch_size=parts[0].inputs.shape[0], forward_only=forward_only,
            collect_non_loss_data=forward_only)

    def _token_log_probs(self, micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        return log_probs_and_entropy(logits[0], self._tensor(micro.targets), group)

    def _loss(
        self, kept: TokenColumn, micro: MicroBatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, LossOutput]]:
        log_probs, entropy = self._token_log_probs(micro, logits)
        kept.put(micro, log_probs.detach())
        fields = {name: self._tensor(micro.fields[name]) for name in self.loss.fields}
        _, sequence = torch.unique(self._tensor(micro.sequences), return_inverse=True)
        output = self.loss.function(LossInputs(
            log_probs, entropy, torch.ones_like(log_probs), sequence, len(set(micro.sequences)), fields))
        tokens = torch.tensor(len(log_probs), dtype=torch.int32, device=self.device)
        return output.loss, tokens, (int(tokens), output)

    def _global_metrics(self, outputs: list[tuple[int, LossOutput]]) -> dict[str, float]:
        """Sums over the global batch per token, and maxima, from the ranks that computed a loss."""
        mine = None
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            mine = (
                sum(count for count, _ in outputs),
                {name: math.fsum(float(o.sums[name]) for _, o in outputs) for name in outputs[0][1].sums},
                {name: max(float(o.maxima[name]) for _, o in outputs) for name in outputs[0][1].maxima})
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        shares = [share for share in gathered if share is not None]
        tokens = sum(count for count, _, _ in shares)
        metrics = {name: math.fsum(s[name] for _, s, _ in shares) / max(tokens, 1) for name in shares[0][1]}
        metrics |= {name: max(m[name] for _, _, m in shares) for name in shares[0][2]}
        return metrics | {"tokens": float(tokens)}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
