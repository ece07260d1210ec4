"""YAML file + `--a.b value` overrides → RunConfig, with every problem in one message.

The file and the overrides become one plain tree that pydantic validates once, so that a wrong key in the file, a
wrong value on the command line and a model that does not fit the layout are reported together. (A command-line
generator such as tyro validates its own arguments and stops at the first error, before the file is looked at.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher.explain import conflict, explain, locate, shown
from launcher.schema import models_of, tag_of
from launcher.sources import ConfigError, KeyPath, Problem, Settings, apply_overrides, read_yaml
from megatron_pbsd.config import LearnerConfig, ModelConfig, RolloutConfig, RunConfig
from megatron_pbsd.errors import did_you_mean


def load_config(path: str | Path, overrides: Sequence[str] = (), check_model: bool = True,
                to_run: bool = False) -> RunConfig:
    """Read, override and check a configuration. `check_model` also looks into the model's folder, which has to be here
    `to_run`; otherwise `model.shape` can stand for it.

    ConfigError (exit code 2 on the command line) lists all problems.
    """
    settings = read_yaml(Path(path))
    apply_overrides(settings, overrides)
    _default_variants(settings.values, RunConfig)
    problems = list(settings.problems)
    config: RunConfig | None = None
    bad: list[KeyPath] = [tuple(p.key.split(".")) for p in problems if p.key]
    try:
        config = RunConfig.model_validate(settings.values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        problems += [problem for detail in details for problem in explain(detail, settings)]
        bad += [locate(detail["loc"])[0] for detail in details if detail["loc"]]
        if any(detail["loc"] for detail in details):
            problems += _conflicts_despite(bad, settings)
    sound = config or _Lenient.salvage(settings.values, bad)
    if check_model and sound.model is not None:
        learner = None if any(path[0] == "learner" for path in bad) else sound.learner
        rollout = None if any(path[0] == "rollout" for path in bad) else sound.rollout
        problems += _model_problems(sound.model, learner, rollout, settings, to_run)
    if problems or config is None:
        raise ConfigError(path, problems)
    return config


def _default_variants(values: dict[str, Any], section: type[BaseModel]) -> None:
    """A union's section that does not name its variant means the default one, like every other missing key."""
    for key, field in section.model_fields.items():
        if not isinstance(inner := values.get(key), dict):
            continue
        variants = models_of(field.annotation)
        if tag := field.discriminator:
            chosen = inner.setdefault(tag, getattr(field.default, tag))
            variants = [model for model in variants if tag_of(model, tag) == chosen]
        for model in variants:
            _default_variants(inner, model)


class _Lenient(RunConfig):
    """A RunConfig in which nothing is required and sections need not agree."""

    name: str = "unnamed"
    steps: int = 1
    model: ModelConfig | None = None

    def _consistent(self) -> _Lenient:
        return self

    @classmethod
    def salvage(cls, values: dict[str, Any], bad: Sequence[KeyPath]) -> _Lenient:
        """The settings without those at the `bad` paths, which take their defaults."""
        values = copy.deepcopy(values)
        while True:
            for path in bad:
                _remove(values, path)
            try:
                return cls.model_validate(values)
            except ValidationError as error:  # what was removed is required: remove what it is required in
                paths = [locate(detail["loc"])[0] for detail in error.errors()]
                bad = [path[:-1] or path for path in paths]


def _remove(values: Any, path: KeyPath) -> None:
    for key in path[:-1]:
        values = values.get(key) if isinstance(values, dict) else None
    if isinstance(values, dict) and path:
        values.pop(path[-1], None)


def _conflicts_despite(bad: Sequence[KeyPath], settings: Settings) -> list[Problem]:
    """Conflicts between sections that do not involve a key already reported."""
    dotted = [".".join(path) for path in bad]
    return [problem for message in _Lenient.salvage(settings.values, bad).conflicts()
            if not any(key in message for key in dotted) for problem in [conflict(message, settings)]]


def _model_problems(
    model: ModelConfig, learner: LearnerConfig | None, rollout: RolloutConfig | None, settings: Settings, to_run: bool
) -> list[Problem]:
    """Look into the model's folder, or at its shape where the folder may be elsewhere. `learner` and `rollout` are None
    when their sections are wrong already."""
    from megatron_pbsd.models import family
    from megatron_pbsd.models.errors import ModelError
    from megatron_pbsd.models.shape import config_of

    hf, problems = None, []
    elsewhere = model.shape is not None and not to_run and not Path(model.path).is_dir()
    if not elsewhere:
        hf, problems = _folder(model, settings)
        if hf is None:
            return problems
    key = "model.path"
    try:
        if hf is not None:  # or no family knows this model, or not with these fields
            family(hf)
        if model.shape is not None:
            key = "model.shape"
            hf = config_of(model)
        assert hf is not None
        if learner is not None:
            problems += [conflict(message, settings) for message in family(hf).learner_problems(hf, learner)]
        if rollout is not None and rollout.engine == "sglang":
            problems += [conflict(message, settings) for message in _server_problems(hf, rollout)]
    except ModelError as error:
        problems.append(_about(key, str(error), settings))
    return problems


def _folder(model: ModelConfig, settings: Settings) -> tuple[dict[str, Any] | None, list[Problem]]:
    """config.json of the model's folder, None when there is none to be read; and what is wrong with the folder."""
    folder = Path(model.path)

    def problem(message: str) -> list[Problem]:
        return [_about("model.path", message, settings)]

    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = did_you_mean(folder.name, siblings) + (f" (in {folder.parent})" if siblings else "")
        return None, problem(f"no such folder, seen from {Path.cwd()}{near}")
    try:
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, problem("expected a folder in Hugging Face format: it has no config.json")
    except (OSError, ValueError) as error:
        return None, problem(f"its config.json cannot be read: {error}")
    if not isinstance(hf_config, dict):
        return None, problem("its config.json is not a JSON object")
    problems = []
    if not (folder / "tokenizer.json").is_file():
        problems += problem("it has no tokenizer.json")
    weights = ("model.safetensors", "model.safetensors.index.json")
    if model.initial_weights == "load" and not any((folder / name).is_file() for name in weights):
        problems += problem("it has no model.safetensors; model.initial_weights = 'random' starts without")
    return hf_config, problems


def _server_problems(hf: dict[str, Any], rollout: RolloutConfig) -> list[str]:
    """Sizes of SGLang servers that do not divide the model. What is no number SGLang's own check names."""
    from megatron_pbsd.models import family, sglang

    args = rollout.sglang.args
    if not all(isinstance(args.get(f"{key}_size", 1), int) for key in ("tp", "ep", "pp")):
        return []
    server = sglang.server_of(args)
    return [f"rollout.sglang.args.{message.replace(' ', '_size ', 1)}"
            for message in sglang.problems(family(hf).decoder(hf), server)]


def _about(key: str, message: str, settings: Settings) -> Problem:
    section, name = key.split(".")
    value = settings.values.get(section, {}).get(name)
    return Problem(key, f"{key} = {shown(value)}", settings.source((section, name)), message)
