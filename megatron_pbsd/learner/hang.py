"""Who keeps a rank waiting: from what every rank says of itself to an error that names the ranks behind. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from megatron_pbsd.controller.failures import PeersHung

RANKS_SHOWN = 8
CALLS_SHOWN = 24


class Frame(NamedTuple):
    """One call of a stack; `code` is the source line, '' when unknown."""

    file: str
    line: int
    function: str
    code: str


class Verdict(NamedTuple):
    """`behind`: the ranks at fault, none when all wait alike. `details`: in words, what each rank does."""

    behind: tuple[int, ...]
    details: str


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    where:       its machine and process, in words.
    entered:     phases entered so far: ranks run the same program, so the same count is the same place in it.
    phase:       the innermost phase it is in, or the last one it was in; '' before the first.
    state:       `inside` the phase; `left` it; `failed` in it with an error of its own, `error`; `broken off`, it was
                 waiting for others when its collective was broken off.
    elapsed_s:   since it entered the phase or, outside, since it left.
    mark:        how far in the phase it is, in its own words; `mark_s` seconds ago.
    stack:       of the thread that runs the phases, outermost call first.
    verdict:     what it found when it outwaited a phase itself.
    """

    where: str
    entered: int
    phase: str
    state: Literal["inside", "left", "failed", "broken off"]
    elapsed_s: float
    mark: str
    mark_s: float
    error: str
    stack: tuple[Frame, ...]
    verdict: Verdict | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits for others: `stack` ends in a collective, or did when that was broken off."""
        return self.state == "broken off" or (self.state == "inside" and is_collective(self.stack))

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(text: bytes) -> Report:
        fields = json.loads(text)
        verdict = fields["verdict"] and Verdict(tuple(fields["verdict"][0]), fields["verdict"][1])
        return Report(**fields | {"stack": tuple(Frame(*frame) for frame in fields["stack"]), "verdict": verdict})

    def __str__(self) -> str:
        phase = f"phase {self.phase!r}"
        if self.state == "failed":
            return f"left {phase} {self.elapsed_s:.1f} s ago with {self.error}"
        if self.state == "broken off":
            return f"was waiting in {phase} until its collective was broken off"
        if self.state == "left":
            return f"is in no phase; it left {phase} {self.elapsed_s:.1f} s ago" if self.phase else (
                "has entered no phase")
        at = f", at {self.mark!r} since {self.mark_s:.1f} s" if self.mark else ""
        return f"{'waits' if self.waits else 'is in no collective'} in {phase} since {self.elapsed_s:.1f} s{at}"


@dataclass(frozen=True)
class Silence:
    """A rank that says nothing of itself, why, and what could be learned of its stack from outside."""

    why: str
    stack: str = ""

    def __str__(self) -> str:
        return self.why


Answer = Report | Silence


class LearnerHung(PeersHung):
    """Rank `rank` outwaited phase `phase`, or its collective broke off, because of the ranks `verdict.behind`."""

    component = "learner"

    def __init__(self, rank: int, phase: str, deadline_s: float, elapsed_s: float, verdict: Verdict):
        super().__init__(rank, phase, deadline_s, elapsed_s, verdict)
        self.rank, self.phase, self.deadline_s, self.elapsed_s, self.verdict = (
            rank, phase, deadline_s, elapsed_s, verdict)

    def __str__(self) -> str:
        behind, details = self.verdict
        cause = f"because of {ranks_text(behind)}" if behind else (
            "though all ranks wait at the same place: their connections are at fault, or an earlier collective")
        return (f"phase {self.phase!r} (deadline {self.deadline_s:g} s) hung on rank {self.rank} after "
                f"{self.elapsed_s:.1f} s {cause}\n{details}")


def is_collective(stack: Sequence[Frame]) -> bool:
    """Whether the innermost Python call waits for other ranks: in torch.distributed, or for a handle it gave out.

    On CUDA collectives run on the device while Python goes on: a rank that waits is seen where it waits for the device.
    """
    if not stack:
        return False
    file, code = stack[-1].file.replace("\\", "/"), stack[-1].code
    if "/torch/cuda/" in file:
        return "synchronize" in code
    # threading's own wait() ends in its acquire().
    return "/torch/distributed/" in file or re.search(r"\bwait\(\)", code) is not None


def judge(rank: int, answers: Mapping[int, Answer]) -> Verdict:
    """What rank `rank`, which waits, makes of the answers of all ranks, its own among them.

    A verdict that another rank has reached is adopted: it was reached before anything was broken off.
    """
    for answer in answers.values():
        if isinstance(answer, Report) and answer.verdict is not None:
            return answer.verdict
    behind = culprits(rank, answers)
    return Verdict(tuple(behind), describe(answers, behind))


def culprits(rank: int, answers: Mapping[int, Answer]) -> list[int]:
    """The ranks that keep rank `rank` and others waiting.

    Those that are gone or failed, if any: others may be late because of them, but not this rank if it does not wait.
    Else those that do something else than wait, whoever is furthest behind first. If all wait, they wait for different
    things: those that wait elsewhere than this rank.
    """
    lost = {r for r, a in answers.items() if isinstance(a, Silence) or a.state == "failed"}
    reports = {r: a for r, a in answers.items() if isinstance(a, Report)}
    mine = reports[rank]
    busy = [r for r, a in reports.items() if not a.waits]
    if lost:
        return sorted(lost | {rank} & set(busy))
    if busy:
        return sorted(busy, key=lambda r: (reports[r].entered, r))
    elsewhere = [r for r, a in reports.items() if (a.entered, a.phase) != (mine.entered, mine.phase)]
    if elsewhere or mine.state != "inside":
        return sorted(elsewhere)
    return sorted(r for r, a in reports.items() if a.state == "inside" and _place(a) != _place(mine))


def _place(report: Report) -> tuple[object, ...]:
    """Where in the program a rank waits: its calls up to the collective."""
    return tuple((frame.file, frame.line) for frame in report.stack)


def describe(answers: Mapping[int, Answer], behind: Sequence[int]) -> str:
    """What each rank at fault does, with its stack; then, in a line each, the others."""
    parts = [f"rank {rank} {_says(answers[rank])}{_stack(answers[rank])}" for rank in behind[:RANKS_SHOWN]]
    if len(behind) > RANKS_SHOWN:
        parts.append(f"and {ranks_text(behind[RANKS_SHOWN:])}")
    others: dict[str, list[int]] = {}
    for rank, answer in sorted(answers.items()):
        if rank not in behind and isinstance(answer, Report):
            others.setdefault(_summary(answer), []).append(rank)
    parts += [f"{ranks_text(ranks)}: {summary}" for summary, ranks in others.items()]
    return "\n".join(parts)


def _says(answer: Answer) -> str:
    return str(answer) if isinstance(answer, Silence) else f"{answer} ({answer.where})"


def _summary(report: Report) -> str:
    """Without times, so that ranks at the same place read alike."""
    if not report.waits:
        return str(report)
    at = f" at {report.mark!r}" if report.mark else ""
    call = next((f for f in reversed(report.stack) if not re.search(r"/(torch|contextlib\.py)", f.file)), None)
    line = f", {call.file}:{call.line} in {call.function}" if call and report.state == "inside" else ""
    return f"waiting in phase {report.phase!r}{at}{line}"


def _stack(answer: Answer) -> str:
    if isinstance(answer, Silence):
        return f"\n{answer.stack.rstrip()}" if answer.stack else ""
    if answer.state == "failed":
        return ""
    lines = [f'  File "{f.file}", line {f.line}, in {f.function}' + (f"\n    {f.code}" if f.code else "")
             for f in answer.stack[-CALLS_SHOWN:]]
    return "\n" + "\n".join(lines) if lines else ""


def ranks_text(ranks: Iterable[int]) -> str:
    """'rank 3', 'ranks 0–2, 7'."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"{'rank' if len(runs) == 1 and len(runs[0]) == 1 else 'ranks'} {text}"
