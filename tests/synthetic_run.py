"""A run's folder with plausible content, written by the real recorder: for tests of what reads such folders."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from megatron_pbsd.config import RunConfig
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.trajectory import Group, Trajectory, Turn, VersionSpan

WORDS: list[str] = []
"""Token id → word; grows as texts are encoded."""


def encode(text: str) -> tuple[int, ...]:
    ids = []
    for word in text.replace("\n", " \n ").split(" "):
        if word not in WORDS:
            WORDS.append(word)
        ids.append(WORDS.index(word))
    return tuple(ids)


def decode(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[t] for t in tokens).replace(" \n ", "\n")


def run_config(name: str = "synthetic", steps: int = 60, runs: str = "runs", **sections: object) -> RunConfig:
    return RunConfig.model_validate({"name": name, "runs": runs, "steps": steps, "model": {"path": "models/base"},
                                     **sections})


def turn(text: str, observation: str = "", kind: str = "search") -> Turn:
    tokens = encode(text)
    return Turn(tokens, (-0.5,) * len(tokens), encode(observation) if observation else (), kind, "stop",
                (VersionSpan(0, 0, len(tokens)),))


def trajectory(step: int, group: int, sample: int, solved: bool, wander: int, rng: random.Random) -> Trajectory:
    """A two-hop chain with `wander` needless searches in it."""
    question = "What is the capital of the country where dysprosium was discovered? <|answer & 'cite'|>"
    turns, evidence = [], []
    for i in range(wander):
        turns.append(turn(f"<think> maybe the currency helps </think> <search> currency of region {i} </search>",
                          "<result> The euro & cents are used in 20 of 27 states, issued by <b>central</b> banks "
                          "that hold reserves of other currencies as well. </result>"))
        evidence.append(-abs(rng.gauss(1.1, 0.5)))
    turns.append(turn("<think> who found it, and where </think> <search> dysprosium discovered </search>",
                      "<result> Dysprosium was identified in 1886 by Paul-Émile Lecoq de Boisbaudran in Paris, "
                      "France. </result>"))
    evidence.append(rng.gauss(0.9, 0.3))
    turns.append(turn("<search> capital of France </search>", "<result> Capital: name: Paris </result>"))
    evidence.append(rng.gauss(2.1, 0.4))
    turns.append(turn(f"<answer> {'Paris' if solved else 'Lyon'} </answer>", kind="answer"))
    evidence.append(0.0)
    sign = 1.0 if solved else -1.0
    return Trajectory(
        f"{step}/{group}/{sample}", f"{step}/{group}", "task-7", encode(question),
        encode(question + " \n [The verified answer is: Paris]"), tuple(turns), 1.0 if solved else 0.0,
        {"exact_match": float(solved), "f1": 1.0 if solved else 0.2}, tuple(evidence),
        tuple(sign * (1 + math.tanh(sign * e) / 2) for e in evidence))


def groups(step: int, steps: int, rng: random.Random) -> list[Group]:
    skill = 0.15 + 0.6 * step / steps
    return [Group(f"{step}/{g}", tuple(
        trajectory(step, g, s, rng.random() < skill, int(rng.random() * 4 * (1.2 - skill)), rng) for s in range(4)))
        for g in range(4)]


def metrics(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    level = 0.12 + 0.55 / (1 + math.exp(-8 * (step / steps - 0.45)))
    row = {"reward/mean": max(0.0, level + rng.gauss(0, 0.04)), "rollout/tokens_per_s": 2900 + rng.gauss(0, 120),
           "rollout/turns_mean": 4.2 - 1.1 * level + rng.gauss(0, 0.1),
           "credit/evidence_solved": 1.1 + level + rng.gauss(0, 0.1), "credit/snr_kept": 0.6 + rng.gauss(0, 0.05),
           "loss/total": -0.02 + rng.gauss(0, 0.01), "loss/entropy": 1.4 - level + rng.gauss(0, 0.03),
           "loss/kl_rollout": abs(rng.gauss(2e-7, 1e-7)), "grad_norm": 0.6 + abs(rng.gauss(0, 0.2)), "lr": 3e-4}
    if step % 10 == 0 or step == steps - 1:
        row["eval/exact_match"] = round(level + 0.05, 3)
        row["eval/f1"] = round(level + 0.11, 3)
    return row


def write_run(runs: Path, steps: int = 60, **sections: object) -> Path:
    """Record a whole run; its times are the test's own."""
    config = run_config(steps=steps, runs=str(runs), observability={"progress": False}, **sections)
    rng = random.Random(0)
    with Recorder(config.folder, config.observability, config, 0) as recorder:
        for step in range(steps):
            for name in ("weights", "rollout", "reward", "log_probs", "train"):
                with recorder.phase(name):
                    pass
            recorder.trajectories(step, groups(step, steps, rng), decode)
            recorder.log(step, metrics(step, steps, rng))
    return config.folder
