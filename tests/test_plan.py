"""`synthcube plan`: what it prints and writes, and that what it writes trains as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from synthcube import config, reading
from synthcube.data.images import write_image
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError
from synthcube.planning.cost import StepTime
from synthcube.planning.draft import PlanRequest, machine
from synthcube.planning.table import spoken
from synthcube.tasks import plan as task


def test_a_plan_says_what_was_measured_chosen_why_and_what_it_costs(
    cli, phantoms: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plans" / "plan.yaml"
    code, out, err = cli("plan", "-d", phantoms, "-o", path, "--budget_images", 24)
    assert code == 0, err
    for word in (
        "images", "16 x 16", "of 12 subjects", "near-duplicates", "data.size", "[16, 16]",
        "at most 10% of the", "--budget_images 24", "memory to train", "steps", "time to train",
        "s a step, from 20 steps", "time an image", "--family",
    ):  # fmt: skip
        assert word in out, word
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Planned by synthcube")
    keys = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(keys) > 8
    assert all(re.fullmatch(r"  \w+: .+  # .+", line) for line in keys), "a reason beside each"
    settings = config.load(path)
    assert settings.data.size == (16, 16)
    assert settings.training.max_epochs == 2
    assert settings.training.batch_size == 2
    measured = json.loads((path.parent / "fingerprint.json").read_text(encoding="utf-8"))
    assert measured["num_images"] == 12
    assert str(phantoms) not in json.dumps(measured) + text


@pytest.mark.slow
def test_the_plan_is_the_same_again_and_overwrites_only_plans(
    cli, phantoms: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    words = ("plan", "-d", phantoms, "-o", path, "--no_probe")
    assert cli(*words)[0] == 0
    first = path.read_text(encoding="utf-8")
    code, out, _ = cli(*words)
    assert (code, path.read_text(encoding="utf-8").splitlines()[1:]) == (0, first.splitlines()[1:])
    assert "not timed" in out
    path.write_text("model: {name: ddpm}\n", encoding="utf-8")
    code, _, err = cli(*words)
    assert code == 2
    assert "is a file that this command did not write" in err
    assert path.read_text(encoding="utf-8") == "model: {name: ddpm}\n"


def test_values_of_the_user_hold_and_the_rest_adapts(cli, phantoms: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    words = ["plan", "-d", phantoms, "-o", path, "--no_probe"]
    code, out, err = cli(*words, "--set", "data.size=[32,32]", "--set", "model.optimizer.lr=0.002")
    assert code == 0, err
    settings = config.load(path)
    assert settings.data.size == (32, 32)
    assert settings.model.optimizer.lr == 0.002
    assert len(getattr(settings.model, "channels", ())) == 3, "and 2 for 16 x 16"
    assert "set by you" in out
    code, _, err = cli(*words, "--set", "model.channels=[8,8]", "--set", "seed=7")
    assert code == 0, err
    settings = config.load(path)
    assert (settings.seed, getattr(settings.model, "channels", ())) == (7, (8, 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory_gb", "much"], "--memory_gb much: write auto, or gigabytes"),
        (["--memory_gb", "-3"], "--memory_gb -3: write auto"),
        (["--hours", "0"], "--hours 0: above 0"),
        (["--hours", "2", "--budget_images", "9"], "give one budget"),
        (["--family", "latent_diffusion"], "needs a trained autoencoder_kl"),
        (["--family", "ddpn"], "ddpn"),
        (["--family", "ddpm", "--set", "model.name=dcgan"], "name one"),
        (["--set", "training.batchsize=3"], "training.batchsize: unknown key"),
        (["--goal", "translate"], "these images have one channel"),
        (["--memory_gb", "1"], "Nothing fits 1.0 GB"),
    ],
)
def test_what_cannot_be_planned_is_said(words, message: str, cli, phantoms: Path) -> None:
    code, _, err = cli("plan", "-d", phantoms, "--no_probe", *words)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_a_machine_that_is_not_there_is_planned_on_paper(cli, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num=60, size=(48, 48, 48)).parent
    path = tmp_path / "plan.yaml"
    code, out, err = cli("plan", "-d", data, "-o", path, "--memory_gb", 800)
    assert code == 0, err
    assert "800.0 GB, bf16-mixed, not this machine" in " ".join(out.split())
    assert "not timed" in out
    assert config.load(path).data.size == (48, 48, 48), "no side is cut for a slow CPU"
    assert cli("plan", "-d", data, "-o", path, "--no_probe")[0] == 0
    assert config.load(path).data.size == (32, 32, 32)


@pytest.mark.slow
def test_hours_choose_the_length_and_the_size(phantoms: Path, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num=40, size=(128, 128)).parent

    def timed(hours: float, seconds: float) -> task.Plan:
        measured = task.fingerprint(read_manifest(data), tmp_path / "cache")
        request = PlanRequest(hours=hours, overrides=("model.channels=[8,8,8,8]",))
        where = machine(config.ComputeConfig(accelerator="cpu"), None)
        step = StepTime(seconds, seconds / 3, seconds, 20)
        return task.planned(measured, where, request, lambda *_: step)

    short = timed(1, 0.2)  # of 3 images
    assert short.settings.data.size == (64, 64)
    assert short.settings.training.max_minutes == 60
    assert short.settings.training.max_epochs == 1500  # 54,000 images of the 36
    long = timed(100, 0.2)
    assert long.settings.data.size == (128, 128)
    slow = timed(1, 20)
    assert any("Give more hours" in warning for warning in slow.warnings)
    assert short.cost.duration
    assert short.cost.duration.steps == pytest.approx(3600, rel=0.01)


@pytest.mark.slow
def test_check_says_where_a_config_differs_from_the_plan(cli, tiny_config, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num=40, size=(64, 64)).parent
    words = ("check", "-c", tiny_config(), "-d", data)
    code, out, err = cli(*words, "--set", "data.size=[16,16]", "--set", "training.batch_size=8")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("the plan differs: ")]
    text = "\n".join(lines)
    assert "data.size is [16, 16], the plan takes [64, 64] (the size of the images)" in text
    assert "training.batch_size is 8, the plan takes 3 (at most 10% of the 36" in text
    assert "data.conditions is {}, the plan takes {'Label': 'class'}" in text
    assert "training.max_epochs 2: 72 images are seen" in text
    assert len(lines) == 4
    plan = tmp_path / "plan.yaml"
    assert cli("plan", "-d", data, "-o", plan, "--no_probe")[0] == 0
    code, out, _ = cli("check", "-c", plan, "-d", data)
    assert (code, "the plan differs" in out) == (0, False)


SHORT = (
    "--set", "training.max_epochs=1", "--set", "model.channels=[8,8]", "--set",
    "training.sample_every_n_epochs=0",
)  # fmt: skip


def test_train_plans_where_there_is_no_config(cli, phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train", "-d", phantoms, "-o", run, *SHORT)
    code, out, err = cli(*words)
    assert code == 0, err
    assert "Chosen" in out
    assert f"Trained model: {run / 'artifact'}" in out
    planned = (run / "plan.yaml").read_text(encoding="utf-8")
    assert (run / "fingerprint.json").is_file()
    assert reading.parse(planned, "plan")[0]["training"]["max_epochs"] == 1
    code, out, err = cli(*words)
    assert (code, "Chosen" in out) == (0, False), "the plan of the run is kept"
    assert "This training is complete" in err
    longer = (*words[:-6], "--set", "training.max_epochs=2", *words[-4:])
    code, _, err = cli(*longer)
    assert (code, "Continuing after epoch 1" in err) == (0, True)
    assert (run / "plan.yaml").read_text(encoding="utf-8") == planned
    code, _, err = cli(*words, "--set", "seed=3")
    assert (code, "seed: was 0, is 3" in err) == (2, True)


def test_train_takes_hours_with_and_without_a_config(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    for name, words in {"planned": (), "own": ("-c", tiny_config())}.items():
        run = tmp_path / name
        code, _, err = cli("train", *words, "-d", phantoms, "-o", run, "--hours", "0.5", *SHORT)
        assert code == 0, err
        assert config.load(run / "config.yaml").training.max_minutes == 30
    planned = (tmp_path / "planned" / "plan.yaml").read_text(encoding="utf-8")
    assert reading.parse(planned, "plan")[0]["training"]["max_minutes"] == 30
    code, _, err = cli("train", "-d", phantoms, "-o", tmp_path / "no", "--hours", "-1")
    assert (code, "--hours -1: above 0" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_a_run_with_a_config_of_its_own_is_not_planned_anew(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli("train", "-c", tiny_config(), "-d", phantoms, "-o", run)[0] == 0
    code, _, err = cli("train", "-d", phantoms, "-o", run)
    assert code == 2
    assert "was trained with a config of its own: name it with --config" in err


def test_several_processes_want_a_plan_first(phantoms: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Several processes cannot plan together"):
        task.config_of_run(phantoms, tmp_path / "run", PlanRequest(), lambda _: None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12 s"), (80, "80 s"), (150, "2.5 minutes"), (7200, "2 hours"), (3e5, "3.47 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert spoken(seconds) == text


def linked(folder: Path, target: Path, number: int) -> Path:
    """Links to the first images of a folder."""
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir())[:number]:
        (target / path.name).symlink_to(path)
    return target


def colours(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(24):
        patch = rng.integers(0, 255, (6, 6, 3)).astype(np.uint8)
        Picture.fromarray(patch).resize((50, 44)).save(folder / f"{number}.png")
    return folder


def anisotropic(folder: Path) -> Path:
    """Thick slices in Hounsfield units, of several spacings."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        spacing = 0.8 + 0.05 * number
        voxels = rng.normal(40, 20, (1, 96, 96, 10)).astype(np.float32)
        voxels[:, :16] = voxels[:, -16:] = -1000
        affine = np.diag([spacing, spacing, 5.0, 1])
        path = folder / f"{number}.nii.gz"
        write_image(path, torch.from_numpy(voxels).round(), affine, integer=True)
    return folder


