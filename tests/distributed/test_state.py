"""Training that is saved, loaded at this or another layout and continued, equals training that never stopped."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pbsd import losses
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, assemble, unfinished, write_common, writer_name
from megatron_pbsd.config import LearnerConfig, ModelConfig, MoEConfig, ParallelConfig, SFTConfig
from megatron_pbsd.learner.saving import Saver
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.dist_checkpoint import places
from megatron_pbsd.models.hf_config import read
from tests.distributed.layouts import DENSE, MOE, ONE
from tests.distributed.test_layouts import WITH_MORE_OUTPUTS
from tests.distributed.training import OPTIMIZER, STEPS, make_batch, published

LAYOUTS = {
    "one": ONE, **DENSE, **MOE, "pp4": ParallelConfig(world_size=4, tp=1, pp=4),
    "tp2dp2": ParallelConfig(world_size=4, tp=2), "tp2pp2ep2": ParallelConfig(world_size=4, tp=2, pp=2, ep=2)}
"""A name may go on with what else decides which rank holds what: distributed, bfloat16, value."""


def make_learner(rank, rendezvous, folder, name, initial="load", seed=3, **settings):
    from megatron_pbsd.learner.learner import Learner

    layout, *kinds = name.split("-")
    return Learner(
        rank, rendezvous, ModelConfig(path=str(folder), initial_weights=initial),
        LearnerConfig(parallel=LAYOUTS[layout], optimizer=OPTIMIZER, micro_batch_tokens=48,
                      distributed_optimizer="distributed" in kinds,
                      precision="bfloat16" if "bfloat16" in kinds else "float32", **settings),
        losses.build(WITH_MORE_OUTPUTS["ppo"] if "value" in kinds else SFTConfig()), seed=seed, total_steps=10)


def run(rank, rendezvous, folder, name, load_from, save_to, seed=3):
    """Steps 0-1, save, steps 2-3; or load, steps 2-3. The state in between, and what the later steps compute."""
    learner = make_learner(rank, rendezvous, folder, name, "random" if load_from else "load", seed)
    try:
        if load_from:
            learner.load(load_from)
        else:
            for k in range(STEPS):
                learner.step(make_batch(k))
            save(learner, rank, save_to, world_size(name))
        state = everything(learner, rank, world_size(name))
        metrics = [learner.step(make_batch(k)).metrics for k in range(STEPS, 2 * STEPS)]
        return metrics, published(learner, rank), learner.platform.rng_state(), state
    finally:
        learner.close()


def world_size(name):
    return LAYOUTS[name.partition("-")[0]].world_size


def save(learner, rank, folder, size):
    import torch.distributed as dist

    learner.save(folder)
    learner.saved()
    dist.barrier()
    if rank == 0:
        assemble(Path(folder), [writer_name(r) for r in range(size)])
    dist.barrier()


def everything(learner, rank, size):
    """On rank 0 the whole state in terms of Hugging Face tensors, by kind and name, brought together without any of
    what reads and writes checkpoints. Ranks that hold the same elements hold the same numbers."""
    import torch.distributed as dist

    parts = list(held_by_rank(learner))
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(parts, gathered)
    if rank != 0:
        return None
    whole = {}
    shapes = learner._shapes | {"value_head.weight": (1, 32), "value_head.bias": (1,)}
    for kind, name, index, values in (part for parts in gathered for part in parts):
        target = whole.setdefault((kind, name), np.full(shapes[name], np.nan, np.float32))[index]
        known = ~np.isnan(target) & ~np.isnan(values)
        np.testing.assert_array_equal(target[known], values[known], err_msg=f"replicas of {kind} {name}")
        target[~np.isnan(values)] = values[~np.isnan(values)]
    for key, values in whole.items():
        assert not np.isnan(values).any(), key
    return whole


def held_by_rank(learner):
    from megatron_pbsd.learner.optimizer_state import held

    of = {}
    for held_state in held(learner._optimizer):
        of.setdefault(id(held_state.parameter), []).append(held_state)
    for local in learner._state._locals:
        states = [("weights", 0, local.flat)] + [(h.kind, h.start, h.flat) for h in of.get(id(local.tensor), [])]
        for kind, start, flat in states:
            whole = np.full(local.tensor.numel(), np.nan, np.float32)
            whole[start : start + len(flat)] = flat.detach().float().numpy()
            for piece in local.pieces:
                yield kind, piece.hf_name, piece.hf_index, whole.reshape(local.tensor.shape)[piece.local_index]


@pytest.fixture(scope="module")
def saved(ranks, folders, tmp_path_factory):
    """(layout name, model) → folder and what the run that wrote it went on to compute."""
    made = {}

    def get(name, model):
        if (name, model) not in made:
            folder = str(tmp_path_factory.mktemp(name) / "learner")
            made[name, model] = folder, ranks.run(run, world_size(name), folders[model], name, None, folder)
        return made[name, model]

    return get


def cases(*combinations, long=False):
    return [pytest.param(*case, marks=[pytest.mark.slow] if long else [], id=" to ".join(case[:2]) + "".join(
        f", {model}" for model in case[2:])) for case in combinations]


@pytest.mark.parametrize(("source", "target", "model"), [
    *cases(("tp2pp2ep2", "pp4", "moe"), ("tp2pp2ep2", "dp4", "moe"), ("tp2", "dp2-distributed", "odd"),
           ("tp2dp2-distributed", "pp2", "tied"), ("ep2-distributed", "one", "glm"),
           ("pp2-value", "tp2-value", "tied"), ("pp2-value", "pp2-value", "tied"), ("pp2ep2", "tp2", "deepseek-plain")),
    *cases(("one", "one", "tied"), ("tp2", "tp2", "untied"), ("tp2pp2", "tp2pp2", "tied"), ("dp2", "dp2", "tied"),
           ("tp2", "pp2", "tied"), ("pp2", "tp2", "untied"), ("dp2", "one", "tied"), ("one", "tp2pp2", "untied"),
           ("tp2pp2", "dp2", "tied"), ("pp2vpp2", "pp2vpp2", "tied"), ("pp2vpp2", "tp2", "tied"),
           ("cp2", "pp4vpp2", "tied"), ("dp2-distributed", "dp2-distributed", "tied"),
           ("dp2-distributed", "one", "tied"), ("tp2dp2-distributed", "dp2-distributed", "tied"),
           ("pp2dp2", "pp2dp2-distributed", "tied"),
           ("tp2cp2", "dp4-distributed", "tied"), ("ep2", "ep2", "moe"), ("tp2ep2", "tp2ep2", "glm"),
           ("pp2ep2", "pp2ep2", "glm"), ("ep2etp2", "tp2", "moe"), ("ep2etp2", "tp2", "glm"), ("one", "ep4", "glm"),
           ("tp2ep2-distributed", "tp2ep2-distributed", "moe"), ("ep2", "one", "moe"),
           ("ep2", "dp4-distributed", "moe"), ("dp4-distributed", "ep2", "moe"),
           ("pp2-value", "dp2-value-distributed", "tied"), ("tp2", "tp2", "odd"), ("tp2", "one", "odd"),
           ("one", "tp2", "odd"), ("tp2pp2", "pp2vpp2", "odd"), ("pp2vpp2", "one", "odd"),
           ("tp2dp2-distributed", "dp2-distributed", "odd"), ("dp2-distributed", "tp2dp2-distributed", "odd"),
           ("tp2", "dp2-distributed", "untied"), ("tp2ep2", "tp2ep2", "deepseek"), ("tp2ep2", "pp2ep2", "deepseek"),
           ("ep2-distributed", "one", "deepseek"), long=True),
])
def test_resume(ranks, folders, saved, source, target, model):
    folder, expected = saved(source, model)
    found = ranks.run(run, world_size(target), folders[model], target, folder, None, 99)
    assert_same_state(found[0][3], expected[0][3])
    for got, wanted in zip(found[0][0], expected[0][0], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for name, values in expected[0][1].items():
        np.testing.assert_allclose(found[0][1][name], values, rtol=1e-5, atol=2e-6, err_msg=name)
    if source == target:
        for got, wanted in zip(found, expected, strict=True):
            assert (got[2]["torch"] == wanted[2]["torch"]).all()
            assert got[2]["model_parallel"].keys() == wanted[2]["model_parallel"].keys()


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=str(key))
    assert {"exp_avg", "exp_avg_sq", "weights"} <= {kind for kind, _ in found}


@pytest.mark.parametrize(("source", "target", "model"), [
    *cases(("dp2-distributed-bfloat16", "tp2-bfloat16", "tied")),
    *cases(("tp2-bfloat16", "dp2-distributed-bfloat16", "tied"), ("ep2-bfloat16", "one-bfloat16", "glm"),
           ("ep2-distributed-bfloat16", "ep2-distributed-bfloat16", "glm"), long=True)])
def test_master_weights(ranks, folders, saved, source, target, model):
    """bfloat16 rounds differently at another layout: the state is compared, and what follows at the same one."""
    folder, expected = saved(source, model)
    found = ranks.run(run, world_size(target), folders[model], target, folder, None, 99)
    assert_same_state(found[0][3], expected[0][3])
    masters = {name: values for (kind, name), values in found[0][3].items() if kind == "param"}
    assert masters and any((values != found[0][3]["weights", name]).any() for name, values in masters.items())
    if source == target:
        assert [got[0] for got in found] == [wanted[0] for wanted in expected]


@pytest.mark.parametrize(("source", "target"), [
    *cases(("dp2-distributed-bfloat16", "one")), *cases(("tp2", "dp2-distributed-bfloat16"), long=True)])
def test_another_precision(ranks, folders, saved, source, target):
    """The most exact numbers that are there are read: float32 parameters are the masters of bfloat16 ones."""
    folder, expected = saved(source, "tied")
    found = ranks.run(run, world_size(target), folders["tied"], target, folder, None, 99)[0][3]
    for (kind, name), values in expected[0][3].items():
        if kind.startswith("exp_avg"):
            np.testing.assert_array_equal(found[kind, name], values, err_msg=name)
    for name in (name for kind, name in expected[0][3] if kind == "weights"):
        exact = [state.get(("param", name), state["weights", name]) for state in (found, expected[0][3])]
        np.testing.assert_array_equal(*exact, err_msg=name)


def run_with_newer_weights(rank, rendezvous, folder, name, load_from, newer):
    learner = make_learner(rank, rendezvous, folder, name, "random", seed=99)
    try:
        learner.load(load_from)
        learner.replace_weights(newer, steps=1)
        return everything(learner, rank, world_size(name)), learner.step(make_batch(0)).metrics
    finally:
        learner.close()


@pytest.mark.parametrize("name", ["dp2-distributed-bfloat16", "pp2-value"])
def test_newer_weights_with_an_older_optimizer_state(ranks, folders, saved, tmp_path, name):
    """Weights, and what bfloat16 ones are rounded from, are those of the folder; the schedule is as far as they are."""
    folder, expected = saved(name, "tied")
    newer = {key: (1.5 * tensor).bfloat16().float() for key, tensor in load_file(
        folders["tied"] / "model.safetensors").items()}
    save_file(newer, tmp_path / "model.safetensors")
    state, metrics = ranks.run(
        run_with_newer_weights, world_size(name), folders["tied"], name, folder, str(tmp_path))[0]
    assert state.keys() == expected[0][3].keys()
    assert {"exp_avg", "exp_avg_sq", "weights"} | ({"param"} if "bfloat16" in name else set()) == {k for k, _ in state}
    for (kind, key), values in state.items():
        is_replaced = kind in ("weights", "param") and not key.startswith("value_head.")
        np.testing.assert_array_equal(
            values, newer[key].numpy() if is_replaced else expected[0][3][kind, key], err_msg=f"{kind} {key}")
    assert metrics["lr"] == expected[0][0][1]["lr"] != expected[0][0][0]["lr"]


def test_each_element_is_written_once_and_evenly(ranks, folders, saved):
    for name, model, tolerance in (("tp2dp2-distributed", "tied", 1.25), ("tp2pp2ep2", "moe", 1.5)):
        folder, _ = saved(name, model)
        reader = Reader(Path(folder))
        assert reader.damaged() == []
        for key, stored in reader.tensors.items():
            count = np.zeros(stored.shape, int)
            for part in stored.parts:
                count[part.box] += 1
            assert (count == 1).all(), key
        sizes = [path.stat().st_size for path in Path(folder).glob("*.distcp")]
        assert len(sizes) == 4 and max(sizes) < tolerance * min(sizes)


class LateSaver(Saver):
    """Copies nothing before it must."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.must = threading.Event()

    def copied(self):
        self.must.set()
        super().copied()

    def saved(self):
        if self._job is not None:
            self.must.set()
        super().saved()

    def begin(self, folder, content):
        self.saved()
        self.must.clear()
        super().begin(folder, content)

    def _copy(self, job):
        self.must.wait()
        super()._copy(job)


