"""Python does what the command line does: classes by name, translation, PIL and nibabel images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

import synthcube
from synthcube import reading
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, EvaluationError, FamilyError, ImageError
from synthcube.models import registry

CONDITIONS = {"Label": "class", "Radius": "number"}


def config_of(**sections: dict) -> dict:
    """A training of two epochs, as a mapping."""
    model = registry.find("rectified_flow").tiny().model_dump(mode="json")
    training = {"max_epochs": 2, "batch_size": 4, "num_sample_images": 2}
    compute = {"accelerator": "cpu", "precision": "32"}
    return {"model": model, "training": training, "compute": compute, **sections}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Trains once: a run and its data, by the kind of the images."""
    runs: dict[str, tuple[Path, Path]] = {}
    kinds = {
        "classes": ((16, 16), 1, {"conditions": CONDITIONS}),
        "two": ((16, 16), 1, {"conditions": {"Label": "class", "Shape": "class"}}),
        "pairs": ((16, 16), 2, {"source_channels": [0], "conditions": {"Label": "class"}}),
        "volumes": ((16, 8, 16), 1, {}),
        "plain": ((16, 16), 1, {}),
    }

    def run(kind: str) -> tuple[Path, Path]:
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            size, channels, data = kinds[kind]
            images = write_phantoms(
                folder / "data", num=12, size=size, channels=channels, spacing_mm=(1, 2, 3)
            ).parent
            manifest = images / "manifest.csv"
            if kind == "two":
                manifest.write_text(manifest.read_text().replace("LabelMapping", "Shape"))
            synthcube.train(config_of(data=data), images, folder / "run")
            runs[kind] = folder / "run", images
        return runs[kind]

    return run


@pytest.fixture
def opened(trained):
    return lambda kind: synthcube.from_pretrained(trained(kind)[0], accelerator="cpu")


def test_a_class_by_its_name(opened) -> None:
    model = opened("classes")
    ours = model.sample("ring", n=2, seed=3, guidance=3, condition={"Radius": 5})
    theirs = model.sample(2, seed=3, guidance=3, condition={"Label": "ring", "Radius": 5})
    assert torch.equal(ours.tensor, theirs.tensor)
    assert not torch.equal(ours.tensor, model.sample("disc", n=2, seed=3, guidance=3).tensor)
    assert len(model.sample("ring")) == len(model.sample()) == 1
    assert torch.equal(model.sample(n=3).tensor, model.sample(3).tensor)
    images = model.sample("ring", n=2, seed=3, guidance=3, condition=[{"Radius": 5}, {"Radius": 4}])
    assert torch.equal(images.tensor[0], ours.tensor[0])
    assert not torch.equal(images.tensor[1], ours.tensor[1])


