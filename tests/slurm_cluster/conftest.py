from __future__ import annotations

import pytest
from slurm_cluster.mini_cluster import MiniCluster
from slurm_cluster.submitted import Submitted


@pytest.fixture(scope="session")
def cluster():
    """Five nodes: a run on two of them finds two others when it loses one, beside a run on one."""
    with MiniCluster(nodes=5) as made:
        yield made


@pytest.fixture
def submit(cluster):
    """Submit a run; it is cancelled when the test ends."""
    made = []

    def start(name: str, *overrides: str) -> Submitted:
        made.append(Submitted.submit(cluster, name, *overrides))
        return made[-1]

    yield start
    for run in made:
        run.cancel()
