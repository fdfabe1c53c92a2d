"""How many cores are this process's own."""

import os


def cores() -> int:
    """Those that it may run on, and no more than srun's --cpus-per-task: not every site binds tasks to their cores."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, int(os.environ.get("SLURM_CPUS_PER_TASK", bound)))
