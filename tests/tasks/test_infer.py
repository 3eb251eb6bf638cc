"""Infer through the command line: images, their geometry, seeds and postprocessing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from synthcube.data.phantom import write_phantoms
from synthcube.models import artifact
from synthcube.storage import sha256


@pytest.fixture
def trained(cli, tiny_config, phantoms: Path, tmp_path: Path) -> Path:
    code, _, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run"


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_infer_writes_as_many_images_as_asked(cli, trained: Path, tmp_path: Path) -> None:
    """GaNDLF-Synth wrote one image a batch, and overwrote them."""
    out = tmp_path / "images"
    words = ("-n", 5, "--batch-size", 2, "--animate", "steps")
    code, printed, _ = cli("infer", "-m", trained, "-o", out, *words)
    assert code == 0
    assert str(out / "grid.png") in printed
    assert f"Animation: {out / 'animation.gif'}" in printed
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == [f"{index:05d}.png" for index in range(5)]
    with (out / "manifest.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["Channel_0"] for row in table] == [f"images/{name}" for name in names]
    assert len({row["Seed"] for row in table}) == 5
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["complete"] is True
    assert provenance["artifact_sha256"] == artifact.load(trained).sha256
    assert provenance["config"]["model"]["name"] == "rectified_flow"
    assert provenance["versions"]["torch"] == torch.__version__


def test_an_image_depends_on_its_seed_alone(cli, trained: Path, tmp_path: Path) -> None:
    for name, size, number in (("a", 1, 3), ("b", 3, 3), ("c", 4, 6)):
        words = ("-n", number, "--batch-size", size, "--seed", 9)
        assert cli("infer", "-m", trained, "-o", tmp_path / name, *words)[0] == 0
    a, b, c = (hashes(tmp_path / name / "images") for name in "abc")
    assert a == b
    assert a.items() <= c.items()
    assert cli("infer", "-m", trained, "-o", tmp_path / "d", "-n", 3, "--seed", 10)[0] == 0
    assert not set(hashes(tmp_path / "d" / "images").values()) & set(a.values())


def test_what_infer_writes_can_be_trained_on(cli, trained, tiny_config, tmp_path: Path) -> None:
    out = tmp_path / "images"
    assert cli("infer", "-m", trained, "-o", out, "-n", 6)[0] == 0
    code, _, err = cli("train", "-c", tiny_config(), "-d", out, "-o", tmp_path / "second")
    assert code == 0, err


def test_infer_again_replaces_only_its_own_images(cli, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert cli("infer", "-m", trained, "-o", out, "-n", 2)[0] == 0
    before = hashes(out)
    assert cli("infer", "-m", trained, "-o", out, "-n", 2)[0] == 0
    assert hashes(out) == before
    code, _, err = cli("infer", "-m", trained, "-o", out, "-n", 3)
    assert code == 2
    assert "holds other images" in err
    assert hashes(out) == before


def test_vqvae_reconstructs_with_the_geometry_of_its_source(
    cli, tiny_config, tmp_path: Path
) -> None:
    data = write_phantoms(tmp_path / "volumes", num=6, size=(16, 16, 16), spacing_mm=(1, 1.5, 3))
    for index, path in enumerate(sorted(data.parent.glob("*.nii.gz"))):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3, 3] = (10 * index, -5, 7)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)
    assert cli("train", "-c", tiny_config("vqvae"), "-d", data, "-o", tmp_path / "run")[0] == 0
    out = tmp_path / "out"
    code, _, err = cli("infer", "-m", tmp_path / "run", "-o", out, "-d", data)
    assert code == 0, err
    written = sorted((out / "images").iterdir())
    sources = sorted(data.parent.glob("*.nii.gz"))
    assert len(written) == len(sources) == 6
    for one, source in zip(written, sources, strict=True):
        np.testing.assert_allclose(nib.load(one).affine, nib.load(source).affine, atol=1e-4)
        assert nib.load(one).shape == nib.load(source).shape
        assert nib.load(one).get_fdata().max() <= 260
    with Pillow.open(out / "grid.png") as picture:
        assert picture.width > 500


def test_the_images_of_a_run_are_those_that_it_held_out(cli, first_stage, tmp_path: Path) -> None:
    """It reconstructed the pictures in samples/ and in the artifact."""
    run, out = first_stage("vqvae"), tmp_path / "out"
    with (run / "split.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Split"] == "validation"]
    code, _, err = cli("infer", "-m", run, "-o", out, "-d", run)
    assert code == 0, err
    with (out / "manifest.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["Source"] for row in listed] == [row["Channel_0"] for row in rows]
    assert len(listed) == 3


def test_generated_volumes_have_the_training_geometry(cli, tiny_config, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "volumes", num=6, size=(16, 16, 16), spacing_mm=(1, 1.5, 3))
    assert cli("train", "-c", tiny_config(), "-d", data, "-o", tmp_path / "run")[0] == 0
    assert cli("infer", "-m", tmp_path / "run", "-o", tmp_path / "out", "-n", 2)[0] == 0
    image = nib.load(tmp_path / "out" / "images" / "00001.nii.gz")
    assert image.header.get_zooms() == pytest.approx((1, 1.5, 3))
    source = nib.load(next(iter(sorted(data.parent.glob("*.nii.gz")))))
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-4)


def test_families_say_what_they_cannot_do(cli, trained, tiny_config, phantoms, tmp_path) -> None:
    code, _, err = cli("infer", "-m", trained, "-o", tmp_path / "x", "-d", phantoms)
    assert code == 2
    assert err == "error: rectified_flow does not reconstruct images: leave out data_path.\n"
    assert cli("train", "-c", tiny_config("vqvae"), "-d", phantoms, "-o", tmp_path / "vq")[0] == 0
    code, _, err = cli("infer", "-m", tmp_path / "vq", "-o", tmp_path / "x", "-n", 3)
    assert code == 2
    assert "vqvae does not generate images out of nothing" in err
    assert not (tmp_path / "x").exists()


def test_infer_needs_a_trained_model(cli, tmp_path: Path) -> None:
    """GaNDLF-Synth ran random weights and exited 0."""
    code, _, err = cli("infer", "-m", tmp_path, "-o", tmp_path / "out")
    assert code == 2
    assert "no trained model is here" in err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, err = cli("infer", "-m", tmp_path / "run", "-o", tmp_path / "out")
    assert code == 2
    assert "this run has not finished training" in err
    code, _, err = cli("infer", "-m", tmp_path / "gone", "-o", tmp_path / "out")
    assert code == 2
    assert "there is no such folder" in err


@pytest.fixture
def write(tmp_path: Path):
    """Writes the YAML of an infer with these steps."""

    def _write(*steps: str) -> Path:
        path = tmp_path / "infer.yaml"
        path.write_text(f"sampling: {{num_images: 3, postprocessing: [{', '.join(steps)}]}}\n")
        return path

    return _write


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Pillow.open(path)) for path in sorted(folder.glob("images/*.png"))])


def test_steps_are_applied_to_pictures_recorded_and_held_to(
    cli, tiny_config, phantoms: Path, tmp_path: Path, write
) -> None:
    settings = "sampling.postprocessing=[{name: clip, low: 100}]"
    words = ("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run")
    assert cli(*words, "--set", settings)[0] == 0

    def infer(name: str, *steps: str) -> tuple[int, str]:
        code, _, err = cli(
            "infer", "-m", tmp_path / "run", "-o", tmp_path / name, "-c", write(*steps)
        )
        return code, err

    assert infer("plain") == (0, "Computing on cpu in 32-true (asked for).\n")
    plain = pixels(tmp_path / "plain").astype(float)
    assert len(np.unique(plain)) > 100
    clip = "{name: clip, low: 60, high: 90.4}"
    assert infer("clipped", clip)[0] == 0
    np.testing.assert_array_equal(pixels(tmp_path / "clipped"), np.clip(plain, 60, 90))
    assert infer("beyond", "{name: ShiftIntensity, offset: 100}")[0] == 0
    beyond = pixels(tmp_path / "beyond").astype(float)
    inside = (plain > 0) & (plain < 155)
    np.testing.assert_allclose(beyond[inside], plain[inside] + 100, atol=1)
    assert bool((beyond[plain > 156] == 255).all())
    record = json.loads((tmp_path / "clipped" / "provenance.json").read_text())["request"]
    assert record["postprocessing"] == [
        {"name": "clip", "channels": None, "low": 60.0, "high": 90.4}
    ]
    assert infer("clipped", clip)[0] == 0
    for other in ((), ("{name: clip, low: 60}",), (clip, clip)):
        code, err = infer("clipped", *other)
        assert code == 2
        assert "holds other images, made by" in err
    out = tmp_path / "trained"
    assert cli("infer", "-m", tmp_path / "run", "-o", out, "-n", 2)[0] == 0
    assert int(pixels(out).min()) == 100  # the steps of the training, where no others are given


def test_a_reference_that_is_missing_or_changed(
    cli, tiny_config, phantoms: Path, tmp_path: Path, write
) -> None:
    words = ("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run")
    assert cli(*words)[0] == 0
    reference, out = tmp_path / "reference.png", tmp_path / "out"
    words = ("infer", "-m", tmp_path / "run", "-o", out)
    step = f"{{name: histogram_matching, reference: {reference}}}"
    code, _, err = cli(*words, "-c", write(step, "{name: clip, low: 0, channels: [1]}"))
    assert code == 2
    assert err == (
        "error: sampling.postprocessing does not fit these images:\n"
        f"  - 0 (histogram_matching): {reference} is missing.\n"
        "  - 1 (clip): channels [1]: the images have 1, counted from 0\n"
    )
    assert not out.exists()
    Pillow.fromarray(np.array([[0, 200], [200, 210]], np.uint8)).save(reference)
    assert cli(*words, "-c", write(step))[0] == 0
    assert {int(image.max()) for image in pixels(out)} == {210}
    record = json.loads((out / "provenance.json").read_text())["request"]["postprocessing"]
    assert record[0]["reference_sha256"] == sha256(reference)
    Pillow.fromarray(np.array([[0, 100], [100, 110]], np.uint8)).save(reference)
    code, _, err = cli(*words, "-c", write(step))
    assert code == 2
    assert "holds other images" in err


def test_reconstructed_volumes_keep_their_geometry_and_become_float(
    cli, tiny_config, tmp_path: Path, write
) -> None:
    data = write_phantoms(tmp_path / "volumes", num=4, size=(16, 16, 16), spacing_mm=(1, 1.5, 3))
    source = nib.load(next(iter(sorted(data.parent.glob("*.nii.gz")))))
    assert cli("train", "-c", tiny_config("vqvae"), "-d", data, "-o", tmp_path / "run")[0] == 0
    written = {}
    for name, steps in {
        "plain": (),
        "unit": ("{name: rescale, low: 0, high: 1}", "{name: GaussianSmooth, sigma: 0.5}"),
        "cut": ("{name: clip, low: 130, high: 130.4}",),
    }.items():
        out = tmp_path / name
        words = ("-m", tmp_path / "run", "-o", out, "-d", data, "-c", write(*steps))
        code, _, err = cli("infer", *words)
        assert code == 0, err
        written[name] = nib.load(sorted((out / "images").iterdir())[0])
        np.testing.assert_allclose(written[name].affine, source.affine, atol=1e-4)
        assert written[name].shape == source.shape
    assert written["plain"].get_data_dtype() == source.get_data_dtype()
    assert written["cut"].get_data_dtype().kind in "iu"
    assert set(np.unique(written["cut"].get_fdata())) == {130}
    assert written["unit"].get_data_dtype() == np.float32
    assert 0 <= written["unit"].get_fdata().min() < written["unit"].get_fdata().max() <= 1
    assert len(np.unique(written["unit"].get_fdata())) > 100


def test_check_finds_steps_that_do_not_fit(cli, tiny_config, phantoms: Path) -> None:
    settings = "sampling.postprocessing=[{name: rescale, low: 0, high: 1}]"
    code, _, err = cli("check", "-c", tiny_config(), "-d", phantoms, "--set", settings)
    assert code == 2
    assert "  - intensities of 0 to 1 are left; a PNG holds those of 0 to 255\n" in err
