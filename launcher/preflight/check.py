"""What several nodes find out together, step by step."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.preflight import exchange
from launcher.preflight.bandwidth import Join, all_reduce, gloo_over, measured_pairs, nccl_over
from launcher.preflight.facts import AllReduce, NodeFacts, Observed, from_json, to_json
from launcher.preflight.meeting import GRACE_S, Meeting, Place, PreflightError
from launcher.preflight.networks import choose


def together(
    facts: NodeFacts, place: Place, shared: Path, clock: Callable[[], float], phase: Callable[[str], None],
    probes_s: float,
) -> Observed:
    """The same at every node. PreflightError when node 0 does not answer, or this one came too late.

    shared: a folder that all nodes see. clock: seconds since 1970. phase: is told what is done next. probes_s: how much
    later than this one other nodes may come, beside the deadline, for the time that they look at themselves.
    """
    phase("the rendezvous")
    meeting = Meeting(place)
    meeting.put("facts", to_json(facts))
    nodes, ident = _assembled(meeting, probes_s)
    try:
        observed = _Steps(meeting, nodes, ident, shared, clock, phase).observe()
    finally:
        exchange.remove_canary(shared, ident, place.rank)
    phase("parting")
    meeting.close({node.rank for node in nodes} - observed.lost.keys())
    return observed


def _assembled(meeting: Meeting, probes_s: float) -> tuple[list[NodeFacts], str]:
    """(facts of the nodes that came in time, a name for this meeting)."""
    wait = meeting.place.deadline_s + probes_s
    if meeting.rank == 0:
        came = meeting.gather("facts", range(meeting.place.size), wait)
        meeting.announce("members", to_json([uuid.uuid4().hex[:12], list(came)]))
    ident, ranks = from_json(list, meeting.awaited("members", wait + GRACE_S))
    if meeting.rank not in ranks:
        raise PreflightError(f"node {meeting.rank} came to the rendezvous after the deadline; nodes {ranks} went on "
                             "without it")
    found = meeting.gather("facts", ranks, meeting.place.deadline_s)
    return [from_json(NodeFacts, text) for text in found.values()], ident


class _Steps:
    """Node 0 says who is in which step; who does not answer in one is not in the next."""

    def __init__(self, meeting: Meeting, nodes: list[NodeFacts], ident: str, shared: Path,
                 clock: Callable[[], float], phase: Callable[[str], None]):
        self.meeting, self.nodes, self.ident, self.shared, self.clock = meeting, nodes, ident, shared, clock
        self.phase = phase
        self.left = {node.rank for node in nodes}
        self.lost: dict[int, str] = {}

    def observe(self) -> Observed:
        meeting, place = self.meeting, self.meeting.place
        self.phase("files that all see")
        canaries = exchange.canaries(meeting, self.ident, self.shared, self.left)
        self._answered(canaries, "when others' files were looked for")
        self.phase("clocks")
        clocks = {}
        if self._takes_part("clocks", self.left):
            if meeting.rank == 0:
                clocks = exchange.clocks(meeting, self.left, self.clock)
            else:
                exchange.answer_for_clock(meeting, self.clock)
        self._answered({0: None, **clocks}, "when it was asked for the time")
        self.phase("exchanges between two nodes")
        backend, devices, join = _transport(self.nodes, meeting.rank)
        pairs, gone = [], {}
        if self._takes_part("pairs", self.left):
            pairs, gone = measured_pairs(meeting, self.left, backend, devices, join)
            self._answered(self.left - gone.keys(), "in exchanges between two nodes")
        self.phase("an exchange between all nodes")
        sound = not self.lost and all(pair.gb_s is not None for pair in pairs)
        reduced = self._reduced(backend, join, self.left if sound and len(self.left) > 1 else set())
        self.phase("bringing results together")
        if meeting.rank == 0:
            missing = {rank: place.names[rank] if place.names else "" for rank in range(place.size)
                       if rank not in {node.rank for node in self.nodes}}
            meeting.announce("observed", to_json(Observed(
                tuple(self.nodes), place.size, backend, missing, self.lost, tuple(canaries.values()),
                tuple(clocks.values()), tuple(pairs), tuple(reduced.values()))))
        return from_json(Observed, meeting.awaited("observed", place.deadline_s + GRACE_S))

    def _takes_part(self, step: str, ranks: set[int]) -> bool:
        """Whether this node does; PreflightError when it has been given up."""
        if self.meeting.rank == 0:
            self.meeting.announce(f"{step} of", to_json([sorted(ranks), sorted(self.left)]))
        taking, left = from_json(list, self.meeting.awaited(f"{step} of", 3 * self.meeting.place.deadline_s + GRACE_S))
        self.left = set(left)
        if self.meeting.rank not in self.left:
            raise PreflightError(f"node {self.meeting.rank} answered too late to be in {step}; nodes {left} went on "
                                 "without it")
        return self.meeting.rank in taking

    def _answered(self, answers: Mapping[int, Any] | set[int], question: str) -> None:
        """At node 0, those without an answer are given up."""
        if self.meeting.rank == 0:
            self.lost |= {rank: question for rank in self.left - set(answers)}
            self.left -= self.lost.keys()

    def _reduced(self, backend: str, join: Join, ranks: set[int]) -> dict[int, AllReduce]:
        if not self._takes_part("all-reduce", ranks):
            return {}
        self.meeting.put("all-reduce", to_json(all_reduce(self.meeting, self.left, backend, join)))
        if self.meeting.rank:
            return {}
        said = self.meeting.gather("all-reduce", self.left, self.meeting.place.deadline_s)
        self._answered(said, "in an exchange between all nodes")
        return {rank: from_json(AllReduce, text) for rank, text in said.items()}


def _transport(nodes: list[NodeFacts], rank: int) -> tuple[str, int, Join]:
    """(backend, GPUs that every node has, how this node joins groups)."""
    node = next(node for node in nodes if node.rank == rank)
    interface = choose(nodes).interfaces.get(rank)
    devices = min(len(one.gpus) for one in nodes)
    if devices and all("NCCL" in one.versions for one in nodes):
        return "nccl", devices, nccl_over(interface.name if interface else "")
    return "gloo", 1, gloo_over(interface.address if interface else node.route_address)
