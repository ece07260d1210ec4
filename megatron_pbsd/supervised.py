"""Supervised fine-tuning on scripted demonstrations: the loop that makes the base policy."""

from __future__ import annotations

from megatron_pbsd.batch import from_trajectories
from megatron_pbsd.components import Components
from megatron_pbsd.environments.search_qa.demonstrations import Demonstrator


def train_supervised(run: Components) -> None:
    """`run.config.steps` optimizer steps over fresh demonstrations; evaluated as the reinforcement loop is."""
    config, recorder = run.config, run.recorder
    demonstrator = Demonstrator(run.environment, config.algorithm, config.environment.train_split, config.seed)
    per_step = config.algorithm.sequences_per_step
    for step in range(run.first_step, config.steps):
        with recorder.step(step):
            first = step * per_step
            batch = from_trajectories([demonstrator.demonstration(first + i) for i in range(per_step)])
            with recorder.phase("train"):
                recorder.add(run.learner.step(batch))
            run.after_step(step + 1)
