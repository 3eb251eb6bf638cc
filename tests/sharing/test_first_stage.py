"""A first stage and its export are one model, for the second stage; another one is refused."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path

import pytest
import torch

from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError
from synthcube.models import artifact
from synthcube.models.artifact import weights_digest
from synthcube.storage import sha256
from synthcube.tasks.export import export
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

TWO = [("code_prior", "vqvae"), ("latent_diffusion", "autoencoder_kl")]
SHORT = ["training.max_epochs=1", "training.sample_every_n_epochs=0"]
PIN = "first_stage_sha256"


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Images whose label is their subject, which an export leaves out."""
    folder = write_phantoms(tmp_path / "people", num=12, size=(16, 16)).parent
    path = folder / "manifest.csv"
    head, *rows = [line.split(",") for line in path.read_text().splitlines()]
    subject, label, name = (head.index(column) for column in ("SubjectID", "Label", "LabelMapping"))
    for number, row in enumerate(rows):
        row[label], row[name] = str(number), row[subject]
    path.write_text("\n".join(",".join(row) for row in [head, *rows]) + "\n")
    return folder


@pytest.fixture
def stages(tiny_config, people: Path, tmp_path: Path):
    """Trains a first stage against a discriminator, and a second one on its run."""

    def trained(second: str, first: str) -> tuple[Path, Path]:
        train(tiny_config(first, "first.yaml"), people, tmp_path / "first",
              overrides=[*SHORT, "model.adversarial_weight=0.1"])  # fmt: skip
        train(tiny_config(second), people, tmp_path / "second",
              overrides=[*SHORT, f"model.first_stage={tmp_path / 'first'}"])  # fmt: skip
        return tmp_path / "first", tmp_path / "second"

    return trained


def pinned(run: Path) -> str:
    return str(artifact.load(run).config["model"][PIN])


@pytest.mark.parametrize(("second", "first"), TWO, ids=[pair[0] for pair in TWO])
def test_an_export_of_the_first_stage_takes_the_place_of_its_run(
    second: str, first: str, stages, tiny_config, people: Path, tmp_path: Path
) -> None:
    origin, run = stages(second, first)
    shared = export(origin, tmp_path / "shared")
    assert sha256(artifact.load(origin).weights) != sha256(artifact.load(shared).weights)
    assert artifact.load(shared).image.labels == ()
    shutil.move(origin, tmp_path / "gone")
    infer(InferRequest(run, tmp_path / "images", num_images=1))
    before, other = pinned(run), [f"model.first_stage={shared}"]
    config = tiny_config(second)
    train(config, people, run, overrides=[*SHORT[1:], "training.max_epochs=2", *other])
    assert pinned(run) == before
    tuned = tmp_path / "tuned"
    train(config, people, tuned, overrides=[*SHORT, *other, f"training.start_from={run}"])
    assert pinned(tuned) == before


def test_another_first_stage_is_refused(stages, tiny_config, people: Path, tmp_path: Path) -> None:
    _, run = stages("code_prior", "vqvae")
    train(tiny_config("vqvae", "first.yaml"), people, tmp_path / "other",
          overrides=[*SHORT, "seed=7"])  # fmt: skip
    config, shared = tiny_config("code_prior"), export(tmp_path / "other", tmp_path / "shared")
    stage = f"model.first_stage={shared}"
    with pytest.raises(ConfigError, match="trained with another config") as caught:
        train(config, people, run, overrides=[stage, "training.max_epochs=2"])
    assert [fault.partition(":")[0] for fault in caught.value.faults][-1] == f"model.{PIN}"
    with pytest.raises(ConfigError, match="does not fit this model") as caught:
        train(config, people, tmp_path / "x", overrides=[stage, f"training.start_from={run}"])
    assert "the start was trained with another one" in caught.value.faults[0]
    with pytest.raises(ConfigError, match=f"and model.{PIN} is {pinned(run)}"):
        train(config, people, tmp_path / "y", overrides=[stage, f"model.{PIN}={pinned(run)}"])


def test_a_digest_is_of_names_types_shapes_and_values() -> None:
    one = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    digest = weights_digest(one)
    assert digest == weights_digest(dict(reversed(one.items())))
    assert digest == weights_digest({**one, "a": one["a"].T.contiguous().T}), "strides are no value"
    others = (
        {"a": one["a"]}, {**one, "c": one["b"]}, {"b": one["a"], "a": one["b"]},
        {**one, "a": one["a"].view(3, 2)}, {**one, "a": one["a"].double()},
        {**one, "b": torch.tensor(2)}, {**one, "b": torch.tensor([1])},
        {**one, "a": one["a"].half()},
    )  # fmt: skip
    assert len({digest, *map(weights_digest, others)}) == len(others) + 1
    head_a, head_b = b'["a", "torch.float32", [2, 3]]\n', b'["b", "torch.int64", []]\n'
    content = head_a + struct.pack("<6f", *range(6)) + head_b + struct.pack("<q", 1)
    assert digest == f"tensors:{hashlib.sha256(content).hexdigest()}", "it stays for ever"
