"""Sample trajectories as HTML: each turn coloured by its evidence, what the policy only read muted."""

from __future__ import annotations

import html
from collections.abc import Sequence

from megatron_pbsd.observability.charts import number
from megatron_pbsd.observability.records import RecordedTrajectory
from megatron_pbsd.trajectory import Turn


def pick(recorded: Sequence[RecordedTrajectory], solved: bool, count: int = 2) -> list[RecordedTrajectory]:
    """The first trajectories with this outcome, those of several turns before those of one."""
    fitting = [r for r in recorded if r.solved == solved]
    return sorted(fitting, key=lambda r: len(r.trajectory.turns) < 2)[:count]


def evidence_limit(recorded: Sequence[RecordedTrajectory]) -> float | None:
    """Where the colour scale ends: the 95th percentile of |evidence| (nats); None when there is no evidence."""
    sizes = sorted(abs(e) for r in recorded for e in r.trajectory.evidence or ())
    return max(sizes[int(0.95 * (len(sizes) - 1))], 1e-6) if sizes else None


def scale(limit: float) -> str:
    """The legend of the colours."""
    return (f'<div class="scale"><span>less likely with the answer known</span><span>−{number(limit)}</span>'
            f'<span class="ramp"></span><span>+{number(limit)} nats</span><span>more likely</span></div>')


def trajectory_card(recorded: RecordedTrajectory, limit: float | None, open_: bool) -> str:
    """One trajectory; `limit` is the evidence at full colour."""
    trajectory = recorded.trajectory
    scores = " · ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in trajectory.scores.items())
    verdict = "solved" if recorded.solved else "failed"
    reward = "–" if trajectory.reward is None else number(trajectory.reward)
    head = (f'<span class="verdict {verdict}">{verdict}</span>'
            f'<span class="meta">reward {reward}{" · " + _text(scores) if scores else ""} · '
            f'{len(trajectory.turns)} turns, {trajectory.generated} tokens</span>'
            f'<span class="meta mono">{_text(trajectory.trajectory_id)}</span>')
    privileged = (f'<details class="privileged"><summary>prompt of the teacher</summary>'
                  f'<pre class="text prompt">{_text(recorded.privileged_prompt.strip())}</pre></details>')
    turns = "".join(_turn(recorded, k, turn, limit) for k, turn in enumerate(trajectory.turns))
    return (f'<details class="card"{" open" if open_ else ""}><summary>{head}</summary><div class="trajectory">'
            f'<pre class="text prompt">{_text(recorded.prompt.strip())}</pre>{privileged}{turns}</div></details>')


def _turn(recorded: RecordedTrajectory, k: int, turn: Turn, limit: float | None) -> str:
    trajectory = recorded.trajectory
    evidence = trajectory.evidence[k] if trajectory.evidence is not None else None
    advantage = trajectory.turn_advantages[k] if trajectory.turn_advantages is not None else None
    numbers = [f"{name} <b>{signed(value)}</b>{unit}" for name, value, unit in
               (("evidence", evidence, " nats"), ("advantage", advantage, "")) if value is not None]
    colour = ""
    if evidence and limit is not None:
        strength = min(1.0, abs(evidence) / limit)
        colour = f' {"good" if evidence > 0 else "bad"}" style="--strength:{strength:.3f}'
    generated, observation = recorded.turns[k]
    seen = f'<pre class="text observation">{_text(observation.strip())}</pre>' if observation.strip() else ""
    return (f'<div class="turn{colour}"><div class="head"><span class="kind">{k + 1}. {_text(turn.kind)}</span>'
            f'<span class="numbers">{" &nbsp; ".join(numbers)}</span></div>'
            f'<pre class="text">{_text(generated.strip())}</pre></div>{seen}')


def signed(value: float) -> str:
    """With its sign and two decimals, more only where two would hide it."""
    text = f"{abs(value):.2f}" if abs(value) >= 0.01 or value == 0 else number(abs(value))
    return ("+" if value > 0 else "−" if value < 0 else "") + text


def _text(value: str) -> str:
    return html.escape(value, quote=True)
