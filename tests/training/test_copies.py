"""Copies of training images among those that a model draws while it trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError
from synthcube.storage import sha256
from synthcube.tasks.train import train
from synthcube.training.copies import NearestSubjects, small

STOP = "training.early_stop.metric=copies"


def test_a_copy_is_much_nearer_to_one_subject_than_to_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 8, 8, generator=generator)
    images[1] = images[0]  # the same subject twice
    training = NearestSubjects(small(images), torch.tensor([0, 0, 1, 2, 3, 4]))
    noise = 0.05 * torch.randn(1, 8, 8, generator=generator)
    drawn = {
        "copy": images[3],
        "copy with noise": images[3] + noise,
        "copy of a subject that is there twice": images[0] + noise,
        "mixture of two": (images[2] + images[3]) / 2,
        "mean, near to all": images.mean(dim=0),
        "another image": torch.rand(1, 8, 8, generator=generator),
    }
    copies = training.copies(small(torch.stack([*drawn.values()])))
    assert dict(zip(drawn, copies.tolist(), strict=True)) == {
        name: name.startswith("copy") for name in drawn
    }


@pytest.mark.parametrize(
    ("shape", "values"),
    [((2, 1, 64, 48), 32 * 32), ((2, 3, 20, 8), 3 * 160), ((1, 1, 16, 24, 40), 16**3)],
)
def test_images_are_compared_small(shape: tuple[int, ...], values: int) -> None:
    assert small(torch.zeros(shape)).shape == (shape[0], values)
    assert small(torch.full(shape, 0.5)).unique().tolist() == [0.5]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("validation/copies")]


QUIET = ["training.sample_every_n_epochs=0", "model.scheduler=null", "data.num_workers=0"]


@pytest.mark.slow
def test_a_training_that_copies_ends(tiny_config, phantoms: Path, tmp_path: Path, caplog) -> None:
    """A few pictures that are all seen at every step, for as long as it takes."""
    run = tmp_path / "run"
    overrides = [
        STOP, *QUIET, "training.early_stop.num_images=8", "training.max_epochs=3000",
        "training.validate_every_n_epochs=200", "training.ema.decay=0.9",
        "model.optimizer.lr=5e-3", "training.batch_size=8",
    ]  # fmt: skip
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=overrides)
    first, *_, last = rows(run)
    assert float(first["validation/copies"]) == 0
    assert float(last["validation/copies"]) > 0.1
    assert int(last["epoch"]) < 3000
    assert "Stopped early: validation/copies is" in caplog.text


@pytest.mark.slow
def test_copies_beyond_the_limit_end_a_training_until_it_is_raised(
    tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    """None is more than a limit below zero; and none at every validation wears out no patience."""
    run = tmp_path / "run"
    few = [*QUIET, STOP, "training.early_stop.num_images=3", "training.early_stop.patience=1"]
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=[*few, "training.early_stop.limit=-0.5"])
    assert [row["epoch"] for row in rows(run)] == ["1"]
    said = (
        "validation/copies is 0 (training.early_stop.limit is -0.5); raise that limit to continue"
    )
    assert said in caplog.text
    train(tiny_config(), phantoms, run, overrides=[*few, "training.max_epochs=4"])
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert {row["validation/copies"] for row in rows(run)} == {"0"}
    assert all(row["validation/loss"] for row in rows(run))


def test_looking_for_copies_changes_no_training(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    for name, overrides in (("plain", []), ("watched", [STOP])):
        train(tiny_config("ddpm"), phantoms, tmp_path / name, overrides=[*QUIET, *overrides])
    plain, watched = (
        sha256(tmp_path / name / "artifact" / "weights.safetensors")
        for name in ("plain", "watched")
    )
    assert plain == watched


def test_images_of_one_subject_tell_nothing(tiny_config, tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "data", num=6, size=(16, 16)).parent
    rows = [("a" if i else "b", folder / f"phantom-{i:05d}.png") for i in range(6)]
    lines = [f"{name},{path},{'train' if name == 'a' else 'validation'}" for name, path in rows]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["SubjectID,Channel_0,Split", *lines]) + "\n")
    with pytest.raises(ConfigError, match="all training images are of one; leave it out"):
        train(tiny_config(), path, tmp_path / "run", overrides=[STOP])


@pytest.mark.parametrize(
    ("family", "overrides", "fault"),
    [
        ("vqvae", [STOP], "training.early_stop.metric is 'validation/copies'; known: train/"),
        ("rectified_flow", [STOP, "data.validation_fraction=0"], "raise data.validation_fraction"),
        ("rectified_flow", [STOP, "training.early_stop.mode=max"], "fewer are better"),
        ("rectified_flow", ["training.best.metric=copies"], "known: train/loss, validation/loss"),
        ("rectified_flow", ["training.best.metric=validation/copies"], "has learned nothing"),
    ],
)
def test_where_copies_say_nothing_they_are_refused(
    family: str, overrides: list[str], fault: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tiny_config(family), phantoms, tmp_path / "run", overrides=overrides)
    assert fault in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
