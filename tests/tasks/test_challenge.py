"""Cases of a challenge: on the grid of the input, byte by byte, and every fault before anything."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from synthcube import reading
from synthcube.errors import ArtifactError, ConfigError, ImageError, ManifestError, OutputError
from synthcube.models import registry
from synthcube.sharing.config import ExportRequest
from synthcube.storage import sha256
from synthcube.tasks.challenge import run_challenge
from synthcube.tasks.challenge_container import export_container
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

MASK = {"kind": "mask"}
FIXED = {"intensity_range": [0, 1000]}
NAMES = ("BraTS-GLI-00002-000", "BraTS-GLI-00010-000")


def trained(folder: Path, data: Path, dimensions: int = 3, **data_keys: Any) -> Path:
    model = {**registry.find("rectified_flow").tiny().model_dump(mode="json"), "mode": "regression"}
    settings = {
        "model": model, "data": data_keys,
        "training": {"max_epochs": 1, "batch_size": 2, "num_sample_images": 1},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(reading.dump(settings))
    train(folder / "config.yaml", data, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def heads(tmp_path_factory, brats: ModuleType) -> Path:
    """A CSV of four heads: voided, mask and whole."""
    folder = tmp_path_factory.mktemp("heads")
    brats.inpainting_cases(folder, [f"h{i}" for i in range(4)], whole=True)
    return brats.manifest(folder, ("t1n-voided", "mask", "t1n"))


@pytest.fixture(scope="module")
def contrasts(tmp_path_factory, brats: ModuleType) -> Path:
    """A CSV of four heads in four contrasts."""
    folder = tmp_path_factory.mktemp("contrasts")
    brats.contrast_cases(folder, [f"h{i}" for i in range(4)])
    return brats.manifest(folder, brats.CONTRASTS)


def container(tmp_path_factory, run: Path, challenge: str, name: str) -> Path:
    folder = tmp_path_factory.mktemp(name) / "container"
    return export_container(run, folder, ExportRequest(), challenge=challenge)


@pytest.fixture(scope="module")
def inpainter_run(tmp_path_factory, heads: Path) -> Path:
    folder = tmp_path_factory.mktemp("inpainter")
    return trained(folder, heads, source_channels=[0, 1], channels={"1": MASK}, **FIXED)


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory, inpainter_run: Path) -> Path:
    return container(tmp_path_factory, inpainter_run, "brats-inpainting", "inpainting")


@pytest.fixture(scope="module")
def coarse_inpainter(tmp_path_factory, heads: Path) -> Path:
    """Its images are half as fine and smaller, and each has a range of its own."""
    run = trained(
        tmp_path_factory.mktemp("coarse"), heads, source_channels=[0, 1], spacing_mm=[2, 2, 2],
        size=[8, 12, 8], fit="crop_or_pad", channels={"1": MASK},
    )  # fmt: skip
    return container(tmp_path_factory, run, "brats-inpainting", "coarse-container")


@pytest.fixture(scope="module")
def synthesizer(tmp_path_factory, contrasts: Path) -> Path:
    """Makes t1c and t2f, by a model for each."""
    folder = tmp_path_factory.mktemp("synthesizer")
    for missing in (0, 2):
        sources = [channel for channel in range(4) if channel != missing]
        run = trained(folder / str(missing), contrasts, source_channels=sources)
        export_container(run, folder / "container", ExportRequest(), challenge="brats-brasyn")
    return folder / "container"


def bytes_of(path: Path) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)


def assert_only_the_mask_is_made(case: Path, path: Path) -> np.ndarray:
    """Every byte outside of the mask is that of the input; returns the voxels in the mask."""
    voided, mask = (case / f"{case.name}-{suffix}.nii.gz" for suffix in ("t1n-voided", "mask"))
    where = np.asarray(nib.load(mask).dataobj) > 0
    size = nib.load(voided).get_data_dtype().itemsize
    before, after = bytes_of(voided), bytes_of(path)
    assert len(before) == len(after)
    start = len(before) - where.size * size
    np.testing.assert_array_equal(before[:start], after[:start])
    inside = np.repeat(where.ravel(order="F"), size)
    np.testing.assert_array_equal(before[start:][~inside], after[start:][~inside])
    output = nib.load(path)
    assert output.shape == nib.load(voided).shape
    np.testing.assert_array_equal(output.affine, nib.load(voided).affine)
    return np.asarray(output.dataobj)[where]


@pytest.mark.slow
def test_the_void_is_filled_with_what_infer_makes_and_every_other_byte_stays(
    cli, inpainter: Path, inpainter_run: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.inpainting_cases(tmp_path / "input", NAMES)
    before = {path: sha256(path) for path in data.rglob("*.gz")}
    out = tmp_path / "output"
    code, shown, err = cli("challenge", "-m", inpainter, "-d", data, "-o", out)
    assert code == 0, err
    assert shown.splitlines()[-1] == f"Written: 2 files in {out}"
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}-t1n-inference.nii.gz" for name in NAMES
    ]
    assert {path: sha256(path) for path in data.rglob("*") if path.is_file()} == before
    table = brats.manifest(data, ("t1n-voided", "mask"))
    infer(InferRequest(inpainter_run, tmp_path / "inferred", data=table))
    for number, name in enumerate(NAMES, start=2):
        voxels = assert_only_the_mask_is_made(data / name, out / f"{name}-t1n-inference.nii.gz")
        inferred = nib.load(tmp_path / "inferred" / "images" / f"{number:05d}-{name}.nii.gz")
        turned = inferred.get_fdata(dtype=np.float32)[::-1, ::-1]
        mask = np.asarray(nib.load(data / name / f"{name}-mask.nii.gz").dataobj) > 0
        np.testing.assert_allclose(voxels, turned[mask], atol=1e-3)
        assert voxels.std() > 0


def test_a_model_of_other_voxels_fills_the_void_on_the_grid_of_the_file(
    coarse_inpainter: Path, brats: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = brats.inpainting_cases(tmp_path / "input", ["case"], (25, 24, 21), dtype="i2")
    scaled = data / "case" / "case-t1n-voided.nii.gz"
    image = nib.load(scaled)
    brats.write(scaled, np.asarray(image.dataobj) * 3, "i2", slope=3)
    (path,) = run_challenge(coarse_inpainter, data, tmp_path / "output")
    voxels = assert_only_the_mask_is_made(data / "case", path)
    assert nib.load(path).get_data_dtype() == np.int16
    assert 0 <= voxels.min() <= voxels.max() < 3 * 1100, "in the range of this image"
    assert "voxels of the mask lie outside" not in caplog.text
    far = np.zeros((25, 24, 21))
    far[0, 12, 10] = 1
    brats.write(data / "case" / "case-mask.nii.gz", far, "u1")
    run_challenge(coarse_inpainter, data, tmp_path / "output")
    assert "case: 1 voxels of the mask lie outside of what the model sees" in caplog.text


@pytest.mark.slow
def test_the_missing_contrast_decides_the_model(
    synthesizer: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.contrast_cases(tmp_path / "input", ["a", "b", "c"], missing=["t1c", "t2f", "t1c"])
    (data / "notes.txt").write_text("no image")
    (data / "a" / "a-seg.nii.gz").write_bytes(b"not read")
    paths = run_challenge(synthesizer, data, tmp_path / "output")
    assert [path.name for path in paths] == ["a-t1c.nii.gz", "b-t2f.nii.gz", "c-t1c.nii.gz"]
    for path in paths:
        name = path.name[0]
        source = nib.load(data / name / f"{name}-t1n.nii.gz")
        output = nib.load(path)
        assert output.shape == source.shape
        assert output.get_data_dtype() == np.float32
        np.testing.assert_array_equal(output.affine, source.affine)
        assert np.isfinite(output.get_fdata()).all()
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()  # as after a kill
    again = run_challenge(synthesizer, data, tmp_path / "output")
    assert [path.read_bytes() for path in again] == before


def test_a_contrast_that_no_model_makes_is_refused(
    cli, synthesizer: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.contrast_cases(tmp_path / "input", ["a", "b"], missing=["t1n", "t1c"])
    code, _, err = cli("challenge", "-m", synthesizer, "-d", data, "-o", tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"  - {data / 'a'}: case a: t1c is made out of t1n, t2f, t2w, and there is no t1n; t2f is "
        "made out of t1c, t1n, t2w, and there is no t1n"
    )
    assert not (tmp_path / "out").exists()


def test_all_faults_come_at_once_and_nothing_is_written(
    inpainter: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.inpainting_cases(tmp_path / "input", ["a", "b", "c", "d"])
    (data / "a" / "a-mask.nii.gz").unlink()
    (data / "c" / "c-mask.nii").write_bytes(b"again")
    (data / "empty").mkdir()
    brats.write(data / "other" / "d-mask.nii.gz", np.ones((2, 2, 2)))
    with pytest.raises(ManifestError) as raised:
        run_challenge(inpainter, data, tmp_path / "out")
    assert raised.value.faults == (
        f"{data / 'c' / 'c-mask.nii.gz'}: c-mask.nii is the same file of the same case",
        f"{data / 'a'}: case a: t1n-inference is made out of t1n-voided, mask, and there is no "
        "mask",
        f"case d is in {data / 'd'} and in {data / 'other'}",
        f"{data / 'empty'} holds no file *-t1n-voided.nii.gz or *-mask.nii.gz",
    )
    data = brats.inpainting_cases(tmp_path / "second", ["a", "b", "c", "d"])
    (data / "a" / "a-mask.nii.gz").write_bytes(b"")
    brats.write(data / "b" / "b-mask.nii.gz", np.ones((5, 24, 20)), "u1")
    brats.write(data / "c" / "c-t1n-voided.nii.gz", np.zeros((24, 24, 20)))
    with pytest.raises(ImageError, match=r"^3 of 4 cases in .*second cannot be used:") as images:
        run_challenge(inpainter, data, tmp_path / "out")
    first, second, third = images.value.faults
    assert "a-mask.nii.gz is empty (0 bytes)" in first
    assert "b: " in second
    assert "the channels of one image must be on the same grid" in second
    assert third.startswith("c: constant image")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ManifestError, match=r"nowhere does not exist, or is no folder"):
        run_challenge(inpainter, tmp_path / "nowhere", tmp_path / "out")


def test_images_of_another_size_than_the_model_s_are_refused(
    inpainter: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.inpainting_cases(tmp_path / "input", ["a"], (16, 24, 20))
    with pytest.raises(
        ImageError, match=r"a: .*the images have size \[16, 24, 20\], the model was "
    ):
        run_challenge(inpainter, data, tmp_path / "out")


def test_outputs_are_separate_and_foreign_files_are_not_touched(
    inpainter: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.inpainting_cases(tmp_path / "input", ["a"])
    with pytest.raises(OutputError, match="lies in data_path"):
        run_challenge(inpainter, data, data / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.nii.gz").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out holds mine.nii.gz, which these cases do not have"):
        run_challenge(inpainter, data, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"there is no challenge.json; give the folder that"):
        run_challenge(data, data, tmp_path / "new")


def test_names_of_cases_are_opaque_and_files_may_be_flat_or_without_a_prefix(
    inpainter: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = tmp_path / "input"
    image, mask = brats.head(brats.SIZE, 0), brats.hole(brats.SIZE, 0)
    for start in ("Ä 7-mask_", "folder/"):
        brats.write(data / f"{start}t1n-voided.nii.gz", image * (1 - mask))
        brats.write(data / f"{start}mask.nii", mask, "u1")
    paths = run_challenge(inpainter, data, tmp_path / "out")
    assert {path.name for path in paths} == {
        "folder-t1n-inference.nii.gz", "Ä 7-mask_t1n-inference.nii.gz"
    }  # fmt: skip


def test_a_runner_of_mlcube_s_kind_calls_it_with_weights_and_parameters(
    cli, inpainter: Path, inpainter_run: Path, brats: ModuleType, tmp_path: Path
) -> None:
    data = brats.inpainting_cases(tmp_path / "io0", ["a"])
    parameters = tmp_path / "parameters.yml"
    parameters.write_text("seed: 4\ncompute: {accelerator: cpu}\n")
    call = ["challenge", f"--model_path={inpainter}", "infer", f"--data_path={data}"]
    for number, weights in enumerate((inpainter, inpainter_run)):
        out = tmp_path / f"io2-{number}"
        code, _, err = cli(
            *call, f"--output_path={out}", f"--weights={weights}", f"--parameters_file={parameters}"
        )
        assert code == 0, err
        assert (out / "a-t1n-inference.nii.gz").is_file()
    code, _, err = cli(*call, f"--output_path={tmp_path / 'x'}", "--set", "model.mode=flow")
    assert code == 2
    assert "model.mode is 'flow', the model was trained with 'regression': leave it out" in err


def test_a_model_of_slices_makes_a_volume(
    tmp_path_factory, heads: Path, brats: ModuleType, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = trained(tmp_path_factory.mktemp("slices"), heads, source_channels=[0, 1],
                  channels={"1": MASK}, slices="axial", size=[16, 16])  # fmt: skip
    folder = container(tmp_path_factory, run, "brats-inpainting", "of-slices")
    data = brats.inpainting_cases(tmp_path / "input", ["a"])
    (path,) = run_challenge(folder, data, tmp_path / "out")
    voxels = assert_only_the_mask_is_made(data / "a", path)
    mask = np.asarray(nib.load(data / "a" / "a-mask.nii.gz").dataobj) > 0
    by_slice = [np.asarray(nib.load(path).dataobj)[..., z][mask[..., z]] for z in (9, 10, 11)]
    assert all(part.std() > 0 for part in by_slice)
    assert len(voxels) == mask.sum()
    assert "lie outside" not in caplog.text
    mask[..., 10] = True  # all of a slice is void
    voided = np.where(mask, 0, brats.head(brats.SIZE, 0))
    brats.write(data / "a" / "a-mask.nii.gz", mask, "u1")
    brats.write(data / "a" / "a-t1n-voided.nii.gz", voided)
    (path,) = run_challenge(folder, data, tmp_path / "out")
    assert_only_the_mask_is_made(data / "a", path)
    assert f"a: {24 * 24} voxels of the mask lie outside of what the model sees" in caplog.text


@pytest.mark.slow
def test_a_case_of_the_true_size(coarse_inpainter: Path, brats: ModuleType, tmp_path: Path) -> None:
    size = (240, 240, 155)
    data = brats.inpainting_cases(tmp_path / "input", ["BraTS-GLI-00000-000"], size)
    table = brats.inpainting_cases(tmp_path / "train", ["a", "b"], size, whole=True)
    csv = brats.manifest(table, ("t1n-voided", "mask", "t1n"))
    run = trained(tmp_path / "training", csv, source_channels=[0, 1], channels={"1": MASK},
                  size=[48, 48, 32], fit="resize")  # fmt: skip
    folder = export_container(
        run, tmp_path / "container", ExportRequest(), challenge="brats-inpainting"
    )
    (path,) = run_challenge(folder, data, tmp_path / "out")
    voxels = assert_only_the_mask_is_made(data / "BraTS-GLI-00000-000", path)
    output = nib.load(path)
    assert output.shape == size
    assert output.affine[:3, 3].tolist() == [0, 239, 0]
    assert voxels.std() > 0


def test_a_container_holds_the_model_its_declaration_and_how_to_build_it(
    cli, inpainter_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "container"
    words = ["export", "-m", inpainter_run, "-o", folder, "--challenge", "brats-inpainting"]
    code, out, err = cli(*words, "--license", "cc-by-nc-4.0", "--base", "registry.org/group/cube:1")
    assert code == 0, err
    assert "Its README.md says how to build, try and submit it." in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "Dockerfile", "README.md", "challenge.json", "models"
    ]  # fmt: skip
    assert json.loads((folder / "challenge.json").read_text()) == {
        "schema_version": 1,
        "name": "brats-inpainting",
        "tasks": [{"inputs": ["t1n-voided", "mask"], "output": "t1n-inference",
                   "image": "t1n-voided", "mask": "mask"}],
    }  # fmt: skip
    dockerfile = (folder / "Dockerfile").read_text()
    assert "FROM registry.org/group/cube:1\n" in dockerfile
    readme = (folder / "README.md").read_text()
    assert "License of the weights: `cc-by-nc-4.0`." in readme
    assert "CC BY-NC data, such as those of BraTS, cannot carry SynthCube's own" in readme
    assert (folder / "models" / "t1n-inference" / "artifact.json").is_file()
    before = {path: sha256(path) for path in folder.rglob("*") if path.is_file()}
    code, out, err = cli(*words)
    assert code == 0, err
    assert "No license is stated" in out
    assert {*before} == {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--challenge", "brats"], "--challenge brats: there is no such challenge; known: "
         "brats-inpainting, brats-brasyn, or a YAML of your own with inputs and output."),
        (["--challenge", "brats-brasyn"], "with three of them as data.source_channels; this one "
         "has [0, 1]. In another order, declare the task in a YAML of your own."),
        (["--challenge", "{own}"], "image and mask belong together: give both of them, or neither"),
        (["--challenge", "{one}"], "it makes images out of 2 source channel(s), and the challenge "
         "gives 1: t1"),
        (["--challenge", "brats-inpainting", "--base", "No Image"], "--base 'No Image' is not the "
         "name of a container image"),
        (["--challenge", "brats-inpainting", "--push_to", "me/model", "--license", "other"],
         "push_to me/model: a container goes to a registry of images, not to a Hub"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_container_is_refused(
    cli, inpainter_run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    paths = {"own": tmp_path / "own.yaml", "one": tmp_path / "one.yaml"}
    paths["own"].write_text("{inputs: [t1, hole], output: filled, mask: hole}")
    paths["one"].write_text("{inputs: [t1], output: filled}")
    words = [word.format(**paths) for word in words]
    code, _, err = cli("export", "-m", inpainter_run, "-o", tmp_path / "c", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "c").exists()


def test_a_container_of_another_challenge_is_refused(
    synthesizer: Path, inpainter_run: Path, tmp_path: Path
) -> None:
    declared = json.loads((synthesizer / "challenge.json").read_text())
    assert [task["output"] for task in declared["tasks"]] == ["t1c", "t2f"]
    request = ExportRequest()
    with pytest.raises(OutputError, match="is a container for brats-brasyn, not for brats-inpaint"):
        export_container(inpainter_run, synthesizer, request, challenge="brats-inpainting")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that are not a container's for a challenge"):
        export_container(inpainter_run, tmp_path / "notes", request, challenge="brats-inpainting")
    weights = synthesizer / "models" / "t1c"
    with pytest.raises(ConfigError, match=r"t1c is one model, and .* has 2: give a folder with"):
        run_challenge(synthesizer, tmp_path, tmp_path.parent / "out", weights=weights)


def test_own_suffixes_are_declared_in_a_yaml(
    inpainter_run: Path, brats: ModuleType, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("{inputs: [t1, hole], output: t1-filled, image: t1, mask: hole}")
    folder = export_container(
        inpainter_run, tmp_path / "container", ExportRequest(), challenge=str(own)
    )
    data, mask = tmp_path / "input" / "p1", brats.hole(brats.SIZE, 0)
    brats.write(data / "p1_t1.nii.gz", brats.head(brats.SIZE, 0) * (1 - mask))
    brats.write(data / "p1_hole.nii.gz", mask, "u1")
    (path,) = run_challenge(folder, tmp_path / "input", tmp_path / "out")
    assert path.name == "p1_t1-filled.nii.gz"
