"""Which experts read each token, against the routers of one plain forward pass of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripted_rollout import EchoEnvironment, requests
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Chunk, EngineError
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.trajectory import Trajectory

SHAPE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15,
    moe_intermediate_size=32, num_experts_per_tok=3)
FAMILIES = {
    # The second layer is dense.
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_experts=8, mlp_only_layers=[1])),
    # The first layer is dense; experts are chosen from one of two halves, by sigmoid and a bias.
    "glm4_moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(
        **SHAPE, n_routed_experts=8, first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(
        **SHAPE | dict(num_key_value_heads=4, head_dim=8), n_routed_experts=8, first_k_dense_replace=1, n_group=2,
        topk_group=1, n_shared_experts=1, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=12)),
}
BIASED = (Glm4MoeForCausalLM, DeepseekV3ForCausalLM)
MOE_LAYERS, TOP_K = 3, 3


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder with a saved model whose routers are sharp."""
    root = tmp_path_factory.mktemp("mixtures")
    for family, build in FAMILIES.items():
        torch.manual_seed(3)
        model = build()
        for name, tensor in model.state_dict().items():
            if name.endswith("gate.weight"):
                tensor.normal_(std=0.4)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.3)
        model.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def make_moe(mixtures):
    def make(family: str = "qwen3_moe", *, slots: int = 8, max_context: int = 128) -> EmbeddedEngine:
        return EmbeddedEngine(str(mixtures[family]), name="test-engine", slots=slots, max_context=max_context)

    return make


