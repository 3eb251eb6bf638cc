"""2D models that take slices of volumes."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from synthcube import config, reading
from synthcube.data.images import Image, read_image
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.preprocessing import Preprocessing
from synthcube.errors import ConfigError, ImageError
from synthcube.models import registry
from synthcube.tasks.train import train

# A volume whose first axis runs from front to back, as scanners store it.
AFFINE = np.array([[0, 0, 3.0, -9], [-2.0, 0, 0, 20], [0, 1.0, 0, 5], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Six volumes, 16 (P) x 16 (S) x 7 (R), whose outer sagittal slices are empty."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        voxels = rng.normal(100, 20, (16, 16, 7)).astype(np.float32)
        voxels[..., [0, 6]] = 0
        nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"p{i}.nii.gz")
        split = "validation" if i > 3 else "train"
        rows.append({"Channel_0": f"p{i}.nii.gz", "SubjectID": f"p{i}", "Split": split})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize(
    ("plane", "count", "axes"),
    [("sagittal", 5, (1, 2)), ("coronal", 16, (0, 2)), ("axial", 16, (0, 1))],
)
def test_slices_lie_where_they_lay(volumes: Path, plane: str, count: int, axes: tuple) -> None:
    """A voxel of a slice is the voxel of the volume at the same place in the world."""
    path = volumes / "p0.nii.gz"
    settings = config.build({"data": {"slices": plane}}).data
    slices = Preprocessing(settings).images_of(read_image([path]))
    assert len(slices) == count
    volume = nib.load(path)
    voxels, inverse = np.asarray(volume.dataobj), np.linalg.inv(volume.affine)
    for number, image in slices:
        assert image.tensor.shape[-1] == 1
        # first and second axis of the slice point along those of RAS
        assert (np.abs(image.affine[:3, :2]).argmax(axis=0) == axes).all()
        assert (image.affine[axes, (0, 1)] > 0).all()
        for i, j in ((0, 0), (3, 2), (2, 5)):
            place = inverse @ image.affine @ [i, j, 0, 1]
            assert np.allclose(place, np.rint(place))
            assert image.tensor[0, i, j, 0] == voxels[tuple(np.rint(place[:3]).astype(int))]
        if plane == "sagittal":
            assert 1 <= number <= 5


def test_the_range_of_a_slice_is_that_of_its_volume() -> None:
    """Else a slice without bright voxels would be stretched until it is bright."""
    tensor = torch.rand(1, 8, 8, 8) * 10 + 100
    tensor[..., 4:] += 900
    image = Image(tensor, np.eye(4), "nii.gz", (False,), False)
    steps = [{"name": "Clamp", "out_min": 0, "out_max": 1005}]
    settings = config.build(
        {"data": {"slices": "axial", "percentiles": [0, 100], "preprocessing": steps}}
    ).data
    preprocessing = Preprocessing(settings)
    slices = [preprocessing(cut) for _, cut in preprocessing.images_of(image)]
    low, high = float(tensor.min()), 1005.0
    assert all(piece.intensity_range == ((pytest.approx(low), high),) for piece in slices)
    assert all(piece.tensor.max() < -0.9 for piece in slices[:4])
    assert all(piece.tensor.min() > 0.9 for piece in slices[4:])


def test_slices_of_a_volume_stay_in_its_split(volumes: Path, tmp_path: Path) -> None:
    settings = config.build({"data": {"slices": "sagittal", "size": [8, 8]}})
    data = DataModule(read_manifest(volumes), settings.data, batch_size=4, seed=0, cache=tmp_path)
    assert (len(data.manifest.rows), len(data.files.rows)) == (30, 6)
    assert len(data.rows("train")) == 20
    assert {data.manifest.rows[i].subject for i in data.rows("validation")} == {"p4", "p5"}
    assert data.image.size == (8, 8)
    assert data.manifest.rows[0].name == "00002-p0-slice_0001"
    batch = data.examples([0, 6])
    assert batch["image"].shape == (2, 1, 8, 8)
    assert np.allclose(data.image.spacing_mm[:2], (4, 2))
    # from the cache, the same again
    again = DataModule(read_manifest(volumes), settings.data, batch_size=4, seed=0, cache=tmp_path)
    assert again.manifest == data.manifest
    assert torch.equal(again.examples([0, 6])["image"], batch["image"])


def test_a_slice_model_reconstructs_and_is_judged_slice_by_slice(
    cli, volumes: Path, tmp_path: Path
) -> None:
    settings = {
        "model": registry.find("autoencoder_kl").tiny().model_dump(mode="json"),
        "data": {"slices": "axial", "size": [16, 8]},
        "training": {"max_epochs": 1, "batch_size": 8, "num_sample_images": 2},
        "compute": {"accelerator": "cpu", "precision": "32"},
        "evaluation": {"extractor": {"name": "radiomic"}},
    }
    (tmp_path / "c.yaml").write_text(reading.dump(settings))
    code, told, err = cli("check", "-c", tmp_path / "c.yaml", "-d", volumes)
    assert code == 0, err
    assert "images: 96 (slices of 6 volumes) of 6 subjects" in told
    run = tmp_path / "run"
    train(tmp_path / "c.yaml", volumes, run)
    with (run / "split.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    code, _, err = cli("infer", "-m", run, "-d", run, "-o", tmp_path / "out")
    assert code == 0, err
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32
    assert rows[1]["Slice"] == "1"
    image = nib.load(tmp_path / "out" / rows[1]["Channel_0"])
    assert image.shape[:2] == (16, 8)
    assert image.affine[2, 3] == pytest.approx(6)  # the second slice is 1 mm above z = 5
    code, _, err = cli(
        "evaluate", "-p", tmp_path / "out", "-l", run, "-m", run, "-o", tmp_path / "r.yaml"
    )
    assert code == 0, err
    results = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert results["paired"]["num_pairs"] == 32
    assert results["images"]["labels"]["count"] == 32


def test_faults_of_slices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size \[8, 8, 8\]: a slice has two sides"):
        config.build({"data": {"slices": "axial", "size": [8, 8, 8]}})
    with pytest.raises(ConfigError, match=r"data\.slices: .*'axial', 'coronal' or 'sagittal'"):
        config.build({"data": {"slices": "xy"}})
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    settings = config.build({"data": {"slices": "axial"}}).data
    with pytest.raises(ImageError, match="every slice is of one intensity"):
        Preprocessing(settings).images_of(read_image([tmp_path / "a.nii.gz"]))