def goes_on(rank, rendezvous, folder, target):
    """Saves that are waited for, and saves of the same during which something else changes the tensors."""
    learner = make_learner(rank, rendezvous, folder, "ep2-distributed", moe=MoEConfig(expert_bias_update_rate=0.1))
    learner._saver = LateSaver(writer_name(rank), learner.device)

    def another_load():
        learner.load(f"{target}/waited-0")

    def memory_given_away():
        learner.release("the rollout")
        learner.regain()

    pending = []
    try:
        for k, meanwhile in enumerate((partial(learner.step, make_batch(1)), another_load, memory_given_away)):
            learner.step(make_batch(2 + k))
            save(learner, rank, f"{target}/waited-{k}", 2)
            learner.save(f"{target}/meanwhile-{k}")
            pending += unfinished(Path(target) / f"meanwhile-{k}", [writer_name(rank)])
            meanwhile()
            learner.saved()
        return pending
    finally:
        learner.close()


def test_what_is_written_is_what_was_there_when_the_save_began(ranks, folders, tmp_path):
    """Bit for bit, whatever happens next, if tensors are copied at the last moment."""
    assert ranks.run(goes_on, 2, folders["glm"], str(tmp_path)) == [["__0_0"] * 3, ["__1_0"] * 3]
    for k in range(3):
        assemble(tmp_path / f"meanwhile-{k}", ["__0_0", "__1_0"])
        waited, meanwhile = Reader(tmp_path / f"waited-{k}"), Reader(tmp_path / f"meanwhile-{k}")
        assert waited.tensors.keys() == meanwhile.tensors.keys() and waited.common() == meanwhile.common()
        for key, stored in waited.tensors.items():
            whole = tuple(slice(0, n) for n in stored.shape)
            assert waited.read(key, whole).equal(meanwhile.read(key, whole)), key
    assert any("expert_bias" in key for key in waited.tensors)


