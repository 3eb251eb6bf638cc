"""The folder of a trained model: what is read back is what was trained, or a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthcube.errors import ArtifactError
from synthcube.models import artifact, registry
from synthcube.schema import ImageSpec

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=np.eye(4).tolist(),
    intensity_range=((0.0, 255.0),), file_format="png",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_weights_must_be_finite(value: float | None, tmp_path: Path) -> None:
    config = registry.find("rectified_flow").tiny()
    weights = config.build(IMAGE).state_dict()
    if value is not None:
        name = next(name for name, weight in weights.items() if weight.is_floating_point())
        weights[name].view(-1)[0] = value
    sections = {"seed": 0, "model": config.model_dump(mode="json")}
    empty = {"data": {}, "sampling": {}, "compute": {}}
    artifact.save(tmp_path, config=sections | empty, image=IMAGE, weights=weights, metrics={})
    trained = artifact.load(tmp_path)
    if value is None:
        assert all(map(torch.equal, trained.build(CPU).state_dict().values(), weights.values()))
        return
    with pytest.raises(ArtifactError, match=f"damaged: {name} holds numbers that are not finite"):
        trained.build(CPU)
