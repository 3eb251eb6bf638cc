"""Memory and cores that this process may use: the machine's, or its container's share."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path

log = logging.getLogger("synthcube")

# Of a container the files of its own group are at the top; version 2, then 1.
_CGROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take of the host's memory: by the kernel's account of the
    machine, the limit of its container or job (cgroup), and that of its address space."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(each for each in lines if each.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            taken = int((root / used).read_text())
            found.append(max(0, int((root / limit).read_text()) - taken))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_bytes != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text().split()[0])
            found.append(max(0, limit_bytes - pages * resource.getpagesize()))
    return min(found)


def workers_that_fit(
    num_workers: int, batch_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> int:
    """As many of `num_workers` as shared memory has room for; says so where these are fewer.

    Every worker keeps two batches there and the training holds a third; a container has 64 MB
    unless told otherwise. Another sharing strategy of PyTorch would not help: each of them takes
    the same memory. The batches are the same with any number of workers.
    """
    if not num_workers or not shared_memory.is_dir():
        return num_workers
    free = shutil.disk_usage(shared_memory).free
    fitting = min(num_workers, max(0, free // batch_bytes - 1) // 2)
    if fitting < num_workers:
        log.info(
            "Loading data with %d instead of %d workers: %s has %.1f MB free, they need %.1f MB. "
            "Give the container more with --shm-size.",
            fitting, num_workers, shared_memory, free / 1e6,
            (2 * num_workers + 1) * batch_bytes / 1e6,
        )  # fmt: skip
    return fitting
