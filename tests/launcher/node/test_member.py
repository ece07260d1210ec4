"""Which machine of a run this is, and what it is told and not told."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from launcher.node.member import Member, head_address, member_of, port_block, without_foreign
from megatron_pbsd.errors import UsageError
from megatron_pbsd.ports import PORTS

STEP = {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "3", "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_STEP_NODELIST": "n[1-2]"}


def names(listed):
    return {"n[1-2]": ("n1", "n2")}[listed]


def test_a_task_of_a_step_is_one_of_the_steps_nodes():
    assert member_of(STEP, None, None, None, names) == Member(1, 2, ("n1", "n2"), "77.3")


def test_without_slurm_it_is_what_is_said_or_the_only_one():
    assert member_of({}, None, None, None, names) == Member(0, 1)
    assert member_of(STEP, 3, 2, "first", names) == Member(2, 3, ("first",))


@pytest.mark.parametrize(("given_", "message"), [
    ((STEP | {"SLURM_NTASKS": "16"}, None, None), "16 tasks on 2 nodes: give srun --ntasks-per-node=1"),
    (({}, 2, 2), "--node-rank 2: with --nodes 2 it has to be from 0 to 1"),
    (({}, 2, None), "--node-rank None")])
def test_what_cannot_be_is_refused(given_, message):
    environ, nodes, rank = given_
    with pytest.raises(UsageError, match=message):
        member_of(environ, nodes, rank, None, names)


def test_nothing_that_ray_starts_takes_itself_for_a_task_of_mpi():
    assert without_foreign(STEP | {"PMI_RANK": "0", "PMIX_ID": "x", "OMPI_X": "1", "HOME": "/h"}) == {"HOME": "/h"}


@given(st.text(max_size=12), st.integers(0, 4096), st.sets(st.integers(7000, 9959), max_size=40))
def test_ports_are_free_together_and_nobody_elses(job, rank, taken):
    block = port_block(job, rank, lambda port: port not in taken)
    assert len(block) == 8 and not taken & set(block)
    assert block.start >= 7000 and block.stop <= 10_002 < PORTS.start
    assert block == port_block(job, rank, lambda port: port not in taken)


def test_a_machine_without_a_free_block_says_so():
    with pytest.raises(UsageError, match="no 8 TCP ports in a row are free from 7000 to 9959"):
        port_block("1.0", 0, lambda port: False)


def test_the_heads_address_is_one_that_others_can_mean():
    assert head_address(Member(0, 2, ("127.0.0.1", "127.0.0.2"))) == "127.0.0.1"
    assert head_address(Member(0, 2, ("127.0.0.5",))) == "127.0.0.5"
    with pytest.raises(UsageError, match="'nowhere.invalid' does not resolve .*say it with --head ADDRESS"):
        head_address(Member(0, 2, ("nowhere.invalid",)))
