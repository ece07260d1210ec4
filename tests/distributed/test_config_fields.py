"""config.json field by field: with another value it describes the model that transformers makes of it, or it is refused
by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import TINY, tiny_config

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.models import FAMILIES, ModelError, family
from tests.distributed.training import learner_of

BY_DEFAULT = ("qwen3",)
REFERENCE = {name: name for name in TINY} | {"kimi_k2": "deepseek_v3"}
"""model_type → the one under which transformers has the model."""
TOKENS = np.random.default_rng(0).integers(0, 64, 23)
FOREIGN = {"attention_bias": True, "use_qk_norm": True, "logits_scaling": 2.0, "partial_rotary_factor": 0.5,
           "sliding_window": 4, "num_experts": 8, "no_rope_layers": [1, 0], "embedding_multiplier": 2.0,
           "attn_logit_softcapping": 30.0, "final_logit_softcapping": 30.0, "rope_local_base_freq": 1e3}
"""Fields that change the mathematics of some family."""
VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu"),
    "quantization_config": ({"quant_method": "fp8"},),
    "sliding_window": (4,),
    "layer_types": (["sliding_attention"] * 4, ["full_attention", "sliding_attention"] * 2),
    "mlp_only_layers": ([], [0, 3], [0, 1, 2, 3]),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "rope_type": ("linear", "dynamic", "yarn", "longrope", "llama3", "default"),
    "type": ("linear", "dynamic"),
    "rope_scaling": ({"type": "linear", "factor": 2.0},),
    "rope_theta": (500.0,),
}
"""What a field is changed to where twice, one more and the opposite do not say it."""
LABELS = {"architectures", "id2label", "label2id", "auto_map", "transformers.js_config", "transformers_version",
          "_name_or_path", "problem_type", "dtype", "torch_dtype", "return_dict", "output_hidden_states",
          "output_attentions", "model_type"}
"""Fields that name things, or say what is returned and how it is stored."""


def changes(hf: Mapping[str, Any], rules: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Field → config.json with another value of it, or without it."""
    yield "rope_scaling", as_transformers_4(hf)
    for name in sorted((hf.keys() | rules.keys() | FOREIGN.keys()) - LABELS):
        known = name in hf or name in rules
        for value in others(name, hf.get(name)) if known else (FOREIGN[name],):
            yield name, {**hf, name: value}
        if name in hf:
            yield name, {other: value for other, value in hf.items() if other != name}
    rope = hf["rope_parameters"]
    for name in sorted({*rope, "partial_rotary_factor", "factor", "attention_factor", "truncate"}):
        for value in others(name, rope.get(name)):
            yield "rope_parameters", {**hf, "rope_parameters": {**rope, name: value}}
        yield "rope_parameters", {
            **hf, "rope_parameters": {other: value for other, value in rope.items() if other != name}}


def as_transformers_4(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with rotary embeddings described by its fields."""
    rope = dict(hf["rope_parameters"])
    kept = {name: value for name, value in hf.items() if name != "rope_parameters"}
    beside = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.pop("rope_type")
    return kept | beside | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}


def others(name: str, value: Any) -> tuple[Any, ...]:
    if name in VALUES:
        return tuple(other for other in VALUES[name] if other != value)
    match value:
        case bool():
            return (not value, None)
        case float():
            return (value / 2 or 0.5, None)
        case int():
            # Products of many experts want widths that are multiples of 16 bytes.
            return (*{2 * value or 2, value + (8 if value >= 16 else 1)}, None)
        case dict():
            return (None,)
        case _:
            return (2,)


def config_of(hf: Mapping[str, Any]):
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(json.dumps(hf)) | {"model_type": REFERENCE[hf["model_type"]]})


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def refusal(hf: Mapping[str, Any]) -> str | None:
    try:
        family(hf)
    except ModelError as error:
        return str(error)
    return None


def base(name: str) -> dict[str, Any]:
    return tiny_config(REFERENCE[name]) | {"model_type": name}


def rules(name: str) -> Mapping[str, Any]:
    return importlib.import_module(f"megatron_pbsd.models.{name}").FIELDS


def random_model(hf: Mapping[str, Any]):
    """StrictDataclassFieldValidationError for a value of a type that transformers does not take."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(hf), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_field_is_read_or_refused_or_does_not_matter(name):
    hf = base(name)
    described, model = family(hf).decoder(hf), random_model(hf)
    expected, wrong = logits(model), []
    for field, changed in changes(hf, rules(name)):
        said = refusal(changed)
        if said is not None:
            if field not in said:
                wrong.append((field, said))
        elif family(changed).decoder(changed) == described:
            try:
                same = random_model(changed)
            except StrictDataclassFieldValidationError:
                continue  # a null for an ignored field
            same.load_state_dict(model.state_dict())
            if not np.array_equal(logits(same), expected):
                wrong.append((field, "changes the logits unnoticed"))
    assert not wrong


def score(rank, rendezvous, folder):
    """Log-probabilities of every token of the vocabulary after each of `TOKENS` but the last."""
    settings = LearnerConfig(parallel=ParallelConfig(world_size=1, tp=1), micro_batch_tokens=len(TOKENS))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    with learner_of(rank, rendezvous, folder, settings) as learner:
        found = learner.score(Batch({"tokens": [TOKENS]}), ("top_tokens", "top_log_probs"), top=vocabulary)
    whole = np.full((len(TOKENS), vocabulary), np.nan)
    np.put_along_axis(whole, found["top_tokens"][0], found["top_log_probs"][0], -1)
    return whole[1:]


@pytest.mark.parametrize("name", [
    name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_a_field_that_is_read_is_read_as_by_transformers(ranks, tmp_path, name):
    hf = base(name)
    described, seen = family(hf).decoder(hf), 0
    for number, (field, changed) in enumerate(changes(hf, rules(name))):
        if refusal(changed) is not None or family(changed).decoder(changed) == described:
            continue
        seen += 1
        folder, model = tmp_path / str(number), random_model(changed)
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(changed))
        (found,) = ranks.run(score, 1, folder)
        expected = torch.from_numpy(logits(model)).log_softmax(-1)[:-1]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{field}: {changed.get(field)}")
    assert seen > 10
