"""Environments: tasks with verified answers, and the tools to solve them."""

from __future__ import annotations

from megatron_pbsd.config import EnvironmentConfig
from megatron_pbsd.environments.protocol import Environment, Reply, Score, Task

__all__ = ["Environment", "Reply", "Score", "Task", "build_environment"]


def build_environment(config: EnvironmentConfig, model_path: str) -> Environment:
    """The environment that `environment.name` names; its tokenizer is the model's."""
    from megatron_pbsd.environments.search_qa.environment import SearchQA

    return {"search_qa": SearchQA}[config.name](config, model_path)
