"""Models of patches from training to whole images: geometry, seams, first stages, evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import synthcube
from synthcube import reading
from synthcube.models import registry
from synthcube.models.windows import in_windows, windowed
from synthcube.schema import Condition
from synthcube.tasks.train import train

AFFINE = np.array([[1.0, 0, 0, -7], [0, 1.0, 0, 20], [0, 0, 2.0, 5], [0, 0, 0, 1]])
SIZE = (32, 32, 32)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Six volumes of 32^3 with a brightness that rises along x, and a second channel, twice it."""
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        ramp = np.linspace(0, 200, 32)[:, None, None] * np.ones(SIZE)
        voxels = (ramp + rng.normal(0, 5, SIZE)).astype(np.float32)
        for channel in range(2):
            image = nib.Nifti1Image(voxels * (channel + 1), AFFINE)
            nib.save(image, folder / f"p{i}_{channel}.nii.gz")
        split = "validation" if i > 3 else "train"
        files = {f"Channel_{channel}": f"p{i}_{channel}.nii.gz" for channel in range(2)}
        rows.append({**files, "SubjectID": f"p{i}", "Split": split})
    for name, dropped in (("manifest.csv", "Channel_1"), ("both.csv", "")):
        with (folder / name).open("w", newline="") as file:
            columns = [column for column in rows[0] if column != dropped]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def config_of(folder: Path, model: dict, **data: object) -> Path:
    settings = {
        "model": model,
        "data": data,
        "training": {"max_epochs": 1, "batch_size": 2, "num_sample_images": 1},
        "compute": {"accelerator": "cpu", "precision": "32"},
        "evaluation": {"extractor": {"name": "radiomic"}},
    }
    path = folder / "config.yaml"
    path.write_text(reading.dump(settings))
    return path


def tiny(family: str, **changes: object) -> dict:
    return registry.find(family).tiny().model_dump(mode="json") | changes


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory, volumes: Path) -> Path:
    folder = tmp_path_factory.mktemp("first")
    train(config_of(folder, tiny("autoencoder_kl"), patches=[16, 16, 16]), volumes, folder / "run")
    return folder / "run"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_whole_images_are_reconstructed_where_they_lie(
    cli, first_stage: Path, volumes: Path, tmp_path: Path
) -> None:
    code, _, err = cli("infer", "-m", first_stage, "-d", first_stage, "-o", tmp_path / "out")
    assert code == 0, err
    for row in rows_of(tmp_path / "out"):
        image = nib.load(tmp_path / "out" / row["Channel_0"])
        assert image.shape == SIZE
        assert np.allclose(image.affine, AFFINE)
    # evaluated as whole images, beside whole images
    words = ("-l", first_stage, "-m", first_stage, "-o", tmp_path / "r.yaml")
    code, _, err = cli("evaluate", "-p", tmp_path / "out", *words)
    assert code == 0, err
    results = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert results["images"]["labels"]["shape"] == [1, *SIZE]
    assert not [note for note in results["notes"] if "patch" in note]


def test_images_of_any_size_are_reconstructed(first_stage: Path) -> None:
    """In windows that are as large as the patches, blended; short sides are padded and cropped."""
    model = synthcube.from_pretrained(first_stage, accelerator="cpu")
    images = torch.rand(2, 1, 20, 11, 16) * 2 - 1
    made = model.reconstruct(images)
    assert made.tensor.shape == images.shape
    assert made.tensor.abs().max() <= 1.001
    one = model.reconstruct(images[1:], batch_size=1)
    assert torch.allclose(one.tensor[0], made.tensor[1], atol=1e-5)
    patch = images[:, :, :16, :, :].repeat(1, 1, 1, 2, 1)[:, :, :, :16]
    with torch.no_grad():
        plain = model.family.reconstruct(patch)
    assert torch.allclose(model.reconstruct(patch).tensor, plain, atol=1e-5)
    with pytest.raises(synthcube.errors.ImageError, match=r"trained on patches of \[16, 16, 16\]"):
        model.reconstruct(images[..., 0])


def test_a_first_stage_of_patches_serves_larger_images(
    cli, first_stage: Path, volumes: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny("latent_diffusion", first_stage=str(first_stage)))
    train(config, volumes, tmp_path / "run")
    code, _, err = cli("infer", "-m", tmp_path / "run", "-n", 2, "-o", tmp_path / "out")
    assert code == 0, err
    image = nib.load(tmp_path / "out" / rows_of(tmp_path / "out")[0]["Channel_0"])
    assert image.shape == SIZE
    assert np.allclose(image.affine, AFFINE)
    family = synthcube.from_pretrained(tmp_path / "run", accelerator="cpu").family
    assert family.first_stage.family.latent_shape() == (2, 16, 16, 16)
    trained = synthcube.from_pretrained(first_stage, accelerator="cpu").family.state_dict()
    for name, weight in family.first_stage.family.state_dict().items():
        assert torch.equal(weight, trained[name])
    # sides that its own network refuses are refused
    config = config_of(
        tmp_path, tiny("latent_diffusion", first_stage=str(first_stage)), size=[30, 31, 32]
    )
    code, _, err = cli("check", "-c", config, "-d", volumes)
    assert code == 2
    assert "model.first_stage: data.size [30, 31, 32]: every side must be a multiple of 2" in err


def test_check_speaks_of_patches(cli, volumes: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny("autoencoder_kl"), patches=[16, 16, 8])
    code, told, err = cli("check", "-c", config, "-d", volumes)
    assert code == 0, err
    assert "size: 32 x 32 x 32 in patches of 16 x 16 x 8, 1 channel(s), 1 x 1 x 2 mm" in told
    assert "at batch size 2 of patches, beside" in told
    needed = told.split("memory: about ")[1].split(" GB")[0]
    config = config_of(tmp_path, tiny("autoencoder_kl"))
    _, told, _ = cli("check", "-c", config, "-d", volumes)
    assert float(told.split("memory: about ")[1].split(" GB")[0]) > 2 * float(needed)
    config = config_of(tmp_path, tiny("autoencoder_kl"), patches=[16, 15, 8])
    code, _, err = cli("check", "-c", config, "-d", volumes)
    assert code == 2
    assert "data.patches [16, 15, 8]: every side must be a multiple of 2" in err
    assert "data.patches: [16, 16, 8] fits" in err
