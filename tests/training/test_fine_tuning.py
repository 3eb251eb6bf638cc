"""Fine-tuning: what a training starts from, what of it stays, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from synthcube.data.phantom import write_phantoms
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models import registry
from synthcube.storage import sha256
from synthcube.tasks.train import train
from synthcube.training import checkpoints

# What is frozen of each family: some of every network of it, and what moves without a gradient.
FREEZE = {
    "autoencoder_kl": "network.encoder.*",
    "code_prior": "network.blocks.*",
    "dcgan": "generator.norms.*",
    "ddpm": "network.down_blocks.*",
    "latent_diffusion": "network.down_blocks.*",
    "rectified_flow": "network.down_blocks.*",
    "stylegan": "mapping.*",
    "vqvae": "network.quantizer.*",
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


@pytest.mark.parametrize("family", registry.names())
def test_frozen_weights_stay_and_the_others_learn(
    family: str, first_stage, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Their moving average, running statistics and codebooks too; resumed, without the start."""
    origin = tmp_path / "origin"
    shutil.copytree(first_stage(family), origin) if not registry.find(family).needs else train(
        tiny_config(family), phantoms, origin
    )
    run, frozen = tmp_path / "run", FREEZE[family].rstrip("*")
    overrides = [
        f"training.start_from={origin}", f"training.freeze=['{FREEZE[family]}']",
        "model.scheduler=null", "training.sample_every_n_epochs=0",
    ]  # fmt: skip
    train(tiny_config(family), phantoms, run, overrides=[*overrides, "training.max_epochs=1"])
    before = weights(origin)
    shutil.rmtree(origin)
    train(tiny_config(family), phantoms, run, overrides=overrides)
    state = checkpoints.load(run / "checkpoints" / "last.ckpt")
    assert state["epoch"] == 1
    for key in ("state_dict", "current_model_state"):
        after = state[key]
        held = [name for name in before if name.startswith(frozen)]
        assert held
        assert all(torch.equal(before[name], after[name]) for name in held), key
        learning = [
            name for name in before if not name.startswith((frozen, "first_stage."))
            and not torch.equal(before[name], after[name])
        ]  # fmt: skip
        assert len(learning) > 3, key


