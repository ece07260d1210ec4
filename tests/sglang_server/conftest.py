"""Tests against real SGLang servers: `make test-sglang`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import Engine

HERE = Path(__file__).parent
SLOTS, MAX_CONTEXT, LONGEST_DRAFT = 8, 120, 8


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Kind → folder. The dense one has an end-of-text token in its configuration that nobody asks to stop at. SGLang
    rounds widths up to 32 per rank on CPUs: these are as they are for one rank and for two."""
    from tiny_models import make_tiny

    root = tmp_path_factory.mktemp("models")
    return {"dense": make_tiny("qwen3", root / "dense", intermediate_size=64, eos_token_id=23),
            "moe": make_tiny("qwen3_moe", root / "moe", mlp_only_layers=[], moe_intermediate_size=64)}


@pytest.fixture(scope="session")
def engines(models, tmp_path_factory):
    """Starts each engine once: `engines(kind of engine, kind of model)`. `drafting` is SGLang that speculates; the
    others are of `servers.DIVIDED`."""
    from sglang_server.servers import ARGS, DIVIDED, ENVIRONMENT, start

    made: dict[tuple[str, str], Engine] = {}

    def engine(kind: str, model: str) -> Engine:
        if (kind, model) not in made:
            if kind == "embedded":
                made[kind, model] = EmbeddedEngine(
                    str(models[model]), name="engine-0", slots=SLOTS, max_context=MAX_CONTEXT)
            else:
                bound = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if kind in DIVIDED else {}
                made[kind, model] = start(
                    models[model], tmp_path_factory.mktemp("logs"), slots=SLOTS, max_context=MAX_CONTEXT,
                    args=ARGS | DIVIDED.get(kind, {}), environment=ENVIRONMENT | bound, routed_experts=model == "moe",
                    longest_draft=LONGEST_DRAFT if kind == "drafting" else None)
        return made[kind, model]

    yield engine
    for (kind, _), started in made.items():
        if kind != "embedded":
            started.close()


@pytest.fixture(scope="session")
def references(models) -> dict[str, PreTrainedModel]:
    """The same models under transformers' own attention and cache."""
    return {kind: AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
            for kind, path in models.items()}
