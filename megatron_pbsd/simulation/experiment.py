"""All policies on one workload, and how they compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from megatron_pbsd.errors import UsageError, did_you_mean
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.policies.oracle import Oracle, ToldOracle
from megatron_pbsd.rollout.scheduler import Policy
from megatron_pbsd.simulation.bounds import bounds
from megatron_pbsd.simulation.cluster import Cluster, Outcome, SimulationError
from megatron_pbsd.simulation.cost import cost_model
from megatron_pbsd.simulation.speculation import Speculation
from megatron_pbsd.simulation.workload import Job, Workload, jobs

OTHER_PROMPTS = 10_000
"""Far from all seeds that are asked for."""
BASELINE, BOUND = "group_pinned", "oracle"
SPECULATION, HISTORY, CORRELATION = "+speculation", "+history", "+correlation"


class Earlier(NamedTuple):
    """What a policy knows of earlier rollouts. lengths: of one answer to each prompt. share: as of `LengthHistory`."""

    lengths: dict[str, int] | None = None
    share: float | None = None


POLICIES: dict[str, Callable[[Workload, Sequence[Job], Earlier], Policy]] = {
    "group_pinned": lambda workload, asked, earlier: GroupPinned(),
    "least_loaded": lambda workload, asked, earlier: LeastLoaded(),
    "divided": lambda workload, asked, earlier: Divided(workload.chunk_tokens),
    "context_aware": lambda workload, asked, earlier: ContextAware(
        workload.chunk_tokens, LengthContext(workload.requests.limit, earlier.lengths)),
    "longest_remaining": lambda workload, asked, earlier: LongestRemaining(
        workload.chunk_tokens, LengthModel(workload.requests.limit, earlier.lengths, earlier.share)),
    "oracle": lambda workload, asked, earlier: Oracle(
        workload.chunk_tokens, {job.request_id: job.tokens for job in asked}),
    "told_oracle": lambda workload, asked, earlier: ToldOracle(
        workload.chunk_tokens, workload.requests.limit, {job.request_id: job.tokens for job in asked}),
}
"""By name. `+speculation` adds speculative decoding, `+correlation` how alike the answers to one prompt were in an
earlier rollout of other prompts, `+history` the same of an earlier epoch, and the length of one answer to each prompt
in it."""
DEFAULT = (*POLICIES, "longest_remaining+correlation", "longest_remaining+history",
           "context_aware+speculation", "longest_remaining+speculation")


@dataclass(frozen=True)
class Experiment:
    """outcomes: by policy, one per seed. jobs: of each seed."""

    workload: Workload
    jobs: list[list[Job]]
    outcomes: dict[str, list[Outcome]]

    def results(self) -> dict[str, Any]:
        """Means over seeds, as `pbsd simulate --json` prints them."""
        published = self.workload.published
        base = fmean(o.total_s for o in self.outcomes[BASELINE])
        best = fmean(o.total_s for o in self.outcomes[BOUND]) if BOUND in self.outcomes else None
        base_tail = fmean(o.tail_s for o in self.outcomes[BASELINE])
        rows = {}
        for name, outcomes in self.outcomes.items():
            total, tail = fmean(o.total_s for o in outcomes), fmean(o.tail_s for o in outcomes)
            row = {"throughput_rel": base / total, "total_s": total, "tail_s": tail, "tail_rel": tail / base_tail,
                   "idle": fmean(o.idle for o in outcomes)}
            if best is not None and SPECULATION not in name:
                row["gap_closed"] = (base - total) / (base - best)
            row |= {"preemptions": fmean(sum(e.counters.preemptions for e in o.engines) for o in outcomes),
                    "moves": fmean(o.moves for o in outcomes), "moved_tokens": fmean(o.moved_tokens for o in outcomes),
                    "prefilled_tokens": fmean(sum(e.counters.prefilled_tokens for e in o.engines) for o in outcomes),
                    "decisions": fmean(o.decisions for o in outcomes),
                    "totals_s": [o.total_s for o in outcomes]}
            if outcomes[0].lengths:
                row["predicted_lengths"] = {key: fmean(o.lengths[key] for o in outcomes) for key in outcomes[0].lengths}
            if name in published:
                row["published"] = published[name].model_dump(exclude_none=True)
            rows[name] = row
        return {"workload": self.workload.name, "seeds": len(self.jobs), "policies": rows, "bounds": self.bounds()}

    def bounds(self) -> dict[str, float]:
        workload, cost = self.workload, cost_model(self.workload)
        found = [bounds(asked, cost, workload.engines, workload.engine.slots) for asked in self.jobs]
        return {name: fmean(one[name] for one in found) for name in found[0]}


def run_experiment(workload: Workload, progress: Callable[[str], None] = lambda text: None) -> Experiment:
    """UsageError when a policy is unknown; SimulationError when one is faster than the bounds allow."""
    chosen = (BASELINE, *(name for name in workload.policies or DEFAULT if name != BASELINE))
    for name in chosen:
        if (bare := _bare(name)) not in POLICIES:
            raise UsageError(f"policies = {name!r}: unknown, expected one of {', '.join(POLICIES)}, with any of "
                             f"{SPECULATION}, {HISTORY}, {CORRELATION}{did_you_mean(bare, POLICIES)}")
    seeds = range(workload.seed, workload.seed + workload.seeds)
    asked = [jobs(workload.requests, seed) for seed in seeds]
    outcomes: dict[str, list[Outcome]] = {}
    for name in chosen:
        for seed, work in zip(seeds, asked, strict=True):
            progress(f"{name}, seed {seed}")
            outcomes.setdefault(name, []).append(simulate(workload, name, work, seed))
    return Experiment(workload, asked, outcomes)


def _bare(name: str) -> str:
    return name.replace(SPECULATION, "").replace(HISTORY, "").replace(CORRELATION, "")


def _earlier(workload: Workload, name: str, seed: int) -> Earlier:
    lengths, share = None, None
    if HISTORY in name:
        epoch = jobs(workload.requests, seed, epoch=1)
        lengths = {job.group_id: job.tokens for job in epoch[::workload.requests.group_size]}
        share = share_of(epoch)
    if CORRELATION in name:
        share = share_of(jobs(workload.requests, seed + OTHER_PROMPTS))
    return Earlier(lengths, share)


def share_of(asked: Sequence[Job]) -> float | None:
    """As a run learns it from a rollout that is over."""
    history, groups = LengthHistory(), defaultdict(list)
    for job in asked:
        groups[job.group_id].append(job.tokens)
    for group, lengths in groups.items():
        history.asked(group, lengths)
    return history.share


def simulate(workload: Workload, name: str, asked: Sequence[Job], seed: int) -> Outcome:
    """One policy on one draw of lengths."""
    cost, engine = cost_model(workload), workload.engine
    policy = POLICIES[_bare(name)](workload, asked, _earlier(workload, name, seed))
    speculation = Speculation() if SPECULATION in name else None
    outcome = Cluster(cost, workload.engines, engine.slots, workload.requests.limit, policy, engine.watermark,
                      speculation).run(asked)
    if type(policy) in (ContextAware, LongestRemaining):
        outcome.lengths = policy.lengths.calibration.metrics()
    if speculation is None:
        for bound, seconds in bounds(asked, cost, workload.engines, engine.slots).items():
            if outcome.total_s < seconds * (1 - 1e-9):
                raise SimulationError(f"{name} took {outcome.total_s:.1f} s, less than the bound {bound} of "
                                      f"{seconds:.1f} s: the simulation is wrong")
    return outcome
