"""Memory: an estimate before a training starts, and advice when it runs out."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from synthcube import compute, environment
from synthcube.compute import ComputeConfig
from synthcube.errors import MemoryShortageError, SynthCubeError
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family, FamilyConfig
from synthcube.models.optimizers import OptimizerConfig
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.training.acceleration import first_line, recompute_blocks
from synthcube.training.config import TrainingConfig
from synthcube.training.privacy import clipped_sum

Work = Callable[[Family, Batch], object]
"""What is done with a batch in a step."""

# Below this number of weights x voxels a real step is faster than a traced one.
_REAL_STEP_LIMIT = 3e8
# Resident memory of a host for each byte of a step that is alive at its peak: glibc keeps holes.
_HOST_STEP, _HOST_RECOMPUTED = 1.38, 2.1
_KEYS_SHOWN = 3
_SHORTAGE_MESSAGES = (
    "out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator",
    "ALLOC_FAILED", "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip
_CUT_MESSAGE = "[enforce fail a"  # all of torch's message if memory for it is lacking too


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes that one training process needs, without its libraries."""

    weights: int
    """Parameters and buffers, including frozen ones."""
    optimizer: int
    """States of every optimizer."""
    average: int
    """Moving average of the weights."""
    step: int
    """Peak of a step: activations and gradients, or temporary memory of the optimizer."""
    loading: int
    """Batches that data workers prefetch, always in host memory."""

    @property
    def on_device(self) -> int:
        """Everything except the prefetched batches."""
        return self.state + self.step

    @property
    def state(self) -> int:
        """What stays between steps, and is copied when a checkpoint is written."""
        return self.weights + self.optimizer + self.average

    def on_host(self, *, recomputed: bool = False) -> int:
        """Everything in the memory of a host, without the prefetched batches.

        There freed blocks are not all used again (measured in tests/training/test_memory.py),
        least where activation checkpointing allocates the same blocks twice; and a checkpoint is
        a copy in host memory until it is on the disk.
        """
        factor = _HOST_RECOMPUTED if recomputed else _HOST_STEP
        return self.state + max(int(self.step * factor), self.state)


def estimate(
    config: FamilyConfig,
    image: ImageSpec,
    training: TrainingConfig,
    *,
    mixed: bool,
    recomputed: bool = False,
    processes: int = 1,
    num_workers: int = 0,
    on_gpu: bool = False,
) -> ProcessMemory:
    """The memory of one training process, from the peak of one forward and backward pass.

    The step is traced on tensors without data (torch's FakeTensorMode), so it needs little memory
    and time even for large images. A tiny step, or one that cannot be traced, is really computed.
    Memory that libraries allocate inside an operation, such as cuDNN's workspaces, is not seen.

    Args:
        mixed: whether the step uses autocast in half precision.
        recomputed: whether activation checkpointing is on.
        processes: number of processes that share a batch.
        on_gpu: whether autocast is that of CUDA, which computes norms in float32.
    """
    family = config.build(image).train()
    autocast = _CudaAutocast if mixed and on_gpu else None
    if recomputed:
        recompute_blocks(family, autocast)
    states = [*family.parameters(), *family.buffers()]
    share = math.ceil(training.batch_size / processes)
    gradients = _bytes(_trained(family.parameters()))
    # Gradients exist during the forward pass only if they accumulate or are communicated.
    held_gradients = gradients * (training.accumulate > 1) + gradients * (processes > 1)
    work: Work = differentiate
    if chosen := training.privacy:
        share = min(share, chosen.images_at_once)  # their gradients are added to a sum
        work = partial(
            clipped_sum, clip_norm=chosen.clip_norm, draws=chosen.draws, images_at_once=share
        )
    with autocast() if autocast else nullcontext():
        peak = _step_peak(family, image, share, mixed=mixed, work=work)
    steps = (peak + held_gradients, 2 * gradients)
    image_bytes = 4 * math.prod(image.size) * (image.channels + len(image.source_channels))
    return ProcessMemory(
        weights=_bytes(states),
        optimizer=_optimizer_bytes(family),
        average=_bytes(states) if training.ema else 0,
        step=max(steps),
        loading=2 * num_workers * share * image_bytes,
    )


