"""What a cluster cannot give is said at once, with the nearest that it can."""

from __future__ import annotations

import pytest

from launcher.slurm.limits import in_slurm, problems, read_partitions, resources
from megatron_pbsd.config import ClusterConfig
from megatron_pbsd.config.cluster import seconds_of

# As `sinfo` of Slurm 22.05 says.
ROWS = [dict(zip(("name", "up", "time_limit", "nodes", "gres", "shown"), line.split("|"))) for line in (
    "main|up|1-00:00:00|4|gpu:h100:8(S:0-1)|main*",
    "main|up|1-00:00:00|2|gpu:a100:4,nvme:1|main*",
    "cpu|up|infinite|10|(null)|cpu",
    "old|down|4:00:00|1|gpu:8|old",
)]


def found(nodes: int = 1, gpus: int = 0, min_nodes: int | None = None, **slurm: object) -> str:
    cluster = ClusterConfig.model_validate(
        {"nodes": nodes, "gpus_per_node": gpus, "min_nodes": min_nodes, "slurm": slurm})
    return "\n".join(problems(cluster, read_partitions(ROWS)))


@pytest.mark.parametrize("asked", [
    {}, {"nodes": 6}, {"nodes": 4, "gpus": 8}, {"nodes": 6, "gpus": 4}, {"nodes": 4, "gpus": 8, "gres": "gpu:h100"},
    {"nodes": 9, "min_nodes": 4, "gpus": 8}, {"partition": "cpu", "nodes": 10, "time_limit": "30-0"},
    {"time_limit": "24:00:00"},
])
def test_what_the_cluster_has_is_no_problem(asked):
    assert found(**asked) == ""


@pytest.mark.parametrize(("asked", "parts"), [
    ({"partition": "mian"}, ("'mian'", "main, cpu, old", "did you mean 'main'?")),
    ({"nodes": 7}, ("cluster.nodes = 7", "has 6 nodes")),
    ({"nodes": 9, "min_nodes": 7}, ("cluster.min_nodes = 7", "has 6 nodes")),
    ({"nodes": 5, "gpus": 8}, ("only 4 nodes", "8 of 'gpu'")),
    ({"gpus": 9}, ("cluster.gpus_per_node = 9", "at most 8")),
    ({"gpus": 8, "gres": "gpu:a100"}, ("cluster.gpus_per_node = 8", "at most 4 of 'gpu:a100'")),
    ({"gpus": 8, "gres": "gpu:h200"}, ("'gpu:h200'", "gpu:a100, gpu:h100, nvme", "did you mean 'gpu:h100'?")),
    ({"gpus": 1, "partition": "cpu"}, ("have no generic resources",)),
    ({"partition": "old"}, ("is down", "up are main, cpu")),
    ({"time_limit": "2-0", "nodes": 7}, ("'2-0'", "at most '1-00:00:00'", "cluster.nodes = 7")),
])
def test_what_it_has_not_is_said_with_the_nearest_choice(asked, parts):
    text = found(**asked)
    assert all(part in text for part in parts), text


def test_resources_and_limits_are_read():
    assert resources("gpu:h100:8(S:0-1),nvme,gpu:a100:2") == {"gpu:h100": 8, "nvme": 1, "gpu:a100": 2}
    assert resources("(null)") == {}
    for limit, seconds in (("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("1-12", 129600), ("2-0:30", 174600)):
        assert seconds_of(limit) == seconds
        assert seconds_of(in_slurm(seconds)) == seconds
