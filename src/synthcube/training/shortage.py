"""Too little memory: said before a training where it can be foreseen, and explained where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from synthcube import compute, runtime
from synthcube.compute import ComputeConfig
from synthcube.errors import MemoryShortageError, SynthCubeError
from synthcube.models.family import FamilyConfig
from synthcube.schema import ImageSpec
from synthcube.training.config import TrainingConfig
from synthcube.training.memory import MemoryEstimate, estimate
from synthcube.training.recomputation import recompute_blocks

_KEYS_SHOWN = 3
_HALVES = 6  # a batch is halved no more often than that
_SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator",
    "ALLOC_FAILED", "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip
_NO_ROOM_FOR_WORDS = "[enforce fail a"  # torch's text, where not even that could be allocated


@dataclass(frozen=True, slots=True)
class Need:
    """A training, and the memory that it needs and has."""

    model: FamilyConfig
    image: ImageSpec
    training: TrainingConfig
    compute: ComputeConfig
    precision: str
    device: torch.device
    num_workers: int = 0

    @property
    def processes(self) -> int:
        """Those that share a batch."""
        return compute.devices_used(self.compute, self.device) * self.compute.num_nodes

    def estimate(self) -> MemoryEstimate:
        """What each process needs."""
        return estimate(
            self.model, self.image, self.training, mixed=self.precision.endswith("-mixed"),
            recomputed=self.compute.activation_checkpointing,
            processes=self.processes, num_workers=self.num_workers,
        )  # fmt: skip

    def bytes_needed(self) -> int:
        """On the GPU of each process; or in the host, by all of its processes."""
        needed = self.estimate()
        if self.device.type == "cuda":
            return needed.on_device
        return (needed.on_device + needed.loading) * self.processes // self.compute.num_nodes

    def bytes_free(self) -> int:
        """On the GPU, or in the host; as much as anything where that cannot be told."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return runtime.free_memory()


def warning(need: Need, needed: int, free: int) -> str:
    """What to say of a training that needs more bytes than are free; empty where it does not."""
    if needed <= free:
        return ""
    return (
        f"This training needs about {_gigabytes(needed)}, and {_gigabytes(free)} are free: it may "
        f"run out of memory. These help most: {'; '.join(_advice(need, free))}."
    )


@contextmanager
def explained(need: Need, free: int, kept: Any) -> Iterator[None]:
    """Turn a failed allocation while training into a text that says what to change.

    Args:
        free: bytes that were free when it started.
        kept: called for the words on the last checkpoint.

    Raises:
        MemoryShortageError: memory ran out.
    """
    where = "the GPU" if need.device.type == "cuda" else "this machine or container"
    with _explained_by(
        lambda reason: MemoryShortageError(
            f"The memory of {where} is used up ({reason}). {kept()} "
            "Run the same command again with one of these, those that help most first:",
            _advice(need, free),
        )
    ):
        yield


@contextmanager
def sampling_explained(batch_size: int) -> Iterator[None]:
    """The same while images are made.

    Raises:
        MemoryShortageError: memory ran out.
    """
    less = f"--batch_size {batch_size // 2}" if batch_size > 1 else "a machine with more of it"
    with _explained_by(
        lambda reason: MemoryShortageError(
            f"Memory ran out while {batch_size} image(s) were made at once ({reason}): use {less}."
        )
    ):
        yield


@contextmanager
def _explained_by(explanation: Callable[[str], MemoryShortageError]) -> Iterator[None]:
    """Raise that, made of the first line of the reason, where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise explanation(_first_line(error)) from error


def is_shortage(error: BaseException | None) -> bool:
    """Whether an exception tells of an allocation that failed, on a GPU or in the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return str(error) == _NO_ROOM_FOR_WORDS or any(sign in str(error) for sign in _SIGNS)


def _advice(need: Need, free: int) -> list[str]:
    """Changes of keys, each by itself, with what would be needed then; the best ones first."""
    changed = [*_less_at_once(need, free), *_cheaper(need), *_smaller(need)]
    ranked = []
    for words, other in changed:
        try:
            ranked.append((other.bytes_needed(), words))
        except (RuntimeError, MemoryError, SynthCubeError):  # it is memory that we are short of
            continue
    ranked.sort(key=lambda each: each[0])
    told = [f"{words} (about {_gigabytes(needed)})" for needed, words in ranked]
    return told[:_KEYS_SHOWN] or [f"--set {words}" for words, _ in changed[:_KEYS_SHOWN]]


def _less_at_once(need: Need, free: int) -> Iterator[tuple[str, Need]]:
    """A smaller batch, the rest of it accumulated: the largest that should fit."""
    training = need.training
    for halves in range(1, _HALVES):
        size, rest = divmod(training.batch_size, 2**halves)
        if rest or size % need.processes or not size:
            size = max(1, size // need.processes) * need.processes
        if size >= training.batch_size:
            return
        accumulate = training.accumulate * -(-training.batch_size // size)
        changes = {"batch_size": size, "accumulate": accumulate}
        other = replace(need, training=training.model_copy(update=changes))
        last = size == need.processes or halves + 1 == _HALVES
        try:
            fits = other.bytes_needed() <= free
        except (RuntimeError, MemoryError):
            fits = False
        if fits or last:
            yield f"training.batch_size={size} training.accumulate={accumulate}", other
            return


def _cheaper(need: Need) -> Iterator[tuple[str, Need]]:
    """Half precision; activations computed twice."""
    on_gpu = need.device.type == "cuda"
    if need.precision == "32-true" and (on_gpu or compute.computes_in_bf16(need.device)):
        yield "compute.precision=bf16", replace(need, precision="bf16-mixed")
    if not need.compute.activation_checkpointing and _has_blocks(need):
        twice = need.compute.model_copy(update={"activation_checkpointing": True})
        yield "compute.activation_checkpointing=true", replace(need, compute=twice)


def _has_blocks(need: Need) -> bool:
    """Whether the model has blocks that can be computed twice."""
    try:
        recompute_blocks(need.model.build(need.image))
    except SynthCubeError:
        return False
    except (RuntimeError, MemoryError):  # it is memory that we are short of
        return True
    return True


def _smaller(need: Need) -> Iterator[tuple[str, Need]]:
    """Half the size of the images, half the channels of the networks, where the model can."""
    size = tuple(each // 2 for each in need.image.size)
    image = need.image.model_copy(update={"size": size})
    if not need.model.faults(image):
        yield f"data.size={list(size)}", replace(need, image=image)
    channels = getattr(need.model, "channels", None)
    if isinstance(channels, tuple) and min(channels, default=0) > 1:
        halved = [each // 2 for each in channels]
        try:
            values = need.model.model_dump() | {"channels": halved}
            model = type(need.model).model_validate(values)
        except (ValidationError, SynthCubeError):
            return
        if not model.faults(need.image):
            yield f"model.channels={halved} (another model)", replace(need, model=model)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"