def inference_bytes(config: FamilyConfig, image: ImageSpec, batch_size: int, *, mixed: bool) -> int:
    """Bytes of a network and its forward pass on a batch, without gradients."""
    family = config.build(image).eval()
    with torch.no_grad():
        peak = _step_peak(family, image, batch_size, mixed=mixed, work=Family.loss)
    return _bytes([*family.parameters(), *family.buffers()]) + peak


_IN_FLOAT32 = {
    functional.group_norm, functional.layer_norm, functional.mse_loss, functional.l1_loss,
    functional.smooth_l1_loss, functional.softmax, functional.log_softmax,
    functional.cross_entropy, functional.softplus, functional.cosine_similarity,
}  # fmt: skip
"""Functions that CUDA's autocast computes in float32, and a CPU's does not."""


class _CudaAutocast(TorchFunctionMode):
    """Casts as autocast does on a GPU, where none is needed to find out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _IN_FLOAT32:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            cast_args, cast_kwargs = tree_map(_in_float32, (args, kwargs or {}))
            return func(*cast_args, **cast_kwargs)


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


class _PeakCounter(TorchDispatchMode):
    """Counts the bytes of living tensors that operations returned, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

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


def _step_peak(
    family: Family, image: ImageSpec, batch_size: int, *, mixed: bool, work: Work
) -> int:
    from torch._subclasses import FakeTensorMode

    weights = sum(weight.numel() for weight in family.parameters())
    if weights * math.prod(image.size) * batch_size < _REAL_STEP_LIMIT:
        return _measured(family, image, batch_size, mixed=mixed, work=work)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _measured(family, image, batch_size, mixed=mixed, work=work)
    except Exception:  # a user's family may read values, which these tensors do not have
        family.zero_grad()
        return batch_size * _measured(family, image, 1, mixed=mixed, work=work)


