"""The exceptions of SynthCube.

PreemptedError          a signal stopped the task, which can go on: exit code 75
                        (what a training does then is in training/preemption.py)
SynthCubeError          a user's fault: shown without a traceback, exit code 2
|- ConfigError          the YAML file or a --set override
|- ManifestError        the list of images
|- ImageError           an image that cannot be read or does not fit the others
|- ArtifactError        a trained model's folder is missing, damaged or too new
|- FamilyError          a family is unknown, or cannot do what is asked of it
|- EvaluationError      predictions and real images that cannot be compared
|- FederationError      sites of a federation that do not agree, or an update that is refused
|- HubError             a Hub cannot be reached, or refuses what is asked of it
|- OutputError          an output folder is not writable, not empty, or the disk is full
|- NonFiniteLossError   training produced a loss or a gradient that is not a number
`- MemoryShortageError  the memory of the GPU or of the machine is used up
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar


def first_faults(faults: Sequence[str], limit: int = 20) -> list[str]:
    """The first `limit` faults, and a line with the number of the others."""
    more = len(faults) - limit
    return [*faults[:limit], *([f"and {more} more"] if more > 0 else [])]


class SynthCubeError(Exception):
    """A fault of the user's: what is wrong, the value, what is right, and where.

    Several faults of the same kind are reported together, one line each.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, headline: str, faults: Iterable[str] = ()) -> None:
        self.headline = headline
        self.faults = tuple(faults)
        super().__init__("\n".join([headline, *(f"  - {fault}" for fault in self.faults)]))


class PreemptedError(BaseException):
    """A signal stopped the task; the same command continues it.

    Not an Exception: it comes at any moment, and code that catches exceptions to report a damaged
    file must not catch it.
    """

    # EX_TEMPFAIL of sysexits.h, try again later; raised by training/preemption.py
    exit_code: ClassVar[int] = 75


class ConfigError(SynthCubeError):
    """The YAML file or a --set override is not a valid config."""


class ManifestError(SynthCubeError):
    """The list of images is empty, malformed or contradicts itself."""


class ImageError(SynthCubeError):
    """An image cannot be read, holds values that cannot be used, or does not fit the others."""


class ArtifactError(SynthCubeError):
    """A trained model's folder is missing, incomplete, damaged or of a newer version."""


class FamilyError(SynthCubeError):
    """A family is unknown, or cannot do what is asked of it."""


class EvaluationError(SynthCubeError):
    """Predictions and real images are too few, or cannot be compared with one another."""


class FederationError(SynthCubeError):
    """Sites of a federation do not agree, or what one sent cannot be averaged."""


class HubError(SynthCubeError):
    """A Hub cannot be reached, holds something else, or refuses what is asked of it."""


class OutputError(SynthCubeError):
    """An output folder cannot be written, already holds something else, or the disk is full."""


class NonFiniteLossError(SynthCubeError):
    """Training produced a loss or a gradient that is not a number."""


class MemoryShortageError(SynthCubeError):
    """The memory of the GPU or of the machine is used up."""


def results_or_faults(*steps: Callable[[], Any]) -> list[Any]:
    """The results of all steps; the user's faults in all of them are raised together."""
    results, faults = [], []
    for step in steps:
        try:
            results.append(step())
        except SynthCubeError as error:
            faults.append(error)
    if faults:
        raise faults[0] if len(faults) == 1 else ConfigError("\n".join(map(str, faults)))
    return results
