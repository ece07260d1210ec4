"""What the command line prints for people: values that follow from a configuration, and trajectories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.records import RecordedTrajectory, read_trajectories, recorded_steps


def derived_values(config: RunConfig) -> list[tuple[str, int, str]]:
    """(name, value, formula) of the sizes that users otherwise work out by hand."""
    layout, rollout, updates = config.learner.parallel, config.rollout, config.learner.updates_per_step
    values = [("data-parallel size", layout.dp, "world_size / (tp * pp)")]
    if config.algorithm.name == "sft":
        sequences = config.algorithm.sequences_per_step
        return [*values, ("demonstrations in the run", config.steps * sequences, "steps * sequences_per_step")]
    return [*values,
            ("trajectories per step", rollout.prompts_per_step * rollout.group_size, "prompts_per_step * group_size"),
            ("groups per optimizer step", rollout.prompts_per_step // updates,
             "prompts_per_step / updates_per_step, rounded down"),
            ("optimizer steps in the run", config.steps * updates, "steps * updates_per_step"),
            ("trajectories in the run", config.steps * rollout.prompts_per_step * rollout.group_size,
             "steps * prompts_per_step * group_size"),
            ("sequences decoded at a time", rollout.engines * rollout.slots, "engines * slots"),
            ("most generated tokens", rollout.max_turns * rollout.max_turn_tokens,
             "max_turns * max_turn_tokens, per trajectory")]


def select_trajectories(folder: Path, step: int | None, group: str | None, solved: bool | None,
                        limit: int) -> list[RecordedTrajectory]:
    """The trajectories of a step (None: the last) that fit; `limit` 0 is all. UsageError when none is kept or fits."""
    if step is None:
        steps = recorded_steps(folder)
        if not steps:
            raise UsageError(f"{folder} keeps no trajectories")
        step = steps[-1]
    found = read_trajectories(folder, step)
    if group is not None:
        groups = list(dict.fromkeys(r.trajectory.group_id for r in found))
        if group.isdigit() and group not in groups and int(group) < len(groups):
            group = groups[int(group)]
        if group not in groups:
            raise UsageError(f"step {step} has no group {group!r}; it has {len(groups)}: {', '.join(groups[:8])}"
                             + (", …" if len(groups) > 8 else ""))
        found = [r for r in found if r.trajectory.group_id == group]
    fitting = [r for r in found if solved is None or r.solved == solved]
    if not fitting:
        raise UsageError(f"none of the {len(found)} trajectories of step {step} "
                         f"{'was solved' if solved else 'failed'}")
    return fitting[:limit] if limit else fitting


def print_trajectories(chosen: Sequence[RecordedTrajectory], as_json: bool) -> None:
    """To standard output: one JSON object per line, or panels."""
    if as_json:
        for recorded in chosen:
            print(json.dumps(recorded.to_json()))
        return
    from rich.console import Console

    console = Console()
    for recorded in chosen:
        _print(recorded, console)


def _print(recorded: RecordedTrajectory, console: object) -> None:
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.text import Text

    trajectory = recorded.trajectory
    verdict, colour = ("solved", "green") if recorded.solved else ("failed", "red")
    scores = "".join(f"  {name} {value:.3g}" for name, value in trajectory.scores.items())
    reward = "–" if trajectory.reward is None else f"{trajectory.reward:.3g}"
    console.print(Rule(Text.assemble((trajectory.trajectory_id, "bold"), "  ", (verdict, f"bold {colour}"),
                                     f"  reward {reward}{scores}"), align="left", style="dim"))
    console.print(Padding(Text(recorded.prompt.strip(), style="italic"), (0, 0, 0, 2)))
    for k, (turn, (generated, observation)) in enumerate(zip(trajectory.turns, recorded.turns, strict=True)):
        head = Text.assemble("\n", (f"{k + 1}. {turn.kind}", "bold cyan"), (f"  {len(turn.tokens)} tokens", "dim"))
        if trajectory.evidence is not None:
            evidence = trajectory.evidence[k]
            style = "green" if evidence > 0 else "yellow" if evidence < 0 else "dim"
            head.append(f"  evidence {evidence:+.2f} nats", style=style)
        if trajectory.turn_advantages is not None:
            head.append(f"  advantage {trajectory.turn_advantages[k]:+.2f}")
        console.print(head)
        console.print(Padding(Text(generated.strip()), (0, 0, 0, 3)))
        if observation.strip():
            console.print(Padding(Text(observation.strip(), style="dim"), (0, 0, 0, 6)))
    console.print()