def _measured(family: Family, image: ImageSpec, batch_size: int, *, mixed: bool, work: Work) -> int:
    """Peak bytes of what is done with a batch."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    counter = _PeakCounter()
    with torch.random.fork_rng(devices=[]), counter, autocast:
        work(family, blank_batch(image, batch_size))
    return counter.peak


def differentiate(family: Family, batch: Batch) -> None:
    """The forward and backward passes of every trained network; the gradients are dropped."""
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        _backward(family.loss(batch), family.parameters())
        return
    terms, images = family.generator_loss(batch)
    _backward(terms, _generator(family))
    images = images.detach()
    del terms
    terms = family.discriminator_loss(batch, images)
    _backward(terms, family.discriminator.parameters())


def _backward(terms: dict[str, torch.Tensor], weights: Iterable[torch.nn.Parameter]) -> None:
    torch.autograd.grad(terms["loss"], _trained(weights), allow_unused=True)


def blank_batch(image: ImageSpec, number: int) -> Batch:
    """A batch of so many images, all of them zero."""
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
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        return int(_bytes(_trained(family.parameters())) * _states(family.config.optimizer))
    generator_optimizer, discriminator_optimizer = family.optimizer_configs()
    return int(
        _bytes(_trained(_generator(family))) * _states(generator_optimizer)
        + _bytes(_trained(family.discriminator.parameters())) * _states(discriminator_optimizer)
    )


def trained_weights(family: Family) -> list[torch.nn.Parameter]:
    """The weights that the first optimizer of a family trains."""
    if isinstance(family, AdversarialFamily) and family.discriminator is not None:
        return _trained(_generator(family))
    return _trained(family.parameters())


def _generator(family: AdversarialFamily) -> list[torch.nn.Parameter]:
    """The weights of a family that are not those of its discriminator."""
    assert family.discriminator is not None
    discriminator = {id(weight) for weight in family.discriminator.parameters()}
    return [weight for weight in family.parameters() if id(weight) not in discriminator]


def _trained(weights: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [weight for weight in weights if weight.requires_grad]


def _states(optimizer: OptimizerConfig) -> float:
    """Bytes of optimizer state for each byte of weights, measured by a step on a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    built = optimizer.build([weight])
    built.step()
    leaves = tree_leaves(dict(built.state))
    states = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel() > 1]
    return _bytes(states) / _bytes([weight])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Estimates the memory of a training on a device, and how other settings change it."""

    model: FamilyConfig
    image: ImageSpec
    training: TrainingConfig
    compute: ComputeConfig
    precision: str
    device: torch.device
    num_workers: int = 0

    @property
    def processes(self) -> int:
        """Number of processes that share a batch."""
        return compute.devices_used(self.compute, self.device) * self.compute.num_nodes

    def estimate(self) -> ProcessMemory:
        """Memory of each process."""
        return estimate(
            self.model, self.image, self.training, mixed=self.precision.endswith("-mixed"),
            recomputed=self.compute.activation_checkpointing,
            processes=self.processes, num_workers=self.num_workers,
            on_gpu=self.device.type == "cuda",
        )  # fmt: skip

    def bytes_needed(self) -> int:
        """Bytes on the GPU of each process, or on this host for all of its processes."""
        needed = self.estimate()
        if self.device.type == "cuda":
            return needed.on_device
        recomputed = self.compute.activation_checkpointing
        of_process = needed.on_host(recomputed=recomputed) + needed.loading
        return of_process * self.processes // self.compute.num_nodes

    def bytes_free(self) -> int:
        """Free bytes on the GPU or the host; a huge number where unknown."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return environment.free_memory()


def warning(memory: MemoryEstimate, needed: int, free: int) -> str:
    """A warning with advice if more bytes are needed than free; empty otherwise."""
    if needed <= free:
        return ""
    return (
        f"This training needs about {_gigabytes(needed)}, and {_gigabytes(free)} are free: it may "
        f"run out of memory. These help most: {'; '.join(_advice(memory, free))}."
    )


def memory_errors(
    memory: MemoryEstimate, free: int, remains: Callable[[], str]
) -> AbstractContextManager[None]:
    """Replace a failed allocation in training by a MemoryShortageError that says what to change.

    Args:
        free: bytes that were free at the start.
        remains: returns a sentence on the last checkpoint.
    """
    where = "the GPU" if memory.device.type == "cuda" else "this machine or container"
    return _memory_errors(
        lambda reason: MemoryShortageError(
            f"Out of memory on {where} ({reason}). {remains()} "
            "Run the same command again with one of these; the first helps most:",
            _advice(memory, free),
        )
    )


def sampling_memory_errors(batch_size: int) -> AbstractContextManager[None]:
    """Replace a failed allocation in sampling by an error that names a smaller batch."""
    less = f"--batch_size {batch_size // 2}" if batch_size > 1 else "a machine with more memory"
    return _memory_errors(
        lambda reason: MemoryShortageError(
            f"Out of memory while sampling {batch_size} image(s) at once ({reason}): use {less}."
        )
    )


@contextmanager
def _memory_errors(explanation: Callable[[str], MemoryShortageError]) -> Iterator[None]:
    """Raise `explanation` of the error's first line where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise explanation(first_line(error)) from error


def is_shortage(error: BaseException | None) -> bool:
    """Whether an exception is a failed allocation, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return str(error) == _CUT_MESSAGE or any(text in str(error) for text in _SHORTAGE_MESSAGES)


