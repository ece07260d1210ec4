"""Whole rollouts with drafts, over engines that tell each other through the coordinator."""

from __future__ import annotations

import numpy as np
import pytest
from scripted_rollout import EchoEnvironment, requests

from megatron_pbsd import summary
from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.embedded.speculation import Speculation
from megatron_pbsd.rollout.engines.host import EngineHost


def rolled_out(folder, policy, paths, engines=2):
    """paths: of each draft; none without drafts."""
    chunks = {"chunk_tokens": 6} if policy == "divided" else {}
    config = RolloutConfig(slots=3, max_turns=3, max_turn_tokens=30, max_context=150, deadline_s=60, policy=policy,
                           speculation={"enabled": bool(paths), "paths": max(1, paths)}, **chunks)
    runtime = InlineRuntime()
    with SharedFolder() as folder_of_kv:
        place = PoolPlace(folder_of_kv.path, 2**22, shared=config.divides)
        handles = [runtime.spawn(f"engine-{i}", EngineHost, EmbeddedEngine, name=f"engine-{i}", model_path=str(folder),
                                 slots=config.slots, max_context=config.max_context, kv_pool=place,
                                 speculation=Speculation(8, paths, always=True) if paths else None)
                   for i in range(engines)]
        coordinator = Coordinator(handles, EchoEnvironment(), config, runtime.client)
        groups = coordinator.collect(requests(3, 4), step=1, seed=5, temperature=0.4, routed_experts=True)
        return [t for group in groups for t in group.trajectories], coordinator.statistics()


@pytest.mark.parametrize(("family", "policy", "paths"), [
    ("qwen3", "least_loaded", 1), ("qwen3", "divided", 2), ("qwen3_moe", "divided", 1), ("qwen3_moe", "divided", 4),
    ("deepseek_v3", "least_loaded", 4)])
def test_trajectories_are_the_same_with_and_without_drafts(folders, family, policy, paths):
    expected, plain = rolled_out(folders[family], policy, paths=0)
    trajectories, statistics = rolled_out(folders[family], policy, paths)
    for one, other in zip(trajectories, expected, strict=True):
        assert (one.trajectory_id, one.continuation) == (other.trajectory_id, other.continuation)
        for turn, wanted in zip(one.turns, other.turns, strict=True):
            np.testing.assert_allclose(turn.log_probs, wanted.log_probs, atol=1e-5)
        if other.routed_experts is not None:
            np.testing.assert_array_equal(one.routed_experts, other.routed_experts)
    assert (plain.drafts, plain.drafted_tokens, plain.accepted_tokens) == (0, 0, 0)
    assert 0 < statistics.accepted_tokens < statistics.drafted_tokens
    metrics = summary.of_engines([statistics])
    assert metrics["speculation/acceptance_length"] == 1 + statistics.accepted_tokens / statistics.drafts
    assert summary.of_engines([plain])["speculation/acceptance_length"] == 1


def test_what_other_engines_generate_is_drafted_from(folders):
    """Four engines, of which each runs few members of a group, draft much as one that runs them all."""
    accepted = [rolled_out(folders["qwen3"], "divided", paths=2, engines=n)[1].accepted_tokens for n in (1, 4)]
    assert accepted[1] > 0.5 * accepted[0]
