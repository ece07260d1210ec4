"""Which layout a learner should have: all valid ones that could be fast, what fits, and in what time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_pbsd.config import ParallelConfig, RunConfig
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.layout import layout_problems
from megatron_pbsd.planning.activations import Recompute
from megatron_pbsd.planning.hardware import Cluster
from megatron_pbsd.planning.memory import (
    Engine,
    Layout,
    Numerics,
    by_phase,
    learner_bytes,
    overfull,
    stages,
    state_bytes,
)
from megatron_pbsd.planning.step_time import Work, learner_seconds, micro_batches

TOKENS_MULTIPLE, FULLER = 256, (1, 2, 4)
"""Micro-batches that are tried: the longest sequence, rounded up, and multiples of it."""
SHORTEST_SHARE, MOST_CP = 1024, 16
"""A sequence is not divided further than this."""
MORE_GPUS = (1.5, 2, 3, 4)


@dataclass(frozen=True)
class Question:
    """What is planned. cluster: its GPUs are the learner's. engine: one of its GPUs, None where engines need none.
    colocated: engines share the learner's GPUs. longest: positions of the longest sequence."""

    config: RunConfig
    decoder: Decoder
    cluster: Cluster
    numerics: Numerics
    work: Work
    engine: Engine | None
    colocated: bool
    longest: int
    buckets: float = 0.0
    value_head: bool = False


@dataclass(frozen=True)
class Candidate:
    """A layout, and what becomes of it. phases: bytes by owner on the fullest GPU. excess: bytes too many by phase.
    learner_s: seconds by part; of what does not fit none."""

    layout: Layout
    micro_batches: int
    phases: Mapping[str, Mapping[str, float]]
    excess: Mapping[str, float]
    learner_s: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return not self.excess

    @cached_property
    def seconds(self) -> float:
        return sum(self.learner_s.values())

    @property
    def over(self) -> float:
        """Bytes too many in the worst phase."""
        return max(self.excess.values(), default=0.0)


def evaluate(question: Question, layout: Layout) -> Candidate:
    count = micro_batches(layout, question.work)
    ranks = learner_bytes(question.decoder, layout, question.numerics, count, value_head=question.value_head,
                           length=question.longest)
    # Stages differ, and the fullest in one phase need not be so in another.
    found = [by_phase(question.config, rank, question.engine, question.buckets, question.colocated)
             for rank in ranks]
    phases = {phase: max((one[phase] for one in found), key=lambda owners: sum(owners.values())) for phase in found[0]}
    excess = overfull(phases, question.cluster)
    seconds = {} if excess else learner_seconds(
        question.decoder, layout, question.numerics, question.cluster, question.work)
    return Candidate(layout, count, phases, excess, seconds)


def search(question: Question) -> list[Candidate]:
    """Of all layouts that are tried: those that fit, the fastest first; then others, those that lack least first. Of
    equally fast ones the simplest is first."""
    found = [evaluate(question, layout) for layout in layouts(question)]
    return sorted(found, key=lambda one: (not one.fits, one.over, round(one.seconds, 6), _parts(one.layout)))


def _parts(layout: Layout) -> tuple[int, ...]:
    parallel = layout.parallel
    return parallel.pp * parallel.tp * parallel.cp * parallel.ep * parallel.vpp, layout.micro_batch_tokens