def refusals(rank, rendezvous, folder, other, weights, save_to):
    from megatron_pbsd.checkpointing.errors import CheckpointError
    from megatron_pbsd.learner.errors import LearnerError

    learner = make_learner(rank, rendezvous, folder, "one")
    said = []

    def attempt(call, *arguments):
        try:
            call(*arguments)
        except (LearnerError, CheckpointError) as error:
            said.append(str(error))
        else:
            said.append("")

    try:
        attempt(learner.load, save_to)
        attempt(learner.load, other)
        attempt(learner.load, weights)
        attempt(learner.load, weights, True)
        loaded = everything(learner, rank, 1)
        save(learner, rank, save_to, 1)
        learner.save(save_to)
        learner._saver._job.thread.join()
        attempt(learner.step, make_batch(0))
        attempt(learner.step, make_batch(0))
        return said, loaded
    finally:
        learner.close()


def test_what_does_not_fit_is_named(ranks, folders, saved, tmp_path):
    """And a checkpoint of weights alone is loaded when they alone are asked for."""
    other, _ = saved("tp2pp2ep2", "moe")
    config = read(str(folders["untied"]))
    expected = write_weights(family(config).decoder(config), tmp_path / "weights")
    [(said, loaded)] = ranks.run(
        refusals, 1, folders["untied"], other, str(tmp_path / "weights"), str(tmp_path / "saved"))
    assert "saved is no distributed checkpoint" in said[0]
    assert "decoder.layers.0.mlp.linear_fc1.weight is missing" in said[1]
    assert "decoder.layers.0.mlp.router.weight is unexpected" in said[1]
    assert "exp_avg" not in said[1]
    assert "without the state of an optimizer" in said[2]
    assert said[3] == ""
    for name, values in expected.items():
        np.testing.assert_array_equal(loaded["weights", name], values, err_msg=name)
    assert "saving __0_0 into" in said[4] and "File exists" in said[4]
    assert said[5] == ""


def write_weights(decoder, folder):
    """A checkpoint of weights alone, with layers along an axis. Returns them by Hugging Face name."""
    folder.mkdir()
    writer, written, generator = Writer(folder, "__0_0"), {}, torch.Generator().manual_seed(5)
    stored = places(decoder, layer_axis=True)
    for name, shape in hf_tensors(decoder).items():
        tensor = torch.randn(shape, generator=generator)
        for place in stored[name]:
            writer.tensor(place.key, place.shape, place.offset, tensor[place.hf_index])
        written[name] = tensor.numpy()
    writer.close()
    write_common(folder, {})
    assemble(folder, ["__0_0"])
    return written
