"""A measurement in a process of its own, on one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")

QUICK = "SYNTHCUBE_BENCH_QUICK"  # set where --quick is given: see bench.sizes


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns in a fresh process, where torch and OpenMP have one thread."""
    os.environ |= one_thread()  # read by the child before it loads any library
    with ProcessPoolExecutor(1, get_context("spawn"), _limit_torch) as pool:
        return pool.submit(function, *arguments).result()


def one_thread() -> dict[str, str]:
    """The environment of this process, with the numerical libraries held to one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _limit_torch() -> None:
    import torch

    torch.set_num_threads(1)
