"""Images and masks made together, from the manifest to the evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from PIL import Image as Pillow

import synthcube
from synthcube import config, reading
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.models import registry
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

CHANNELS = {
    0: {"kind": "image", "intensity_range": [-1000, 400]},
    1: {"kind": "mask", "classes": [0, 1, 4]},
}


def write_scans(folder: Path, *, pictures: bool = False, number: int = 12) -> Path:
    """A lesion of class 4 in an organ of class 1: CT and mask, as volumes or as pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shape = (16, 16) if pictures else (16, 16, 8)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    rows = []
    for i in range(number):
        centre = np.array(shape) / 2 + rng.uniform(-1, 1, len(shape))
        distance = np.linalg.norm(grid - centre.reshape(-1, *[1] * len(shape)), axis=0)
        mask = np.where(distance < 2, 4, np.where(distance < 4 + i % 3, 1, 0)).astype(np.uint8)
        ct = np.select([mask == 4, mask == 1], [200.0, 40.0], -900.0) + rng.normal(0, 9, shape)
        row = {"SubjectID": f"p{i:02d}", "Split": "train" if i < number - 4 else "test"}
        for channel, (name, voxels) in enumerate((("ct", ct), ("seg", mask))):
            if pictures:
                grey = np.clip(ct / 4 + 128, 0, 255).astype(np.uint8) if name == "ct" else mask
                path = folder / f"p{i:02d}_{name}.png"
                Pillow.fromarray(grey.T).save(path)
            else:
                path = folder / f"p{i:02d}_{name}.nii.gz"
                kind = np.float32 if name == "ct" else np.uint8
                nib.save(nib.Nifti1Image(voxels.astype(kind), np.diag([1, 1, 2, 1.0])), path)
            row[f"Channel_{channel}"] = path.name
        rows.append(row)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def trained(
    folder: Path, data: Path, family: str, channels: dict, source_channels: tuple[int, ...] = ()
) -> Path:
    settings = {
        "model": registry.find(family).tiny().model_dump(mode="json"),
        "data": {"channels": channels, "source_channels": list(source_channels)},
        "training": {"max_epochs": 2, "batch_size": 4, "num_sample_images": 2},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }
    (folder / "config.yaml").write_text(reading.dump(settings))
    train(folder / "config.yaml", data, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans") / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, scans: Path) -> Path:
    return trained(tmp_path_factory.mktemp("masks"), scans, "rectified_flow", CHANNELS)


@pytest.fixture(scope="module")
def images(tmp_path_factory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("made") / "images"
    infer(InferRequest(run, out, num_images="6", seed=3))
    return out


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_image_and_mask_are_files_of_their_own(images: Path) -> None:
    rows = rows_of(images)
    assert rows[0]["Channel_0"] == "images/00000_image_0.nii.gz"
    assert rows[0]["Channel_1"] == "images/00000_mask_1.nii.gz"
    for row in rows:
        ct, mask = (nib.load(images / row[f"Channel_{i}"]) for i in range(2))
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= {0, 1, 4}
        assert ct.get_data_dtype() == np.float32
        assert np.allclose(ct.affine, mask.affine)
        assert np.allclose(np.diag(ct.affine), [1, 1, 2, 1])
        assert ct.shape == mask.shape == (16, 16, 8)


def test_python_makes_the_same_files(run: Path, images: Path, tmp_path: Path) -> None:
    model = synthcube.from_pretrained(run, accelerator="cpu")
    drawn = model.sample(6, seed=3)
    assert drawn.tensor.shape == (6, 2, 16, 16, 8)
    assert set(np.unique(drawn[0][1])) <= {0, 1, 4}
    paths = drawn.save(tmp_path)
    assert [path.name for path in paths[:2]] == ["00000_image_0.nii.gz", "00000_mask_1.nii.gz"]
    for path in paths:
        assert path.read_bytes() == (images / "images" / path.name).read_bytes()
    first, second = drawn.to_nifti()[:2]
    assert (first.get_data_dtype(), second.get_data_dtype()) == (np.float32, np.uint8)


def test_the_network_sees_a_channel_for_each_class(run: Path) -> None:
    image = yaml.safe_load((run / "artifact" / "image.json").read_text())
    assert (image["channels"], image["masks"]) == (2, {"1": [0, 1, 4]})
    model = synthcube.from_pretrained(run, accelerator="cpu")
    assert model.family.image.channels == 4


def test_evaluate_judges_masks_apart(cli, run: Path, scans: Path, tmp_path: Path) -> None:
    """Real scans as predictions of themselves: Dice is 1, volumes are those of the labels."""
    held_out = [row for row in rows_of(scans) if row["Split"] == "test"]
    copy = tmp_path / "predictions.csv"
    with copy.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["Channel_0", "Channel_1", "SubjectID"], extrasaction="ignore"
        )
        writer.writeheader()
        for row in held_out:
            paths = {f"Channel_{i}": scans / row[f"Channel_{i}"] for i in range(2)}
            writer.writerow({**row, **paths})
    out = tmp_path / "results.yaml"
    words = ("--set", "evaluation.extractor.name=radiomic")
    code, _, err = cli("evaluate", "-p", copy, "-l", run, "-m", run, "-o", out, *words)
    assert code == 0, err
    results = yaml.safe_load(out.read_text())
    masks = results["masks"]
    assert masks["dice_channel_1_class_4"]["value"] == 1
    assert masks["dice_channel_1_class_1"]["value"] == 1
    assert masks["dice_channel_1_class_1"]["real_baseline"] < 1
    lesions = [
        (np.asarray(nib.load(scans / row["Channel_1"]).dataobj) == 4).sum() for row in held_out
    ]
    volume = masks["volume_channel_1_class_4"]
    assert volume["value"] == volume["real_baseline"] == pytest.approx(np.mean(lesions) * 2 / 1000)
    assert masks["volume_distance_channel_1_class_4"]["value"] == 0
    assert masks["present_channel_1_class_4"]["value"] == 1
    # the mask is no image: its classes are in no PSNR
    assert len(results["paired"]["data_range"]) == 1


def test_a_prediction_with_other_values_in_its_mask_is_refused(
    cli, run: Path, scans: Path, tmp_path: Path
) -> None:
    mask = nib.load(scans / rows_of(scans)[0]["Channel_1"])
    voxels = np.asarray(mask.dataobj).astype(np.float32) * 0.5
    rows = ["Channel_0,Channel_1"]
    for i in range(2):
        nib.save(nib.Nifti1Image(voxels, mask.affine), tmp_path / f"{i}.nii.gz")
        rows.append(f"{scans / rows_of(scans)[i]['Channel_0']},{tmp_path / f'{i}.nii.gz'}")
    (tmp_path / "p.csv").write_text("\n".join(rows))
    code, _, err = cli("evaluate", "-p", tmp_path / "p.csv", "-l", run, "-o", tmp_path / "r.yaml")
    assert code == 2
    assert "channel 1 is a mask and holds 0.5, 2; data.channels.1.classes are [0, 1, 4]" in err
    assert not (tmp_path / "r.yaml").exists()


def test_pictures_with_masks(cli, tmp_path: Path) -> None:
    """Reconstructions: a PNG each, with the classes' own numbers."""
    data = write_scans(tmp_path / "data", pictures=True, number=8)
    channels = {1: CHANNELS[1]}
    run = trained(tmp_path, data, "autoencoder_kl", channels)
    code, _, err = cli("infer", "-m", run, "-d", data, "-o", tmp_path / "out")
    assert code == 0, err
    for row in rows_of(tmp_path / "out"):
        assert row["Channel_0"].endswith("_image_0.png")
        mask = Pillow.open(tmp_path / "out" / row["Channel_1"])
        assert (mask.mode, mask.size) == ("L", (16, 16))
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 4}


