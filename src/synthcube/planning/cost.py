"""What a plan costs: bytes by tracing a step, and seconds by taking some steps on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils._pytree import tree_map_only

from synthcube.config import RunConfig
from synthcube.data.channels import subject_of
from synthcube.environment import derived_seed
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family, Samples
from synthcube.planning.draft import Draft, Machine
from synthcube.schema import Batch, ImageSpec
from synthcube.training import memory
from synthcube.training.acceleration import recompute_blocks
from synthcube.training.config import COPIES

PROBE_STEPS = 20
_WARM_UP = 3
_PROBE_SECONDS = 60.0  # after which a probe ends early, with five steps at least
_LEAST_STEPS = 5
_AUGMENTED = 7  # images
_COPIES_READ = 3.3  # of an image in float32, while it is brought to its grid
_START_SECONDS = 8.0  # imports, the first batch, the artifact at the end


def training_bytes(draft: Draft) -> int:
    """Bytes of a training step on one process, without libraries. Raises SynthCubeError."""
    settings = draft.config()
    machine, recomputed = draft.machine, settings.compute.activation_checkpointing
    needed = memory.estimate(
        settings.model, draft.image(settings), settings.training,
        mixed=machine.precision.endswith("-mixed"), recomputed=recomputed,
        processes=machine.processes, on_gpu=machine.is_gpu,
        num_workers=settings.data.num_workers,
    )  # fmt: skip
    if machine.is_gpu:
        return needed.on_device
    return needed.on_host(recomputed=recomputed) + needed.loading


def reading_bytes(draft: Draft) -> int:
    """Bytes at the peak of reading the largest image and bringing it to its grid.

    Measured for NIfTI of 256^3 voxels: 2.5 to 3.3 copies in float32 for a small grid, and one
    more for a grid of as many voxels.
    """
    measured, image = draft.fingerprint, draft.image(draft.config())
    channels = len(measured.channels)
    largest, grid = (math.prod(shape) for shape in (measured.shape.highest, image.size))
    return int(4 * channels * (_COPIES_READ * largest + grid))


def sampling_bytes(settings: RunConfig, image: ImageSpec, batch_size: int, mixed: bool) -> int:
    """Bytes that drawing so many images at once takes, without libraries."""
    return memory.inference_bytes(settings.model, image, batch_size, mixed=mixed)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds on this machine: medians of a probe."""

    step: float
    """One optimizer step, with its average and all of its accumulated batches, augmented."""
    forward: float
    """One forward pass of a batch without gradients."""
    process_step: float
    """CPU-seconds of a step: on a busy machine, less than it takes."""
    num_steps: int
    forward_one: float = 0.0
    """One forward pass of a single image, which takes more than its share of a batch."""
    augmentation: tuple[float, float] = (0.0, 0.0)
    """What of `step` and of `process_step` is augmentation."""

    def without_augmentation(self) -> StepTime:
        """The same step of images as they are."""
        wall, process = self.augmentation
        return replace(
            self, step=self.step - wall, process_step=self.process_step - process,
            augmentation=(0.0, 0.0),
        )  # fmt: skip


def probe(settings: RunConfig, image: ImageSpec, machine: Machine) -> StepTime:
    """Time training steps of the configured model on noise, as a training takes them."""
    torch.manual_seed(derived_seed(settings.seed, "probe"))
    family = settings.model.build(image).to(machine.device).train()
    if settings.compute.activation_checkpointing:
        recompute_blocks(family)
    step, forward = _step_and_forward(family, settings, image, machine)
    walls, processes = [], []
    start = time.perf_counter()
    for number in range(_WARM_UP + PROBE_STEPS):
        before = time.perf_counter(), time.process_time()
        step()
        _wait(machine)
        walls.append(time.perf_counter() - before[0])
        processes.append(time.process_time() - before[1])
        is_late = time.perf_counter() - start > _PROBE_SECONDS
        if is_late and number + 1 >= _LEAST_STEPS:
            break
    kept = slice(min(_WARM_UP, len(walls) - 2), None)
    passes = []
    for number in (settings.training.batch_size, 1):
        before_forward = time.perf_counter()
        forward(number)
        _wait(machine)
        passes.append(time.perf_counter() - before_forward)
    images = math.ceil(settings.training.batch_size / machine.processes)
    images *= settings.training.accumulate
    wall, process = (images * seconds for seconds in _augmentation_seconds(settings, image))
    return StepTime(
        statistics.median(walls[kept]) + wall, passes[0],
        statistics.median(processes[kept]) + process, len(walls[kept]), passes[1],
        (wall, process),
    )  # fmt: skip


