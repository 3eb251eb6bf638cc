"""Small models of every family, and folders of trained ones, converted once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from synthcube.models import registry
from synthcube.models.family import Family
from synthcube.schema import ConditionSpec, ImageSpec

CONDITIONS = (
    ConditionSpec(name="Label", kind="class", classes=("a", "b")),
    ConditionSpec(name="Age", kind="number", low=1.0, high=90.0),
)

# OpenVINO's bindings, and torch.onnx, whose own code is not what is tested here
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def image_spec(
    rank: int, conditions: tuple[ConditionSpec, ...] = (), source: tuple[int, ...] = ()
) -> ImageSpec:
    """Images of 16 voxels along each of `rank` axes."""
    return ImageSpec(
        size=(16,) * rank,
        channels=1,
        spacing_mm=(1, 1, 1),
        affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        intensity_range=((0, 255),),
        file_format="png" if rank == 2 else "nii.gz",
        conditions=conditions,
        source_channels=source,
    )


@pytest.fixture
def family() -> Callable[..., Family]:
    """A small model with the default sampler of its family, as if it were trained."""

    def build(name: str, rank: int = 2, *, conditions: bool = False, **changes) -> Family:
        kind = registry.find(name)
        config = kind.tiny()
        if "num_sampling_steps" in kind.model_fields:
            default = kind.model_fields["num_sampling_steps"].default
            changes = {"num_sampling_steps": default} | changes
        elif "objective" in kind.model_fields:
            changes = {"objective": kind.model_fields["objective"].default} | changes
        source = (1,) if changes.pop("translates", False) else ()
        torch.manual_seed(0)
        config = config.model_copy(update=changes)
        family = config.build(image_spec(rank, CONDITIONS if conditions else (), source))
        for weight in family.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        return family.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def converted(first_stage, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a small trained model for a runtime, once."""
    folders: dict[tuple[str, ...], Path] = {}

    def exported(name: str = "rectified_flow", *runtimes: str) -> Path:
        from synthcube.sharing.config import ExportRequest
        from synthcube.tasks.export import export

        key = (name, *runtimes)
        if key not in folders:
            folder = tmp_path_factory.mktemp("-".join(key)) / "model"
            folders[key] = export(first_stage(name), folder, ExportRequest(runtimes=runtimes))
        return folders[key]

    return exported
