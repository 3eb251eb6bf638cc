"""The memory that a training will need, estimated before it starts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synthcube import compute, environment
from synthcube.compute import ComputeConfig
from synthcube.errors import MemoryShortageError, SynthCubeError
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family, FamilyConfig
from synthcube.models.optimizers import OptimizerConfig
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.training.acceleration import recompute_blocks
from synthcube.training.config import TrainingConfig

# Weights x voxels below which a step is taken for real: that is quicker than to trace it.
_CHEAP = 3e8


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one process of a training needs, beside those of its libraries."""

    weights: int
    """Parameters and buffers, the frozen ones too."""
    optimizer: int
    """States of every optimizer."""
    average: int
    """Moving average of the weights."""
    step: int
    """Most that a step adds: activations and gradients, or what its optimizer needs."""
    loading: int
    """Batches that data workers keep ready, always in the memory of the host."""

    @property
    def on_device(self) -> int:
        """Everything but the data workers' batches."""
        return self.weights + self.optimizer + self.average + self.step


def estimate(
    config: FamilyConfig,
    image: ImageSpec,
    training: TrainingConfig,
    *,
    mixed: bool,
    recomputed: bool = False,
    processes: int = 1,
    num_workers: int = 0,
) -> MemoryEstimate:
    """What a training of that model takes, from the peak of one step's forward and backward pass.

    The step is traced on tensors without data (torch's FakeTensorMode), so that it costs neither
    memory nor time however large the images; a tiny one, or one that cannot be traced, is taken
    for real. What libraries allocate inside an operation, as cuDNN's workspaces, is not seen.

    Args:
        mixed: whether it computes in half precision.
        recomputed: whether the inside of blocks is computed again backwards.
        processes: those that share a batch.
    """
    family = config.build(image).train()
    if recomputed:
        recompute_blocks(family)
    trained = [weight for weight in family.parameters() if weight.requires_grad]
    states = [*family.parameters(), *family.buffers()]
    share = math.ceil(training.batch_size / processes)
    gradients = _bytes(trained)
    # While a forward pass runs, none are left but those that are added up or sent.
    kept = gradients * (training.accumulate > 1) + gradients * (processes > 1)
    steps = (_step_peak(family, image, share, mixed=mixed) + kept, 2 * gradients)
    image_bytes = 4 * math.prod(image.size) * (image.channels + len(image.source_channels))
    return MemoryEstimate(
        weights=_bytes(states),
        optimizer=_optimizer_bytes(family),
        average=_bytes(states) if training.ema else 0,
        step=max(steps),
        loading=2 * num_workers * share * image_bytes,
    )


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen[id(storage)] = weakref.finalize(storage, self._free, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size


def _step_peak(family: Family, image: ImageSpec, batch_size: int, *, mixed: bool) -> int:
    from torch._subclasses import FakeTensorMode

    weights = sum(each.numel() for each in family.parameters())
    if weights * math.prod(image.size) * batch_size < _CHEAP:
        return _measured(family, image, batch_size, mixed=mixed)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _measured(family, image, batch_size, mixed=mixed)
    except Exception:  # a user's own family may look at values, which a tensor without data lacks
        family.zero_grad()
        return batch_size * _measured(family, image, 1, mixed=mixed)


def _measured(family: Family, image: ImageSpec, batch_size: int, *, mixed: bool) -> int:
    """Peak of the forward and backward pass of every network that is trained."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    live = _Live()
    with torch.random.fork_rng(devices=[]), live, autocast:
        batch = _blank(image, batch_size)
        if not isinstance(family, AdversarialFamily) or family.discriminator is None:
            _differentiate(family.loss(batch), family.parameters())
            return live.peak
        judging = {id(weight) for weight in family.discriminator.parameters()}
        making = [weight for weight in family.parameters() if id(weight) not in judging]
        terms, made = family.generator_loss(batch)
        _differentiate(terms, making)
        made = made.detach()
        del terms
        judged = family.discriminator_loss(batch, made)
        _differentiate(judged, family.discriminator.parameters())
    return live.peak


def _differentiate(terms: dict[str, torch.Tensor], weights: Iterable[torch.Tensor]) -> None:
    trained = [weight for weight in weights if weight.requires_grad]
    torch.autograd.grad(terms["loss"], trained, allow_unused=True)


def _blank(image: ImageSpec, number: int) -> Batch:
    return Batch(
        image=torch.zeros(number, image.channels, *image.size),
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.zeros(number, dtype=torch.int64),
        augmented=False,
        condition=Condition(
            values=torch.zeros(number, len(image.conditions)),
            source=torch.zeros(number, len(image.source_channels), *image.size),
        ),
    )


def _optimizer_bytes(family: Family) -> int:
    trained = [weight for weight in family.parameters() if weight.requires_grad]
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        return int(_bytes(trained) * _states(family.config.optimizer))
    judging = {id(weight) for weight in family.discriminator.parameters()}
    made_by, judged_by = family.optimizer_configs()
    return int(
        _bytes(each for each in trained if id(each) not in judging) * _states(made_by)
        + _bytes(each for each in trained if id(each) in judging) * _states(judged_by)
    )


def _states(optimizer: OptimizerConfig) -> float:
    """Bytes that an optimizer keeps for each byte of weights, from a step with a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    built = optimizer.build([weight])
    built.step()
    kept = [each for each in tree_leaves(dict(built.state)) if isinstance(each, torch.Tensor)]
    return _bytes(each for each in kept if each.numel() > 1) / _bytes([weight])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


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
        return environment.free_memory()


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
