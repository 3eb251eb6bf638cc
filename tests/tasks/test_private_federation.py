"""A federation of private sites: one mechanism at each of them, and a budget that is never lost."""

from __future__ import annotations

import json
import math
import shutil
import socket
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthcube.config import load_any
from synthcube.data.manifest import read_manifest
from synthcube.errors import ConfigError, FederationError
from synthcube.federation import audit
from synthcube.federation.plan import site_settings
from synthcube.federation.update import read_update
from synthcube.models import artifact
from synthcube.sharing.card import CardContext, model_card
from synthcube.tasks import join as joining
from synthcube.tasks.federate import simulate
from synthcube.tasks.federated_model import initial_model, recorded_agreement
from synthcube.tasks.federated_site import Site
from synthcube.tasks.federation_plan import write_plan
from synthcube.tasks.join import join
from synthcube.tasks.serve import serve
from synthcube.tasks.train import train
from synthcube.training import checkpoints
from synthcube.training.accountant import epsilon_spent

DELTA = 1e-3
PRIVATE = [
    "data.intensity_range=[0, 255]", "data.validation_fraction=0", "training.batch_size=3",
    f"training.privacy={{epsilon: 8, delta: {DELTA}, draws: 1}}",
]  # fmt: skip
CONDITIONS = "data.conditions={Label: class, Radius: number}"
DECLARED = ["data.classes={Label: [disc, square, ring, never]}", "data.ranges={Radius: [0, 20]}"]