@pytest.mark.parametrize(
    ("kind", "what", "options", "said"),
    [
        ("plain", "Hand", {}, r"sample\('Hand'\): this model was trained without classes"),
        ("two", "ring", {}, r"several .* Label, Shape: .* condition=\{'Label': 'ring'\}"),
        ("classes", "Hand", {}, "Label=Hand: 'Hand' is not among the classes disc, square, ring"),
        ("classes", "ring", {"condition": {"label": "disc"}}, "Label is also in `condition`"),
        ("plain", 4, {"n": 5}, r"sample\(4, n=5\): the number is given twice"),
        ("plain", 0, {}, "n is 0"),
    ],
)
def test_what_cannot_be_sampled(opened, kind: str, what, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(kind).sample(what, **options)


def test_translations_are_those_of_infer(trained, opened, tmp_path: Path) -> None:
    (run, data), model = trained("pairs"), opened("pairs")
    images = model.translate(data, seed=5)
    synthcube.infer(run, tmp_path / "out", data=data, seed=5)
    theirs = sorted((tmp_path / "out" / "images").iterdir())
    assert len(images) == len(theirs) == 12
    for ours, path in zip(images.save(tmp_path / "ours"), theirs, strict=True):
        assert ours.read_bytes() == path.read_bytes()


def test_translations_of_tensors(trained, opened) -> None:
    (_, data), model = trained("pairs"), opened("pairs")
    generator = torch.Generator().manual_seed(1)
    both = torch.rand(3, 2, 16, 16, generator=generator) * 2 - 1
    images = model.translate(both, condition={"Label": "ring"}, batch_size=2)
    assert images.tensor.shape == (3, 1, 16, 16)
    alone = model.translate(both[:, :1], condition={"Label": "ring"}, batch_size=2)
    assert torch.equal(images.tensor, alone.tensor), "the first channel is the source"
    other = model.translate(both, condition=[{"Label": "disc"}] * 3, batch_size=2)
    assert not torch.equal(images.tensor, other.tensor)
    changed = model.translate(data, condition={"Label": "ring"}).tensor
    assert not torch.equal(changed, model.translate(data).tensor)
    with pytest.raises(ImageError, match=r"3 channel\(s\); the model makes 1 out of 1"):
        model.translate(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ImageError, match=r"The images are \[2, 8, 8\]"):
        model.translate(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ConfigError, match="1 conditions for 3 images"):
        model.translate(both, condition=[{"Label": "disc"}])
    with pytest.raises(FamilyError, match="or translate for one that makes images out of others"):
        model.sample(1)
    with pytest.raises(FamilyError, match="does not translate images"):
        opened("plain").translate(torch.zeros(1, 1, 16, 16))


def test_pictures_as_pil(opened, tmp_path: Path) -> None:
    images = opened("plain").sample(2)
    for picture, path in zip(images.to_pil(), images.save(tmp_path), strict=True):
        with PIL.Image.open(path) as saved:
            assert picture.mode == saved.mode == "L"
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(saved))


def test_volumes_as_pil_and_nifti(opened, tmp_path: Path) -> None:
    images = opened("volumes").sample(2)
    # 16 x 8 x 16 voxels of 1 x 2 x 3 mm, columns first
    assert [picture.size for picture in images.to_pil()] == [(16, 16)] * 2
    assert images.to_pil("coronal")[0].size == (16, 48)
    assert images.to_pil("sagittal")[0].size == (8, 24)
    grey = np.rint((images.tensor[0, 0, :, :, 8].clamp(-1, 1).numpy() + 1) * 127.5)
    np.testing.assert_array_equal(np.asarray(images.to_pil("axial")[0])[::-2, ::-1], grey.T)
    with pytest.raises(ImageError, match="plane is 'top': use axial, coronal, sagittal"):
        images.to_pil("top")
    for image, path in zip(images.to_nifti(), images.save(tmp_path), strict=True):
        saved = nib.load(path)
        assert isinstance(saved, nib.Nifti1Image)
        np.testing.assert_array_equal(image.affine, saved.affine)
        np.testing.assert_allclose(np.abs(np.diag(image.affine)), [1, 2, 3, 1])
        np.testing.assert_array_equal(image.get_fdata(), saved.get_fdata())
        assert image.get_data_dtype() == saved.get_data_dtype()
    assert images.to_nifti()[0].get_fdata().max() > 1, "in the units of the training images"


def test_a_picture_as_nifti(opened) -> None:
    images = opened("plain").sample(1)
    (image,) = images.to_nifti()
    assert image.shape == (16, 16, 1)
    np.testing.assert_allclose(image.get_fdata()[..., 0], images[0][0], atol=0.5)


class _Terminal:
    """Standard error that is a terminal, and remembers what is shown."""

    encoding = "utf-8"

    def __init__(self, is_one: bool) -> None:
        self.text, self.is_one = "", is_one

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return self.is_one


