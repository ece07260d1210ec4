"""Waiting for many components at once, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megatron_pbsd.controller.failures import ComponentDied, ComponentHung, DeadlineExpired, PeersHung
from megatron_pbsd.controller.runtime import Client, Future

# When one rank fails, its peers' collectives fail too, and may be heard of first.
CAUSE_WAIT_S = 0.5
# Peers that know it was not them have waited already: worth some more to hear of a death, which says it best.
BLAMED_WAIT_S = 2.0


def gather(client: Client, futures: Sequence[Future], *, phase: str, deadline_s: float) -> list[Any]:
    """Results in the order of `futures`. A failure is raised at once, whoever else is still busy or hangs.

    Of failures at about the same time the cause is raised: a death before anything else, and PeersHung, which blames
    others, only when they say nothing themselves.
    DeadlineExpired names those that have not answered within `deadline_s`, with their stacks.
    """
    end = time.monotonic() + deadline_s
    results: dict[int, Any] = {}
    pending = list(futures)
    while pending:
        done, pending = client.wait(pending, 1, max(0.0, end - time.monotonic()))
        if not done:
            names = list(dict.fromkeys(future.name for future in pending))
            raise DeadlineExpired(phase, deadline_s, names, client.stacks(pending))
        for i, future in enumerate(done):
            try:
                results[id(future)] = client.result(future)
            except ComponentDied:
                raise
            except Exception as error:
                cause = _cause(client, error, [*done[i + 1 :], *pending])
                if cause is error:
                    raise
                raise cause from None
    return [results[id(future)] for future in futures]


def end_hung(client: Client, expired: DeadlineExpired, futures: Sequence[Future]) -> list[ComponentHung]:
    """End the processes of the components that `expired` names; `futures` are what they owe. Raises `expired` where
    components have no processes of their own."""
    if not client.end([future for future in futures if future.name in expired.missing]):
        raise expired
    return [ComponentHung(name, expired) for name in expired.missing]


def _cause(client: Client, error: Exception, pending: Sequence[Future]) -> Exception:
    """The first of the failures, among `error` and those that follow shortly, that the others come from."""
    end = time.monotonic() + (BLAMED_WAIT_S if isinstance(error, PeersHung) else CAUSE_WAIT_S)
    while pending:
        done, pending = client.wait(pending, 1, max(0.0, end - time.monotonic()))
        if not done:
            break
        for future in done:
            try:
                client.result(future)
            except ComponentDied as death:
                return death
            except Exception as other:
                if isinstance(error, PeersHung) and not isinstance(other, PeersHung):
                    error = other
    return error
