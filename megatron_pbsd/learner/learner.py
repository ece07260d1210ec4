"""One learner rank. All ranks are called alike, with the same full batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_pbsd.batch import Batch
from megatron_pbsd.checkpointing.hf_folder import stored
from megatron_pbsd.checkpointing.torch_dist import writer_name
from megatron_pbsd.config import LearnerConfig, ModelConfig
from megatron_pbsd.learner import fields, metrics, microbatch, weights
from megatron_pbsd.learner.balance import plan
from megatron_pbsd.learner.blocks import Share, plan_blocks
from megatron_pbsd.learner.categories import CATEGORIES
from megatron_pbsd.learner.context_parallel import sum_over
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.memory import DeviceMemory
from megatron_pbsd.learner.microbatch import MicroBatch, Shape
from megatron_pbsd.learner.model import Query, build_model, build_optimizer
from megatron_pbsd.learner.optimizer_state import renew_masters
from megatron_pbsd.learner.parallel_state import connect, context_group, disconnect
from megatron_pbsd.learner.routing import Positions, forget_last, routers
from megatron_pbsd.learner.saving import Saver
from megatron_pbsd.learner.sending import Sending
from megatron_pbsd.learner.state import LearnerState
from megatron_pbsd.learner.token_table import TokenTable
from megatron_pbsd.learner.update import Update
from megatron_pbsd.learner.watchdog import Watchdog
from megatron_pbsd.losses import Loss, LossInputs, LossOutput, token_weights
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import Decoder, kept_in_float32
from megatron_pbsd.models.hf_config import read
from megatron_pbsd.models.parameters import ParameterMap, RankCoordinates
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.models.transformer_engine import parameter_names
from megatron_pbsd.platform import select
from megatron_pbsd.platform.process_group import GroupPlace
from megatron_pbsd.platform.usage import MemoryUse
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.stream import Bucket

WEIGHTS_AND_STATE = tuple(name for name in CATEGORIES if name != "gradients")
WEIGHTS = "weights"
"""Beside the loss's own fields every micro-batch carries the weights of its reduction."""


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
    ):
        self.rank, self.config, self.loss = rank, config, loss
        self.platform = select()
        self.device = self.platform.device(rank)
        hf = read(model.path)
        self._family = family(hf)
        self._shapes = self._family.hf_tensors(hf)
        self._cost = Cost.of(self._family.decoder(hf))
        self.platform.prepare(rank)
        self._watchdog = Watchdog.join(rank, config.parallel.world_size, rendezvous, config.deadline_s)
        with self.platform.running(), self._watchdog.phase("build"):
            with self._watchdog.connecting():
                at = connect(self.platform, config.parallel, rank, self._watchdog.store, config.deadline_s)
            self.platform.seed(seed)
            chunks = build_model(self._family, hf, config, self.platform, "values" in loss.outputs)
            chunks = [chunk.to(self.device) for chunk in chunks]
            maps = self._maps(hf, at)
            self._weights = weights.Weights(chunks, maps)
            self._stored = partial(stored, shapes=self._shapes, ignored=partial(self._family.ignored_tensor, hf))
            self._weights.fill(
                self._stored(model.path) if model.initial_weights == "load"
                else weights.random(self._shapes, hf["initializer_range"], seed))
            self._chunks = chunks
            self._model, self._optimizer, self._scheduler = build_optimizer(chunks, config, self.platform, total_steps)
        self._sending = Sending(rank, self._parameters(hf, at), self.tensors(), self.device)
        self._memory = DeviceMemory(self._model, self._optimizer)
        self._state = LearnerState(
            chunks, maps, self._maps(hf, replace(at, cp=0, dp=0, expert_dp=0)), self._optimizer, self._scheduler,
            self.platform, self._family, hf, config.parallel, at, rank, "values" in loss.outputs)
        self._saver = Saver(writer_name(rank), self.device)
        self._routers = routers(chunks)
        transformer = chunks[0].config
        self._shape = Shape(
            packed=config.batching == "packed", cp=config.parallel.cp,
            multiple=config.parallel.tp if transformer.sequence_parallel else 1)

    def log_probs(self, batch: Batch) -> list[np.ndarray] | None:
        """`score` for log-probabilities alone."""
        scores = self.score(batch)
        return scores and scores["log_probs"]

    def score(
        self, batch: Batch, outputs: Sequence[str] = ("log_probs",), top: int = 0
    ) -> dict[str, list[np.ndarray]] | None:
        """What the model says of each token given those before it, per sequence, by one forward pass.

        log_probs, entropy, values:      float32 [T_i]; nats, nats, and the value head's estimate.
        top_tokens, top_log_probs:       int64 and float32 [T_i, top], the likeliest tokens, likeliest first. They take
                                         a pass of their own.

        0 at position 0, and wherever the batch has a `loss_mask` that is 0. Rank 0 returns them, other ranks None.
        """
        wanted = set(outputs)
        if unknown := wanted - {"log_probs", "entropy", "values", "top_tokens", "top_log_probs"}:
            raise LearnerError(f"score knows no outputs {sorted(unknown)}")
        found: dict[str, list[np.ndarray]] = {}
        if wanted & {"log_probs", "entropy", "values"}:
            rows = self._forward(batch, 2 + ("values" in wanted), values="values" in wanted)
            found |= dict(zip(("log_probs", "entropy", "values"), rows or [], strict=False))
        if wanted & {"top_tokens", "top_log_probs"}:
            rows = self._forward(batch, 2 * top, top=top) or []
            pairs = [np.stack(row, -1) for row in zip(*rows, strict=True)]
            found["top_log_probs"] = [pair[:, :top] for pair in pairs]
            found["top_tokens"] = [pair[:, top:].astype(np.int64) for pair in pairs]
        return {name: found[name] for name in outputs} if self.rank == 0 else None

    def step(self, batch: Batch, loss: Loss | None = None) -> Update:
        """One optimizer step over the whole batch; `loss` instead of the learner's own, which it must not ask more of
        the model than.

        LearnerError when the loss or the gradient is not finite.
        """
        loss = loss or self.loss
        missing = [name for name in ("loss_mask", *loss.fields) if name not in batch]
        if missing:
            raise LearnerError(f"loss {loss.name!r} needs the batch fields {missing}, which the batch lacks")
        columns = fields.per_token(batch, loss.fields) | {WEIGHTS: token_weights(batch, loss.reduction)}
        kept = TokenTable(batch, 1, self.device)
        self._train(True)
        for router in self._routers:
            router.reset_statistics()
        with self._phase("step", CATEGORIES):
            for chunk in self._model:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            with self._watchdog.phase("step.forward_backward"):
                outputs = self._schedule(
                    batch, columns, partial(self._loss, loss, kept), forward_only=False,
                    values="values" in loss.outputs, candidates="candidates" in loss.outputs)
            with self._watchdog.phase("step.metrics"):
                found = loss.summary(metrics.reduce(outputs, self._routers))
                log_probs = kept.collect()
            with self._watchdog.phase("step.optimizer"):
                self._saver.copied()
                self._scheduler.step(1)
                _, grad_norm, _ = self._optimizer.step()
        found["grad_norm"] = float(grad_norm)
        found["lr"] = get_canonical_lr_for_logging(self._optimizer.param_groups)
        wrong = {name: value for name, value in found.items() if not math.isfinite(value)}
        if wrong:
            raise LearnerError(f"optimizer step {self._scheduler.num_steps} is not finite: {wrong}")
        return Update(found, log_probs and log_probs[0])

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face name → dtype, full shape, in the order of the model; a tied lm_head is not separate."""
        dtype = str(self._chunks[0].config.params_dtype).removeprefix("torch.")
        return {name: ("float32" if kept_in_float32(name) else dtype, shape) for name, shape in self._shapes.items()}

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """In what parts weights leave from now on, by `gather` or `broadcast`. LearnerError when they are not ours."""
        self._sending.prepare(buckets)

    def gather(self, number: int) -> None:
        """Write this rank's part of a bucket into shared memory."""
        self._memory.require("gather", ("parameters",))
        self._sending.gather(number)

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Tensors whose published bytes are not what this rank computes with; to be asked once all have published."""
        self._memory.require("differing", ("parameters",))
        return self._weights.differing(manifest)

    def digests(self) -> dict[tuple[str, str], str]:
        """See `Weights.digests`: equal on all ranks that have the same part."""
        self._memory.require("digests", ("parameters",))
        return self._weights.digests()

    def open_group(self, place: GroupPlace) -> None:
        """See `Sending`, as for the following."""
        self._sending.open_group(place)

    def divide(self, decoder: Decoder, server: ServerParallel, servers: int) -> None:
        self._sending.divide(decoder, server, servers)

    def scatter(self, number: int) -> dict[str, str]:
        with self._phase("scatter", ("parameters", "communicators")), torch.no_grad():
            return self._sending.scatter(number)

    def broadcast(self, number: int) -> dict[str, str]:
        with self._phase("broadcast", ("parameters", "communicators")), torch.no_grad():
            return self._sending.broadcast(number)

    def share(self, number: int, times: int) -> tuple[list[bytes], dict[str, str]]:
        with self._phase("share", ("parameters", "communicators")), torch.no_grad():
            return self._sending.share(number, times)

    def store(self, number: int, path: str, held: Mapping[str, str]) -> dict[str, str]:
        with self._phase("store", ("parameters", "communicators")), torch.no_grad():
            return self._sending.store(number, path, held)

    def sent(self) -> None:
        self._sending.sent()

    def save(self, folder: str) -> None:
        """Begin to write this rank's part of a checkpoint into `folder`: model, optimizer, schedule and random numbers
        as they are now, readable at any layout. `torch_dist.unfinished` says whether it is there.

        LearnerError, here or from a later call, when an earlier part could not be written.
        """
        with self._phase("save", WEIGHTS_AND_STATE):
            self._saver.begin(Path(folder), self._state.content())

    def saved(self) -> None:
        """Wait until what `save` began is on disk."""
        with self._phase("saved"):
            self._saver.saved()

    def copy_wait_s(self) -> float:
        """Seconds for which a step has waited until the last `save` had copied what the step changes."""
        return self._saver.waited_s

    def load(self, folder: str, weights_only: bool = False) -> None:
        """Inverse of `save`. weights_only: not the optimizer, nor anything else that continues a run.

        CheckpointError when there is nothing to load, LearnerError when it is not this model's.
        """
        with self._phase("load", WEIGHTS_AND_STATE), torch.no_grad():
            self._saver.copied()
            self._state.load(Path(folder), weights_only)

    def replace_weights(self, folder: str, steps: int) -> None:
        """Take the weights of a Hugging Face folder instead, which are `steps` optimizer steps newer. The schedule goes
        on as far; Adam's moments, random numbers and a value head stay as they are.

        ModelError when they are not this model's.
        """
        with self._phase("replace_weights", WEIGHTS_AND_STATE), torch.no_grad():
            self._saver.copied()
            self._weights.fill(self._stored(folder))
            renew_masters(self._optimizer)
            self._scheduler.step(steps)

    def close(self) -> None:
        """Leave the process groups; the learner is unusable afterwards."""
        try:
            self._saver.saved()
        finally:
            forget_last(self._chunks)
            self._sending.close_group()
            disconnect()
            self._watchdog.close()

    def release(self, phase: str, keep: Sequence[str] = ()) -> dict[str, int]:
        """Give device memory away for `phase`; bytes given back, by category (`memory.CATEGORIES`).

        All ranks do it alike. Until `regain` everything that needs what is released raises LearnerError.
        """
        with self._phase("release"):
            self._saver.copied()
            return self._memory.release(phase, keep)

    def regain(self, categories: Sequence[str] | None = None) -> None:
        """Inverse of `release`: the same values, but gradients are zero. categories: None regains all."""
        with self._phase("regain"):
            self._memory.regain(CATEGORIES if categories is None else categories)

    def memory(self) -> MemoryUse:
        """What is in use where this rank computes, and what of it is the rank's."""
        return self.platform.memory_use(self.device, self._memory.account(), self._memory.waiting())

    @contextmanager
    def _phase(self, name: str, needed: Sequence[str] = ()) -> Iterator[None]:
        """Surrounds all of Megatron's work: collectives have a name and a deadline, and memory is there."""
        self._memory.require(name, needed)
        self._saver.check()
        with self.platform.running(), self._watchdog.phase(name):
            yield

    def _parameters(self, hf: Mapping[str, Any], at: RankCoordinates) -> dict[tuple[int, str], torch.Tensor]:
        """By model chunk and the parameter map's own name."""
        found = {}
        for number, (chunk, parts) in enumerate(zip(self._chunks, self._maps(hf, at), strict=True)):
            held = dict(weights.held_tensors(chunk))
            names = self._family.pieces(hf, self.config.parallel, at, number)
            found |= {(number, name): held[module] for name, module in zip(names, parts, strict=True)}
        return found

    def _maps(self, hf: Mapping[str, Any], at: RankCoordinates) -> list[ParameterMap]:
        """What lies where in each model chunk of the rank at `at`, by the names that this platform's modules have."""
        parallel = self.config.parallel
        maps = [self._family.pieces(hf, parallel, at, chunk) for chunk in range(parallel.vpp)]
        if self.platform.transformer_engine:
            maps = [{new: parts[old] for old, new in parameter_names(parts).items()} for parts in maps]
        return maps

    def _train(self, training: bool) -> None:
        for chunk in self._model:
            chunk.train(training)

    def _forward(self, batch: Batch, rows: int, **query: Any) -> list[list[np.ndarray]] | None:
        """The model's first `rows` answers for every token; see `PolicyModel.forward`."""
        kept = TokenTable(batch, rows, self.device)

        def keep(micro: MicroBatch, answers: torch.Tensor, non_loss_data: bool) -> None:
            kept.put(micro, answers[:rows])

        self._train(False)
        with self._phase("score", ("parameters", "communicators")), torch.no_grad():
            self._schedule(batch, {}, keep, forward_only=True, **query)
            return kept.collect()

    def _schedule(
        self, batch: Batch, columns: Mapping[str, Sequence[np.ndarray]], consume: Callable[..., Any],
        forward_only: bool, values: bool = False, candidates: bool = False, top: int = 0,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule; `consume(micro_batch, answers)` is called on the last stage."""
        parts = self._micro_batches(batch, columns)

        def forward_step(iterator, model):
            number, micro = next(iterator)
            self._watchdog.mark(f"micro-batch {number}/{len(parts)}, forward")
            query = Query(
                self._tensor(micro.selected), self._tensor(micro.targets), values=values, top=top,
                candidates=self._tensor(micro.fields["teacher_top_tokens"]) if candidates else None)
            answers = model(self._tensor(micro.inputs), query, self._packed(micro), self._positions(micro))
            return answers, partial(consume, micro)

        iterators = [enumerate(parts, start=1) for _ in self._model]
        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._model, num_microbatches=len(parts), seq_length=parts[0].inputs.shape[1],
            micro_batch_size=parts[0].inputs.shape[0], forward_only=forward_only,
            collect_non_loss_data=forward_only)

    def _micro_batches(self, batch: Batch, columns: Mapping[str, Sequence[np.ndarray]]) -> list[MicroBatch]:
        """This rank's share of the batch; every data-parallel rank has equally many."""
        experts = bool(self._routers) and self.config.moe.routing_replay and "routed_experts" in batch
        parts = []
        for share in self._shares([microbatch.positions(n) for n in batch.lengths]):
            shape, rank = replace(self._shape, cp=share.size), context_group(share.size).rank()
            parts.append(microbatch.build(batch, share.sequences, columns, shape, rank, experts))
        return parts

    def _shares(self, lengths: Sequence[int]) -> list[Share]:
        """Which of the sequences, `lengths` positions long, this rank's micro-batches hold."""
        parallel, shape = self.config.parallel, self._shape
        mine = parallel_state.get_data_parallel_rank()
        if parallel.dynamic_cp:
            return plan_blocks(lengths, parallel.dp, self.config.micro_batch_tokens, self._cost, shape).shares[mine]
        # A row is rounded up once more than its sequences are: to what sequence parallelism divides.
        budget = self.config.micro_batch_tokens * parallel.cp // shape.row_multiple * shape.row_multiple
        divided = plan(
            lengths, parallel.dp, budget, self._cost,
            multiple=shape.granule if shape.packed else shape.row_multiple, padded=not shape.packed,
            micro_batch_multiple=parallel.pp if parallel.vpp > 1 else 1,
            # Experts on other data-parallel ranks are waited for in every micro-batch.
            synchronised=parallel.ep > 1)
        return [Share(tuple(part), parallel.cp) for part in divided.micro_batches[mine]]

    def _packed(self, micro: MicroBatch) -> PackedSeqParams | None:
        if micro.bounds is None:
            return None
        bounds, longest = self._tensor(micro.bounds), int(np.diff(micro.bounds).max())
        own = {"local_cp_size": micro.cp, "cp_group": context_group(micro.cp) if micro.cp > 1 else None}
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest,
            **own if self.config.parallel.dynamic_cp else {})

    def _positions(self, micro: MicroBatch) -> Positions | None:
        """The routers' view: this rank's positions in [S, B] order, divided by sequence parallelism."""
        if not self._routers:
            return None
        padding, experts, sharers = micro.padding.T, micro.experts, micro.cp * self._shape.multiple
        if self._shape.multiple > 1:
            each = len(padding) // self._shape.multiple
            first = parallel_state.get_tensor_model_parallel_rank() * each
            padding = padding[first : first + each]
            experts = None if experts is None else experts[first : first + each]
        return Positions(
            padding=self._tensor(padding.flatten()), trained=micro.trained / sharers,
            experts=None if experts is None else self._tensor(
                experts.reshape(-1, *experts.shape[2:]).astype(np.int64)))

    def _loss(
        self, loss: Loss, kept: TokenTable, micro: MicroBatch, answers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, LossOutput]]:
        kept.put(micro, answers[:1].detach())
        asked = {name: self._tensor(column) for name, column in micro.fields.items()}
        first_candidate = 2 + ("values" in loss.outputs)
        output = loss.function(LossInputs(
            log_probs=answers[0],
            entropy=answers[1],
            weights=asked.pop(WEIGHTS),
            sequence=self._tensor(micro.sequence),
            sequences=len(micro.sequences),
            fields=asked,
            values=answers[2] if "values" in loss.outputs else None,
            candidate_log_probs=answers[first_candidate:].T if "candidates" in loss.outputs else None,
            over_context=partial(sum_over, group=context_group(micro.cp))))
        count = len(micro.targets)
        return output.loss, torch.tensor(count, dtype=torch.int32, device=self.device), (count, output)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
