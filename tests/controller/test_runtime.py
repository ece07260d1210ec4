import os
import signal
import threading

import numpy as np
import pytest

from megatron_pbsd.controller.runtime import ComponentDied, DeadlineExpired, gather


class Counter:
    def __init__(self, start: int = 0, peers=()):
        self.value, self.peers = start, peers
        self.released = threading.Event()

    def add(self, n: int, *, times: int = 1) -> int:
        self.value += n * times
        return self.value

    def total(self) -> int:
        return sum(peer.call("add", 0).result() for peer in self.peers)

    def fail(self, text: str) -> None:
        raise LookupError(text)

    def die(self) -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def block(self) -> bool:
        return self.released.wait(30)

    def release(self) -> None:
        self.released.set()

    def sum(self, array: np.ndarray) -> float:
        return float(array.sum())

    def environment(self) -> list[str | None]:
        return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE", "HF_HUB_OFFLINE")]


def unable():
    raise LookupError("no such model")


def test_calls_run_in_order_with_their_arguments(runtime):
    counter = runtime.spawn("counter", Counter, start=3)
    calls = [counter.call("add", 1), counter.call("add", 2, times=2)]
    assert gather("test", [counter], calls, 60.0) == [4, 8]
    assert [call.component for call in calls] == ["counter", "counter"]


def test_handles_work_inside_components(runtime):
    peers = [runtime.spawn(f"peer-{i}", Counter, start=i) for i in (1, 2)]
    assert runtime.spawn("caller", Counter, peers=peers).call("total").result() == 3


def test_a_shared_value_reaches_all_receivers(runtime):
    shared = runtime.share(np.ones(50_000))
    counters = [runtime.spawn(f"receiver-{i}", Counter) for i in range(2)]
    assert [counter.call("sum", shared).result() for counter in counters] == [50_000, 50_000]


def test_an_exception_comes_back_as_it_was(runtime):
    counter = runtime.spawn("counter", Counter)
    with pytest.raises(LookupError, match="^nothing here$"):
        counter.call("fail", "nothing here").result()
    assert counter.call("add", 1).result() == 1


def test_what_a_constructor_raises_is_what_the_first_call_raises(ray_runtime):
    with pytest.raises(LookupError, match="^no such model$"):
        ray_runtime.spawn("broken", unable).call("add", 1).result()


def test_death_is_an_error_with_the_components_last_words(ray_runtime, capfd):
    mortal = ray_runtime.spawn("mortal", Counter)
    with pytest.raises(ComponentDied, match="(?s)^mortal died: Worker unexpectedly exits .*last words$"):
        mortal.call("die").result()
    with pytest.raises(ComponentDied, match="^mortal died"):
        mortal.call("add", 1).result()
    # What it printed, and what Ray has to say about it, is in the error and not on the terminal.
    assert capfd.readouterr() == ("", "")


def test_a_second_thread_answers_beside_a_running_call(ray_runtime):
    busy = ray_runtime.spawn("busy", Counter, threads=2)
    running = busy.call("block")
    busy.call("release").result()
    assert running.result()


def test_wait_returns_the_first_and_the_deadline_shows_stacks(ray_runtime):
    quick, slow = ray_runtime.spawn("quick", Counter), ray_runtime.spawn("slow", Counter, threads=2)
    for handle in (quick, slow):
        handle.call("add", 0).result()
    calls = [slow.call("block"), quick.call("add", 1)]
    assert slow.wait(calls, 60.0) == (calls[1:], calls[:1])
    with pytest.raises(DeadlineExpired, match="(?s)'test': no answer from slow within 0.2 s\n.*in block"):
        gather("test", [slow, quick], calls, 0.2)
    slow.call("release").result()


def test_components_get_one_thread_and_stay_offline(ray_runtime):
    assert ray_runtime.spawn("quiet", Counter).call("environment").result() == ["1", "1", "1"]
