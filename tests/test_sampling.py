"""Guidance, sampler, steps and truncation: where they are set, and that they act or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import synthcube
from synthcube.errors import ConfigError
from synthcube.models import registry
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

CLASSES = "data.conditions={Label: class}"


@pytest.fixture
def labelled(phantoms: Path) -> Path:
    """The phantoms, every second one of class ring."""
    path = phantoms / "manifest.csv"
    header, *rows = path.read_text().splitlines()
    kinds = ("disc", "ring")
    lines = [f"{row},{kinds[i % 2]}" for i, row in enumerate(rows)]
    path.write_text("\n".join([f"{header},Kind", *lines, ""]))
    return phantoms


@pytest.fixture
def conditional(tiny_config, labelled: Path, tmp_path: Path) -> Path:
    """A run whose model follows a class, and does so at guidance 1."""
    run = tmp_path / "run"
    train(tiny_config(), labelled, run, overrides=["data.conditions={Kind: class}"])
    return run


def images(folder: Path) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("images/*"))])


def drawn_with(folder: Path) -> dict[str, object]:
    return json.loads((folder / "provenance.json").read_text())["request"]["sampling"]


WAYS = {
    "option": lambda folder: ["--guidance", "4"],
    "--set": lambda folder: ["--set", "sampling.guidance=4"],
    "YAML": lambda folder: ["-c", written(folder / "g.yaml", "sampling: {guidance: 4}")],
    "option over YAML": lambda folder: [
        "-c", written(folder / "g.yaml", "sampling: {guidance: 2}"), "--guidance", "4",
    ],
}  # fmt: skip


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_guidance_acts_however_it_is_set(way: str, conditional: Path, cli, tmp_path: Path) -> None:
    words = ["infer", "-m", conditional, "-n", "disc=3", "-o"]
    assert cli(*words, tmp_path / "plain")[0] == 0
    code, _, err = cli(*words, tmp_path / "guided", *WAYS[way](tmp_path))
    assert code == 0, err
    assert drawn_with(tmp_path / "plain")["guidance"] == 1
    assert drawn_with(tmp_path / "guided")["guidance"] == 4
    assert not np.array_equal(images(tmp_path / "plain"), images(tmp_path / "guided"))


def test_sampler_and_steps_act_and_are_recorded(conditional: Path, cli, tmp_path: Path) -> None:
    words = ["infer", "-m", conditional, "-n", "2", "-o"]
    assert cli(*words, tmp_path / "a")[0] == 0
    assert cli(*words, tmp_path / "b", "--sampler", "heun", "--steps", "5")[0] == 0
    assert drawn_with(tmp_path / "a") == {"guidance": 1, "sampler": "dpm-solver++", "steps": 3}
    assert drawn_with(tmp_path / "b") == {"guidance": 1, "sampler": "heun", "steps": 5}
    assert not np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))
    code, _, err = cli(*words, tmp_path / "a", "--steps", "4")
    assert code == 2
    assert "holds other images" in err


def test_another_sampler_takes_its_own_number_of_steps() -> None:
    config = registry.find("ddpm").tiny()
    assert config.sampling() == {"guidance": 1, "sampler": "dpm-solver++", "steps": 3}
    assert config.with_sampling({"sampler": "ddim"}).sampling()["steps"] == 50
    assert config.with_sampling({"sampler": "ddpm"}).sampling()["steps"] == 1000


def test_what_is_trained_with_them_is_drawn_with_them(
    tiny_config, labelled: Path, tmp_path: Path
) -> None:
    overrides = ["data.conditions={Kind: class}", "sampling.guidance=3", "sampling.steps=4"]
    train(tiny_config(), labelled, tmp_path / "run", overrides=overrides)
    infer(InferRequest(tmp_path / "run", tmp_path / "images", num_images=2))
    used = drawn_with(tmp_path / "images")
    assert (used["guidance"], used["steps"]) == (3, 4)


def test_changed_guidance_of_a_finished_run_is_that_of_its_artifact(
    conditional: Path, tiny_config, labelled: Path, cli
) -> None:
    words = ["train", "-c", tiny_config(), "-d", labelled, "-o", conditional]
    words += ["--set", "data.conditions={Kind: class}", "--set", "model.guidance=3"]
    assert cli(*words, "--accept_changes")[0] == 0
    run, model = (
        yaml.safe_load((conditional / place / "config.yaml").read_text())
        for place in (".", "artifact")
    )
    assert run == model
    assert model["model"]["guidance"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {guidance: 4}", "model.guidance is 4.0, the model was trained with 1.0: use "
         "sampling.guidance"),
        ("model: {num_sampling_steps: 9}", "use sampling.steps"),
        ("model: {channels: [8, 16]}", "model.channels is [8, 16], the model was trained with "
         "[8, 8]: leave it out"),
        ("data: {size: [32, 32]}", "data.size is [32, 32], the model was trained with"),
        ("sampling: {truncation: 0.5}", "rectified_flow cannot use sampling.truncation: leave it"),
        ("sampling: {sampler: ddim}", "sampler: Input should be 'dpm-solver++', 'euler' or 'heun'"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_act_is_refused_by_name(
    text: str, message: str, conditional: Path, cli, tmp_path: Path
) -> None:
    path = written(tmp_path / "g.yaml", text)
    code, _, err = cli("infer", "-m", conditional, "-n", "2", "-c", path, "-o", tmp_path / "out")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_the_yaml_of_the_training_may_be_given_to_infer(
    conditional: Path, cli, tmp_path: Path
) -> None:
    words = ["infer", "-m", conditional, "-n", "2", "-c", conditional / "config.yaml"]
    assert cli(*words, "-o", tmp_path / "out")[0] == 0


def test_other_families_need_no_name_in_the_yaml(
    tiny_config, phantoms: Path, cli, tmp_path: Path
) -> None:
    train(tiny_config("dcgan"), phantoms, tmp_path / "run")
    words = ["infer", "-m", tmp_path / "run", "-n", "2", "-o", tmp_path / "out"]
    assert cli(*words)[0] == 0
    code, _, err = cli(*words, "-c", written(tmp_path / "g.yaml", "model: {guidance: 4}"))
    assert code == 2
    assert "model.guidance: dcgan has no such key: leave it out" in err
    assert "model.name" not in err
    assert cli(*words, "--guidance", "2")[0] == 2


def test_a_training_whose_model_has_no_such_setting_is_refused(
    tiny_config, phantoms: Path, cli, tmp_path: Path
) -> None:
    words = ["train", "-c", tiny_config("dcgan"), "-d", phantoms, "-o", tmp_path / "run"]
    code, _, err = cli(*words, "--set", "sampling.guidance=2", "--set", "sampling.steps=5")
    assert code == 2
    assert "dcgan cannot use sampling.guidance and sampling.steps: leave it out." in err


def test_python_takes_them_for_one_call(conditional: Path) -> None:
    model = synthcube.from_pretrained(conditional)
    words = {"condition": {"Kind": "ring"}, "seed": 3}
    plain, guided = model.sample(2, **words), model.sample(2, **words, guidance=5)
    coarse = model.sample(2, **words, sampler="euler", steps=2)
    again = model.sample(2, **words)
    assert np.array_equal(plain.numpy(), again.numpy())
    assert not np.array_equal(plain.numpy(), guided.numpy())
    assert not np.array_equal(plain.numpy(), coarse.numpy())
    with pytest.raises(ConfigError, match=r"^rectified_flow cannot use sampling\.truncation"):
        model.sample(1, truncation=0.5)


@pytest.mark.parametrize("family", registry.names())
def test_every_family_names_its_settings_and_keeps_the_rest(family: str) -> None:
    config = registry.find(family).tiny()
    if "autoguidance" in type(config).model_fields:
        config = config.model_copy(update={"autoguidance_from": 0.25})
    settings = config.sampling()
    changed = {
        "guidance": 2.5, "autoguidance": 1.5, "sampler": settings.get("sampler"), "steps": 7,
        "truncation": 0.25,
    }  # fmt: skip
    changed = {key: changed[key] for key in settings}
    other = config.with_sampling(changed)
    assert other.sampling() == changed
    assert other.with_sampling(settings).sampling() == settings
    assert type(other) is type(config)
    assert other.optimizer == config.optimizer


def test_evaluate_and_export_take_set(conditional: Path, labelled: Path, cli, tmp_path) -> None:
    assert cli("infer", "-m", conditional, "-o", tmp_path / "images", "-n", "6")[0] == 0
    words = ["evaluate", "-p", tmp_path / "images", "-l", labelled, "-o", tmp_path / "r.yaml"]
    words += ["--set", "evaluation.extractor.name=radiomic", "--set", "data.size=[16,16]"]
    assert cli(*words, "--set", "seed=11")[0] == 0
    results = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert results["extractor"]["name"] == "radiomic"
    words = ["export", "-m", conditional, "-o", tmp_path / "model", "--set", "export.license=mit"]
    assert cli(*words)[0] == 0
    assert "license: mit" in (tmp_path / "model" / "README.md").read_text()
