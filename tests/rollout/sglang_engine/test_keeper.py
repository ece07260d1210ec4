"""What is left of a server's processes when whoever started them is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_pbsd.rollout.engines.sglang import keeper

# A server with a process below it: it says who they are, and then they wait.
SERVER = ("import subprocess, sys, os;"
          "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE);"
          "print(os.getpid(), child.pid, flush=True); child.wait()")
DRIVER = "import subprocess, sys; keeper = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); keeper.wait()"


def kept(folder, code=SERVER) -> list[str]:
    return [sys.executable, "-S", keeper.__file__, str(folder), sys.executable, "-c", code]


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(runs, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_driver(tmp_path, number):
    folder = tmp_path / "temporary"
    folder.mkdir()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *kept(folder)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    driver.send_signal(number)
    driver.wait()
    assert gone(pids)
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not folder.exists()


def test_closing_the_pipe_ends_all(tmp_path):
    process = subprocess.Popen(kept(tmp_path / "f"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGKILL and gone(pids)


def test_a_killed_keeper_takes_the_server_with_it(tmp_path):
    process = subprocess.Popen(kept(tmp_path / "f"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert gone(pids)


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("", 0),
                                              ("import os; os.kill(os.getpid(), 6)", 128 + 6)])
def test_the_status_is_the_command_s(tmp_path, code, status):
    process = subprocess.Popen(kept(tmp_path / "f", code), stdin=subprocess.PIPE)
    assert process.wait(20) == status
