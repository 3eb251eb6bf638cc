"""The number of threads of a training on a CPU, from a short measurement."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from synthcube import environment
from synthcube.models.family import Family, FamilyConfig
from synthcube.schema import ImageSpec
from synthcube.training.memory import blank_batch, differentiate

log = logging.getLogger("synthcube")

_IMAGES = 4  # in a measured step, at most
_ROUNDS = 3
_MOST_SECONDS = 10.0
# Fewer threads must save this share of the time: they also leave the rest of the machine alone.
_CLEARLY = 0.95


def choose_threads(
    config: FamilyConfig,
    image: ImageSpec,
    batch_size: int,
    *,
    mixed: bool,
    deterministic: bool = False,
    recorded: int | None = None,
) -> None:
    """Set torch's threads to the number with which steps of this model are fastest.

    Steps with all cores, half of them and one are timed in turns. On a machine that is busy with
    other work, two threads that wait for each other may be several times slower than one.
    OMP_NUM_THREADS decides where it is set.

    Args:
        image: as the network sees it.
        mixed: whether steps use bfloat16.
        deterministic: keep the number of cores, so that the same command gives the same bits.
        recorded: the threads of a run that is continued, which needs the same ones to give the
            same result, bit for bit.
    """
    cores = environment.num_cores()
    if recorded:
        torch.set_num_threads(min(recorded, cores))
    elif cores > 1 and not deterministic and not environment.has_chosen_threads():
        step = _step(config, image, min(batch_size, _IMAGES), mixed=mixed)
        seconds = _measure(step, sorted({cores, cores // 2, 1}, reverse=True))
        best = fastest(seconds)
        torch.set_num_threads(best)
        shown = ", ".join(f"{number}: {1000 * value:.0f} ms" for number, value in seconds.items())
        log.info("Training on %d of %d threads (a short step on %s).", best, cores, shown)


def fastest(seconds: Mapping[int, float]) -> int:
    """The number of threads to take, from the seconds of a step by number of threads.

    More threads are kept unless fewer are clearly faster.
    """
    best = max(seconds)
    for number in sorted(seconds, reverse=True):
        if seconds[number] < _CLEARLY * seconds[best]:
            best = number
    return best


def _step(
    config: FamilyConfig, image: ImageSpec, number: int, *, mixed: bool
) -> Callable[[], None]:
    with torch.random.fork_rng(devices=[]):
        family: Family = config.build(image).train()
    batch = blank_batch(image, number)

    def step() -> None:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, mixed):
            differentiate(family, batch)

    return step


def _measure(step: Callable[[], None], candidates: list[int]) -> dict[int, float]:
    """Median seconds of a step by number of threads, measured in turns, the first for warm-up.

    Few threads are left out where a step with them may take longer than all of this should.
    """
    torch.set_num_threads(candidates[0])
    step()
    taken: dict[int, list[float]] = {number: [] for number in candidates}
    begun = time.monotonic()
    for turn in range(_ROUNDS):
        for number in candidates:
            longest = taken[candidates[0]] and taken[candidates[0]][0] * candidates[0] / number
            if longest and longest > _MOST_SECONDS:
                continue
            torch.set_num_threads(number)
            start = time.monotonic()
            step()
            taken[number].append(time.monotonic() - start)
        if turn and time.monotonic() - begun > _MOST_SECONDS / 2:
            break
    return {number: statistics.median(values) for number, values in taken.items() if values}
