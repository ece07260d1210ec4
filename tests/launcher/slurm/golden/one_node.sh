#!/bin/bash
# The run curve. Written by `pbsd submit`; docs/slurm.md explains it.
#SBATCH --job-name=curve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --chdir=/home/ada/work
#SBATCH --output=/home/ada/work/runs/curve/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue

run=/home/ada/work/runs/curve
pbsd() { /opt/pbsd/bin/pbsd "$@"; }

# Slurm says some time before the limit, and before it preempts: the run ends after its step, with a checkpoint.
trap ': >"$run/stop"; pbsd attempt stop "$run"' USR1
# Slurm ends the job. Its steps are told too; what became of them is recorded while there is time.
trap ':' TERM

while :; do
    # Closes the record of an attempt that died without a word; ends a crash loop.
    PBSD_ATTEMPT=$(pbsd attempt begin "$run") || exit
    export PBSD_ATTEMPT
    log=$run/attempts/$PBSD_ATTEMPT/job.log

    # One task on every node; when one ends badly all end.
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        /opt/pbsd/bin/pbsd node "$run" >>"$log" 2>&1 &
    step=$!
    # A trap interrupts `wait`.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    code=$?

    # 0: the same allocation makes another attempt. Otherwise the job ends: complete, requeued or given up.
    pbsd attempt end "$run" --exit-code "$code" || exit "$code"
done
