"""Waiting for many components at once, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.runtime import Client, Future

# When one rank dies, its peers' collectives fail too, and may be heard of first.
CAUSE_WAIT_S = 0.5


def gather(client: Client, futures: Sequence[Future], *, phase: str, deadline_s: float) -> list[Any]:
    """Results in the order of `futures`. The first failure is raised at once, whoever else is still busy or hangs.

    DeadlineExpired names those that have not answered within `deadline_s`, with their stacks.
    """
    end = time.monotonic() + deadline_s
    results: dict[int, Any] = {}
    pending = list(futures)
    while pending:
        done, pending = client.wait(pending, 1, max(0.0, end - time.monotonic()))
        if not done:
            names = [future.name for future in pending]
            raise DeadlineExpired(phase, deadline_s, names, client.stacks(pending))
        for future in done:
            try:
                results[id(future)] = client.result(future)
            except ComponentDied:
                raise
            except Exception:
                _raise_death_among(client, pending)
                raise
    return [results[id(future)] for future in futures]


def _raise_death_among(client: Client, pending: Sequence[Future]) -> None:
    end = time.monotonic() + CAUSE_WAIT_S
    while pending:
        done, pending = client.wait(pending, 1, max(0.0, end - time.monotonic()))
        if not done:
            return
        for future in done:
            try:
                client.result(future)
            except ComponentDied:
                raise
            except Exception:
                # A consequence of the failure that the caller is about to raise.
                continue
