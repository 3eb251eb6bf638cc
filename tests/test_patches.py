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
    # its export says what it was trained on, and makes the same images
    code, _, err = cli("export", "-m", first_stage, "-o", tmp_path / "shared")
    assert code == 0, err
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "16 x 16 x 16 (patches of larger images)" in card
    code, _, err = cli("infer", "-m", tmp_path / "shared", "-d", first_stage, "-o", tmp_path / "2")
    assert code == 0, err
    for path in (tmp_path / "out" / "images").iterdir():
        assert (tmp_path / "2" / "images" / path.name).read_bytes() == path.read_bytes()
    # evaluated as whole images, beside whole images
    words = ("-l", first_stage, "-m", first_stage, "-o", tmp_path / "r.yaml")
    code, _, err = cli("evaluate", "-p", tmp_path / "out", *words)
    assert code == 0, err
    results = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert results["images"]["labels"]["shape"] == [1, *SIZE]
    assert not [note for note in results["notes"] if "patch" in note]


def test_images_of_several_sizes_are_reconstructed(cli, first_stage: Path, tmp_path: Path) -> None:
    """Each at its own size and place."""
    data = tmp_path / "data"
    data.mkdir()
    shapes = {"a": (20, 18, 16), "b": (16, 22, 11)}
    for name, shape in shapes.items():
        voxels = np.arange(float(np.prod(shape))).reshape(shape)
        nib.save(nib.Nifti1Image(voxels, AFFINE), data / f"{name}.nii.gz")
    code, _, err = cli("infer", "-m", first_stage, "-d", data, "-o", tmp_path / "out")
    assert code == 0, err
    rows = rows_of(tmp_path / "out")
    for row, shape in zip(rows, shapes.values(), strict=True):
        image = nib.load(tmp_path / "out" / row["Channel_0"])
        assert image.shape == shape
        assert np.allclose(image.affine, AFFINE)
    model = synthcube.from_pretrained(first_stage, accelerator="cpu")
    with pytest.raises(synthcube.errors.ImageError, match="several sizes"):
        model.reconstruct(data)


def test_images_of_any_size_are_reconstructed(first_stage: Path) -> None:
    """In windows that are as large as the patches, blended; short sides are padded and cropped."""
    model = synthcube.from_pretrained(first_stage, accelerator="cpu")
    images = torch.rand(2, 1, 20, 11, 16) * 2 - 1
    whole = model.reconstruct(images)
    assert whole.tensor.shape == images.shape
    assert whole.tensor.abs().max() <= 1.001
    one = model.reconstruct(images[1:], batch_size=1)
    assert torch.allclose(one.tensor[0], whole.tensor[1], atol=1e-5)
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
    config = config_of(tmp_path, tiny("autoencoder_kl"), size=[31, 31, 31], patches=[31, 31, 8])
    assert "data.patches: [28, 28, 8] fits" in cli("check", "-c", config, "-d", volumes)[2]


def test_patches_are_judged_beside_the_middle_of_images(cli, volumes: Path, tmp_path: Path) -> None:
    """Middle patches of the labels, as predictions: nothing differs."""
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    middles = []
    for i in (4, 5):
        voxels = np.asarray(nib.load(volumes / f"p{i}_0.nii.gz").dataobj)
        middles.append(voxels[8:24, 8:24, 12:20])
        nib.save(nib.Nifti1Image(middles[-1], AFFINE), predictions / f"p{i}.nii.gz")
    config = config_of(tmp_path, tiny("autoencoder_kl"), patches=[16, 16, 8])
    words = ("-l", volumes, "-t", volumes, "-o", tmp_path / "r.yaml")
    code, _, err = cli("evaluate", "-p", predictions, "-c", config, *words)
    assert code == 0, err
    results = yaml.safe_load((tmp_path / "r.yaml").read_text())
    images = results["images"]
    assert images["labels"]["shape"] == images["train_data"]["shape"] == [1, 16, 16, 8]
    assert images["labels"]["sha256"] == images["predictions"]["sha256"]
    (note,) = [text for text in results["notes"] if "patch" in text]
    assert note.startswith("Predictions are patches (data.patches [16, 16, 8])")
    # predictions that are neither patches nor whole
    config = config_of(tmp_path, tiny("autoencoder_kl"), patches=[8, 8, 8])
    code, _, err = cli("evaluate", "-p", predictions, "-c", config, *words)
    assert code == 2
    assert "predictions have the shape [1, 16, 16, 8], labels [1, 32, 32, 32]" in err