@pytest.mark.slow
def test_a_mask_is_made_of_an_image_and_an_image_of_a_mask(
    cli, scans: Path, tmp_path: Path
) -> None:
    for source, target in ((0, 1), (1, 0)):
        folder = tmp_path / str(source)
        folder.mkdir()
        run = trained(folder, scans, "rectified_flow", CHANNELS, (source,))
        alone = folder / "alone.csv"  # the source channel, and nothing else
        paths = [scans / row[f"Channel_{source}"] for row in rows_of(scans)[-4:]]
        alone.write_text("\n".join(["Channel_0", *map(str, paths)]))
        for data in (run, alone):
            out = folder / f"of-{data.name}"
            code, _, err = cli("infer", "-m", run, "-d", data, "-o", out)
            assert code == 0, err
            image = nib.load(out / rows_of(out)[0]["Channel_0"])
            if target == 1:
                assert set(np.unique(image.dataobj)) <= {0, 1, 4}
                assert image.get_data_dtype() == np.uint8
            else:
                assert len(np.unique(image.dataobj)) > 10


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:rdflib")
def test_croissant_names_both_files(cli, run: Path, tmp_path: Path) -> None:
    import mlcroissant

    out = tmp_path / "images"
    words = ("--croissant", "--license", "cc-by-4.0", "--creator", "A group")
    code, _, err = cli("infer", "-m", run, "-o", out, "-n", 2, *words)
    assert code == 0, err
    dataset = mlcroissant.Dataset(jsonld=out / "croissant.json")
    assert dataset.metadata.ctx.issues.errors == set()
    records = list(dataset.records("images"))
    texts = {value for value in records[1].values() if isinstance(value, bytes)}
    assert {b"00001_image_0.nii.gz", b"00001_mask_1.nii.gz", b"00001"} <= texts


