"""Runs as Slurm jobs: rendered, checked, submitted, followed from attempt to attempt (docs/slurm.md)."""
