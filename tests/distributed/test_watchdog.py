"""A rank that hangs, dies or is elsewhere is named, with its stack, in the error of the ranks that wait for it."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
from rank_pool import RankPool

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.ports import free_port

DEADLINE_S = 0.8
LONG_S = 60.0
"""Of process groups, and of phases that are not to end by their deadline; more than the pool waits for its ranks."""


def enter(rank, rendezvous, world_size):
    """A watchdog and a gloo world with a second group, made as Megatron's are."""
    import torch.distributed as dist

    from megatron_pbsd.learner.watchdog import Watchdog

    watchdog = Watchdog.join(rank, world_size, rendezvous, LONG_S)
    with watchdog.connecting():
        dist.init_process_group("gloo", store=watchdog.store, rank=rank, world_size=world_size,
                                timeout=timedelta(seconds=LONG_S))
        group = dist.new_group(range(world_size))
    return watchdog, group


@contextmanager
def world(*arguments):
    """The same for ranks that go on to other tests."""
    import torch.distributed as dist

    watchdog, group = enter(*arguments)
    try:
        yield watchdog, group
    finally:
        dist.destroy_process_group()
        watchdog.close()


def caught(run):
    """The LearnerHung that `run` raises, and after how many seconds."""
    from megatron_pbsd.learner.hang import LearnerHung

    began = time.monotonic()
    try:
        run()
    except LearnerHung as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


@pytest.fixture
def pipe(tmp_path):
    """A named pipe: whoever reads it hangs until another opens it for writing."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def line(function, code):
    """Where this code stands in a function of this file: what a stack shows of it."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, text in enumerate(lines) if text.strip().startswith(code))


def hang(pipe):
    open(pipe).read()  # the line that the others' error shows


def release(pipe):
    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


def wait_until(condition, watchdog, rank):
    """Before a deadline runs: another rank has come to where the test wants it."""
    from megatron_pbsd.learner.watchdog import ask

    while not condition(ask(watchdog._addresses[rank])):
        threading.Event().wait(0.02)


def hangs(answer):
    from megatron_pbsd.learner.hang import Report

    return isinstance(answer, Report) and any(frame.function == "hang" for frame in answer.stack)


def waits(answer):
    from megatron_pbsd.learner.hang import Report

    return isinstance(answer, Report) and answer.waits


@pytest.fixture
def mortals():
    """(function, world_size, *args) → what each rank returned, None for one that died; a pool for these ranks alone."""
    pools = []

    def run(function, world_size, *args, answering=None):
        pool = RankPool(world_size)
        pools.append(pool)
        pool._start()
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        for rank, (_, connection) in enumerate(pool.ranks):
            connection.send((function.__module__, function.__name__, (rank, rendezvous, *args)))
        return [outcome(pool.ranks[rank][1]) for rank in answering or range(world_size)]

    yield run
    for pool in pools:
        pool.close()


def outcome(connection):
    assert connection.poll(30)
    try:
        succeeded, value, _ = connection.recv()
    except EOFError:
        return None
    assert succeeded, value
    return value


