"""Reading a Hugging Face config.json so that no field which changes the mathematics goes unnoticed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_pbsd.models.decoder import Llama3Scaling, RopeScaling
from megatron_pbsd.models.errors import ModelError


@dataclass(frozen=True)
class FieldRule:
    """mapped: read by the family. only: must have one of `values`. ignored: does not change the mathematics."""

    kind: Literal["mapped", "only", "ignored"]
    values: tuple[Any, ...] = ()


def mapped() -> FieldRule:
    return FieldRule("mapped")


def only(*values: Any) -> FieldRule:
    return FieldRule("only", values)


def ignored() -> FieldRule:
    return FieldRule("ignored")


DECODER_FIELDS: Mapping[str, FieldRule] = {
    **{name: mapped() for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "initializer_range", "attention_dropout")},
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    "rope_parameters": mapped(),
    "rope_theta": mapped(),
    "rope_scaling": mapped(),
    "hidden_act": only("silu"),
    "is_encoder_decoder": only(False),
    "chunk_size_feed_forward": only(0),
    "quantization_config": only(None),
    **{name: ignored() for name in (
        "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
        "pad_token_id", "_name_or_path", "return_dict", "output_hidden_states", "output_attentions", "id2label",
        "label2id", "problem_type")},
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
        rule = rules.get(name)
        if rule is None:
            near = difflib.get_close_matches(name, rules, 1)
            problems.append(f"'{prefix}{name}' = {value!r} is not known to this model family"
                            + (f"; did you mean {near[0]!r}?" if near else ""))
        elif rule.kind == "only" and value not in rule.values:
            problems.append(f"'{prefix}{name}' = {value!r} is not implemented; "
                            f"supported: {', '.join(map(repr, rule.values))}")
    if problems:
        raise ModelError("config.json: " + "; ".join(problems))


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
"""rope_type → what its fields describe."""


def rope(config: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """rope_theta, rope_scaling as `Decoder` has it, and the `optional` fields of rotary embeddings; 'rope_parameters'
    goes before the fields beside it. ModelError when there is no rope_theta, or another scaling than `ROPE_SCALINGS`,
    or one whose fields are missing or unknown."""
    names = ("rope_theta", *optional)
    section = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    inner = config.get(section) or {}
    if section == "rope_parameters" and config.get("rope_scaling"):
        raise ModelError("config.json: 'rope_parameters' and 'rope_scaling' are two names of one field; keep the first")
    scaling = _scaling(inner, names, f"{section}.")
    found = {name: source[name] for source in (config, inner) for name in names if name in source}
    if "rope_theta" not in found:
        raise ModelError("config.json: 'rope_theta' is missing, in 'rope_parameters' and beside it")
    return found | {"rope_scaling": scaling}


def _scaling(inner: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> RopeScaling | None:
    kinds = only("default", *ROPE_SCALINGS)
    known = {name: inner[name] for name in ("rope_type", "type") if name in inner}
    checked(known, dict.fromkeys(known, kinds), (), prefix)
    kind = either(inner, *known) if known else "default"
    described = ROPE_SCALINGS.get(kind)
    needed = tuple(field.name for field in fields(described)) if described else ()
    checked(inner, {**{name: mapped() for name in (*names, *needed)}, **dict.fromkeys(known, kinds)}, needed, prefix)
    return described(**{name: inner[name] for name in needed}) if described else None


def decoder_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the fields that every decoder family has, besides those of rotary embeddings."""
    return {name: config[name] for name in DECODER_REQUIRED} | {
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def read(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder. ModelError naming the path when it is missing or no JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist: model.path must be a folder in Hugging Face format")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