def test_progress_is_for_eyes_and_for_long_work(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("plain")
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for is_terminal, after_s in ((True, 0.0), (True, 60.0), (False, 0.0)):
        terminal = _Terminal(is_terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr("synthcube.generator._BAR_AFTER_S", after_s)
        model.sample(4, batch_size=2)
        shown[is_terminal, after_s] = terminal.text
    assert "Generating " in shown[True, 0.0]
    assert " 0 of 4" in shown[True, 0.0]
    assert shown[True, 60.0] == shown[False, 0.0] == ""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    notebook = _Terminal(False)
    monkeypatch.setattr(sys, "stderr", notebook)
    monkeypatch.setattr("synthcube.generator._BAR_AFTER_S", 0.0)
    model.sample(2)
    assert "Generating " in notebook.text


def test_train_infer_and_evaluate_are_the_commands(trained, cli, tmp_path: Path) -> None:
    run, data = trained("classes")
    yaml = tmp_path / "config.yaml"
    yaml.write_text(reading.dump(config_of(data={"conditions": CONDITIONS})))
    assert cli("train", "-c", yaml, "-d", data, "-o", tmp_path / "run")[0] == 0
    weights = "artifact/weights.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()

    ours = synthcube.infer(
        str(run), tmp_path / "ours", {"disc": 2, "ring": 3}, seed=4, condition={"Radius": 5},
        config={"sampling": {"steps": 3}},
    )  # fmt: skip
    assert ours == tmp_path / "ours"
    words = ("-n", "disc=2,ring=3", "--seed", 4, "--condition", "Radius=5", "--steps", 3)
    assert cli("infer", "-m", run, "-o", tmp_path / "theirs", *words)[0] == 0
    for path in sorted((ours / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "theirs" / "images" / path.name).read_bytes()
    assert (ours / "manifest.csv").read_bytes() == (tmp_path / "theirs/manifest.csv").read_bytes()

    results = synthcube.evaluate(
        ours, data, tmp_path / "ours.yaml", config=str(yaml), report=tmp_path / "report"
    )
    words = ("-p", ours, "-l", data, "-o", tmp_path / "theirs.yaml", "-c", yaml)
    assert cli("evaluate", *words)[0] == 0
    assert reading.dump(results) == (tmp_path / "theirs.yaml").read_text()
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_mapping_stays_as_it_is_and_is_judged_like_a_file(trained, tmp_path: Path) -> None:
    run, data = trained("plain")
    config = config_of()
    before = json.dumps(config)
    folder = synthcube.train(
        config, str(data), str(tmp_path / "run"), overrides=["training.max_epochs=1"]
    )
    assert folder == tmp_path / "run" / "artifact"
    assert json.dumps(config) == before
    with pytest.raises(ConfigError, match=r"config has 1 fault.*\n.*training.max_epoch"):
        synthcube.train(config_of(training={"max_epoch": 3}), data, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"model.channels.* leave it out"):
        synthcube.infer(run, tmp_path / "images", 1, config={"model": {"channels": [8, 24]}})
    with pytest.raises(EvaluationError, match=r"predictions: .*nowhere"):
        synthcube.evaluate(tmp_path / "nowhere", data, tmp_path / "results.yaml")
    assert not any((tmp_path / name).exists() for name in ("other", "images", "results.yaml"))


def test_names_are_public_and_import_nothing_heavy() -> None:
    assert set(synthcube.__all__) == {
        "__version__", "evaluate", "from_pretrained", "infer", "train",
    }  # fmt: skip
    code = (
        "import sys; from synthcube import *; assert train and infer and evaluate;"
        "print({'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_program_without_its_own_log_sees_that_of_the_command(trained, tmp_path: Path) -> None:
    run, _ = trained("plain")
    shutil.copytree(run, tmp_path / "run")
    call = f"synthcube.infer('run', 'images', 1, config={{'compute': {config_of()['compute']}}})"
    quiet = "import logging; logging.basicConfig(level='WARNING');"
    for before, count in (("", 1), (quiet, 0)):
        done = subprocess.run(
            [sys.executable, "-c", f"{before}import synthcube; {call}"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Computing on cpu in 32-true") == count, done.stderr
