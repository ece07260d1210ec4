"""However the driver ends, nothing that it started outlives it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DRIVER = """
import os, sys, threading
from contextlib import closing
from pathlib import Path
import psutil
from megatron_pbsd.controller import open_runtime

class Busy:
    def pid(self):
        return os.getpid()
    def block(self):
        threading.Event().wait()

with closing(open_runtime("ray", Path(sys.argv[1]))) as runtime:
    handles = [runtime.spawn(f"busy-{i}", Busy) for i in range(1)]
    for handle in handles:
        handle.call("pid").result()
    calls = [handle.call("block") for handle in handles]
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    if sys.argv[2] == "raise":
        raise RuntimeError("the loop failed")
    calls[0].result()
"""


@pytest.mark.parametrize(("how", "returned", "said"), [
    ("raise", 1, "RuntimeError: the loop failed"),
    ("SIGINT", -signal.SIGINT, "KeyboardInterrupt"),
    ("SIGTERM", signal.SIGTERM, ""),
    ("SIGKILL", -signal.SIGKILL, ""),
])
def test_no_process_outlives_the_driver(tmp_path, how, returned, said):
    # A session of its own: Ctrl-C goes to every process of the terminal's group, Ray's and the actors' too.
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    started = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    assert len(started) >= 3  # at least gcs_server, raylet and the actor
    if how == "SIGINT":
        os.killpg(driver.pid, signal.SIGINT)
    elif how != "raise":
        driver.send_signal(signal.Signals[how])
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == returned
    assert said in errors
    _, alive = psutil.wait_procs(started, timeout=40)
    for process in alive:
        process.kill()
    assert not alive
