"""The images of a job shared among processes, batch by batch, whoever started them.

Batches are those of one process, so that every image is the same to the last bit: how many images
a network sees at once can change how it rounds.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from synthcube import environment, plugins
from synthcube.errors import SynthCubeError
from synthcube.tasks.inference_jobs import Job, Made
from synthcube.training.memory import sampling_memory_errors

log = logging.getLogger("synthcube")

Opener = Callable[[torch.device], Job]
"""Opens the job on a device; another process gets it as a copy."""

_START = timedelta(minutes=10)  # for all processes to be there
_LONG = timedelta(days=30)  # one may wait for the slowest as long as that needs


def make_alone(job: Job) -> list[Made]:
    """Every image, made in this process."""
    return [made for rows in job.batches() for made in _made(job, rows)]


def make_in_pool(opener: Opener, batches: Sequence[range], devices: list[str]) -> list[Made]:
    """Every image, made by a process of our own for each device.

    Raises:
        SynthCubeError: what any of them raised, once; or one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for device in devices:
        places.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    given = (places, opener, threads, plugins.vouched())
    results: dict[int, list[Made]] = {}
    with ProcessPoolExecutor(len(devices), context, _begin, given) as pool:
        futures = {pool.submit(_make, rows): rows.start for rows in batches}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
        except BrokenProcessPool as error:
            raise SynthCubeError(
                "A process that makes images was killed, as happens when memory runs out: lower "
                "sampling.batch_size or compute.num_devices."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [made for start in sorted(results) for made in results[start]]


_OPENED: dict[str, Any] = {}  # of a process of the pool: its device, and its job once opened


def _begin(places: Any, opener: Opener, threads: int, vouched: plugins.Vouched) -> None:
    environment.open_log()
    plugins.vouch(vouched.folders, vouched.packages)
    log.setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    _OPENED.update(device=torch.device(places.get()), opener=opener)


def _make(rows: range) -> list[Made]:
    if "job" not in _OPENED:
        _OPENED["job"] = _OPENED["opener"](_OPENED["device"])
    return _made(_OPENED["job"], rows)


def _made(job: Job, rows: range) -> list[Made]:
    with sampling_memory_errors(len(rows)):
        return job.make(rows)


def make_in_ranks(opener: Opener, device: torch.device) -> Path | None:
    """The share of this process among those that a launcher has started; all of them call it.

    The first one takes the folder and finishes it when all are done.

    Raises:
        SynthCubeError: one of them failed; only the first process says so.
    """
    rank, processes = environment.process_rank(), environment.launched_processes()
    if rank:
        log.setLevel(logging.WARNING)
    with _joined(rank, processes) as group:
        job, error = _attempt(lambda: _claimed(opener(device), rank))
        _agree(error, group)
        batches = job.batches()[rank::processes]
        made, error = _attempt(lambda: [_made(job, rows) for rows in batches])
        _agree(error, group)
        shares: list[Any] | None = [None] * processes if rank == 0 else None
        distributed.gather_object(made, shares, group=group)
        finished, error = _attempt(lambda: job.finish(_in_order(shares)) if shares else None)
        _agree(error, group)
    path: Path | None = finished
    return path


def _claimed(job: Job, rank: int) -> Job:
    if rank == 0:
        job.claim()
    return job


def _in_order(shares: list[list[list[Made]]]) -> list[Made]:
    """Batch i was made by process i modulo their number."""
    number = sum(map(len, shares))
    return [made for i in range(number) for made in shares[i % len(shares)][i // len(shares)]]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # every process must hear of it before it ends
        return None, error


def _agree(error: Exception | None, group: Any) -> None:
    """End all processes where one has failed.

    Raises:
        SynthCubeError: in the first process, the fault of a user in any of them.
        Exception: this process's own, where it is a bug.
    """
    text = str(error) if isinstance(error, SynthCubeError) else None
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (error is not None, text), group)
    if not any(failed for failed, _ in found):
        return
    if error and text is None:
        raise error
    texts = [each for _, each in found if each]
    if texts and distributed.get_rank() == 0:
        raise SynthCubeError(texts[0])
    raise SystemExit(2 if texts else 1)


@contextmanager
def _joined(rank: int, processes: int) -> Iterator[Any]:
    """The processes connected, on the CPU: what they exchange are rows and tiles."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    where = "env://"
    if SLURMEnvironment.detect():
        cluster = SLURMEnvironment()
        where = f"tcp://{cluster.main_address}:{cluster.main_port}"
    try:
        distributed.init_process_group(
            "gloo", init_method=where, rank=rank, world_size=processes, timeout=_START
        )
    except (RuntimeError, ValueError) as error:
        raise SynthCubeError(
            f"The {processes} processes that the launcher has started do not find each other at "
            f"{where}: {error}"
        ) from error
    try:
        yield distributed.new_group(timeout=_LONG)
    except RuntimeError as error:
        if "gloo" in str(error).lower() or "connection" in str(error).lower():
            raise SynthCubeError(
                "Another process of this inference ended unexpectedly, as when memory runs out; "
                "the same command again makes the images anew."
            ) from error
        raise
    finally:
        distributed.destroy_process_group()