def routed(model: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """[T, MoE layers, top-k], best first: the definition of the routers applied to the logits of a full forward."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    chosen = []
    for layer, scores in enumerate(logits):
        if isinstance(model, BIASED):
            gate = model.model.layers[layer + 1].mlp.gate
            scores = torch.sigmoid(scores) + gate.e_score_correction_bias
            left, right = scores[:, :4], scores[:, 4:]
            better = left.topk(2).values.sum(1) > right.topk(2).values.sum(1)
            scores = torch.where(better[:, None].repeat(1, 8).logical_xor(torch.arange(8) >= 4), scores, -torch.inf)
        chosen.append(scores.topk(TOP_K).indices)
    return torch.stack(chosen, dim=1).numpy()


def check(model: PreTrainedModel, tokens: Sequence[int], experts: np.ndarray, start: int = 0) -> None:
    """`experts` are those of `tokens[start:]`."""
    expected = routed(model, tokens)[start:]
    assert experts.dtype == np.int16 and experts.shape == (len(tokens) - start, MOE_LAYERS, TOP_K)
    if isinstance(model, BIASED):  # its router does not sort them
        expected, experts = np.sort(expected), np.sort(experts)
    np.testing.assert_array_equal(experts, expected)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


class ChunkedEngine(EmbeddedEngine):
    """Ends every chunk after `most` tokens."""

    def __init__(self, *args, most: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.most = most

    def submit(self, chunks):
        super().submit([replace(chunk, max_new_tokens=min(chunk.max_new_tokens, self.most)) for chunk in chunks])


def collect(folder: Path, engines: int, slots: int, most: int, routed_experts: bool = True) -> list[Trajectory]:
    """Three prompts, two trajectories each, of up to four turns with observations."""
    runtime = InlineRuntime()
    limits = RolloutConfig(slots=slots, max_turns=4, max_turn_tokens=9, max_context=100, deadline_s=60)
    handles = [
        runtime.spawn(f"engine-{i}", EngineHost, ChunkedEngine, name=f"engine-{i}", model_path=str(folder),
                      slots=slots, max_context=100, most=most) for i in range(engines)]
    coordinator = Coordinator(handles, EchoEnvironment(), limits, runtime.client, partial(LeastLoaded, spread=1))
    groups = coordinator.collect(requests(3, 2), step=1, seed=2, temperature=1.0, routed_experts=routed_experts)
    return [trajectory for group in groups for trajectory in group.trajectories]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_trajectories_are_those_of_one_forward_pass(mixtures, family):
    model = plain(mixtures[family])
    for engines, slots, most in [(1, 8, 99), (1, 2, 4), (2, 2, 1), (3, 1, 3)]:
        trajectories = collect(mixtures[family], engines, slots, most)
        assert any(len(t.turns) > 2 and any(turn.observation for turn in t.turns) for t in trajectories)
        for trajectory in trajectories:
            tokens = trajectory.prompt + trajectory.continuation
            check(model, tokens[:-1], trajectory.routed_experts[:-1])
            assert (trajectory.routed_experts[-1] == -1).all()


def test_asking_changes_nothing_else(mixtures):
    asked, unasked = (collect(mixtures["qwen3_moe"], 2, 2, 5, routed_experts=ask) for ask in (True, False))
    assert [replace(t, routed_experts=None) for t in asked] == unasked
    assert asked != unasked


def test_a_chunk_reports_what_is_new(mixtures, make_moe):
    model, engine = plain(mixtures["qwen3_moe"]), make_moe()
    context, known = tuple(range(40, 60)), 0
    for observation in ((7, 8, 9), (), (11,)):
        engine.submit([Chunk("r", context, 5, seed=0, routed_from=known)])
        engine.score([range(30)])  # a pass that is nobody's
        (result,) = engine.collect()
        tokens = context + result.tokens
        assert result.routed_from == known
        check(model, tokens[:-1], result.routed_experts, start=known)
        context, known = tokens + observation, len(tokens) - 1


def test_what_is_read_again_is_reported_again(mixtures, make_moe):
    model, engine = plain(mixtures["qwen3_moe"]), make_moe(slots=1)
    engine.submit([Chunk("r", tuple(range(20)), 5, seed=0, routed_from=0)])
    (before,) = engine.collect()
    tokens = (*range(20), *before.tokens)
    engine.submit([Chunk("evicts r", tuple(range(50, 80)), 5, seed=0)])
    engine.collect()
    check(model, tokens[:-1], before.routed_experts)
    engine.submit([Chunk("r", tokens, 5, seed=0, routed_from=24)])
    (result,) = engine.collect()
    assert result.routed_from == 0 and result.cached_tokens == 0
    check(model, (tokens + result.tokens)[:-1], result.routed_experts)


def test_cached_tokens_are_reported_to_those_who_do_not_know_them(mixtures, make_moe):
    model, engine = plain(mixtures["qwen3_moe"]), make_moe()
    engine.submit([Chunk("r", tuple(range(20)), 5, seed=0, routed_from=0)])
    tokens = (*range(20), *engine.collect()[0].tokens)
    engine.submit([Chunk("r", tokens, 5, seed=0, routed_from=3)])
    (result,) = engine.collect()
    assert result.routed_from == 3 and result.cached_tokens == 24
    check(model, (tokens + result.tokens)[:-1], result.routed_experts, start=3)


def test_recording_begins_with_the_first_chunk_that_asks(mixtures, make_moe):
    model, engine = plain(mixtures["qwen3_moe"]), make_moe()
    engine.submit([Chunk("early", (1, 2, 3), 3, seed=0), Chunk("long", (4, 5), 30, seed=0)])
    assert [r.routed_experts for r in engine.collect()] == [None]
    engine.submit([Chunk("late", tuple(range(9)), 4, seed=0, routed_from=0)])
    (late,) = engine.collect()
    check(model, (*range(9), *late.tokens)[:-1], late.routed_experts)
    (long,) = engine.collect()
    assert long.routed_experts is None
    engine.submit([Chunk("long", (4, 5, *long.tokens), 2, seed=0, routed_from=0)])
    (result,) = engine.collect()
    assert result.cached_tokens == 31
    check(model, (4, 5, *long.tokens, *result.tokens)[:-1], result.routed_experts)


def test_aborted_chunks(mixtures, make_moe):
    model, engine = plain(mixtures["qwen3_moe"]), make_moe(slots=2)
    engine.submit([Chunk(name, (n, 5), 3 + 20 * n, seed=0, routed_from=0) for n, name in enumerate("abc")])
    engine.collect()
    engine.abort(["b", "c"])
    running, waiting = engine.collect()
    check(model, (1, 5, *running.tokens)[:-1], running.routed_experts)
    assert waiting.request_id == "c" and waiting.routed_experts is None


def test_new_weights_within_and_between_chunks(mixtures, make_moe, publish):
    engine, folder = make_moe(slots=2), mixtures["qwen3_moe"]
    tensors = load_file(folder / "model.safetensors")
    swapped = {n: t.flip(0) if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}
    old, new = plain(folder), plain(folder)
    for name, gate in new.named_modules():
        if name.endswith("mlp.gate"):
            gate.weight.data = gate.weight.data.flip(0)
    engine.submit([Chunk("short", (1, 2), 4, 0, routed_from=0), Chunk("long", (3, 4, 5), 4, 0, routed_from=0)])
    texts = {r.request_id: r.tokens for r in engine.collect()}
    short, long = (1, 2, *texts["short"]), (3, 4, 5, *texts["long"])
    engine.submit([Chunk("other", (9,), 2, 0), Chunk("long", long, 5, 0, routed_from=len(long) - 1)])
    engine.collect()
    engine.update_weights(publish(swapped), version=1)
    engine.submit([Chunk("short", short, 3, seed=0, routed_from=len(short) - 1)])
    results = {r.request_id: r for r in (*engine.collect(), *engine.collect())}
    for context, result in ((long, results["long"]), (short, results["short"])):
        tokens = (*context, *result.tokens)[:-1]
        assert result.routed_from == 0
        check(new, tokens, result.routed_experts)
        assert (routed(old, tokens) != result.routed_experts).any()


def test_a_chunk_aborted_after_new_weights_has_lost_its_experts(mixtures, make_moe, publish):
    engine = make_moe()
    engine.submit([Chunk("short", (1,), 2, seed=0, routed_from=0), Chunk("r", (1, 2), 9, seed=0, routed_from=0)])
    engine.collect()
    engine.update_weights(publish(load_file(mixtures["qwen3_moe"] / "model.safetensors")), version=1)
    engine.abort(["r"])
    (result,) = engine.collect()
    assert len(result.tokens) == 2 and (result.routed_from, len(result.routed_experts)) == (0, 0)


def test_dense_models_report_nothing(make_engine):
    engine = make_engine("qwen3")
    engine.submit([Chunk("r", (1, 2), 3, seed=0)])
    engine.collect()
    engine.submit([Chunk("r", (1, 2), 3, seed=0, routed_from=0)])
    (result,) = engine.collect()
    assert result.routed_experts is None and result.cached_tokens == 1


@pytest.mark.parametrize("asked", [-1, 3])
def test_refused_positions(make_moe, asked):
    with pytest.raises(EngineError, match=rf"'bad' has routed_from {asked}, expected 0 … 2"):
        make_moe().submit([Chunk("bad", (1, 2), 1, seed=0, routed_from=asked)])


def test_a_family_that_cannot_be_heard_is_refused(make_moe, monkeypatch):
    def forward(self, hidden_states, chosen, weights): ...

    engine = make_moe()
    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    with pytest.raises(EngineError, match=r"test-engine.*layers\.0\.mlp\.experts \(Qwen3MoeExperts\).*top_k_index"):
        engine.submit([Chunk("r", (1, 2), 1, seed=0, routed_from=0)])
