"""TCP ports of this machine."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = range(20_000, 32_768)
"""Between those of Ray's workers and those that Linux gives to whoever asks for any: nobody else takes one by chance
before who was told of it listens there."""


def is_free(port: int) -> bool:
    """Whether nobody listens on it at the moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_near(port: int) -> int | None:
    """The next free one, or the nearest below; None if there is none that a user may take."""
    return next((p for p in (*range(port + 1, 65536), *range(port - 1, 1023, -1)) if is_free(p)), None)


def free_port() -> int:
    """One of `PORTS` that nobody listens on at the moment. OSError when there is none."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no TCP port from {PORTS.start} to {PORTS.stop - 1} is free")