def budget(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = checkpoints.load(run / "checkpoints" / "last.ckpt")["privacy"]
    return record


@pytest.mark.slow
def test_each_site_spends_what_its_own_subjects_and_all_rounds_come_to(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, overrides = tmp_path / "run", [*PRIVATE, CONDITIONS, *DECLARED]

    def work() -> Path:
        return simulate(tiny_config(), phantoms, run, num_rounds=2, overrides=overrides)

    trained = checkpoints.position
    with monkeypatch.context() as patch:  # as by a kill, in the second round of the second site

        def broken(path: Path) -> tuple[int, int]:
            if path.parts[-4:-2] == ("site-2", "run") and trained(path)[0] == 1:
                raise KeyboardInterrupt
            return trained(path)

        patch.setattr(checkpoints, "position", broken)
        with pytest.raises(KeyboardInterrupt):
            work()
    work()

    counts = json.loads((run / "agreement.json").read_text())["subjects"]
    assert sum(counts.values()) == len({row.subject for row in read_manifest(phantoms).rows})
    spent = read_update(run / "average.safetensors").header.privacy
    for label, subjects in counts.items():
        record, site = budget(run / "sites" / label / "run"), spent[label]
        assert (record["subjects"], record["steps"]) == (subjects, 2 * (subjects // 3))
        expected = epsilon_spent(record["sigma"], 3 / subjects, record["steps"], DELTA)
        assert (site.epsilon, site.sigma, site.steps) == (
            expected, record["sigma"], record["steps"],
        )  # fmt: skip
        assert 7.8 < site.epsilon <= 8
        lines = audit.read(run / "sites" / label / "audit.jsonl")
        told = [line.epsilon for line in lines if line.kind == "weights"]
        assert told == sorted(told)
        assert told[-1] == expected

    said = artifact.load(run).privacy
    assert said is not None
    assert said.sites == spent
    assert said.epsilon == max(site.epsilon for site in spent.values())
    assert said.unit == "one subject at one site, with all its images there, added or removed"
    card = model_card(artifact.load(run), CardContext())
    assert "A subject with images at several sites is promised the sum" in card
    assert all(f"| {label} |" in card for label in counts)
    image = artifact.load(run).image
    assert [spec.classes or (spec.low, spec.high) for spec in image.conditions] == [
        ("disc", "square", "ring", "never"), (0, 20),
    ]  # fmt: skip
    assert image.intensity_range == ((0, 255),)

    # A site that has lost its checkpoint would spend its budget a second time.
    (run / "average.safetensors").unlink()
    shutil.rmtree(run / "sites" / "site-1" / "run")
    with pytest.raises(FederationError, match=r"the checkpoint that counts .* is lost"):
        work()


@pytest.mark.slow
def test_one_private_site_has_the_mechanism_of_a_training(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    simulate(tiny_config(), phantoms, tmp_path / "one", sites=1, num_rounds=2,
             overrides=PRIVATE)  # fmt: skip
    train(
        tiny_config(), phantoms, tmp_path / "plain", overrides=[*PRIVATE, "training.max_epochs=2"]
    )
    assert budget(tmp_path / "one" / "sites" / "site-1" / "run") == budget(tmp_path / "plain")


@pytest.mark.slow
def test_a_site_on_a_network_that_lost_its_folder_is_refused_until_it_is_back(
    tiny_config, phantoms: Path, tmp_path: Path, certificates: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(joining, "_POLL_S", 0.1)
    authority = certificates.Authority(tmp_path / "study")
    keys = {name: authority.issue(name) for name in ("server", "site-1")}
    listed = certificates.site_list(tmp_path / "list", [keys["site-1"]], ["site-1"])
    plan, site = tmp_path / "plan.json", tmp_path / "site"
    write_plan(tiny_config(), plan, sites=["site-1"], num_rounds=2, overrides=PRIVATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def take_part(run: Path) -> None:
        join(plan, phantoms, keys["site-1"], run, address=address, patience_minutes=1,
             overrides=["compute.accelerator=cpu", "compute.precision='32'"])  # fmt: skip

    serving = threading.Thread(
        target=serve, args=(plan, keys["server"], listed, tmp_path / "server"),
        kwargs={"address": address, "round_minutes": 5}, daemon=True,
    )  # fmt: skip
    serving.start()
    trained = Site.train_round

    def broken(site: Site, agreement: Any, number: int, average: Path | None) -> Path:
        if number == 2:
            raise KeyboardInterrupt
        return trained(site, agreement, number, average)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "train_round", broken)
        with pytest.raises(KeyboardInterrupt):
            take_part(site)
    with pytest.raises(FederationError, match=r"put the folder back, or leave this site out"):
        take_part(tmp_path / "new")
    take_part(site)
    serving.join(60)
    assert not serving.is_alive()
    said = artifact.load(tmp_path / "server").privacy
    assert said == artifact.load(site).privacy
    assert said is not None
    assert said.steps == budget(site / "run")["steps"] == 8
    assert "privacy" not in (tmp_path / "server" / "rounds.json").read_text()


def test_a_round_is_clipped_and_noised(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    """With a tiny clip norm nothing but noise moves the weights: by sigma * C / B a step of SGD."""
    clip, run = 1e-4, tmp_path / "run"
    overrides = [
        *PRIVATE, "training.batch_size=4", "model.optimizer={name: sgd, lr: 1.0}",
        "model.scheduler=null", "training.ema=null", f"training.privacy.clip_norm={clip}",
    ]  # fmt: skip
    simulate(tiny_config(), phantoms, run, num_rounds=1, overrides=overrides)
    agreement = recorded_agreement(run)
    assert agreement
    start = initial_model(load_any(tiny_config(), overrides), agreement)
    names = [name for name, _ in start.named_parameters()]
    state = start.state_dict()
    for label in agreement.images:
        sent = load_file(run / "sites" / label / "update.safetensors")
        moved = torch.cat([(sent[f"averaged.{name}"] - state[name]).flatten() for name in names])
        record = budget(run / "sites" / label / "run")
        expected = record["sigma"] * clip / 4 * math.sqrt(record["steps"])
        assert moved.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_private_latents_are_scaled_by_what_the_plan_declares(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """With FedProx, FedAdam and the moving average of the server, which all spend nothing."""
    overrides = [*PRIVATE, "model.latent_moments=[0.25, 2.0]"]
    run = tmp_path / "run"
    simulate(
        tiny_config("latent_diffusion"), phantoms, run, num_rounds=2, proximal=0.1,
        server_optimizer={"name": "adam", "lr": 0.01}, average="server", overrides=overrides,
    )  # fmt: skip
    assert json.loads((run / "agreement.json").read_text())["moments"] is None
    weights = load_file(run / "artifact" / "weights.safetensors")
    assert (weights["latent_mean"], weights["latent_std"]) == (0.25, 2)
    said = artifact.load(run).privacy
    assert said is not None
    assert 7.8 < said.epsilon <= 8
    assert said.first_stage_sha256


UNDECLARED = {
    "delta": ("training.privacy.delta=null", r"training.privacy.delta: state it"),
    "early stop": ("training.early_stop={}", r"early_stop"),
}


@pytest.mark.parametrize(("override", "message"), UNDECLARED.values(), ids=UNDECLARED)
def test_a_plan_must_state_what_becomes_public(
    override: str, message: str, tiny_config, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, FederationError), match=message):
        write_plan(tiny_config(), tmp_path / "plan.json", sites=["a", "b"], num_rounds=1,
                   overrides=[*PRIVATE, override])  # fmt: skip
    assert not (tmp_path / "plan.json").exists()


def test_undeclared_classes_and_ranges_are_refused_at_once(tiny_config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        write_plan(tiny_config(), tmp_path / "plan.json", sites=["a", "b"], num_rounds=1,
                   overrides=[*PRIVATE, CONDITIONS])  # fmt: skip
    assert "data.classes: name the classes of the column Label" in str(refusal.value)
    assert "data.ranges: declare the lowest and highest Radius" in str(refusal.value)
    plan = write_plan(tiny_config(), tmp_path / "plan.json", sites=["a", "b"], num_rounds=1,
                      overrides=[*PRIVATE, CONDITIONS, *DECLARED])  # fmt: skip
    assert plan.ranges == {"Radius": (0, 20)}
    settings = site_settings(plan, ["training.privacy.images_at_once=1"])  # its memory is its own
    assert settings.training.privacy
    assert settings.training.privacy.images_at_once == 1
    with pytest.raises(ConfigError, match=r"training.privacy.epsilon: 8.0 in the plan, 20.0 here"):
        site_settings(plan, ["training.privacy.epsilon=20"])
    with pytest.raises(FederationError, match=r"--range Radius=0,9: data.ranges says another one"):
        write_plan(tiny_config(), tmp_path / "plan.json", sites=["a", "b"], num_rounds=1,
                   ranges={"Radius": (0, 9)},
                   overrides=[*PRIVATE, CONDITIONS, *DECLARED])  # fmt: skip


def test_too_large_a_batch_is_refused_before_any_training(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(FederationError) as refusal:
        simulate(tiny_config(), phantoms, tmp_path / "run", num_rounds=1,
                 overrides=[*PRIVATE, "training.batch_size=9"])  # fmt: skip
    assert "site-1: training.batch_size 9 is more than the 6 training subjects" in str(
        refusal.value
    )
    assert "site-2: training.batch_size 9" in str(refusal.value)