def with_mask(folder: Path) -> Path:
    """Volumes, and a mask of two classes for each."""
    written = write_phantoms(folder, num=12, size=(32, 32, 32))
    rows = []
    for number, row in enumerate(read_manifest(written).rows):
        from synthcube.data.images import read_image

        image = read_image(row.channels)
        mask = (image.tensor > 100).float()
        write_image(folder / f"{number}-seg.nii.gz", mask, image.affine, integer=True)
        rows.append({**row.cells, "Channel_1": str(folder / f"{number}-seg.nii.gz")})
    write_manifest(written, rows)
    return folder


def six_classes(mednist: Path, folder: Path, cli) -> Path:
    for path in sorted(mednist.iterdir()):
        linked(path, folder / "pictures" / path.name, 12)
    out = folder / "listed"
    assert cli("prepare", "-d", folder / "pictures", "-o", out, "--paradigm", "custom")[0] == 0
    return out


Sets = dict[str, Callable[[Path], Path]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["one class", "six classes", "40 pictures", "colours", "volumes", "anisotropic", "with a mask",
     "4 channels"],
)  # fmt: skip
def test_a_plan_trains_without_an_edit(
    name: str, cli, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def real(fixture: str) -> Path:
        folder: Path = request.getfixturevalue(fixture)
        return folder

    sets: Sets = {
        "one class": lambda folder: linked(real("mednist") / "Hand", folder, 100),
        "six classes": lambda folder: six_classes(real("mednist"), folder, cli),
        "40 pictures": lambda folder: linked(real("mednist") / "HeadCT", folder, 40),
        "colours": colours,
        "volumes": lambda folder: linked(real("volumes"), folder, 7),
        "anisotropic": anisotropic,
        "with a mask": with_mask,
        "4 channels": lambda folder: (
            write_phantoms(folder, num=16, size=(32, 32), channels=4).parent
        ),
    }
    data, path = sets[name](tmp_path / "data"), tmp_path / "plan.yaml"
    code, out, err = cli("plan", "-d", data, "-o", path, "--budget_images", 16, "--no_probe")
    assert code == 0, err
    code, checked, err = cli("check", "-c", path, "-d", data)
    assert code == 0, err
    assert "Ready to train" in checked
    differing = [line for line in checked.splitlines() if line.startswith("the plan differs")]
    assert all("max_epochs" in line for line in differing), "only the budget was cut"
    short = ("--set", "training.num_sample_images=1", "--set", "sampling.steps=2")
    code, out, err = cli("train", "-c", path, "-d", data, "-o", tmp_path / "run", *short)
    assert code == 0, err
    assert "Trained model" in out
    settings = config.load(path)
    assert len(settings.data.masks) == (name == "with a mask")
    assert bool(settings.data.conditions) == (name in ("six classes",))
    if name == "anisotropic":
        assert settings.data.intensity_range
        assert settings.data.intensity_range[0] == -1000
        assert settings.data.spacing_mm
        assert settings.data.spacing_mm[2] < 1.5 * 5
