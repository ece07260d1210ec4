"""However the driver ends, nothing that it started outlives it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pbsd_process import none_left

from megatron_pbsd.controller import guard

DRIVER = """
import os, signal, sys, threading
from contextlib import ExitStack
from pathlib import Path
import psutil
from megatron_pbsd.controller.runtime import open_runtime

class Busy:
    def pid(self):
        return os.getpid()
    def block(self):
        threading.Event().wait()

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
with ExitStack() as stack:
    stack.callback(print, "closed in order", file=sys.stderr)
    runtime = stack.enter_context(open_runtime("ray", Path(sys.argv[1])))
    handle = runtime.spawn("busy", Busy)
    runtime.result(handle.call("pid"))
    call = handle.call("block")
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    if sys.argv[2] == "raise":
        sys.stdin.readline()
        raise RuntimeError("the loop failed")
    runtime.result(call)
"""


@pytest.mark.parametrize(("how", "returned", "said"), [
    ("raise", {1}, "RuntimeError: the loop failed"),
    ("SIGINT", {-signal.SIGINT}, "KeyboardInterrupt"),
    # Ray makes it 1 where the signal arrives inside of its calls.
    ("SIGTERM", {128 + signal.SIGTERM, 1}, "closed in order"),
    ("SIGKILL", {-signal.SIGKILL}, ""),
])
def test_no_process_outlives_the_driver(tmp_path, how, returned, said):
    # A session of its own: Ctrl-C goes to every process of the terminal's group, Ray's and the actors' too.
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), how], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    started = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    assert len(started) >= 3  # at least gcs_server, raylet and the actor
    if how == "SIGINT":
        os.killpg(driver.pid, signal.SIGINT)
    elif how != "raise":
        driver.send_signal(signal.Signals[how])
    _, errors = driver.communicate("\n", timeout=60)
    assert driver.returncode in returned, errors
    assert said in errors
    assert none_left(started)


def test_the_guard_spares_a_process_that_took_over_a_number(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder = tmp_path / "session"
    folder.mkdir()
    watching = subprocess.run(
        [sys.executable, "-S", guard.__file__, str(folder), f"{other.pid}:1"], stdin=subprocess.DEVNULL)
    assert watching.returncode == 0 and not folder.exists()
    assert other.poll() is None
    subprocess.run([sys.executable, "-S", guard.__file__, str(folder), guard.identity(other.pid)],
                   stdin=subprocess.DEVNULL, check=True)
    assert other.wait(timeout=10) == -signal.SIGKILL


def test_closing_leaves_other_children_of_the_driver_alone(tmp_path):
    """A logger's service, say, that was started while the cluster ran."""
    script = """
import subprocess, sys
from pathlib import Path
from megatron_pbsd.controller.runtime import open_runtime

with open_runtime("ray", Path(sys.argv[1])) as runtime:
    runtime.result(runtime.spawn("list", list).ready())
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(other.poll())
other.communicate(b"end")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["None"]
