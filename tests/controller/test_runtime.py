import os
import pickle
import signal
import socket
import threading

import numpy as np
import psutil
import pytest

from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.gather import end_hung, gather
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.controller.ray_cluster import check_port
from megatron_pbsd.errors import UsageError
from megatron_pbsd.ports import is_free


class Counter:
    def __init__(self, start: int = 0, peers=(), client=None):
        self.value, self.peers, self.client = start, peers, client
        self.thread = threading.get_ident()
        self.released = threading.Event()

    def add(self, n: int, *, times: int = 1) -> int:
        self.value += n * times
        return self.value

    def total(self) -> int:
        futures = [peer.call("add", 0) for peer in self.peers]
        return sum(self.client.result(f) for f in self.client.wait(futures, len(futures))[0])

    def fail(self, text: str) -> None:
        raise LookupError(text)

    def die(self) -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def block(self) -> bool:
        return self.released.wait(30)

    def release(self) -> None:
        self.released.set()

    def same_thread(self) -> bool:
        return self.thread == threading.get_ident()

    def sum(self, array: np.ndarray) -> float:
        return float(array.sum())

    def environment(self) -> list[str | None]:
        return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE", "HF_HUB_OFFLINE")]


def unable():
    raise LookupError("no such model")


def test_calls_run_in_order_with_their_arguments(runtime):
    counter = runtime.spawn("counter", Counter, start=3)
    futures = [counter.call("add", 1), counter.call("add", 2, times=2), counter.observe("add", 0)]
    assert [runtime.result(f) for f in futures[:2]] == [4, 8]
    done, pending = runtime.wait(futures, len(futures))
    assert done == futures and pending == []
    assert {f.name for f in futures} == {"counter"}
    assert runtime.result(counter.ready()) is None
    assert runtime.result(counter.call("same_thread"))


def test_handles_work_inside_components(runtime):
    peers = [runtime.spawn(f"peer-{i}", Counter, start=i) for i in (1, 2)]
    caller = runtime.spawn("caller", Counter, peers=peers, client=runtime.client)
    assert runtime.result(caller.call("total")) == 3


def test_another_components_call_waits_for_a_component_to_be_built(ray_runtime):
    gate = ray_runtime.spawn("gate", Counter)
    opened = gate.call("block")
    late = ray_runtime.spawn("late", Counter, start=opened.reference)
    caller = ray_runtime.spawn("caller", Counter, peers=[late], client=ray_runtime.client)
    ray_runtime.result(caller.ready())
    total = caller.call("total")
    assert ray_runtime.wait([total], timeout=1.0)[0] == [], "the call did not wait"
    ray_runtime.result(gate.observe("release"))
    assert ray_runtime.result(total) == 1


def test_a_shared_value_reaches_all_receivers(runtime):
    shared = runtime.share(np.ones(50_000))
    counters = [runtime.spawn(f"receiver-{i}", Counter) for i in range(2)]
    assert [runtime.result(c.call("sum", shared)) for c in counters] == [50_000, 50_000]


def test_an_exception_comes_back_as_it_was(runtime):
    counter = runtime.spawn("counter", Counter)
    with pytest.raises(LookupError, match="(?m)^'?nothing here'?$"):
        runtime.result(counter.call("fail", "nothing here"))
    assert runtime.result(counter.call("add", 1)) == 1


def test_a_remote_exception_shows_where_it_was_raised(ray_runtime):
    counter = ray_runtime.spawn("counter", Counter)
    with pytest.raises(LookupError) as raised:
        ray_runtime.result(counter.call("fail", "nothing here"))
    assert "in counter:" in raised.value.__notes__[0] and "in fail" in raised.value.__notes__[0]


def test_a_constructor_that_raises(ray_runtime):
    broken = ray_runtime.spawn("broken", unable)
    with pytest.raises(LookupError, match="no such model"):
        ray_runtime.result(broken.ready())
    with pytest.raises(RuntimeError, match="broken.add was called, but broken could not be constructed"):
        ray_runtime.result(broken.call("add", 1))


def test_death_is_an_error_with_the_components_last_words(ray_runtime):
    counter = ray_runtime.spawn("mortal", Counter)
    with pytest.raises(ComponentDied, match="(?s)^mortal died: .*mortal | last words") as died:
        ray_runtime.result(counter.call("die"))
    assert died.value.last_lines[-1] == "last words"
    assert str(pickle.loads(pickle.dumps(died.value))) == str(died.value)
    with pytest.raises(ComponentDied):
        ray_runtime.result(counter.call("add", 1))


def test_a_stopped_component_is_ended(ray_runtime):
    """It hears nothing but SIGKILL, and is gone, not about to go, when that has been done."""
    import ray

    counter, other = ray_runtime.spawn("stopped", Counter), ray_runtime.spawn("going on", Counter)
    pid = ray.get(counter.pid)
    os.kill(pid, signal.SIGSTOP)
    futures = [counter.call("add", 1), counter.call("add", 2)]
    with pytest.raises(DeadlineExpired, match="(?s)no answer within 0.2 s from stopped.*does not react") as expired:
        gather(ray_runtime, futures, phase="test.stop", deadline_s=0.2)
    (hung,) = end_hung(ray_runtime, expired.value, [*futures, other.call("add", 1)])
    assert not psutil.pid_exists(pid)
    assert isinstance(hung, ComponentDied) and isinstance(hung, DeadlineExpired)
    assert str(pickle.loads(pickle.dumps(hung))) == str(hung)
    assert hung.name == "stopped" and str(expired.value) in str(hung) and str(hung).endswith("stopped was ended")
    with pytest.raises(ComponentDied):
        ray_runtime.result(futures[0])
    assert ray_runtime.result(other.call("add", 1)) == 2


def test_what_has_no_process_of_its_own_is_not_ended():
    runtime, expired = InlineRuntime(), DeadlineExpired("test", 1.0, ["counter"])
    with pytest.raises(DeadlineExpired) as raised:
        end_hung(runtime, expired, [runtime.spawn("counter", Counter).call("add", 1)])
    assert raised.value is expired


def test_observe_answers_beside_a_running_call(ray_runtime):
    counter = ray_runtime.spawn("busy", Counter)
    running = counter.call("block")
    ray_runtime.result(counter.observe("release"))
    assert ray_runtime.result(running)


def test_wait_returns_the_first_and_the_deadline_shows_stacks(ray_runtime):
    quick, slow = ray_runtime.spawn("quick", Counter), ray_runtime.spawn("slow", Counter)
    for handle in (quick, slow):
        ray_runtime.result(handle.ready())
    futures = [slow.call("block"), quick.call("add", 1)]
    done, pending = ray_runtime.wait(futures)
    assert done == futures[1:] and pending == futures[:1]
    with pytest.raises(DeadlineExpired) as expired:
        gather(ray_runtime, futures, phase="test.block", deadline_s=0.2)
    assert expired.value.missing == ("slow",)
    assert "'test.block': no answer within 0.2 s from slow" in str(expired.value)
    assert "in block" in expired.value.stacks
    ray_runtime.result(slow.observe("release"))


def test_components_get_one_thread_and_stay_offline(ray_runtime):
    assert ray_runtime.result(ray_runtime.spawn("quiet", Counter).call("environment")) == ["1", "1", "1"]


def test_a_taken_port_names_the_key_and_a_free_one():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = rf"ray_port = {port} is in use by another process; (\d+) is free"
        with pytest.raises(UsageError, match=message) as error:
            check_port(port)
        assert is_free(int(str(error.value).split("; ")[1].split()[0]))