def collect(kind, group, rank):
    import torch
    import torch.distributed as dist

    value = torch.ones(4)
    if kind == "all_reduce":
        dist.all_reduce(value, group=group)
    elif kind == "recv":
        dist.recv(value, 1, group=group) if rank == 0 else dist.send(value, 0, group=group)
    elif kind == "barrier":
        dist.barrier(group=group)
    elif kind == "all_gather_object":
        dist.all_gather_object([None] * dist.get_world_size(group), rank, group=group)
    else:
        other = torch.ones(4)
        for work in dist.batch_isend_irecv([
                dist.P2POp(dist.isend, value, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]):
            work.wait()


def hangs_before(rank, rendezvous, kind, pipe):
    with world(rank, rendezvous, 2) as (watchdog, group):
        collect("all_reduce", group, rank)

        def run():
            if rank == 0:
                wait_until(hangs, watchdog, 1)
            with watchdog.phase("step/forward_backward", DEADLINE_S):
                watchdog.mark(f"micro-batch {rank + 1}/8 forward")
                if rank == 1:
                    hang(pipe)
                collect(kind, group, rank)

        result = caught(run)
        if rank == 0:
            release(pipe)
        return result


@pytest.mark.parametrize("kind", ["all_reduce", "recv", "barrier", "all_gather_object", "batch_isend_irecv"])
def test_a_rank_that_hangs_is_named_with_its_stack(ranks, pipe, kind):
    (error, _), (own, _) = ranks.run(hangs_before, 2, kind, pipe, deadline_s=30)
    assert (error.rank, error.phase, error.deadline_s, error.verdict.behind) == (
        0, "step/forward_backward", DEADLINE_S, (1,))
    text = str(error)
    assert text.startswith("phase 'step/forward_backward' (deadline 0.8 s) hung on rank 0 after ")
    assert "because of rank 1\nrank 1 is in no collective in phase 'step/forward_backward' since " in text
    assert "at 'micro-batch 2/8 forward'" in text
    assert f'test_watchdog.py", line {line(hang, "open")}, in hang\n    open(pipe).read()' in text
    assert "\nrank 0: waiting in phase 'step/forward_backward' at 'micro-batch 1/8 forward', " in text
    # The one that hung learns of it too, should it go on.
    assert own.rank == 1 and 1 in own.verdict.behind


def dies(rank, rendezvous, victim, how):
    watchdog, group = enter(rank, rendezvous, 3)
    with watchdog.phase("step"):
        collect("all_reduce", group, rank)

    def run():
        with watchdog.phase("step"):
            if rank == victim:
                os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
            collect("all_reduce", group, rank)

    return caught(run)


@pytest.mark.parametrize(("victim", "how"), [(1, "exit"), (0, "SIGKILL"), (2, "SIGKILL")])
def test_a_rank_that_dies_is_named_before_any_deadline(mortals, victim, how):
    """Also rank 0, where the others met, and to ranks that are not its neighbours in the collective."""
    outcomes = mortals(dies, 3, victim, how)
    assert outcomes[victim] is None
    for rank in {0, 1, 2} - {victim}:
        error, seconds = outcomes[rank]
        assert seconds < LONG_S / 2
        assert (error.phase, error.verdict.behind) == ("step", (victim,))
        assert f"rank {victim} is gone: process " in str(error)


def keeps_the_interpreter(rank, rendezvous):
    from megatron_pbsd.learner.hang import Silence

    watchdog, group = enter(rank, rendezvous, 2)

    def run():
        if rank == 0:
            wait_until(lambda answer: isinstance(answer, Silence), watchdog, 1)
        with watchdog.phase("step", DEADLINE_S):
            if rank == 1:
                ctypes.PyDLL(None).pause()  # without giving up the interpreter's lock
            collect("all_reduce", group, rank)

    return caught(run)


def test_a_rank_stuck_in_native_code_is_named_with_its_stack(mortals):
    [(error, _)] = mortals(keeps_the_interpreter, 2, answering=[0])
    assert error.verdict.behind == (1,)
    assert "rank 1 does not answer: process " in str(error)
    assert f'test_watchdog.py", line {line(keeps_the_interpreter, "ctypes")} in run' in str(error)


def slow(rank, rendezvous):
    with world(rank, rendezvous, 2) as (watchdog, group):
        def run():
            with watchdog.phase("step", LONG_S / 2):
                if rank == 1:
                    wait_until(waits, watchdog, 0)
                collect("all_reduce", group, rank)

        return caught(run)[0]


def test_a_rank_that_is_slow_within_the_deadline_raises_nothing(ranks):
    assert ranks.run(slow, 2) == [None, None]


def differing(rank, rendezvous, phases):
    import torch.distributed as dist

    watchdog, group = enter(rank, rendezvous, 2)

    def run():
        with watchdog.phase(phases[rank], 3 * DEADLINE_S):
            if rank == 0:
                dist.barrier()
            else:
                dist.barrier(group=group)

    return caught(run)[0]


def test_ranks_in_differing_phases_are_named(mortals):
    for rank, error in enumerate(mortals(differing, 2, ("log_probs", "step"))):
        other = 1 - error.rank
        assert error.phase == ("log_probs", "step")[rank]
        # One of the two found it, the other may have taken its word.
        assert error.verdict.behind in {(other,), (rank,)}
        assert "phase 'log_probs'" in str(error) and "phase 'step'" in str(error)


def test_ranks_at_differing_collectives_of_a_phase_are_named(mortals):
    lines = [line(differing, "dist.barrier()"), line(differing, "dist.barrier(group=group)")]
    for error in mortals(differing, 2, ("step", "step")):
        [culprit] = error.verdict.behind
        assert f'test_watchdog.py", line {lines[culprit]}, in run\n    dist.barrier(' in str(error)
        assert f"rank {1 - culprit}: waiting in phase 'step', " in str(error)
        assert f"test_watchdog.py:{lines[1 - culprit]} in run" in str(error)


def absent(rank, rendezvous, present):
    from megatron_pbsd.learner.watchdog import Watchdog

    return caught(lambda: Watchdog.join(rank, 3, rendezvous, 3 * DEADLINE_S))[0] if rank in present else None


@pytest.mark.parametrize(("present", "missing"), [({0, 2}, 1), ({1, 2}, 0)])
def test_ranks_that_never_arrive_are_named(ranks, present, missing):
    errors = ranks.run(absent, 3, present)
    first = min(present)
    assert errors[first].phase == "join" and errors[first].verdict.behind == (missing,)
    assert f"rank {missing} did not arrive at tcp://127.0.0.1:" in str(errors[first])
    # Rank 0 gives up a moment earlier, and with it the place where they meet.
    assert errors[2].verdict.behind in {(missing,), (0,)}


def hangs_before_connecting(rank, rendezvous, pipe):
    import torch.distributed as dist

    from megatron_pbsd.learner.watchdog import Watchdog

    watchdog = Watchdog.join(rank, 2, rendezvous, LONG_S)

    def run():
        if rank == 0:
            wait_until(hangs, watchdog, 1)
        with watchdog.phase("start", DEADLINE_S), watchdog.connecting():
            if rank == 1:
                hang(pipe)
            dist.init_process_group("gloo", store=watchdog.store, rank=rank, world_size=2,
                                    timeout=timedelta(seconds=LONG_S))

    return caught(run)[0]


def test_a_rank_that_hangs_before_process_groups_are_made_is_named(mortals, pipe):
    [error] = mortals(hangs_before_connecting, 2, pipe, answering=[0])
    assert (error.phase, error.verdict.behind) == ("connect", (1,))
    assert "in hang\n    open(pipe).read()" in str(error)


def fails(rank, rendezvous, pipe):
    with world(rank, rendezvous, 2) as (watchdog, group):
        if rank == 0:
            wait_until(hangs, watchdog, 1)
            error, _ = caught(lambda: in_phase(watchdog, DEADLINE_S, group, rank))
            release(pipe)
            return error
        with pytest.raises(ArithmeticError, match="not finite"), watchdog.phase("step"):
            raise ArithmeticError("the loss is not finite")
        hang(pipe)
        return None


def in_phase(watchdog, deadline_s, group, rank):
    with watchdog.phase("step", deadline_s):
        collect("all_reduce", group, rank)


def test_an_error_of_a_ranks_own_passes_through_and_the_others_quote_it(ranks, pipe):
    error, _ = ranks.run(fails, 2, pipe)
    assert error.verdict.behind == (1,)
    assert "rank 1 left phase 'step' " in str(error) and "ArithmeticError: the loss is not finite" in str(error)


def alone(rank, rendezvous):
    with world(rank, rendezvous, 1) as (watchdog, _):
        with watchdog.phase("step", LONG_S), watchdog.phase("step/optimizer"):
            watchdog.mark("bucket 1")
            report = watchdog.report()
        outside = watchdog.report()

        def run(outer_s, inner_s):
            with watchdog.phase("step", outer_s), watchdog.phase("step/optimizer", inner_s):
                while watchdog._phases[-1].hung is None:
                    pass

        return report, outside, [caught(partial(run, *ends))[0] for ends in (
            (DEADLINE_S, LONG_S), (DEADLINE_S, None), (LONG_S, DEADLINE_S))]


def test_phases_enclose_others_and_end_no_later(ranks):
    [(inside, outside, errors)] = ranks.run(alone, 1)
    assert (inside.entered, inside.phase, inside.state, inside.mark) == (3, "step/optimizer", "inside", "bucket 1")
    assert (outside.entered, outside.phase, outside.state) == (3, "step", "left")
    for error in errors:
        assert error.phase == "step/optimizer" and error.verdict.behind == (0,)
        assert error.elapsed_s < LONG_S / 2


def expires_often(rank, rendezvous):
    watchdog, _ = enter(rank, rendezvous, 1)

    def calls(depth):
        if depth:
            return calls(depth - 1)
        while watchdog._phases[-1].hung is None:
            sum(len(str(i)) for i in range(50))

    def run():
        with watchdog.phase("step", 0.01):
            calls(30)

    # Whoever watches gives the interpreter up some thirty times for each error, and would get it back 5 ms later.
    sys.setswitchinterval(1e-4)
    return sum(caught(run)[0] is not None for _ in range(150))


@pytest.mark.slow
def test_a_process_survives_that_its_deadlines_expire_while_it_runs(mortals):
    """Reading stacks from outside the interpreter while it runs ends it, in one of some hundred times."""
    assert mortals(expires_often, 1) == [150]


def hangs_in_its_loss(rank, rendezvous, folder, parallel, pipe):
    """A Megatron learner, whose last rank hangs in the loss of its second micro-batch."""
    from megatron_pbsd import losses
    from megatron_pbsd.config import LearnerConfig, ModelConfig, SFTConfig
    from megatron_pbsd.learner.learner import Learner

    loss, calls = losses.build(SFTConfig()), []

    def function(inputs):
        calls.append(inputs)
        if len(calls) == 2 and rank == 1:
            hang(pipe)
        return loss.function(inputs)

    learner = Learner(
        rank, rendezvous, ModelConfig(path=str(folder)),
        LearnerConfig(parallel=parallel, micro_batch_tokens=24, deadline_s=LONG_S), replace(loss, function=function),
        seed=0, total_steps=1)
    rng = np.random.default_rng(0)
    batch = Batch({"tokens": [rng.integers(0, 64, 20) for _ in range(4)], "loss_mask": [np.ones(20, np.float32)] * 4})
    # Building takes as long as the machine is busy; the step must not.
    learner._watchdog._deadline_s = 5 * DEADLINE_S
    return caught(lambda: learner.step(batch))[0]


@pytest.mark.parametrize("parallel", [
    pytest.param({"tp": 2, "pp": 1}, id="tp2"), pytest.param({"tp": 1, "pp": 2}, id="pp2", marks=pytest.mark.slow)])
def test_a_learner_that_hangs_in_megatrons_schedule_is_named(mortals, folders, parallel, pipe):
    parallel = ParallelConfig(world_size=2, **parallel)
    [error] = mortals(hangs_in_its_loss, 2, folders["tied"], parallel, pipe, answering=[0])
    assert error.verdict.behind == (1,)
    assert "'micro-batch 2/4, forward'" in str(error) and "in hang\n    open(pipe).read()" in str(error)
    assert "rank 0: waiting in phase 'step.forward_backward'" in str(error) and "megatron/core" in str(error)


class RayRank:
    """A rank as the learner is one: an actor, whose error travels."""

    def __init__(self, rank, rendezvous):
        self.rank, (self.watchdog, self.group) = rank, enter(rank, rendezvous, 2)

    def step(self, pipe):
        if self.rank == 0:
            wait_until(hangs, self.watchdog, 1)
        with self.watchdog.phase("step", DEADLINE_S):
            if self.rank == 1:
                hang(pipe)
            collect("all_reduce", self.group, self.rank)


def test_the_driver_hears_it_from_the_rank_that_waits(ray_runtime, pipe):
    from megatron_pbsd.learner.group import LearnerGroup
    from megatron_pbsd.learner.hang import LearnerHung

    group = LearnerGroup.spawn(ray_runtime, RayRank, world_size=2, deadline_s=LONG_S)
    group.ready()
    # The driver's own deadline is the ranks', and no earlier to be heard.
    group._deadline_s -= LONG_S - DEADLINE_S
    with pytest.raises(LearnerHung, match=r"because of rank 1\nrank 1 is in no collective in phase 'step'") as hung:
        group.call("step", pipe)
    assert "in hang\n    open(pipe).read()" in str(hung.value)
    release(pipe)
