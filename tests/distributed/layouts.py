"""Layouts of up to four ranks, by name; sizes that a name leaves out are 1."""

from __future__ import annotations

from megatron_pbsd.config import ParallelConfig

ONE = ParallelConfig(world_size=1, tp=1)
DENSE = {
    "tp2": ParallelConfig(world_size=2, tp=2),
    "pp2": ParallelConfig(world_size=2, tp=1, pp=2),
    "pp2vpp2": ParallelConfig(world_size=2, tp=1, pp=2, vpp=2),
    "pp4vpp2": ParallelConfig(world_size=4, tp=1, pp=4, vpp=2),
    "cp2": ParallelConfig(world_size=2, tp=1, cp=2),
    "dp2": ParallelConfig(world_size=2, tp=1),
    "dp4": ParallelConfig(world_size=4, tp=1),
    "tp2pp2": ParallelConfig(world_size=4, tp=2, pp=2),
    "tp2cp2": ParallelConfig(world_size=4, tp=2, cp=2, sequence_parallel=True),
    "pp2dp2": ParallelConfig(world_size=4, tp=1, pp=2),
}
MOE = {
    "ep2": ParallelConfig(world_size=2, tp=1, ep=2),
    "etp2": ParallelConfig(world_size=2, tp=2, etp=2),
    "tp2": ParallelConfig(world_size=2, tp=2),
    "cp2": ParallelConfig(world_size=2, tp=1, cp=2),
    "tp2ep2": ParallelConfig(world_size=4, tp=2, ep=2),
    "ep2etp2": ParallelConfig(world_size=4, tp=2, ep=2, etp=2),
    "ep4": ParallelConfig(world_size=4, tp=1, ep=4),
    "pp2ep2": ParallelConfig(world_size=4, tp=1, pp=2, ep=2),
    "cp2ep2": ParallelConfig(world_size=4, tp=1, cp=2, ep=2),
}
