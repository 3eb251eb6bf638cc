"""What a timed step contains."""

from __future__ import annotations

import time

import torch
import torchio as tio

from synthcube import config
from synthcube.planning import cost
from synthcube.planning.draft import machine
from synthcube.schema import ImageSpec

ELASTIC = "data.augmentation=[{name: RandomElasticDeformation, max_displacement: 2}]"
TINY = [
    "data.size=[32,32,32]", "compute.accelerator=cpu", "model.channels=[8,8]",
    "model.num_res_blocks=1", "model.attention_from=2", "model.num_norm_groups=4",
    "model.wavelet_levels=2", "training.batch_size=2", "training.accumulate=2",
]  # fmt: skip
IMAGE = ImageSpec(
    size=(32, 32, 32), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="nii.gz",
)  # fmt: skip


def test_a_step_waits_for_the_augmentation_of_its_images_unless_workers_do_it() -> None:
    image, taken = tio.ScalarImage(tensor=torch.rand(1, 32, 32, 32)), []
    transform = tio.RandomElasticDeformation(max_displacement=2)
    for _ in range(5):
        start = time.perf_counter()
        transform(image)
        taken.append(time.perf_counter() - start)
    steps = {}
    for name, more in (
        ("none", []), ("between", [ELASTIC]), ("workers", [ELASTIC, "data.num_workers=1"]),
    ):  # fmt: skip
        settings = config.build({}, [*TINY, *more])
        steps[name] = cost.probe(settings, IMAGE, machine(settings.compute, None)).step
    assert steps["between"] - max(steps["none"], steps["workers"]) > 4 * 0.5 * min(taken)
