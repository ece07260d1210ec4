"""HTTP to a server on this machine."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException
from typing import Any


class Unreachable(Exception):
    """Nobody answers: the server is gone, or hangs."""


class Refused(Exception):
    """The server answers that it will not. message: why."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}: {message}")
        self.status, self.message = status, message


class Client:
    """May be used by many threads: each call has a connection of its own, which costs little on one machine.

    deadline_s: for how long a server that says nothing is waited for.
    """

    def __init__(self, port: int, deadline_s: float):
        self.port, self.deadline_s = port, deadline_s

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The reply, decoded. Unreachable, Refused."""
        return json.loads(self._call("POST", path, json.dumps(body or {}).encode()) or b"null")

    def get(self, path: str, deadline_s: float | None = None) -> str:
        return self._call("GET", path, None, deadline_s).decode()

    def _call(self, method: str, path: str, body: bytes | None, deadline_s: float | None = None) -> bytes:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=deadline_s or self.deadline_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(response.status, message_of(content))
        return content


def message_of(content: bytes) -> str:
    """What an error's body says: SGLang has several forms for it."""
    try:
        said = json.loads(content)
    except ValueError:
        return content.decode(errors="replace").strip()
    for key in ("error", "message"):
        while isinstance(said, dict) and key in said:
            said = said[key]
    return said if isinstance(said, str) else json.dumps(said)
