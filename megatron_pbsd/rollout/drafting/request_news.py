"""What a request to a server says of its group, beside what it asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Protocol

GROUP, REQUEST, SIBLINGS = "pbsd_group", "pbsd_request", "pbsd_siblings"

Told = dict[str, str]
"""What a request says, by name."""


class News(Protocol):
    """See engines.protocol.SiblingTokens, which would bring more with it than a server needs."""

    @property
    def request_id(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def tokens(self) -> Sequence[int]: ...


def told(group: str, request: str, siblings: Iterable[News]) -> Told:
    """Of a request that continues trajectory `request`: its group, and what siblings did elsewhere. A trajectory
    without a group is one of its own."""
    said = {GROUP: group or request, REQUEST: request}
    if news := [[sibling.request_id, sibling.start, list(sibling.tokens)] for sibling in siblings]:
        said[SIBLINGS] = json.dumps(news)
    return said


def taken(said: Told) -> list[tuple[str, int, list[int]]]:
    """Siblings, their first tokens' positions and their tokens; taken out of `said`, so that they are told once."""
    return [(request, start, tokens) for request, start, tokens in json.loads(said.pop(SIBLINGS, "[]"))]
