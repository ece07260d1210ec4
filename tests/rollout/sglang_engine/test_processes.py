"""What is shown of the output of a server's processes, of which a script stands for one."""

from __future__ import annotations

import pytest

from megatron_pbsd.rollout.engines.sglang.processes import LOG_LINES_SHOWN, Launch, Processes

# Each process that has loaded Triton ends so when it ends of an error.
LEAKS = """nanobind: leaked 64 types!
 - leaked type "triton._C.libtriton.ir.location"
 - ... skipped remainder
nanobind: this is likely caused by a reference counting issue in the binding code.
See https://nanobind.readthedocs.io/en/latest/refleaks.html"""


@pytest.fixture
def ended(tmp_path):
    """Processes that have written this and ended."""
    def make(text: str) -> Processes:
        (tmp_path / "text").write_text(text)
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\ncat {tmp_path / 'text'}\nexit 3\n")
        script.chmod(0o755)
        processes = Processes(Launch(str(script), {}, tmp_path / "log", {}), {})
        assert processes.wait(60) == 3
        return processes

    return make


def test_the_cause_is_among_the_last_lines_whatever_leaks(ended):
    processes = ended("first\n\nthe cause\n" + f"{LEAKS}\n" * 20 + "the end\n")
    assert processes.last_lines() == ("first", "the cause", "the end")
    assert processes.have_said("the cause") and processes.have_said("leaked 64 types")
    assert not processes.have_said("a cause")


def test_no_more_lines_are_shown_than_can_be_read(ended):
    lines = tuple(map(str, range(100)))
    assert ended("\n".join(lines)).last_lines() == lines[-LOG_LINES_SHOWN:]
