import os
import threading
import time

import numpy as np
import pytest
from scripted_rollout import ScriptedEngine

from megatron_pbsd.batch import Batch
from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired, PeersHung
from megatron_pbsd.controller.inline import InlineHandle, InlineRuntime
from megatron_pbsd.errors import Lost
from megatron_pbsd.learner.group import LearnerGroup
from megatron_pbsd.rollout.engine_group import EngineGroup

BATCH = Batch({"tokens": [np.array([1, 2, 3]), np.array([4])]})


class Rank:
    """Ranks that answer, and one that does what `fault` says in `step`, where the others then wait for ever."""

    def __init__(self, rank: int, rendezvous: str, fault: str = "none", faulty: int = 1):
        self.rank, self.rendezvous, self.fault, self.faulty = rank, rendezvous, fault, faulty

    def log_probs(self, batch):
        return [np.float32(len(t)) * np.ones(len(t), np.float32) for t in batch["tokens"]] if self.rank == 0 else None

    def step(self, batch):
        if self.fault == "none":
            return {"tokens": float(sum(batch.lengths))}
        if self.rank != self.faulty:
            if self.fault == "dies, peers notice":
                raise RuntimeError("Connection closed by peer")
            if self.fault.endswith("peers blame it"):
                raise PeersHung(f"rank {self.rank} waits for rank {self.faulty}")
            threading.Event().wait()
        if self.fault.startswith("dies"):
            os._exit(3)
        if self.fault.startswith("raises"):
            # The others are heard of first.
            threading.Event().wait(0.1)
            raise ArithmeticError("the loss is not finite")
        threading.Event().wait()

    def tensors(self):
        return {"w": ("float32", (2, 3))}

    def differing(self, manifest):
        return [f"tensor-{self.rank}", "shared"]

    def save(self, folder):
        with open(f"{folder}/{self.rank}", "w") as file:
            file.write(self.rendezvous)

    def close(self):
        pass


def learners(runtime, world_size=3, deadline_s=60.0, **arguments):
    group = LearnerGroup.spawn(runtime, Rank, world_size=world_size, deadline_s=deadline_s, **arguments)
    group.ready()
    return group


def test_all_ranks_are_called_and_rank_0_answers(runtime, tmp_path):
    group = learners(runtime)
    assert group.names == ["learner-0", "learner-1", "learner-2"]
    assert [list(values) for values in group.log_probs(BATCH)] == [[3, 3, 3], [1]]
    assert group.step(BATCH) == {"tokens": 4.0}
    assert group.tensors() == {"w": ("float32", (2, 3))}
    assert group.wait("differing", group.start("differing", None, only=["learner-0", "learner-2"])) == [
        ["tensor-0", "shared"], ["tensor-2", "shared"]]
    group.save(str(tmp_path), wait=False)
    assert len({file.read_text() for file in tmp_path.iterdir()}) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2"]
    group.close()


@pytest.mark.parametrize("fault", ["dies", "dies, peers notice", "dies, peers blame it"])
def test_a_dead_rank_is_named_at_once_while_the_others_hang(ray_runtime, fault):
    group = learners(ray_runtime, fault=fault)
    began = time.monotonic()
    with pytest.raises(ComponentDied) as died:
        group.step(BATCH)
    assert died.value.name == "learner-1"
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("fault", ["raises", "raises, peers blame it"])
def test_a_ranks_error_is_raised_whatever_the_others_do(ray_runtime, fault):
    group = learners(ray_runtime, fault=fault, faulty=2)
    with pytest.raises(ArithmeticError, match="the loss is not finite"):
        group.step(BATCH)


def test_the_ranks_that_wait_name_one_that_hangs(ray_runtime):
    group = learners(ray_runtime, fault="hangs, peers blame it", faulty=0)
    with pytest.raises(PeersHung, match=r"rank [12] waits for rank 0"):
        group.step(BATCH)


def test_the_cause_is_found_among_results_that_are_all_there():
    runtime = InlineRuntime()
    group = LearnerGroup(runtime, [
        runtime.spawn(f"learner-{rank}", Rank, rank, "", fault="raises, peers blame it", faulty=2)
        for rank in range(3)], 60.0)
    with pytest.raises(ArithmeticError, match="the loss is not finite"):
        group.step(BATCH)


def test_hanging_ranks_are_named_with_their_stacks(ray_runtime):
    group = learners(ray_runtime, world_size=2, deadline_s=30)
    hanging = LearnerGroup(ray_runtime, [
        group.handles[0], ray_runtime.spawn("learner-hung", Rank, 1, "", fault="hangs", faulty=0)], 1.0)
    ray_runtime.result(hanging.handles[1].ready())
    with pytest.raises(DeadlineExpired) as expired:
        hanging.step(BATCH)
    assert expired.value.phase == "learner.step"
    assert expired.value.missing == ("learner-hung",)
    assert "in step" in expired.value.stacks


def test_engines_are_called_together(runtime):
    group = EngineGroup.spawn(runtime, ScriptedEngine, count=2, deadline_s=60.0)
    group.ready()
    assert group.names == ["engine-0", "engine-1"]
    group.call("update_weights", None, 7)
    assert group.checksums() == [{"weights": "7"}] * 2
    assert [len(scores[0]) for scores in group.score([[1, 2, 3]])] == [3, 3]
    assert [s.version for s in group.statistics()] == [7, 7]


class TwoMachines(InlineRuntime):
    def parts(self, name):
        return [name, f"{name}.node1"]


class Part(ScriptedEngine):
    def __init__(self, name, meeting, number=0):
        self.about = name, meeting, number

    def which(self):
        return self.about

    def die(self):
        raise Lost(self.about[0], "its processes ended", ["last words"])


def test_an_engine_is_dead_when_its_part_on_another_machine_is():
    runtime = TwoMachines()
    started = []
    group = EngineGroup.spawn(runtime, Part, count=2, deadline_s=60.0,
                              member=lambda **arguments: started.append(Part(**arguments)) or started[-1])
    group.ready()
    assert group.names == ["engine-0", "engine-1"]
    (name, meeting, number), other = (part.about for part in started)
    assert (name, number, meeting.machines) == ("engine-0.node1", 1, 2) and other[1].port != meeting.port
    with pytest.raises(ComponentDied, match="^engine-1 died: engine-1.node1 died: its processes ended") as death:
        group.wait("rollout", [InlineHandle("engine-1.node1", started[1]).call("die")])
    assert (death.value.name, death.value.last_lines) == ("engine-1", ("last words",))
    group.restart("engine-1")
    assert started[2].about[0] == "engine-1.node1" and started[2].about[1].port != other[1].port
