"""This process among those that a launcher has started: torchrun, srun, or the user."""

from __future__ import annotations

import os
from collections.abc import Mapping


def process_rank(num_devices: int = 1, environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among those that train together, as their launcher wrote it.

    Args:
        num_devices: processes on each node.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    # Without a launcher, where the user starts the same command on each node.
    node, local = (environment.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return int(node) * num_devices + int(local) if (node + local).isdecimal() else 0


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among those of its node, as their launcher wrote it."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher (torchrun, srun) has started with this one."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 1
