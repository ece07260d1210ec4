"""Where the learner's ranks meet."""

from __future__ import annotations

import errno
import socket

from megatron_pbsd.errors import PbsdError

HOST = "127.0.0.1"


def rendezvous_address(port: int | None) -> str:
    """'tcp://host:port' with the configured port, or a free one. PbsdError when it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            with socket.socket() as other:
                other.bind((HOST, 0))
                raise PbsdError(f"learner.port = {port} is taken; {other.getsockname()[1]} is free, and without the "
                                "key a free one is found") from error
        return f"tcp://{HOST}:{probe.getsockname()[1]}"