def test_the_start_is_what_is_trained_further_and_is_recorded(
    tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    origin, run = first_stage("rectified_flow"), tmp_path / "run"
    still = ["model.optimizer.lr=1e-30", "model.scheduler=null", "training.max_epochs=1"]
    train(tiny_config(), phantoms, run, overrides=[f"training.start_from={origin}", *still])
    before, after = weights(origin), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    digest = sha256(origin / "artifact" / "weights.safetensors")
    for path in (run / "config.yaml", run / "artifact" / "config.yaml"):
        assert yaml.safe_load(path.read_text())["training"]["start_from_sha256"] == digest


def tiny_channels() -> list[int]:
    return list(registry.find("rectified_flow").tiny().model_dump()["channels"])


def test_a_key_that_differs_is_one_line(
    cli, tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    origin = first_stage("rectified_flow")
    overrides = [f"training.start_from={origin}", "model.channels=[8, 16]"]
    with pytest.raises(ConfigError, match="does not fit this model") as caught:
        train(tiny_config(), phantoms, tmp_path / "run", overrides=overrides)
    faults = caught.value.faults
    assert faults == (f"model.channels: {tiny_channels()} in the start model, [8, 16] here",)
    words = [word for override in overrides for word in ("--set", override)]
    code, _, text = cli("check", "-c", tiny_config(), "-d", phantoms, *words)
    assert code == 2
    assert text.count("in the start model,") == 1
    assert re.search(r"does not fit this model in \d{2,} weights \(network\.", text)
    # Mended, the same folder is as good as a new one.
    train(tiny_config(), phantoms, tmp_path / "run", overrides=overrides[:1])


def test_the_architecture_comes_from_the_start(phantoms: Path, tmp_path: Path, first_stage) -> None:
    """Of any family, where the YAML does not say otherwise; also when the run is continued."""
    brief = tmp_path / "brief.yaml"
    for family in ("rectified_flow", "vqvae"):
        origin, run = first_stage(family), tmp_path / family
        brief.write_text(
            f"training: {{start_from: '{origin}', max_epochs: 1, batch_size: 4, "
            "sample_every_n_epochs: 0}\n"
            "compute: {accelerator: cpu, precision: '32'}\n"
        )
        train(brief, phantoms, run)
        before, after = (
            yaml.safe_load((folder / "artifact" / "config.yaml").read_text())["model"]
            for folder in (origin, run)
        )
        schedules = {"optimizer", "scheduler"}
        assert {key: before[key] for key in before if key not in schedules} == {
            key: after[key] for key in after if key not in schedules
        }
        assert weights(run).keys() == weights(origin).keys()
        train(brief, phantoms, run, overrides=["training.max_epochs=2"])
    brief.write_text(f"{{model: {{name: vqvae}}, training: {{start_from: '{tmp_path}/gone'}}}}")
    with pytest.raises(ArtifactError, match="there is no such folder"):
        train(brief, phantoms, tmp_path / "gone_run")
    stated = ["model.name=vqvae", f"training.start_from={first_stage('rectified_flow')}"]
    with pytest.raises(ConfigError, match="the start is a rectified_flow, this is a vqvae"):
        train(brief, phantoms, tmp_path / "stated", overrides=stated)


def test_what_does_not_fit_starts_anew_only_by_name(
    tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    origin, run = first_stage("vqvae"), tmp_path / "run"
    overrides = [f"training.start_from={origin}", "model.num_embeddings=64"]
    with pytest.raises(ConfigError, match="does not fit") as caught:
        train(tiny_config("vqvae"), phantoms, run, overrides=overrides)
    (fault,) = caught.value.faults
    assert re.fullmatch(r"model.num_embeddings: \d+ in the start model, 64 here", fault)
    assert "(network.quantizer." in str(caught.value)
    anew = ["training.start_anew=['network.quantizer.*']", "model.optimizer.lr=1e-30"]
    train(tiny_config("vqvae"), phantoms, run, overrides=[*overrides, *anew])
    before, after = weights(origin), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before if "quantizer" not in name)


def test_another_family_is_refused(
    tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    overrides = [f"training.start_from={first_stage('vqvae')}"]
    with pytest.raises(ConfigError, match="the start is a vqvae, this is a rectified_flow"):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=overrides)


def test_another_start_than_recorded_is_refused(
    tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    overrides = [f"training.start_from={first_stage('vqvae')}", "training.start_from_sha256=abc"]
    with pytest.raises(ConfigError, match="sha256 is abc"):
        train(tiny_config("vqvae"), phantoms, tmp_path / "run", overrides=overrides)
    with pytest.raises(ArtifactError, match="there is no such folder"):
        train(
            tiny_config(), phantoms, tmp_path / "run",
            overrides=[f"training.start_from={tmp_path / 'gone'}"],
        )  # fmt: skip


def test_other_classes_of_the_same_number_start_anew(
    tiny_config, tmp_path: Path, first_stage
) -> None:
    data = write_phantoms(tmp_path / "data", num=12, size=(16, 16)).parent
    manifest = (data / "manifest.csv").read_text()
    condition = "data.conditions={Label: class}"
    origin = tmp_path / "origin"
    train(tiny_config(), data, origin, overrides=[condition, "training.max_epochs=1"])
    names = yaml.safe_load((origin / "artifact" / "image.json").read_text())["labels"]
    (data / "manifest.csv").write_text(manifest.replace(names[0], "Zebra"))
    overrides = [condition, f"training.start_from={origin}", "training.max_epochs=1"]
    with pytest.raises(ConfigError, match="class_embedding") as caught:
        train(tiny_config(), data, tmp_path / "run", overrides=overrides)
    assert all("Zebra" in fault and names[0] in fault for fault in caught.value.faults)
    anew = "training.start_anew=['network.class_embedding.*']"
    train(tiny_config(), data, tmp_path / "run", overrides=[*overrides, anew])


@pytest.mark.parametrize(
    ("family", "override", "text"),
    [
        ("vqvae", "freeze=['network.encodr.*']", r"'network.encodr.\*' matches no weight"),
        ("vqvae", "freeze=['network.encodr.*']", "there are network.encoder.blocks"),
        ("vqvae", "freeze=['*']", "no weight is left to train"),
        ("vqvae", "start_anew=['head*']", r"start_anew: 'head\*' matches no weight"),
        ("dcgan", "freeze=['discriminator.*']", "no weight of the discriminator is left to train"),
        ("dcgan", "freeze=['generator.*']", "no weight of the generator is left to train"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(
    family: str, override: str, text: str, tiny_config, phantoms: Path, tmp_path: Path, first_stage
) -> None:
    overrides = [f"training.start_from={first_stage(family)}", f"training.{override}"]
    with pytest.raises(ConfigError, match=text):
        train(tiny_config(family), phantoms, tmp_path / "run", overrides=overrides)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.freeze=['a']", "freeze without start_from"),
        ("training.start_from=' '", "give the folder of a run or of an artifact"),
    ],
)
def test_a_start_is_a_folder(
    override: str, text: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=[override])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rectified_flow", "dcgan"])
def test_two_processes_keep_the_same_weights(
    family: str, tiny_config, phantoms: Path, tmp_path: Path, first_stage, forks
) -> None:
    script = Path(__file__).parents[1] / "each_rank.py"
    run, origin = tmp_path / "run", first_stage(family)
    forks.script_together(
        script, tiny_config(family), phantoms, run, "compute.num_devices=2",
        f"training.start_from={origin}", f"training.freeze=['{FREEZE[family]}']",
    )  # fmt: skip
    before = weights(origin)
    ranks = [load_file(run / f"rank_{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in before)
    held = [name for name in before if name.startswith(FREEZE[family].rstrip("*"))]
    assert all(torch.equal(before[name], ranks[1][name]) for name in held)
    assert any(not torch.equal(before[name], ranks[1][name]) for name in before)
