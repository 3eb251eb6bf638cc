"""What a run will need of memory: said before it starts, explained where it runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from synthcube.config import RunConfig
from synthcube.schema import ImageSpec
from synthcube.training import checkpoints, shortage
from synthcube.training.shortage import Need

log = logging.getLogger("synthcube")


def need_of(settings: RunConfig, image: ImageSpec, precision: str, device: torch.device) -> Need:
    """The memory that this run needs on that device, for such images."""
    return Need(
        settings.model, image, settings.training, settings.compute, precision, device,
        settings.data.num_workers,
    )  # fmt: skip


def foretell(need: Need) -> None:
    """Log what is needed and what is free, and a warning where that is less."""
    free = need.bytes_free()
    try:
        needed = need.bytes_needed()
    except Exception as error:  # what is wrong the training will say, better than an estimate
        log.debug("No estimate of memory: %s", error)
        return
    log.info("Needs about %.2f GB beside the libraries; %.2f GB free.", needed / 1e9, free / 1e9)
    if lack := shortage.warning(need, needed, free):
        log.warning(lack)


@contextmanager
def shortage_explained(need: Need, run: Path) -> Iterator[None]:
    """Explain memory that runs out, and say what is left of `run`.

    Raises:
        MemoryShortageError: it ran out.
    """

    def kept() -> str:
        last = run / "checkpoints" / checkpoints.LAST
        if last.exists():
            return f"The last checkpoint, {last}, is intact."
        return "There is no checkpoint yet, and nothing half-written."

    with shortage.explained(need, need.bytes_free(), kept):
        yield