def layouts(question: Question) -> Iterator[Layout]:
    """Those worth a look: valid, no group of tensor parallelism beyond a node, and of those whose parameters,
    gradients and optimizer alone do not fit only the ones that divide most."""
    logits_tokens = question.config.learner.logits_tokens
    recomputes: tuple[Recompute, ...] = ("none", "full") if question.numerics.kernels.flash else (
        "none", "selective", "full")
    for parallel in parallels(question):
        sequence = parallel.tp > 1
        need = -(-(question.longest // parallel.cp) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        for recompute in recomputes:
            for times in FULLER:
                yield Layout(parallel, times * need, recompute, logits_tokens, sequence)


def parallels(question: Question) -> list[ParallelConfig]:
    world, decoder = question.cluster.count, question.decoder
    valid = [parallel for parallel in _divisions(question)
             if not layout_problems(decoder, parallel)]
    room = question.cluster.available
    states = {id(p): max(sum(state_bytes(decoder, p, question.numerics, stage.index, question.value_head).values())
                         for stage in stages(decoder, p)) for p in valid}
    fitting = [p for p in valid if states[id(p)] < room]
    return fitting or sorted(valid, key=lambda p: states[id(p)])[:max(1, world.bit_length())]


def _divisions(question: Question) -> Iterator[ParallelConfig]:
    world, decoder, per_node = question.cluster.count, question.decoder, question.cluster.per_node
    layers = decoder.num_hidden_layers
    experts = decoder.experts.num_experts if decoder.experts else 1
    powers = [2**n for n in range(world.bit_length())]
    for tp in (n for n in powers if n <= per_node):
        for pp in (n for n in range(1, layers + 1) if not world % (tp * n)):
            for cp in (n for n in powers if _divides_well(n, question.longest) and not world % (tp * pp * n)):
                for ep in (n for n in range(1, experts + 1) if not experts % n and not world // pp % n):
                    for etp in sorted({1, tp} if experts > 1 else {1}):
                        if world // pp % (ep * etp):
                            continue
                        for vpp in (1, 2, 4) if pp > 1 else (1,):
                            if pp * vpp <= layers:
                                yield ParallelConfig(world_size=world, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, vpp=vpp)


def _divides_well(cp: int, longest: int) -> bool:
    return cp == 1 or (cp <= MOST_CP and longest // cp >= SHORTEST_SHARE)


def remedies(question: Question, candidate: Candidate) -> list[str]:
    """For a layout that does not fit: each change that alone would make it fit, and what the phase lacks."""
    layout, found = candidate.layout, []

    def fits(**changes: object) -> bool:
        return not _excess(question, replace(layout, **changes))

    if layout.recompute != "full" and fits(recompute="full"):
        found.append("learner.recompute: full")
    need = -(-question.longest // layout.parallel.cp)
    low, high = need - 1, layout.micro_batch_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(micro_batch_tokens=middle) else (low, middle)
    if low >= need:
        found.append(f"learner.micro_batch_tokens <= {low}")
    found += _handed_over(question, layout)
    parallel = layout.parallel
    for times in MORE_GPUS:
        count = int(parallel.world_size * times)
        if count % (parallel.tp * parallel.pp * parallel.cp) or count // parallel.pp % (parallel.ep * parallel.etp):
            continue
        more = replace(layout, parallel=parallel.model_copy(update={"world_size": count}))
        if not _excess(replace(question, cluster=replace(question.cluster, count=count)), more):
            found.append(f"{count} GPUs instead of {parallel.world_size}")
            break
    return found


def _handed_over(question: Question, layout: Layout) -> list[str]:
    """Whether memory that learner and engines give each other would do."""
    config = question.config
    if not question.colocated or (config.learner.release_memory and config.rollout.sleep == "all"):
        return []
    given = config.model_copy(update={
        "learner": config.learner.model_copy(update={"release_memory": True}),
        "rollout": config.rollout.model_copy(update={"sleep": "all"})})
    fits = not _excess(replace(question, config=given), layout)
    return ["learner.release_memory: true with rollout.sleep: all"] if fits else []


def _excess(question: Question, layout: Layout) -> Mapping[str, float]:
    return evaluate(question, layout).excess


def more_gpus(question: Question) -> int | None:
    """The fewest GPUs of those tried on which something fits when all layers are recomputed."""
    for times in MORE_GPUS:
        count = int(question.cluster.count * times)
        larger = replace(question, cluster=replace(question.cluster, count=count))
        tried: Sequence[Layout] = [layout for layout in layouts(larger) if layout.recompute == "full"
                                   and layout.micro_batch_tokens * layout.parallel.cp < 2 * question.longest + 512]
        if any(not _excess(larger, layout) for layout in tried):
            return count
    return None
