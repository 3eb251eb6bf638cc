"""What a timed step contains."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torchio as tio

from synthcube import config
from synthcube.data.fingerprint import measure
from synthcube.data.manifest import read_manifest
from synthcube.planning import cost, rules
from synthcube.planning.draft import Draft, PlanRequest, machine
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


@pytest.mark.slow
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


READ_APART = """
import sys
from pathlib import Path
from synthcube.data.images import read_image
from synthcube.data.preprocessing import DataConfig, Preprocessing
preprocessing = Preprocessing(DataConfig(size=[32, 32, 32]))
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
for path in sys.argv[1:]:  # a small image first, whose libraries are no part of the rest
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    preprocessing(read_image([Path(path)]))
print(status("VmHWM:") - before)
"""


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_the_memory_to_read_the_largest_image_is_known(dtype: str, tmp_path: Path) -> None:
    paths = []
    for side in (16, 128):
        voxels = np.arange(side**3).reshape([side] * 3) % 1000
        paths.append(tmp_path / f"{side}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(voxels.astype(dtype), np.eye(4)), paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", READ_APART, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    overrides = ("compute.accelerator=cpu", "data.size=[32,32,32]")
    settings = config.build({}, overrides)
    draft = Draft(
        measure(read_manifest(tmp_path)), machine(settings.compute, None),
        PlanRequest(overrides=overrides),
    )  # fmt: skip
    rules.choose_model(draft)
    rules.choose_channels(draft)
    assert 0.9 < cost.reading_bytes(draft) / int(done.stdout) < 1.5