def _augmentation_seconds(settings: RunConfig, image: ImageSpec) -> tuple[float, float]:
    """Median seconds and CPU-seconds to augment an image, where steps wait for that."""
    if not settings.data.augmentation or settings.data.num_workers:
        return 0.0, 0.0
    transforms = [transform.build() for transform in settings.data.augmentation]
    voxels = torch.rand(image.channels, *image.size, *[1] * (3 - image.rank))
    walls, processes = [], []
    with torch.random.fork_rng(devices=[]):
        for _ in range(_AUGMENTED):
            start = time.perf_counter(), time.process_time()
            subject = subject_of(voxels, np.eye(4), image.masks)
            for transform in transforms:
                subject = transform(subject)
            walls.append(time.perf_counter() - start[0])
            processes.append(time.process_time() - start[1])
    return statistics.median(walls), statistics.median(processes)


def _wait(machine: Machine) -> None:
    if machine.is_gpu:
        torch.cuda.synchronize(machine.device)


def _step_and_forward(
    family: Family, settings: RunConfig, image: ImageSpec, machine: Machine
) -> tuple[Callable[[], None], Callable[[int], None]]:
    """Two functions: one takes an optimizer step, the other the loss of so many of its images."""
    training, device = settings.training, machine.device
    share = math.ceil(training.batch_size / machine.processes)
    batch = _noise(image, share, device)
    mixed = machine.precision.endswith("-mixed")
    dtype = torch.float16 if machine.precision.startswith("16") else torch.bfloat16
    generator = memory.trained_weights(family)
    discriminator = getattr(family, "discriminator", None)
    optimizer = settings.model.optimizer.build(generator)
    judges: list[Any] = []
    if isinstance(family, AdversarialFamily) and discriminator is not None:
        weights = list(discriminator.parameters())
        judges = [family.optimizer_configs()[1].build(weights)]
    average = [weight.detach().clone() for weight in family.parameters()] if training.ema else []
    clip = training.clip_norm(by_hand=bool(judges))

    def autocast() -> Any:
        return torch.autocast(device.type, dtype, enabled=mixed)

    def step() -> None:
        for _ in range(training.accumulate):
            with autocast():
                if isinstance(family, AdversarialFamily) and judges:
                    terms, images = family.generator_loss(batch)
                else:
                    terms, images = family.loss(batch), None
            terms["loss"].backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(generator, clip)
        optimizer.step()
        family.zero_grad()
        for judge in judges:
            assert isinstance(family, AdversarialFamily)
            assert images is not None
            with autocast():
                judged = family.discriminator_loss(batch, images.detach())
            judged["loss"].backward()
            judge.step()
            family.zero_grad()
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(average, [w.detach() for w in family.parameters()], 0.001)

    def forward(number: int) -> None:
        some = tree_map_only(torch.Tensor, itemgetter(slice(number)), batch)
        with torch.no_grad(), autocast():
            family.loss(some)

    return step, forward


def _noise(image: ImageSpec, number: int, device: torch.device) -> Batch:
    batch = memory.blank_batch(image, number)
    batch["image"] = torch.rand_like(batch["image"]) * 2 - 1
    moved: Batch = move_data_to_device(batch, device)
    return moved


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds that a planned training takes, by what takes them."""

    steps: float
    validation: float
    pictures: float
    start: float = _START_SECONDS

    @property
    def total(self) -> float:
        return self.steps + self.validation + self.pictures + self.start


def duration(draft: Draft, settings: RunConfig, timed: StepTime) -> Duration:
    """Time of the whole training on this machine, with the step that was timed."""
    training = settings.training
    number = draft.num_training_images
    batches = max(1, number // training.batch_size)
    steps = training.max_epochs * math.ceil(batches / training.accumulate)
    validations = training.max_epochs // training.validate_every_n_epochs
    held_out = max(0, draft.num_images - number)
    batches_validated = math.ceil(held_out / training.batch_size)
    every = training.sample_every_n_epochs
    pictures = math.ceil(training.max_epochs / every) if every else 0  # one at the end
    shown = min(training.num_sample_images, max(1, held_out or number))
    stop = training.early_stop
    looked_at = stop.num_images if stop and stop.metric == COPIES else 0
    return Duration(
        steps=steps * timed.step,
        validation=validations
        * (batches_validated * timed.forward + looked_at * image_seconds(settings, timed)),
        pictures=pictures
        * max(shown * image_seconds(settings, timed), sampling_steps(settings) * timed.forward_one),
    )


def seconds_an_image(settings: RunConfig, timed: StepTime) -> float:
    """Seconds of training for each image that is seen."""
    return timed.step / (settings.training.batch_size * settings.training.accumulate)


def image_seconds(settings: RunConfig, timed: StepTime) -> float:
    """Seconds to draw one image, from the forward pass of a batch."""
    return sampling_steps(settings) * timed.forward / settings.training.batch_size


def sampling_steps(settings: RunConfig) -> int:
    """How often the network is computed for an image."""
    sampling = settings.model.with_sampling(settings.sampling.of_model()).sampling()
    networks = 2 if sampling.get("autoguidance", 1) > 1 else 1
    return networks * int(sampling.get("steps") or 1)


def draws_images(settings: RunConfig, image: ImageSpec) -> bool:
    """Whether the model makes images out of nothing, or out of other images."""
    with torch.device("meta"):
        return isinstance(settings.model.build(image), Samples)