def test_membership_of_a_model_of_patches(first_stage: Path, volumes: Path, tmp_path: Path) -> None:
    from synthcube.data.manifest import read_manifest
    from synthcube.evaluation.membership import _model_images
    from synthcube.models import artifact

    images = _model_images(artifact.load(first_stage), read_manifest(volumes), tmp_path)
    middle = images.cache.read([1])[..., 8:24, 8:24, 8:24]
    assert np.array_equal(images.__getitems__([(0, 1)])["image"], middle)


def test_windows_leave_no_seams() -> None:
    """A network that sees neighbours, in windows: smooth where windows meet, and noise of one."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 1, 5, padding=2, bias=False)
    calls = []

    def network(x_t: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        assert x_t.shape[1:] == condition["source"].shape[1:] == (1, 16, 16)
        assert len(x_t) == len(time) == len(condition["values"]) <= 2
        assert len(set(time.tolist())) == 1
        calls.append(float(time[0]))
        shift = condition["values"][:, :1, None, None]
        return conv(torch.cat([x_t, condition["source"]], dim=1)) + shift

    x_t, source = torch.randn(2, 2, 1, 40, 37).unbind(0)
    values, time = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0])
    condition = Condition(values=values, source=source)
    with torch.no_grad():
        joined = windowed(network, (16, 16))(x_t, time, condition)
        whole = conv(torch.cat([x_t, source], dim=1)) + values[..., None, None]
        plain = in_windows(lambda image: image * 2, x_t[:1], (16, 16), 3)
    assert set(calls) == {3.0, 4.0}  # each image under its own time and condition
    assert torch.allclose(plain, x_t[:1] * 2, atol=1e-5)
    # Where windows meet, their borders count least: a tenth of the error of tiles side by side.
    tiles = torch.zeros_like(whole)
    with torch.no_grad():
        for rows in torch.arange(40).split(16):
            for columns in torch.arange(37).split(16):
                part = torch.cat([x_t, source], dim=1)[:, :, rows][..., columns]
                tiles[:, :, rows[:, None], columns] = conv(part) + values[..., None, None]
    error, of_tiles = ((image - whole).square().mean() for image in (joined, tiles))
    assert 0 < error < 0.1 * of_tiles
    assert (joined - whole).abs().median() < 1e-6


@pytest.fixture(scope="module")
def translator(tmp_path_factory, volumes: Path) -> Path:
    """A model that learned, on patches, to make the second channel out of the first."""
    folder = tmp_path_factory.mktemp("translator")
    model = tiny("rectified_flow", num_sampling_steps=2)
    size = {"size": [32, 16, 16], "fit": "crop_or_pad"}
    data = {**size, "patches": [16, 16, 16], "source_channels": [0]}
    train(config_of(folder, model, **data), volumes / "both.csv", folder / "run")
    return folder / "run"


def test_whole_images_are_translated_without_seams(cli, translator: Path, tmp_path: Path) -> None:
    code, _, err = cli("infer", "-m", translator, "-d", translator, "-o", tmp_path / "out")
    assert code == 0, err
    for row in rows_of(tmp_path / "out"):
        image = nib.load(tmp_path / "out" / row["Channel_0"])
        assert image.shape == (32, 16, 16)
        assert np.allclose(image.affine[:3, 3], AFFINE[:3, 3] + [0, 8, 16])
    model = synthcube.from_pretrained(translator, accelerator="cpu")
    (ramp,) = np.linspace(-1, 1, 32)[None]
    source = torch.tensor(ramp, dtype=torch.float32)[:, None, None].expand(2, 1, 32, 16, 16)
    translated = model.translate(source, seed=1).tensor
    # Along x, windows begin at 0, 12 and 16: there, voxels are as alike as elsewhere.
    jumps = translated.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    assert jumps.max() < 1.2 * jumps.median()
    short = source[:, :, :20, :9]
    assert model.translate(short).tensor.shape == short.shape


def test_families_that_cannot_translate_window_by_window_say_so(
    translator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = synthcube.from_pretrained(translator, accelerator="cpu")
    monkeypatch.setattr(type(model.family), "translates_any_size", False)
    with pytest.raises(
        synthcube.errors.ImageError,
        match=r"rectified_flow was trained on patches of \[16, 16, 16\], and rectified_flow cannot "
        "translate window by window without seams",
    ):
        model.translate(torch.zeros(1, 1, 32, 16, 16))
    assert model.translate(torch.zeros(1, 1, 16, 16, 16)).tensor.shape == (1, 1, 16, 16, 16)
