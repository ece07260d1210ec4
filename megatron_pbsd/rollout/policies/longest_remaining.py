"""The largest likely remaining length first: what is known of a group, and how far a request has come, together.

Differs from `context_aware` in what it learns (`length_model`: all members' progress, not the longest finished length
alone; `length_correlation`: how much siblings say of each other), in ranking by what remains instead of by the whole
(so that all requests end at about the same time, however late it turned out that they are long), in learning about all
groups at the same pace before it knows any of them, and in moving requests whenever engines are unevenly loaded.
"""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.queues import TURN_EVERY, RequestQueue, Turns
from megatron_pbsd.rollout.routing import balanced
from megatron_pbsd.rollout.scheduler import Request

PROBES_AHEAD, LARGEST_GROUP = 2.0 ** 30, 2.0 ** 16


class LongestRemaining:
    """Probes first: as long as none of a group has finished, its first request goes before all others."""

    admits = True

    def __init__(self, chunk_tokens: int, lengths: LengthModel, turn_every: int = TURN_EVERY):
        self.chunk_tokens: int | None = chunk_tokens
        self.lengths = lengths
        self._members: dict[str, list[Request]] = {}
        self._queue = RequestQueue(self._key)
        self._turns = Turns(turn_every)

    def _key(self, request: Request) -> float:
        """Minus the urgency, in one number because comparing tuples takes several times as long: probes are ahead by
        more than any length, and between equal ones the begun are, then the groups' first members."""
        ahead = 0.5 if request.begun else 0.0
        if request.place == 0 and not self.lengths.known(request.group_id):
            ahead += PROBES_AHEAD
        return request.place / LARGEST_GROUP - ahead - self._urgency(request)

    def _urgency(self, request: Request) -> float:
        return self.lengths.urgency(request.group_id, request.generated)

    def wait(self, request: Request) -> None:
        tokens = request.generated
        if request.ticket == 1:
            members = self._members.setdefault(request.group_id, [])
            request.place = len(members)
            members.append(request)
            self.lengths.submitted()
        elif tokens and self.lengths.reached(request.group_id, request.request_id, tokens):
            self._reorder(request.group_id)
        self._queue.push(request)
        self._turns.push(request)

    def _reorder(self, group_id: str) -> None:
        for member in self._members[group_id]:
            if member.waiting:
                self._queue.push(member)

    def head(self) -> Request | None:
        return self._turns.due() or self._queue.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        return balanced(request, tokens, engines)

    def started(self, request: Request) -> None:
        self._turns.placed()
        if not request.generated:
            self.lengths.started(request.group_id, request.request_id)

    def finished(self, request: Request) -> None:
        if self.lengths.finished(request.group_id, request.request_id, request.generated):
            self._reorder(request.group_id)
