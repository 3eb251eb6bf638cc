"""What a plan is made from and made of: request, machine, choices, and a config that is growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from synthcube import compute, config, environment
from synthcube.compute import ComputeConfig
from synthcube.config import RunConfig
from synthcube.data.fingerprint import Fingerprint
from synthcube.models import registry
from synthcube.models.family import FamilyConfig
from synthcube.schema import ConditionSpec, ImageSpec

Goal = Literal["generate", "translate", "compress"]
LIBRARY_BYTES = 1_000_000_000  # bytes of PyTorch and its libraries, which no estimate counts
_UNSEEN = 0.1  # share of the memory for what the estimate does not see


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; None: the plan decides."""

    goal: Goal = "generate"
    family: str | None = None
    memory_gb: float | None = None
    hours: float | None = None
    budget_images: int | None = None
    overrides: tuple[str, ...] = ()
    recipe: Literal["best", "default"] = "best"
    """default: the network and learning rate of the family, also where steps are what lacks."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the training will run."""

    device: torch.device
    memory: int
    """Bytes that one training process may take, libraries included."""
    cores: int
    processes: int
    precision: str
    """What compute.precision auto becomes."""
    is_here: bool = True
    """Whether it is this machine, so that a step can be timed."""

    @property
    def usable(self) -> int:
        """Bytes for what the estimate of memory counts."""
        return max(0, int(self.memory * (1 - _UNSEEN) - LIBRARY_BYTES))

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def machine(section: ComputeConfig, memory_gb: float | None) -> Machine:
    """This machine; with more memory than it has, a GPU elsewhere that computes in bfloat16."""
    device = compute.device(section.accelerator)
    processes = compute.devices_used(section, device) * section.num_nodes
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = environment.free_memory() // processes
    wanted = free if memory_gb is None else int(memory_gb * 1e9)
    if wanted > free and section.accelerator != "cpu":
        gpu = torch.device("cuda")
        name = "bf16" if section.precision == "auto" else section.precision
        elsewhere, _ = compute.resolve_precision(name, gpu)
        cores = environment.num_cores()
        return Machine(gpu, wanted, cores, processes, elsewhere, is_here=False)
    precision, _ = compute.resolve_precision(section.precision, device)
    return Machine(device, wanted, environment.num_cores(), processes, precision)


@dataclass(frozen=True, slots=True)
class Choice:
    """One key of the config, its value, and why it has it."""

    key: str
    value: Any
    reason: str
    by_user: bool = False


@dataclass
class Draft:
    """A config that grows choice by choice; what the user fixed stays."""

    fingerprint: Fingerprint
    machine: Machine
    request: PlanRequest
    choices: dict[str, Choice] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """The user's own values, nested."""
        return config.overridden(self.request.overrides)

    def choose(self, key: str, value: Any, reason: str) -> Any:
        """Take a value for a key, unless the user has one; returns what holds."""
        stated, own = lookup(self.fixed, key)
        if stated:
            value, reason = own, "set by you"
        self.choices[key] = Choice(key, value, reason, by_user=stated)
        *sections, name = key.split(".")
        inner = self.values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
        return value

    def is_fixed(self, key: str) -> bool:
        """Whether the user set this key."""
        return lookup(self.fixed, key)[0]

    def config(self) -> RunConfig:
        """The config so far, with the user's values. Raises ConfigError."""
        return config.build(_merged(self.values, self.fixed), where="The plan")

    @property
    def family(self) -> type[FamilyConfig]:
        return registry.find(self.values["model"]["name"])

    @property
    def wavelet_levels(self) -> int:
        """How often the images are halved before the network sees them."""
        stated, own = lookup(self.fixed, "model.wavelet_levels")
        chosen = own if stated else lookup(self.values, "model.wavelet_levels")[1]
        return chosen if isinstance(chosen, int) else 0

    @property
    def rank(self) -> int:
        """Axes of an image of the training."""
        return len(self.along_axes(self.fingerprint.shape.median))

    @property
    def slice_axis(self) -> int | None:
        """The axis across which volumes are cut into slices (data.slices)."""
        plane = lookup(self.fixed, "data.slices")[1]
        return {"sagittal": 0, "coronal": 1, "axial": 2}.get(str(plane))

    def along_axes(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Those of the axes that an image of the training has."""
        axis = self.slice_axis if len(values) == 3 else None
        return tuple(value for i, value in enumerate(values) if i != axis)

    @property
    def num_images(self) -> int:
        """Images, or slices of volumes."""
        axis, shape = self.slice_axis, self.fingerprint.shape.median
        slices = int(shape[axis]) if axis is not None and len(shape) == 3 else 1
        return self.fingerprint.num_images * slices

    @property
    def num_training_images(self) -> int:
        """Images that are trained on, about."""
        measured = self.fingerprint
        if measured.splits:
            share = measured.splits.get("train", 0) / measured.num_images
        else:
            share = 1 - self.values.get("data", {}).get("validation_fraction", 0.1)
        return max(1, round(self.num_images * share))

    def image(self, settings: RunConfig) -> ImageSpec:
        """What a network would see of these images."""
        data, measured = settings.data, self.fingerprint
        shape = tuple(map(int, self.along_axes(measured.shape.median)))
        size = data.patches or data.size or shape
        sources = data.source_channels
        targets = max(1, len(measured.channels) - len(sources))
        classes = tuple(map(str, range(len(measured.class_counts))))
        conditions = tuple(
            ConditionSpec(name=name, kind="class", classes=classes or ("0", "1"))
            if kind == "class"
            else ConditionSpec(name=name, kind="number", low=0, high=1)
            for name, kind in data.conditions.items()
        )
        return ImageSpec(
            size=size, channels=targets, spacing_mm=(1, 1, 1),
            affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
            intensity_range=((0, 1),) * targets, file_format=measured.file_format,
            conditions=conditions, source_channels=sources, masks=data.target_masks,
        ).encoded  # fmt: skip


def lookup(values: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Whether nested values have this key or any below it, and what they are."""
    inner: Any = values
    for name in key.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            return False, None
        inner = inner[name]
    return True, inner


def _merged(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and where both have a key, that of `fixed`."""
    merged = dict(values)
    for name, value in fixed.items():
        before = merged.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[name] = _merged(before, value)
        else:
            merged[name] = value
    return merged
