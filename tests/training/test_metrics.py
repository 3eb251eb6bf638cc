"""The metric that decides: which model is the best one, and when a training has learned enough."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from synthcube.errors import ConfigError
from synthcube.tasks.train import train
from synthcube.training import checkpoints

# A change of the loss that no training of these makes: every validation is one in vain.
STOP = "training.early_stop={patience: 2, min_change: 1000}"
LONG = ["training.max_epochs=9", "model.scheduler=null", "training.sample_every_n_epochs=0"]


def reached(run: Path, name: str = "last.ckpt") -> int:
    return checkpoints.reached(run / "checkpoints" / name)[0]


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("metric", ["validation/loss", "train/loss"])
@pytest.mark.parametrize("every", [1, 2])
def test_patience_counts_validations(
    metric: str, every: int, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stop = f"training.early_stop={{metric: {metric}, patience: 2, min_change: 1000}}"
    every_n = f"training.validate_every_n_epochs={every}"
    train(tiny_config(), phantoms, run, overrides=[*LONG, stop, every_n])
    assert reached(run) == 3 * every, "the first validation improves on none, two do not"
    assert (run / "artifact" / "artifact.json").is_file()


@pytest.mark.slow
def test_an_early_stop_is_complete_until_its_patience_is_raised(
    tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=[*LONG, STOP])
    before = (run / "artifact" / "artifact.json").read_text()
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=[*LONG, STOP])
    assert "complete; validation/loss has not improved on" in caplog.text
    assert "raise that patience to continue it" in caplog.text
    assert (run / "artifact" / "artifact.json").read_text() == before
    more = STOP.replace("patience: 2", "patience: 4")
    train(tiny_config(), phantoms, run, overrides=[*LONG, more])
    assert reached(run) == 5, "what was waited for counts on"


def test_patience_survives_an_interruption(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=[*LONG, STOP, "training.max_epochs=2"])
    train(tiny_config(), phantoms, run, overrides=[*LONG, STOP])
    assert reached(run) == 3


def test_the_best_model_is_the_one_asked_for(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    for mode, best_of in (("min", min), ("max", max)):
        run = tmp_path / mode
        best = f"training.best={{metric: validation/perplexity, mode: {mode}}}"
        train(tiny_config("vqvae"), phantoms, run, overrides=[best, "training.max_epochs=4"])
        values = column(run, "validation/perplexity")
        recorded = json.loads((run / "artifact" / "metrics.json").read_text())
        assert recorded["validation/perplexity"] == pytest.approx(best_of(values))
        assert recorded["epochs"] == values.index(best_of(values)) + 1


@pytest.mark.parametrize(
    ("family", "override", "known"),
    [
        ("rectified_flow", "training.best.metric=validation/los", "train/loss, validation/loss"),
        ("vqvae", "training.early_stop.metric=dice", "validation/perplexity"),
        ("dcgan", "training.best.metric=loss", "train/discriminator_real"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_first_step(
    family: str, override: str, known: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="This training has no such metric") as caught:
        train(tiny_config(family), phantoms, run, overrides=[override])
    assert known in str(caught.value)
    assert override.split("=")[1] in str(caught.value)
    assert not (run / "checkpoints").exists()


def test_a_validation_metric_without_validation_is_refused(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    overrides = ["training.early_stop={patience: 2}", "data.validation_fraction=0"]
    with pytest.raises(ConfigError, match=r"raise data\.validation_fraction"):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=overrides)


def test_looking_for_metrics_changes_no_training(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """A family whose loss moves its codebook, and that draws."""
    for name, overrides in (("plain", []), ("asked", ["training.best.metric=validation/loss"])):
        train(tiny_config("vqvae"), phantoms, tmp_path / name, overrides=overrides)
    plain, asked = (column(tmp_path / name, "validation/loss") for name in ("plain", "asked"))
    assert plain == asked
