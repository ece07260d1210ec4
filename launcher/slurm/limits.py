"""What a cluster has, beside what a run asks of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_pbsd.config import ClusterConfig
from megatron_pbsd.config.cluster import seconds_of
from megatron_pbsd.errors import did_you_mean


@dataclass(frozen=True)
class Partition:
    """limit_s:  longest time limit; None is without.
    kinds:    (number of nodes, generic resources of each) of every kind of node: ('gpu:h100', 8).
    """

    name: str
    is_up: bool
    is_default: bool
    limit_s: int | None
    kinds: tuple[tuple[int, Mapping[str, int]], ...]

    @property
    def nodes(self) -> int:
        return sum(count for count, _ in self.kinds)

    def having(self, gres: str, count: int) -> int:
        """How many nodes have so many of a resource, 'gpu' or 'gpu:h100'."""
        return sum(nodes for nodes, has in self.kinds if amount(has, gres) >= count)


def amount(has: Mapping[str, int], gres: str) -> int:
    """gpu: of whatever type."""
    return sum(count for name, count in has.items() if name == gres or name.startswith(gres + ":"))


def read_partitions(rows: Sequence[Mapping[str, str]]) -> list[Partition]:
    """From `commands.partitions`."""
    found: dict[str, Partition] = {}
    for row in rows:
        kind = (int(row["nodes"]), resources(row["gres"]))
        before = found.get(row["name"])
        limit = row["time_limit"]
        found[row["name"]] = Partition(
            row["name"], row["up"] == "up", row["shown"].endswith("*"),
            None if limit == "infinite" else seconds_of(limit), (*(before.kinds if before else ()), kind))
    return list(found.values())


def resources(gres: str) -> dict[str, int]:
    """'gpu:h100:8(S:0-1),nvme:1' → {'gpu:h100': 8, 'nvme': 1}; a resource without a number is there once."""
    found: dict[str, int] = {}
    for one in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = one.strip().split(":")
        if parts == [""] or parts == ["null"]:
            continue
        count = int(parts.pop()) if len(parts) > 1 and parts[-1].isdigit() else 1
        found[":".join(parts)] = found.get(":".join(parts), 0) + count
    return found


def problems(cluster: ClusterConfig, partitions: Sequence[Partition]) -> list[str]:
    """All that the cluster cannot give, each with the nearest that it can."""
    slurm, names = cluster.slurm, [partition.name for partition in partitions]
    if slurm.partition:
        chosen = next((partition for partition in partitions if partition.name == slurm.partition), None)
        if chosen is None:
            return [f"cluster.slurm.partition = {slurm.partition!r} does not exist here; there are {', '.join(names)}"
                    + did_you_mean(slurm.partition, names)]
    else:
        chosen = next((partition for partition in partitions if partition.is_default), None)
        if chosen is None:
            return [f"cluster.slurm.partition = '' but this cluster has no default partition; there are "
                    f"{', '.join(names)}"]
    found = []
    if not chosen.is_up:
        others = [p.name for p in partitions if p.is_up]
        found.append(f"cluster.slurm.partition = {chosen.name!r} is down" + (
            f"; up are {', '.join(others)}" if others else ""))
    found += _node_problems(cluster, chosen)
    if slurm.time_limit and chosen.limit_s is not None and seconds_of(slurm.time_limit) > chosen.limit_s:
        found.append(f"cluster.slurm.time_limit = {slurm.time_limit!r} exceeds that of partition {chosen.name!r}; it "
                     f"may be at most {in_slurm(chosen.limit_s)!r}: a longer run goes on in the next attempt")
    return found


def _node_problems(cluster: ClusterConfig, chosen: Partition) -> list[str]:
    least, gres, count = cluster.min_nodes or cluster.nodes, cluster.slurm.gres, cluster.gpus_per_node
    key = "cluster.min_nodes" if cluster.min_nodes else "cluster.nodes"
    if least > chosen.nodes:
        return [f"{key} = {least}, but partition {chosen.name!r} has {chosen.nodes} nodes"]
    if not count or chosen.having(gres, count) >= least:
        return []
    kinds = sorted({name for _, has in chosen.kinds for name in has})
    if not any(amount(has, gres) for _, has in chosen.kinds):
        return [f"cluster.slurm.gres = {gres!r} is nothing that nodes of partition {chosen.name!r} have; they have "
                f"{', '.join(kinds) or 'no generic resources'}" + did_you_mean(gres, kinds)]
    if not (enough := chosen.having(gres, count)):
        most = max(amount(has, gres) for _, has in chosen.kinds)
        return [f"cluster.gpus_per_node = {count}, but nodes of partition {chosen.name!r} have at most {most} of "
                f"{gres!r}"]
    return [f"{key} = {least}, but only {enough} nodes of partition {chosen.name!r} have {count} of {gres!r}"]


def in_slurm(seconds: int) -> str:
    """As Slurm writes time limits: days-hh:mm:ss, or hh:mm:ss.

    >>> in_slurm(129600)
    '1-12:00:00'
    """
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