def _advice(memory: MemoryEstimate, free: int) -> list[str]:
    """Settings that each reduce the memory, with the estimate for them; the best first."""
    changed = [*_smaller_batch(memory, free), *_cheaper_step(memory), *_smaller_model(memory)]
    ranked = []
    for words, other in changed:
        try:
            ranked.append((other.bytes_needed(), words))
        except (RuntimeError, MemoryError, SynthCubeError):  # out of memory again
            continue
    ranked.sort(key=lambda pair: pair[0])
    shown = [f"{words} (about {_gigabytes(needed)})" for needed, words in ranked]
    return shown[:_KEYS_SHOWN] or [f"--set {words}" for words, _ in changed[:_KEYS_SHOWN]]


def _smaller_batch(memory: MemoryEstimate, free: int) -> Iterator[tuple[str, MemoryEstimate]]:
    """The largest batch that should fit, with the rest of it accumulated.

    Memory grows by the same amount with each image of a batch.
    """
    whole, least = memory.training.batch_size, memory.processes
    if whole <= least:
        return
    most = least
    try:
        lowest = _with_batch(memory, least).bytes_needed()
        added = (memory.bytes_needed() - lowest) / (whole - least)
        if added > 0 and free > lowest:
            most = min(least + int((free - lowest) / added), whole - 1)
    except (RuntimeError, MemoryError):  # out of memory again
        pass
    parts = -(-whole // most)
    size = max(least, -(-whole // parts) // least * least)
    other = _with_batch(memory, size)
    training = other.training
    yield (
        f"training.batch_size={training.batch_size} training.accumulate={training.accumulate}",
        other,
    )


def _with_batch(memory: MemoryEstimate, size: int) -> MemoryEstimate:
    """Steps of as many images, of which `size` are computed at once."""
    accumulate = memory.training.accumulate * -(-memory.training.batch_size // size)
    changes = {"batch_size": size, "accumulate": accumulate}
    return replace(memory, training=memory.training.model_copy(update=changes))


def _cheaper_step(memory: MemoryEstimate) -> Iterator[tuple[str, MemoryEstimate]]:
    """Half precision, and activation checkpointing."""
    on_gpu = memory.device.type == "cuda"
    if memory.precision == "32-true" and (on_gpu or compute.computes_in_bf16(memory.device)):
        yield "compute.precision=bf16", replace(memory, precision="bf16-mixed")
    if not memory.compute.activation_checkpointing and _has_blocks(memory):
        recomputed = memory.compute.model_copy(update={"activation_checkpointing": True})
        other = replace(memory, compute=recomputed)
        if _is_less(other, memory):  # a host keeps more holes then
            yield "compute.activation_checkpointing=true", other


def _is_less(other: MemoryEstimate, memory: MemoryEstimate) -> bool:
    try:
        return other.bytes_needed() < memory.bytes_needed()
    except (RuntimeError, MemoryError):  # out of memory again
        return True


def _has_blocks(memory: MemoryEstimate) -> bool:
    """Whether activation checkpointing works with the model."""
    try:
        recompute_blocks(memory.model.build(memory.image))
    except SynthCubeError:
        return False
    except (RuntimeError, MemoryError):  # out of memory again
        return True
    return True


def _smaller_model(memory: MemoryEstimate) -> Iterator[tuple[str, MemoryEstimate]]:
    """Images of half the size, and networks of half the channels, where the model allows it."""
    size = tuple(side // 2 for side in memory.image.size)
    image = memory.image.model_copy(update={"size": size})
    if not memory.model.faults(image):
        yield f"data.size={list(size)}", replace(memory, image=image)
    channels = getattr(memory.model, "channels", None)
    if isinstance(channels, tuple) and min(channels, default=0) > 1:
        halved = [number // 2 for number in channels]
        try:
            values = memory.model.model_dump() | {"channels": halved}
            model = type(memory.model).model_validate(values)
        except (ValidationError, SynthCubeError):
            return
        if not model.faults(memory.image):
            yield f"model.channels={halved} (another model)", replace(memory, model=model)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"
