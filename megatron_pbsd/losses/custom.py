"""A user's own loss: one Python file with a registered function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from megatron_pbsd.batch import SCHEMA
from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.losses.errors import LossError
from megatron_pbsd.losses.inputs import Constant, LossInputs, LossOutput, Mean, Output, Reduction

UserFunction = Callable[[LossInputs, dict[str, Any]], LossOutput]
REDUCTIONS = (*get_args(Mean), "constant")
MARK = "__registered_loss__"


@dataclass(frozen=True)
class Registration:
    """What `register_loss` was told."""

    name: str
    fields: tuple[str, ...]
    reduction: Reduction | str
    outputs: tuple[Output, ...]


def register_loss(name: str, *, fields: Sequence[str] = (), reduction: Reduction | str = "token",
                  outputs: Sequence[Output] = ()) -> Callable[[UserFunction], UserFunction]:
    """Decorator: makes `function(inputs, options) -> LossOutput` a loss that `loss: {name: custom}` finds in its file.

    name:       what `loss.function` selects it by.
    fields:     columns of the batch that the function reads, names of `megatron_pbsd.batch.SCHEMA`.
    reduction:  'token', 'turn', 'trajectory', 'group', 'constant' or `Constant(tokens)`; see `losses.reduction`.
    outputs:    'values' for `inputs.values`; 'candidates' for `inputs.candidate_log_probs`, of the tokens in the
                field 'teacher_top_tokens', which is declared with it.

    LossError when one of these is unknown.
    """
    if isinstance(fields, str) or isinstance(outputs, str):
        raise LossError(f"loss {name!r}: fields and outputs are sequences of names, such as ('advantages',)")
    for field_name in fields:
        _known(name, "batch field", field_name, SCHEMA)
    for output in outputs:
        _known(name, "output", output, get_args(Output))
    if not isinstance(reduction, Constant):
        _known(name, "reduction", reduction, REDUCTIONS)
    implied = ("teacher_top_tokens",) if "candidates" in outputs else ()
    registration = Registration(name, tuple(dict.fromkeys((*fields, *implied))), reduction, tuple(outputs))

    def register(function: UserFunction) -> UserFunction:
        setattr(function, MARK, registration)
        return function

    return register


@dataclass(frozen=True)
class CustomLoss:
    """A registered function with its options. Pickled as the place it was read from, and read again there."""

    file: Path
    registration: Registration
    options: Mapping[str, Any]
    function: UserFunction = field(repr=False)

    @classmethod
    def load(cls, file: str | Path, name: str | None, options: Mapping[str, Any]) -> CustomLoss:
        """LossError when there is no such file, when it does not run, or when it does not register what is asked."""
        path = Path(file).resolve()
        registered = _registered(path)
        if not registered:
            raise LossError(f"{path} registers no loss: decorate a function with "
                            "@register_loss(...) from megatron_pbsd.losses")
        if name is None and len(registered) > 1:
            raise LossError(f"{path} registers {', '.join(map(repr, registered))}: select one by loss.function")
        chosen = next(iter(registered)) if name is None else name
        if chosen not in registered:
            raise LossError(f"{path} registers no loss {chosen!r}{_nearest(chosen, registered)}")
        function = registered[chosen]
        return cls(path, getattr(function, MARK), dict(options), function)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        output = self.function(inputs, dict(self.options))
        name = f"loss {self.registration.name!r} ({self.file})"
        if not isinstance(output, LossOutput):
            raise LossError(f"{name} returned {type(output).__name__}, expected a LossOutput")
        if output.loss.shape != ():
            raise LossError(f"{name} returned a loss of shape {tuple(output.loss.shape)}, expected one number: "
                            "(per_token * inputs.weights).sum()")
        if not output.loss.requires_grad:
            raise LossError(f"{name} returned a loss without gradient: it must depend on inputs.log_probs or another "
                            "output of the model, and not be detached")
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return CustomLoss.load, (self.file, self.registration.name, self.options)


def _registered(path: Path) -> dict[str, UserFunction]:
    """Name → function, of what a file registers."""
    functions: dict[str, UserFunction] = {}
    for value in _names(path).values():
        registration = getattr(value, MARK, None)
        if not isinstance(registration, Registration):
            continue
        if functions.setdefault(registration.name, value) is not value:
            raise LossError(f"{path} registers two losses {registration.name!r}: rename one")
    return functions


def _names(path: Path) -> dict[str, Any]:
    """What a Python file defines."""
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise LossError(f"loss.file: there is no file {path}{_nearest(path.name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"custom_loss_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LossError(f"loss.file: {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except LossError:
        raise
    except Exception as error:
        raise LossError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return dict(vars(module))


def _known(loss: str, kind: str, value: str, choices: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in choices:
        raise LossError(f"loss {loss!r}: unknown {kind} {value!r}{_nearest(value, choices)}")


def _nearest(value: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    return did_you_mean(value, choices) or (f"; there are: {', '.join(map(repr, choices))}" if choices else "")
