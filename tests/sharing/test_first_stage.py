"""A first stage and its export are one model, for the second stage; another one is refused."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml

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
    subject, label, name = (head.index(each) for each in ("SubjectID", "Label", "LabelMapping"))
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


def as_older(run: Path, pin: str) -> None:
    """Write the pin of a run as versions before this one did: the hash of the file."""
    for folder in (run, run / "artifact"):
        path = folder / "config.yaml"
        values = yaml.safe_load(path.read_text())
        values["model"][PIN] = pin
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    artifact.write_index(run / "artifact")


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


def test_what_an_older_version_pinned_is_the_file(
    stages, tiny_config, people: Path, tmp_path: Path
) -> None:
    origin, run = stages("code_prior", "vqvae")
    old = sha256(artifact.load(origin).weights)
    as_older(run, old)
    infer(InferRequest(run, tmp_path / "images", num_images=1))
    config, further = tiny_config("code_prior"), [*SHORT[1:], "training.max_epochs=2"]
    stage = f"model.first_stage={origin}"
    train(config, people, run, overrides=[*further, stage])
    assert pinned(run) == old, "it is continued as it was"
    tuned = tmp_path / "tuned"
    train(config, people, tuned, overrides=[*SHORT, stage, f"training.start_from={run}"])
    assert pinned(tuned).startswith("tensors:")
    again = tmp_path / "again"
    train(config, people, again, overrides=[*SHORT, stage, f"model.{PIN}={old}"])
    assert pinned(again) == old


@pytest.mark.parametrize("kind", ["of now", "older"])
def test_another_first_stage_is_refused(
    kind: str, stages, tiny_config, people: Path, tmp_path: Path
) -> None:
    origin, run = stages("code_prior", "vqvae")
    if kind == "older":
        as_older(run, sha256(artifact.load(origin).weights))
    train(tiny_config("vqvae", "first.yaml"), people, tmp_path / "other",
          overrides=[*SHORT, "seed=7"])  # fmt: skip
    config, shared = tiny_config("code_prior"), export(tmp_path / "other", tmp_path / "shared")
    stage = f"model.first_stage={shared}"
    with pytest.raises(ConfigError, match="trained with another config") as caught:
        train(config, people, run, overrides=[stage, "training.max_epochs=2"])
    assert [each.partition(":")[0] for each in caught.value.faults][-1] == f"model.{PIN}"
    with pytest.raises(ConfigError, match="does not fit this model") as caught:
        train(config, people, tmp_path / "x", overrides=[stage, f"training.start_from={run}"])
    assert "the start was trained on another one" in caught.value.faults[0]
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
