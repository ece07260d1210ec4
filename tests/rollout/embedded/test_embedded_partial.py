"""Trajectories that weights of several versions generated, over real engines: each token is that of its own weights,
with nothing left over from older ones."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripted_rollout import EchoEnvironment, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.embedded.sampling import request_key, uniforms
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Chunk
from megatron_pbsd.trajectory import trajectories_of

STEPS, SEED = 3, 5


@pytest.fixture
def pool_folder():
    with SharedFolder() as folder:
        yield folder


def weights(folder, version):
    """Version 0 is the checkpoint; every other one is far enough from it to sample other tokens."""
    generator = torch.Generator().manual_seed(version)
    return {name: tensor + 0.03 * (version > 0) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(folder / "model.safetensors").items()}


def rolled_out(folder, pool_folder, publish, config, routed_experts=False):
    """STEPS steps of two groups of three, of four that are begun; the weights change before each but the first."""
    runtime = InlineRuntime()
    place = PoolPlace(pool_folder.path, 2**20, shared=config.divides)
    handles = [runtime.spawn(f"engine-{i}", EngineHost, EmbeddedEngine, name=f"engine-{i}", model_path=str(folder),
                             slots=config.slots, max_context=config.max_context, kv_pool=place) for i in range(2)]
    coordinator = Coordinator(handles, EchoEnvironment(), config, runtime.client)
    made, carried = [], []
    for step in range(1, STEPS + 1):
        if step > 1:
            manifest = publish(weights(folder, step - 1))
            for handle in handles:
                runtime.result(handle.call("update_weights", manifest, step - 1))
        names = [name for name in "abcdefgh" if name not in {group.group_id for group in carried}]
        asked = [type(r)(name, r.task, r.samples, r.privileged_answer)
                 for r, name in zip(requests(4 - len(carried), 3), names, strict=False)]
        made += coordinator.collect(asked, step=step, seed=SEED, temperature=1.0, carried=carried, wanted=2,
                                    routed_experts=routed_experts)
        carried = coordinator.left()
        assert len(carried) == 2
    return trajectories_of(made)


def limits(policy, slots):
    return RolloutConfig(policy=policy, slots=slots, max_turns=3, max_turn_tokens=40, max_context=150, deadline_s=60,
                         over_sampling=2.0, max_staleness=2)


@pytest.mark.parametrize(("policy", "slots"), [
    ("least_loaded", 3), pytest.param("longest_remaining", 2, marks=pytest.mark.slow)])
def test_tokens_and_log_probs_are_those_of_their_versions_weights(folders, reference, publish, pool_folder, policy,
                                                                  slots):
    """Generated again by transformers, from a full forward pass under the weights of each token's span: KV of older
    weights takes no part."""
    folder = folders["qwen3_untied"]
    trajectories = rolled_out(folder, pool_folder, publish, limits(policy, slots))
    model, checked = reference("qwen3_untied"), 0
    several = [t for t in trajectories if len(versions(t)) > 1]
    assert len(several) >= 3 and any(len(turn.versions) > 1 for t in several for turn in t.turns)
    found = {}
    for version in sorted({version for t in several for version in versions(t)}):
        model.load_state_dict(weights(folder, version))
        for t in several:
            with torch.no_grad():
                logits = model(torch.tensor([t.prompt + t.continuation])).logits[0].double()
            found[t.trajectory_id, version] = torch.log_softmax(logits, -1).numpy()
    for t in several:
        position, key = len(t.prompt), np.array([request_key(SEED, t.trajectory_id)], np.uint64)
        for turn in t.turns:
            for span in turn.versions:
                for i in range(span.start, span.end):
                    log_probs = found[t.trajectory_id, span.version][position + i - 1]
                    u = uniforms(key, np.array([position + i], np.uint64))[0]
                    assert np.searchsorted(np.exp(log_probs).cumsum(), u, "right") == turn.tokens[i]
                    assert turn.log_probs[i] == pytest.approx(log_probs[turn.tokens[i]], abs=1e-4)
                    checked += 1
            position += len(turn.tokens) + len(turn.observation)
    assert checked > 50


def versions(trajectory):
    return {span.version for turn in trajectory.turns for span in turn.versions}


def test_routed_experts_are_those_of_the_newest_weights(folders, publish, pool_folder, make_engine):
    """The newest weights read a carried context anew, so the experts that a replay prescribes are theirs throughout."""
    trajectories = rolled_out(
        folders["qwen3_moe"], pool_folder, publish, limits("least_loaded", 3), routed_experts=True)
    several = [t for t in trajectories if len(versions(t)) > 1][:3]
    assert several
    for trajectory in several:
        engine = make_engine("qwen3_moe", max_context=160)
        engine.update_weights(publish(weights(folders["qwen3_moe"], trajectory.turns[-1].versions[-1].version)), 1)
        engine.submit([Chunk("r", trajectory.prompt + trajectory.continuation, 1, seed=0, routed_from=0)])
        (result,) = engine.collect()
        read = len(trajectory.routed_experts) - 1
        np.testing.assert_array_equal(trajectory.routed_experts[:read], result.routed_experts[:read])


def test_an_interrupted_engine_gives_what_there_is(make_engine):
    engine, whole = make_engine(slots=2, max_context=900), make_engine(slots=2, max_context=900)
    chunks = [Chunk(name, (3, 4, 5), 800, seed=0) for name in ("a", "b", "waits")]

    def interrupt():
        while engine.statistics().decode_steps < 5:
            pass
        engine.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    engine.submit(chunks)
    assert engine.collect() == []
    thread.join()
    assert engine.collect() == [], "until it is told what to abort"
    engine.abort(["a", "b", "waits", "unknown"])
    results = {result.request_id: result for result in engine.collect()}
    assert {r.finish_reason for r in results.values()} == {"abort"} and results["waits"].tokens == ()
    assert 5 <= len(results["a"].tokens) < 800
    # It goes on with others, and with these.
    engine.submit([Chunk("a", (3, 4, 5, *results["a"].tokens), 20, seed=0)])
    (more,) = engine.collect()
    whole.submit([Chunk("a", (3, 4, 5), len(results["a"].tokens) + 20, seed=0)])
    assert whole.collect()[0].tokens == results["a"].tokens + more.tokens
