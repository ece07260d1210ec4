"""Where a run goes on from, and what one that fails leaves behind for that."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_pbsd.checkpointing import recovery
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.manifest import Contents, read_manifest
from megatron_pbsd.checkpointing.store import LATEST, CheckpointStore, complete, resolve, step_of
from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.prompts import Stream, check_position, position
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.request import Started

CARRIED = "carried.json"
"""In a checkpoint: groups that were begun and not trained on."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    done:        training steps that are behind the weights (0 in a new run).
    checkpoint:  what the learner loads; None for the policy of `model.path`. saved: steps behind it.
    recovered:   weights to replace those of the checkpoint, newer than it; None for those of the checkpoint itself.
    stream:      where it is in its prompts.
    """

    done: int = 0
    checkpoint: Path | None = None
    saved: int = 0
    recovered: Path | None = None
    stream: Stream = field(default_factory=Stream)

    def metrics(self, step: int) -> dict[str, float]:
        """What the first step's row says of weights that are newer than the optimizer's state."""
        if self.recovered is None or step != self.done + 1:
            return {}
        return {"recovered/weights_step": float(self.done), "recovered/optimizer_step": float(self.saved)}


def find_start(checkpoints: CheckpointStore, config: RunConfig, resume: str | None) -> Start:
    """`resume`: the checkpoint to go on from, None for a new run; the newest one need not exist.

    With the newest one go weights that were recovered, if they are newer. Without: who names a checkpoint gets it as it
    is. CheckpointError when what there is is damaged, UsageError when it is not this run's.
    """
    if resume is None:
        return Start()
    folder = checkpoints.folder
    checkpoint = checkpoints.newest() if resume == LATEST else checkpoints.select(resume)
    contents = None if checkpoint is None else read_manifest(checkpoint).contents
    saved, recovered = contents.step if contents else 0, None
    if resume == LATEST and (newer := _recovered(folder, checkpoint)) and newer.step > saved:
        contents, recovered = newer, folder / recovery.RECOVERED
        _say(f"recovered weights of step {newer.step} from the engines; optimizer state "
             + (f"of step {saved}" if checkpoint else "new: no checkpoint had been made"))
    if resume != LATEST and (aside := recovery.set_aside(folder)):
        _say(f"weights that were recovered from the engines are not used; they are now in {aside}")
    if contents is None:
        return Start()
    stream = Stream(check_position(contents.position, config), carried_in(recovered or checkpoint))
    check_carried(stream, config, contents.step)
    return Start(contents.step, checkpoint, saved, recovered, stream)


def carried_file(stream: Stream) -> dict[str, bytes]:
    """File name → content: what a checkpoint keeps of the groups that are carried, if there are any."""
    if not stream.carried:
        return {}
    return {CARRIED: json.dumps([group.to_json() for group in stream.carried], separators=(",", ":")).encode()}


def carried_in(checkpoint: Path) -> tuple[Started, ...]:
    """Inverse of `carried_file`, from a checkpoint that has been verified."""
    path = checkpoint / CARRIED
    if not path.exists():
        return ()
    try:
        return tuple(map(Started.from_json, json.loads(path.read_bytes())))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold carried groups: {type(error).__name__}: {error}") from error


def check_carried(stream: Stream, config: RunConfig, version: int) -> None:
    """UsageError when groups that are carried are already too old for the first step, which trains `version`."""
    behind = {group.group_id: version - group.oldest for group in stream.carried if group.oldest is not None}
    late = [name for name, count in behind.items() if count > config.rollout.max_staleness]
    if late:
        most = max(behind.values())
        raise UsageError(
            f"rollout.max_staleness = {config.rollout.max_staleness}, but the checkpoint carries {len(late)} groups "
            f"whose oldest tokens are up to {most} weight versions behind: set it to at least {most}, or begin a new "
            "run with the exported policy")


@contextmanager
def leaving_weights(publisher: Publisher, checkpoints: Path, config: RunConfig,
                    stream: Callable[[], Stream]) -> Iterator[None]:
    """If the block fails, the learner is lost, and its weights with it unless a checkpoint has them: keep those
    that the engines were last given. stream: where the run was in its prompts then."""
    try:
        yield
    except Exception:
        try:
            note = rescue(publisher, checkpoints, config, stream())
        except Exception as error:  # What the run failed of is what it has to say.
            note = f"weights could not be recovered from the engines: {error}"
        if note:
            _say(note)
        raise


def rescue(publisher: Publisher, checkpoints: Path, config: RunConfig, stream: Stream) -> str | None:
    """Keep the weights that were last published, unless a checkpoint is as new. What has been done, in a sentence."""
    held = publisher.published
    newest = resolve(checkpoints, LATEST) if complete(checkpoints) else None
    if held is None or held.version <= (step_of(newest) if newest else 0):
        return None
    contents = Contents(held.version, config.learner.parallel.model_dump(), {}, position(config, stream.asked))
    tried = []
    for source, tensors in publisher.copies():
        try:
            kept = recovery.keep(checkpoints, contents, tensors, held.checksums, Path(config.model.path),
                                 carried_file(stream))
        except CheckpointError as error:
            tried.append(f"{source}: {error}")
            continue
        state = f"the optimizer state of {newest.name}" if newest else "a new optimizer: no checkpoint had been made"
        return (f"the weights of step {held.version}, which the learner has lost, were recovered from the engines "
                f"({source}) into {kept}: --resume goes on from them, with {state}")
    return f"the weights of step {held.version} could not be recovered from the engines: {'; '.join(tried)}"


def _recovered(folder: Path, checkpoint: Path | None) -> Contents | None:
    """What weights were recovered, once they have been verified."""
    kept = folder / recovery.RECOVERED
    if not kept.is_dir():
        return None
    if problems := recovery.problems(kept):
        raise CheckpointError(
            f"weights that were recovered from the engines are not what was written: {'; '.join(problems)}. " + (
                f"Go on without them with --resume {checkpoint.name}" if checkpoint
                else f"Remove {kept} to begin anew: there is no checkpoint"))
    return read_manifest(kept).contents


def _say(note: str) -> None:
    print(f"pbsd: {note}", file=sys.stderr)
