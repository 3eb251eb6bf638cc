"""The networks of an exported model for other runtimes: made anew, or kept from before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from synthcube import artifact
from synthcube.artifact import Artifact
from synthcube.export.config import Runtime, Weights
from synthcube.export.runtimes.conversion import check_request, convert
from synthcube.export.runtimes.formats import RUNTIMES, Converted, is_part, record_name
from synthcube.export.runtimes.substitution import converted
from synthcube.storage import scratch_folder

log = logging.getLogger("synthcube")


@dataclass(frozen=True, slots=True)
class Conversions:
    """What an export adds for other runtimes."""

    records: tuple[Converted, ...] = ()
    files: tuple[Path, ...] = ()


@contextmanager
def conversions(
    trained: Artifact, asked: Sequence[Runtime], weights: Weights
) -> Iterator[Conversions]:
    """The networks converted for the runtimes asked for; the files are there for so long.

    What the model was converted for before, it stays converted for.

    Raises:
        ConfigError: a runtime is not installed, or does not store weights so.
        FamilyError: a network cannot be converted, or would make other images.
    """
    for each in asked:
        check_request(each, weights)
    listed = artifact.read_index(trained.folder)
    kept: list[Runtime] = [
        each for each in RUNTIMES if record_name(each) in listed and each not in asked
    ]
    records = [converted(trained.folder, each) for each in kept]
    files = [trained.folder / name for each in kept for name in listed if is_part(name, each)]
    with scratch_folder() as folder:
        for each in asked:
            records.append(convert(trained.build(torch.device("cpu")), folder, each, weights))
            log.info(
                "%s, weights in %s: its images are off those of torch by %.2g of the range at "
                "most, by %.2g on average.",
                each, weights, records[-1].largest_difference, records[-1].mean_difference,
            )  # fmt: skip
        yield Conversions(tuple(records), (*files, *sorted(folder.iterdir())))
