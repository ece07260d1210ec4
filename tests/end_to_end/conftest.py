from __future__ import annotations

import subprocess
import sys

import pytest
from pbsd_process import QUICKSTART, ROOT, Run


@pytest.fixture(scope="session")
def pbsd(tmp_path_factory):
    """Start `pbsd train configs/quickstart.yaml` with overrides, in a folder of runs that the session shares."""
    runs = tmp_path_factory.mktemp("runs").resolve()
    started = []

    def start(name: str, *arguments: str) -> Run:
        command = [sys.executable, "-m", "launcher.cli", "train", str(QUICKSTART), "--runs", str(runs), "--name", name,
                   *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        started.append(process)
        return Run(process, runs / name)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
