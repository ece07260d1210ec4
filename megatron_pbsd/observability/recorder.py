"""What a run leaves behind: config.yaml, metrics.jsonl, trajectories/, trace.json and report.html in its folder."""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from megatron_pbsd.config import ObservabilityConfig, RunConfig
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.observability.progress import Progress, make_progress
from megatron_pbsd.observability.records import (
    CONFIG,
    METRICS,
    TRACE,
    TRAJECTORIES,
    RecordedTrajectory,
    Row,
    read_metrics,
    recorded_steps,
    trajectory_file,
    write_atomically,
)
from megatron_pbsd.observability.report import write_report
from megatron_pbsd.observability.trace import Trace
from megatron_pbsd.observability.wandb_sink import WandbSink
from megatron_pbsd.trajectory import Group, Trajectory, trajectories_of

PHASES = ("weights", "rollout", "reward", "log_probs", "train", "evaluation", "checkpoint")


class RecordError(PbsdError):
    """Something that cannot be recorded as it is."""

    component = "observability"


class Recorder:
    """Collects what happens in a step and writes it down when the step is logged.

    `first_step` is the first row that will be logged: 0 (the starting policy), or the step after the checkpoint of a
    resumed run; records of that step and later ones, which will be made again, are cut off.

    A context manager: leaving it closes the files and, unless the run failed, writes the report.

        with Recorder(folder, config, run, first_step) as recorder:
            with recorder.phase("rollout"): ...
            recorder.trajectories(step, groups, environment.decode)
            recorder.log(step, {"reward/mean": 0.5})
    """

    def __init__(self, folder: str | Path, config: ObservabilityConfig, run: RunConfig, first_step: int,
                 progress: Progress | None = None):
        self.folder = Path(folder)
        (self.folder / TRAJECTORIES).mkdir(parents=True, exist_ok=True)
        self._kept = config.trajectories_kept
        self._step = first_step
        self._seconds: dict[str, float] = {}
        self._depth = 0
        self._step_started: float | None = None
        rows = self._cut(first_step)
        write_atomically(self.folder / CONFIG, [yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).rstrip()])
        with ExitStack() as resources:  # what is open is closed again if the next thing cannot be opened
            self._metrics = resources.enter_context((self.folder / METRICS).open("a", encoding="utf-8"))
            self._trace = Trace(self.folder / TRACE)
            resources.callback(self._trace.close)
            self._wandb = WandbSink(self.folder, run) if config.wandb != "disabled" else None
            if self._wandb:
                resources.callback(self._wandb.close)
            self.progress = progress or make_progress(config.progress, run.name, run.steps, rows)
            resources.callback(self.progress.close)
            self._resources = resources.pop_all()

    def _cut(self, first_step: int) -> list[Row]:
        kept = [row for row in read_metrics(self.folder) if row["step"] < first_step]
        write_atomically(self.folder / METRICS, [json.dumps(row) for row in kept])
        for step in recorded_steps(self.folder):
            if step >= first_step:
                trajectory_file(self.folder, step).unlink()
        return kept

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent in the block counts as `time/<name>_s` of the current step.

        A phase inside another one is its own span of the trace, but its time is the outer one's.
        """
        started = time.perf_counter()
        if self._step_started is None:
            self._step_started = started
        self._depth += 1
        self.progress.phase(name)
        try:
            with self._trace.span(name, step=self._step):
                yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def lane(self, lane: str, name: str, start_ns: int, end_ns: int, **arguments: Any) -> None:
        """Something that went on beside the phases, in a lane of its own in the trace. Times are `time.time_ns`."""
        self._trace.add(name, start_ns, end_ns - start_ns, lane=lane, **arguments)

    def rollout_progress(self, finished: int, total: int) -> None:
        """Trajectories of the current rollout that are finished, of how many."""
        self.progress.rollout(finished, total)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the row of `step`, with the phases' times, and begin the next step.

        RecordError for a value that is no finite number, a key that the recorder computes, or a step not after the
        last one.
        """
        if step < self._step:
            raise RecordError(f"step {step} was logged after step {self._step - 1}: each step has one row, in order")
        row = {"step": step, **{key: _number(key, value, step) for key, value in metrics.items()}, **self._times()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._wandb:
            self._wandb.log(step, row)
        self.progress.step(row)
        self._step = step + 1
        self._seconds = {}
        self._step_started = time.perf_counter()

    def _times(self) -> Row:
        now = time.perf_counter()
        total = now - (self._step_started if self._step_started is not None else now)
        seconds = {**dict.fromkeys(PHASES, 0.0), **self._seconds}
        times = {f"time/{name}_s": round(value, 6) for name, value in seconds.items()}
        return {**times, "time/other_s": round(max(0.0, total - sum(seconds.values())), 6),
                "time/step_s": round(total, 6)}

    def trajectories(self, step: int, groups: Sequence[Group], decode: Callable[[Sequence[int]], str]) -> None:
        """Keep the step's trajectories with their text, as trajectories/step_000012.jsonl."""
        recorded = (_with_text(trajectory, decode) for trajectory in trajectories_of(groups))
        write_atomically(trajectory_file(self.folder, step), (json.dumps(r.to_json()) for r in recorded))
        if self._kept:
            for old in recorded_steps(self.folder)[: -self._kept]:
                trajectory_file(self.folder, old).unlink()

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()
        if kind is None:
            write_report(self.folder)


def _with_text(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> RecordedTrajectory:
    return RecordedTrajectory(
        trajectory, decode(trajectory.prompt), decode(trajectory.privileged_prompt),
        tuple((decode(turn.tokens), decode(turn.observation) if turn.observation else "")
              for turn in trajectory.turns))


def _number(key: str, value: Any, step: int) -> float:
    if key == "step" or (key.startswith("time/") and key.endswith("_s")):
        raise RecordError(f"metric {key!r} is the recorder's own: times come from phase()")
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RecordError(f"metric {key!r} of step {step} is {value!r}, expected a number")
    if not math.isfinite(value):
        raise RecordError(f"metric {key!r} of step {step} is {value}, expected a finite number")
    return value if isinstance(value, int) else float(value)
