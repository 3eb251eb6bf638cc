"""What infer writes after steps of sampling.postprocessing, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from synthcube.data.phantom import write_phantoms
from synthcube.storage import sha256


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
