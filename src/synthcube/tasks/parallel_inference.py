"""Parallel inference: the batches of a job divided among processes, which this one or a launcher
has started.

Batches are the same as in one process, so that every image is the same to the last bit: how many
images a network sees at once can change how it rounds.
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
from typing import Any, TypeVar

import torch
from torch import distributed

from synthcube import environment, plugins, terminal
from synthcube.errors import SynthCubeError
from synthcube.tasks.inference_jobs import Job, WrittenImage
from synthcube.training.memory import sampling_memory_errors

log = logging.getLogger("synthcube")

T = TypeVar("T")
Opener = Callable[[torch.device], Job]
"""Opens the job on a device; pickled for other processes."""

_START = timedelta(minutes=10)  # until all processes have started
_LONG = timedelta(days=30)  # the first waits for the slowest, however long it takes


def make_alone(job: Job) -> list[WrittenImage]:
    """Every image, made in this process."""
    return [image for images in _made(job, job.batches()) for image in images]


def _made(job: Job, batches: Sequence[range]) -> Iterator[list[WrittenImage]]:
    with _progress(batches) as progress:
        for batch in batches:
            yield _make_batch(job, batch)
            progress.advance(len(batch))


def _progress(batches: Sequence[range]) -> terminal.Progress:
    return terminal.Progress("Making images", sum(map(len, batches)))


def make_in_pool(
    opener: Opener, batches: Sequence[range], devices: list[str]
) -> list[WrittenImage]:
    """Every image, made by new processes, one for each device."""
    context = multiprocessing.get_context("spawn")
    free_devices = context.SimpleQueue()
    for device in devices:
        free_devices.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    arguments = (free_devices, opener, threads, plugins.vouched())
    results: dict[int, list[WrittenImage]] = {}
    with ProcessPoolExecutor(len(devices), context, _setup_worker, arguments) as pool:
        futures = {pool.submit(_make_in_worker, batch): batch for batch in batches}
        try:
            with _progress(batches) as progress:
                for future in as_completed(futures):
                    results[futures[future].start] = future.result()
                    progress.advance(len(futures[future]))
        except BrokenProcessPool as error:
            raise SynthCubeError(
                "A process that makes images was killed, as happens when memory runs out: lower "
                "sampling.batch_size or compute.num_devices."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [image for start in sorted(results) for image in results[start]]


_WORKER: dict[str, Any] = {}  # of a process of the pool: its device, and its job once opened


def _setup_worker(
    free_devices: Any, opener: Opener, threads: int, vouched: plugins.Vouched
) -> None:
    environment.open_log()
    plugins.vouch(vouched.folders, vouched.packages)
    log.setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    _WORKER.update(device=torch.device(free_devices.get()), opener=opener)


def _make_in_worker(batch: range) -> list[WrittenImage]:
    if "job" not in _WORKER:
        _WORKER["job"] = _WORKER["opener"](_WORKER["device"])
    return _make_batch(_WORKER["job"], batch)


def _make_batch(job: Job, batch: range) -> list[WrittenImage]:
    with sampling_memory_errors(len(batch)):
        return job.make(batch)


def make_in_ranks(opener: Opener, device: torch.device) -> Path | None:
    """Make this process's part of the images; all processes of the launcher call it.

    The first process claims the folder, and finishes it once all are done; it alone returns the
    picture.

    Raises SynthCubeError, in the first process only, if one of them failed.
    """
    rank, processes = environment.process_rank(), environment.launched_processes()
    if rank:
        log.setLevel(logging.WARNING)

    def claimed() -> Job:
        job = opener(device)
        if rank == 0:
            job.claim()
        return job

    def finished() -> Path | None:
        if gathered is None:
            return None
        # Batch i was made by process i modulo their number.
        number = sum(map(len, gathered))
        batches = (gathered[i % processes][i // processes] for i in range(number))
        return job.finish([image for batch in batches for image in batch])

    with _connected(rank, processes) as group:
        job: Job = _together(claimed, group)
        mine = job.batches()[rank::processes]
        images = _together(lambda: list(_made(job, mine)), group)
        gathered: list[Any] | None = [None] * processes if rank == 0 else None
        distributed.gather_object(images, gathered, group=group)
        return _together(finished, group)


def _together(work: Callable[[], T], group: Any) -> T:
    """What `work` returns; all processes end where it failed in one of them."""
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # the other processes must hear of it before this one ends
        error = caught
    text = str(error) if isinstance(error, SynthCubeError) else None
    outcomes: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(outcomes, (error is not None, text), group)
    if not any(has_failed for has_failed, _ in outcomes):
        return result
    if error and text is None:
        raise error
    texts = [fault for _, fault in outcomes if fault]
    if texts and distributed.get_rank() == 0:
        raise SynthCubeError(texts[0])
    raise SystemExit(2 if texts else 1)


@contextmanager
def _connected(rank: int, processes: int) -> Iterator[Any]:
    """A group of all processes, connected over the CPU: they exchange rows and tiles."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    address = "env://"
    if SLURMEnvironment.detect():
        cluster = SLURMEnvironment()
        address = f"tcp://{cluster.main_address}:{cluster.main_port}"
    try:
        distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=processes, timeout=_START
        )
    except (RuntimeError, ValueError) as error:
        raise SynthCubeError(
            f"The {processes} processes that the launcher has started do not find each other at "
            f"{address}: {error}"
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
