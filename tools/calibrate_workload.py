"""Find the overhead per step with which the simulated baseline takes as long as published.

    python tools/calibrate_workload.py configs/workloads/moonlight.yaml

Prints the overhead to write into the file, and what else is published of the baseline beside what comes out.
"""

from __future__ import annotations

import sys
from statistics import fmean

from launcher.simulate import load_workload
from megatron_pbsd.simulation.cluster import Outcome
from megatron_pbsd.simulation.experiment import BASELINE, simulate
from megatron_pbsd.simulation.workload import Workload, jobs


def outcomes(workload: Workload, overhead_s: float) -> list[Outcome]:
    tried = workload.model_copy(update={"engine": workload.engine.model_copy(update={"overhead_s": overhead_s})})
    seeds = range(workload.seed, workload.seed + workload.seeds)
    return [simulate(tried, BASELINE, jobs(workload.requests, seed), seed) for seed in seeds]


def main(path: str) -> None:
    workload = load_workload(path)
    wanted = workload.published[BASELINE].total_s
    low, high = 0.0, 0.2
    for _ in range(12):
        middle = (low + high) / 2
        found = outcomes(workload, middle)
        low, high = (middle, high) if fmean(o.total_s for o in found) < wanted else (low, middle)
    overhead_s = round((low + high) / 2, 4)
    found = outcomes(workload, overhead_s)
    print(f"overhead_s: {overhead_s}")
    print(f"total {fmean(o.total_s for o in found):.0f} s, published {wanted:.0f} s")
    print(f"tail {fmean(o.tail_s for o in found):.0f} s, published {workload.published[BASELINE].tail_s:.0f} s")
    print(f"idle {fmean(o.idle for o in found):.3f}")
    print(f"preemptions {fmean(sum(e.counters.preemptions for e in o.engines) for o in found):.0f}")


if __name__ == "__main__":
    main(sys.argv[1])
