"""TCP ports of this machine."""

from __future__ import annotations

import socket


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
