"""What only several nodes together can find out: whether their files and their clocks agree."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from launcher.preflight.facts import Canary, Clock, from_json, to_json
from launcher.preflight.meeting import GRACE_S, Meeting

ASKED = 5
"""How often a node is asked for the time: the quickest answer counts."""
ANSWER_S = 5.0
"""For an answer of a node that waits for the question: one that is gone must not use up the others' time."""
LOOK_S = 0.05


def write_canary(folder: Path, meeting: str, rank: int) -> str:
    """The content of this node's file, once it is synced; or what kept it from being written, after '!'."""
    content = f"{rank} {os.urandom(16).hex()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with canary_path(folder, meeting, rank).open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"!{error}"
    return content


def canary_path(folder: Path, meeting: str, rank: int) -> Path:
    return folder / f".preflight-{meeting}-{rank}"


def look_for_canaries(
    folder: Path, meeting: str, reader: int, written: Mapping[int, str], deadline_s: float
) -> Canary:
    """Until this node has read what every other one wrote, by rank in `written`, or the deadline has come."""
    began = time.monotonic()
    unseen = {writer: f"could not be written: {content[1:]}" if content.startswith("!") else ""
              for writer, content in written.items() if writer != reader}
    waiting = {writer for writer, reason in unseen.items() if not reason}
    slowest, seconds = None, 0.0
    while waiting:
        for writer in sorted(waiting):
            unseen[writer] = _difference(canary_path(folder, meeting, writer), written[writer])
            if not unseen[writer]:
                waiting.remove(writer)
                slowest, seconds = writer, time.monotonic() - began
        if time.monotonic() - began > deadline_s:
            break
        if waiting:
            time.sleep(LOOK_S)
    return Canary(reader, seconds, slowest, {writer: reason for writer, reason in unseen.items() if reason})


def _difference(path: Path, content: str) -> str:
    try:
        return "" if (found := path.read_text()) == content else f"another content, of {len(found)} bytes"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


def canaries(meeting: Meeting, ident: str, folder: Path, members: Collection[int]) -> dict[int, Canary]:
    """By reader. At node 0 those of all that answered, elsewhere this node's own."""
    deadline_s = meeting.place.deadline_s
    meeting.put("canary", write_canary(folder, ident, meeting.rank).encode())
    written = {rank: text.decode() for rank, text in meeting.gather("canary", members, deadline_s).items()}
    mine = look_for_canaries(folder, ident, meeting.rank, written, deadline_s / 2)
    meeting.put("canaries", to_json(mine))
    if meeting.rank:
        return {meeting.rank: mine}
    found = meeting.gather("canaries", members, 1.5 * deadline_s + GRACE_S)
    return {rank: from_json(Canary, text) for rank, text in found.items()}


def remove_canary(folder: Path, ident: str, rank: int) -> None:
    with suppress(OSError):
        canary_path(folder, ident, rank).unlink()


def answer_for_clock(meeting: Meeting, clock: Callable[[], float]) -> None:
    """Another node's part of `clocks`."""
    for turn in range(ASKED):
        meeting.awaited(f"clock/{meeting.rank}/asked/{turn}", 3 * meeting.place.deadline_s + GRACE_S)
        meeting.announce(f"clock/{meeting.rank}/{turn}", repr(clock()).encode())


def clocks(meeting: Meeting, members: Collection[int], clock: Callable[[], float]) -> dict[int, Clock]:
    """At node 0: how far other nodes' clocks are from its own, of those that answered in time. A node's answer was
    given between question and reply, so the offset is wrong by half of the time in between at most (Cristian 1989)."""
    found: dict[int, Clock] = {}
    limit_s = min(ANSWER_S, meeting.place.deadline_s)
    for rank in sorted(set(members) - {0}):
        for turn in range(ASKED):
            asked, began = clock(), time.monotonic()
            meeting.announce(f"clock/{rank}/asked/{turn}", b"")
            answer = meeting.heard(f"clock/{rank}/{turn}", limit_s)
            if answer is None:
                break
            half = (time.monotonic() - began) / 2
            if rank not in found or half < found[rank].uncertainty_s:
                found[rank] = Clock(rank, float(answer) - (asked + half), half)
    return found