def test_augmentation_keeps_classes_and_fills_in_background(scans: Path, tmp_path: Path) -> None:
    steps = [
        {"name": "RandomAffine", "degrees": 40, "scales": 0.3},
        {"name": "RandomNoise", "std": 0.2},
    ]
    settings = config.build({"data": {"channels": CHANNELS, "augmentation": steps}})
    data = DataModule(
        read_manifest(scans), settings.data, batch_size=4, seed=0, cache=tmp_path / "cache"
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (4, 16, 16, 8)
    assert set(batch["image"][:, 1:].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(batch["image"][:, 1:].sum(dim=1), torch.full((4, 16, 16, 8), -1.0))
    assert (batch["image"][:, 1, 0, 0] == 1).all()  # a corner is background
    plain = data.examples(batch["index"].tolist())["image"]
    assert not torch.equal(plain[:, 1], batch["image"][:, 1])


@pytest.mark.slow
def test_check_tells_masks_from_images(cli, scans: Path, tmp_path: Path) -> None:
    model = reading.dump({"model": registry.find("rectified_flow").tiny().model_dump(mode="json")})
    (tmp_path / "plain.yaml").write_text(model)
    code, told, _ = cli("check", "-c", tmp_path / "plain.yaml", "-d", scans)
    assert code == 0
    assert "Warning: channel 1 of the first 8 images: few whole numbers, as in a mask" in told
    assert "add data: {channels: {1: {kind: mask, classes: [0, 1, 4]}}}" in told
    (tmp_path / "masks.yaml").write_text(model + reading.dump({"data": {"channels": CHANNELS}}))
    code, told, _ = cli("check", "-c", tmp_path / "masks.yaml", "-d", scans)
    assert code == 0
    assert "Warning" not in told
    assert "channel 1: a mask, share of the voxels of each class: 0 (" in told


def test_prepare_recognises_masks(cli, scans: Path, tmp_path: Path) -> None:
    code, told, err = cli("prepare", "-d", scans, "-o", tmp_path, "--channels", "ct,seg")
    assert code == 0, err
    assert (
        "Masks: channel 1; add to the config: "
        "data: {channels: {1: {kind: mask, classes: [0, 1, 4]}}}" in told
    )


def test_a_healthy_subject_stays(cli, tmp_path: Path) -> None:
    """Its mask is all background, which --verify took for a fault."""
    scans = write_scans(tmp_path / "scans")
    mask = nib.load(scans / "p03_seg.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), mask.affine), scans / "p03_seg.nii.gz")
    (scans / "manifest.csv").unlink()
    code, told, err = cli("prepare", "-d", scans, "-o", tmp_path / "out", "--verify")
    assert code == 0, err
    assert "12 images of 12 subjects" in told
    settings = config.build({"data": {"channels": CHANNELS}})
    data = DataModule(
        read_manifest(tmp_path / "out"), settings.data, batch_size=4, seed=0, cache=tmp_path / "c"
    )
    assert len(data.cache) == 12


def test_masks_are_postprocessed_only_by_name(run: Path, tmp_path: Path) -> None:
    plain, finished = tmp_path / "plain", tmp_path / "finished"
    infer(InferRequest(run, plain, num_images="2"))
    steps = [
        {"name": "clip", "low": 3},
        {"name": "largest_component", "above": 0, "channels": [1]},
    ]
    settings = {"sampling": {"postprocessing": steps}}
    infer(InferRequest(run, finished, num_images="2", config=settings))
    for row in rows_of(finished):
        assert np.asarray(nib.load(finished / row["Channel_0"]).dataobj).min() >= 3
        mask = np.asarray(nib.load(finished / row["Channel_1"]).dataobj)
        assert mask.min() == 0
        before = np.asarray(nib.load(plain / row["Channel_1"]).dataobj)
        assert (mask > 0).sum() <= (before > 0).sum()
    steps = [{"name": "rescale", "low": 0, "high": 9, "channels": [1]}]
    with pytest.raises(synthcube.errors.ConfigError, match="channel 1 is a mask and holds"):
        infer(InferRequest(run, tmp_path / "no", config={"sampling": {"postprocessing": steps}}))


def test_masks_are_dicom_series_of_whole_numbers(run: Path, tmp_path: Path) -> None:
    infer(InferRequest(run, tmp_path / "out", num_images=1, format="dicom"))
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["DICOM"] == "dicom/00000_image_0 dicom/00000_mask_1"
    for channel, folder in enumerate(row["DICOM"].split()):
        files = sorted((tmp_path / "out" / folder).iterdir())
        voxels = sitk.GetArrayFromImage(sitk.ReadImage([str(path) for path in files]))
        expected = nib.load(tmp_path / "out" / row[f"Channel_{channel}"]).get_fdata()
        tolerance = 0 if channel else np.ptp(expected) / 131070 * 1.1
        np.testing.assert_allclose(voxels.transpose(2, 1, 0), expected, rtol=0, atol=tolerance)
