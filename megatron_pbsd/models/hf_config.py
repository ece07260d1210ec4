"""Reading a Hugging Face config.json so that no field which changes the mathematics goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.models.decoder import Llama3Scaling, RopeScaling
from megatron_pbsd.models.errors import ModelError


@dataclass(frozen=True)
class FieldRule:
    """mapped: read by the family, and of one of `types`, not below `least`. only: must have one of `values`. ignored:
    does not change the mathematics. advice: what to do about another value."""

    kind: Literal["mapped", "only", "ignored"]
    values: tuple[Any, ...] = ()
    advice: str = ""
    types: tuple[type, ...] = ()
    least: int | None = None

    def problem(self, name: str, value: Any) -> str | None:
        """A sentence about a value that breaks the rule."""
        if self.kind == "only" and value not in self.values:
            return (f"{name!r} = {value!r} is not implemented; supported: {', '.join(map(repr, self.values))}"
                    + (f" ({self.advice})" if self.advice else ""))
        if self.kind == "mapped" and type(value) not in self.types:
            return f"{name!r} = {value!r} is not {' or '.join(JSON_TYPES[kind] for kind in self.types)}"
        if self.least is not None and value is not None and not value >= self.least:
            return f"{name!r} = {value!r} is below {self.least}"
        return None


JSON_TYPES = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
              NoneType: "null"}
"""Type → what it is in config.json."""


def mapped(*types: type, least: int | None = None) -> FieldRule:
    return FieldRule("mapped", types=types, least=least)


def whole(least: int = 1) -> FieldRule:
    return mapped(int, least=least)


def number() -> FieldRule:
    return mapped(int, float, least=0)


def flag() -> FieldRule:
    return mapped(bool)


def only(*values: Any, advice: str = "") -> FieldRule:
    return FieldRule("only", values, advice)


def ignored() -> FieldRule:
    return FieldRule("ignored")


DECODER_FIELDS: Mapping[str, FieldRule] = {
    **{name: whole() for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings")},
    "head_dim": mapped(int, NoneType, least=1),
    **{name: number() for name in ("rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta")},
    "tie_word_embeddings": flag(),
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    **{name: mapped(dict, NoneType) for name in ("rope_parameters", "rope_scaling")},
    "hidden_act": only("silu"),
    "is_encoder_decoder": only(False),
    "chunk_size_feed_forward": only(0),
    "quantization_config": only(None, advice="`pbsd convert` dequantises; give this its result"),
    **{name: ignored() for name in (
        "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
        "pad_token_id", "unk_token_id", "_name_or_path", "_model_name_or_path", "return_dict", "output_hidden_states",
        "output_attentions", "id2label", "label2id", "problem_type")},
}
"""Rules for the fields that every decoder family has."""

DECODER_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")


def checked(
    config: Mapping[str, Any], rules: Mapping[str, FieldRule], required: tuple[str, ...], prefix: str = ""
) -> None:
    """ModelError with one sentence per field that is missing, unknown or has an unsupported value."""
    problems = [f"'{prefix}{name}' is missing" for name in required if name not in config]
    for name, value in config.items():
        if name not in rules:
            problems.append(f"'{prefix}{name}' = {value!r} is not known to this model family"
                            + did_you_mean(name, rules))
        elif problem := rules[name].problem(prefix + name, value):
            problems.append(problem)
    if problems:
        raise ModelError("config.json: " + "; ".join(problems))


def full_attention(config: Mapping[str, Any]) -> FieldRule:
    """Of 'layer_types': no layer attends to a window only."""
    layers = config.get("num_hidden_layers")
    return only(["full_attention"] * layers if isinstance(layers, int) else [],
                advice="one for each of num_hidden_layers")


def either(config: Mapping[str, Any], *names: str) -> Any:
    """Value of a field that goes by several names. ModelError when it is missing, or has two values."""
    found = {name: config[name] for name in names if name in config}
    if not found:
        raise ModelError(f"config.json: {' or '.join(map(repr, names))} is missing")
    if len(set(found.values())) > 1:
        raise ModelError("config.json: " + " and ".join(f"{name!r} = {value!r}" for name, value in found.items())
                         + " are two names of one field")
    return next(iter(found.values()))


ROPE_SCALINGS: Mapping[str, type[RopeScaling]] = {"llama3": Llama3Scaling}
"""rope_type → what its fields describe; those that have a default may be missing."""


def rope(
    config: Mapping[str, Any], optional: tuple[str, ...] = (),
    scalings: Mapping[str, type[RopeScaling]] = ROPE_SCALINGS,
) -> dict[str, Any]:
    """rope_theta, rope_scaling as `Decoder` has it, and the `optional` fields of rotary embeddings; 'rope_parameters'
    goes before the fields beside it. ModelError when there is no rope_theta, or another scaling than `scalings`, or
    one whose fields are missing or unknown."""
    names = ("rope_theta", *optional)
    section = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    inner = config.get(section) or {}
    if section == "rope_parameters" and config.get("rope_scaling"):
        raise ModelError("config.json: 'rope_parameters' and 'rope_scaling' are two names of one field; keep the first")
    scaling = _scaling(inner, names, scalings, f"{section}.")
    found = {name: source[name] for source in (config, inner) for name in names if name in source}
    if "rope_theta" not in found:
        raise ModelError("config.json: 'rope_theta' is missing, in 'rope_parameters' and beside it")
    return found | {"rope_scaling": scaling}


def _scaling(
    inner: Mapping[str, Any], names: tuple[str, ...], scalings: Mapping[str, type[RopeScaling]], prefix: str
) -> RopeScaling | None:
    kinds = only("default", *scalings)
    known = {name: inner[name] for name in ("rope_type", "type") if name in inner}
    checked(known, dict.fromkeys(known, kinds), (), prefix)
    described = scalings.get(either(inner, *known) if known else "default")
    described_by = fields(described) if described else ()
    rules = {name: number() for name in names} | {
        field.name: number() if field.default is MISSING else mapped(int, float, NoneType, least=0)
        for field in described_by}
    needed = tuple(field.name for field in described_by if field.default is MISSING)
    # Of yarn: in place of what follows from its other fields, and of bounds that are whole numbers.
    variants = {"attention_factor": only(None), "truncate": only(True)}
    checked(inner, {**variants, **rules, **dict.fromkeys(known, kinds)}, needed, prefix)
    return described(**{field.name: inner[field.name] for field in described_by
                        if inner.get(field.name) is not None}) if described else None


def decoder_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the fields that every decoder family has, besides those of rotary embeddings."""
    return {name: config[name] for name in DECODER_REQUIRED} | {
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def read(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder. ModelError naming the path when it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist: model.path must be a folder in Hugging Face format")
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """A config.json by whatever name. ModelError naming the path when it cannot be read or is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object but {JSON_TYPES.get(type(config), 'a text')}")
    return config
