"""Private steps: clipped gradients of each subject, secret noise, and nothing else that tells."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthcube import reading
from synthcube.errors import ConfigError, PreemptedError
from synthcube.models import registry
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec
from synthcube.tasks.train import train
from synthcube.training import checkpoints
from synthcube.training.accountant import Budget, epsilon_spent
from synthcube.training.config import PrivacyConfig
from synthcube.training.privacy import (
    PrivateSteps,
    clipped_sum,
    noise_like,
    require_differentiable,
    trained,
)

DECLARED = [
    "data.intensity_range=[0, 255]", "training.privacy={epsilon: 8, draws: 1}",
    "training.max_epochs=2",
]  # fmt: skip
PRIVATE = ("autoencoder_kl", "code_prior", "ddpm", "latent_diffusion", "rectified_flow")
MOMENTS = "model.latent_moments=[0.0, 1.0]"
SPEC = ImageSpec.model_validate({
    "size": [16, 16], "channels": 1, "spacing_mm": [1.0, 1.0, 1.0],
    "affine": [[float(row == column) for column in range(4)] for row in range(4)],
    "intensity_range": [[0.0, 255.0]], "file_format": "png",
    "conditions": [
        ConditionSpec(name="Label", kind="class", classes=("a", "b")),
        ConditionSpec(name="Age", kind="number", low=0.0, high=100.0),
    ],
})  # fmt: skip


def family_of(name: str = "rectified_flow") -> Any:
    torch.manual_seed(0)
    family = registry.find(name).tiny().build(SPEC)
    with torch.no_grad():  # a new U-Net ends in zeros, which hide most gradients
        for weight in family.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return family


def batch_of(number: int, *, augmented: bool = True) -> Batch:
    values = torch.tensor([[0.0, 0.1], [1.0, math.nan], [math.nan, -1.0]]).repeat(number, 1)
    return Batch(
        image=torch.rand(number, 1, 16, 16) * 2 - 1,
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.arange(number),
        augmented=augmented,
        condition=Condition(values=values[:number], source=torch.zeros(number, 0, 16, 16)),
    )


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return torch.stack([value.square().sum() for value in gradients.values()]).sum().sqrt().item()


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return norm_of({name: one[name] - other[name] for name in one})


class Plain(torch.nn.Module):
    """The loss without noise, so that two ways of computing it can be compared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(),
            torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 3),
        )  # fmt: skip
        self.layers[0].bias.requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        scale = torch.nan_to_num(batch["condition"]["values"][:, :1]) + 1
        return {"loss": (self.layers(batch["image"]) * scale).square().mean()}


def looped_sum(family: Any, batch: Batch, clip_norm: float) -> dict[str, torch.Tensor]:
    weights = trained(family)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for place in range(len(batch["index"])):
        condition = batch["condition"]
        one: Any = {
            **batch, "image": batch["image"][[place]],
            "condition": {
                "values": condition["values"][[place]], "source": condition["source"][[place]],
            },
        }  # fmt: skip
        gradients = torch.autograd.grad(family.loss(one)["loss"], list(weights.values()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient * min(1.0, clip_norm / norm.item())
    return total


@pytest.mark.parametrize("images_at_once", [1, 2, 7])
@pytest.mark.parametrize("clip_norm", [0.01, 0.3, 100.0])
def test_the_clipped_sum_is_that_of_a_loop(clip_norm: float, images_at_once: int) -> None:
    family, batch = Plain(), batch_of(5)
    total = clipped_sum(
        family,
        batch,
        clip_norm=clip_norm,
        draws=3,
        images_at_once=images_at_once,  # type: ignore[arg-type]
    )
    expected = looped_sum(family, batch, clip_norm)
    assert "layers.0.bias" not in total  # it is frozen
    assert difference(total, expected) < 1e-5 * max(1.0, norm_of(expected))


@pytest.mark.parametrize("name", ["autoencoder_kl", "ddpm", "latent_diffusion", "rectified_flow"])
def test_one_huge_image_moves_the_sum_by_the_clip_norm_at_most(name: str) -> None:
    family, batch = family_of(name), batch_of(4)
    huge: Any = {**batch, "image": batch["image"].clone()}
    huge["image"][3] = 1e6
    part: Any = dict(batch.items())
    for key in ("image", "label", "index"):
        part[key] = batch[key][:3]  # type: ignore[literal-required]
    part["condition"] = {key: value[:3] for key, value in batch["condition"].items()}
    sums = []
    for images in (part, huge):
        torch.manual_seed(5)
        options = {"clip_norm": 0.5, "draws": 2, "images_at_once": 3}
        sums.append(clipped_sum(family, images, **options))
    assert 0.1 < difference(*sums) <= 0.5 * (1 + 1e-5)


def test_a_gradient_that_is_not_finite_counts_nothing() -> None:
    family, batch = Plain(), batch_of(3)
    broken: Any = {**batch, "image": batch["image"].clone()}
    broken["image"][1] = math.nan
    total = clipped_sum(family, broken, clip_norm=1.0, draws=1, images_at_once=3)  # type: ignore[arg-type]
    assert math.isfinite(norm_of(total))
    assert 0 < norm_of(total) <= 2.00001


def test_each_draw_of_an_image_has_noise_of_its_own() -> None:
    """Averaged draws have a smaller spread than single ones."""
    family, batch = family_of(), batch_of(1)

    def spread(draws: int) -> float:
        sums = [
            clipped_sum(family, batch, clip_norm=1e6, draws=draws, images_at_once=1)
            for _ in range(6)
        ]
        mean = {name: torch.stack([one[name] for one in sums]).mean(0) for name in sums[0]}
        return sum(difference(one, mean) ** 2 for one in sums)

    assert spread(16) < spread(1) / 3


def test_noise_is_standard_normal_and_never_the_same() -> None:
    torch.manual_seed(0)
    first = noise_like(torch.zeros(300, 301), 2.0)
    torch.manual_seed(0)
    second = noise_like(torch.zeros(300, 301), 2.0)
    assert not torch.equal(first, second)
    for noise in (first, second):
        values = noise.flatten().double() / 2
        assert abs(values.mean()) < 5 / math.sqrt(len(values))
        assert abs(values.var() - 1) < 5 * math.sqrt(2 / len(values))
        assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96 / len(values))
        assert abs((values[1:] * values[:-1]).mean()) < 5 / math.sqrt(len(values))
    assert abs((first * second).mean()) < 5 * 4 / math.sqrt(first.numel())
    assert noise_like(torch.zeros(()), 1.0).shape == ()


def test_a_step_of_nobody_is_noise_of_the_right_size() -> None:
    family = family_of().train()
    budget = Budget(9, 4, 1 / 90, 0.5, sigma=3.0)
    privacy = PrivacyConfig(clip_norm=0.5, draws=1)
    steps = PrivateSteps(torch.device("cpu"), privacy, budget)
    steps._lightning_module = family
    nobody: Any = batch_of(1)
    nobody = {key: nobody[key][:0] for key in ("image", "label", "index")} | {
        "augmented": True,
        "condition": {key: value[:0] for key, value in nobody["condition"].items()},
    }
    steps.training_step(nobody).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in trained(family).values()])
    assert len(gradient) > 10_000
    assert gradient.std().item() == pytest.approx(3.0 * 0.5 / 4, rel=0.03)
    assert steps.budget.steps == 1


def test_a_family_that_looks_into_its_tensors_is_refused() -> None:
    class Looks(Plain):
        config = registry.find("rectified_flow").tiny()

        def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"loss": super().loss(batch)["loss"] * float(batch["image"].mean())}

    with pytest.raises(ConfigError, match="cannot be differentiated for each subject alone"):
        require_differentiable(Looks(), batch_of(2), PrivacyConfig())  # type: ignore[arg-type]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def statement(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifact" / "privacy.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", PRIVATE)
def test_every_family_that_can_trains_privately(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    moments = [MOMENTS] if family == "latent_diffusion" else []
    train(tiny_config(family), phantoms, tmp_path / "run", overrides=[*DECLARED, *moments])
    said = statement(tmp_path / "run")
    assert 7.8 < said["epsilon"] <= 8
    assert said["steps"] == 4  # of ten subjects, four in a step
    assert said["canary_audit"] is None
    weights = load_file(tmp_path / "run" / "artifact" / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    if moments:
        assert (weights["latent_mean"], weights["latent_std"]) == (0, 1)


@pytest.mark.slow
def test_two_runs_of_one_seed_have_other_noise(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        train(tiny_config(), phantoms, run, overrides=[*DECLARED, "training.max_epochs=1"])
    one, two = (load_file(run / "artifact" / "weights.safetensors") for run in runs)
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("ema", ["{}", "null"])
def test_epsilon_after_a_resume_is_that_without_one(
    ema: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """The noise of the first part stays, so more epochs spend more: they must be allowed."""
    run, more = tmp_path / "run", [*DECLARED, f"training.ema={ema}", "training.max_epochs=4"]
    train(tiny_config(), phantoms, run, overrides=more[:-1])
    first = statement(run)
    with pytest.raises(ConfigError, match=r"4 steps have spent epsilon 7.* set training.privacy"):
        train(tiny_config(), phantoms, run, overrides=more)
    allowed = [*more, "training.privacy.epsilon=20"]
    train(tiny_config(), phantoms, run, overrides=allowed)
    last = statement(run)
    assert (last["steps"], last["sigma"]) == (8, first["sigma"])
    straight = epsilon_spent(first["sigma"], first["sample_rate"], 8, first["delta"])
    assert last["epsilon"] == straight > first["epsilon"]
    record = checkpoints.load(run / "checkpoints" / "last.ckpt")["privacy"]
    assert record["steps"] == 8


@pytest.mark.slow
def test_an_interrupted_epoch_counts_each_step_once(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, run = PrivateSteps.training_step, tmp_path / "run"
    overrides = [*DECLARED, "training.max_epochs=3"]

    def interrupted(self: PrivateSteps, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.budget.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(PrivateSteps, "training_step", interrupted)
        with pytest.raises(PreemptedError):
            train(tiny_config(), phantoms, run, overrides=overrides)
    content = checkpoints.load(run / "checkpoints" / "last.ckpt")
    assert content["privacy"]["steps"] == content["global_step"] == 3
    train(tiny_config(), phantoms, run, overrides=overrides)
    assert statement(run)["steps"] == 6
    assert statement(run)["epsilon"] <= 8


def test_a_checkpoint_without_a_record_is_refused(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    train(tiny_config(), phantoms, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"trained with another config"):
        train(tiny_config(), phantoms, tmp_path / "plain", overrides=DECLARED)
    last = tmp_path / "plain" / "checkpoints" / "last.ckpt"
    longer = [*DECLARED, "training.max_epochs=3"]
    with pytest.raises(ConfigError, match="says nothing of privacy"):
        train(tiny_config(), phantoms, tmp_path / "new", overrides=longer, resume=str(last))


@pytest.mark.parametrize("change", ["privacy.clip_norm=2.0", "privacy.draws=2", "privacy=null"])
def test_the_privacy_of_a_run_stays(
    change: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=DECLARED)
    for options in ({}, {"accept_changes": True}):
        with pytest.raises(ConfigError, match=r"training.privacy.(clip_norm|draws): was"):
            train(
                tiny_config(), phantoms, run, overrides=[*DECLARED, f"training.{change}"], **options
            )


def test_another_batch_size_is_refused_even_where_changes_are_accepted(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    train(tiny_config(), phantoms, tmp_path / "run", overrides=DECLARED)
    with pytest.raises(ConfigError, match=r"batch_size: was 4, is 2"):
        train(
            tiny_config(), phantoms, tmp_path / "run",
            overrides=[*DECLARED, "training.batch_size=2"], accept_changes=True,
        )  # fmt: skip


PLANTED = 987654.25


def test_nothing_private_is_written(
    cli, tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a loss of the images is a certain number, no file and no line has it."""
    from synthcube.models.families.rectified_flow import RectifiedFlow

    plain = RectifiedFlow.loss

    def planted(self: Any, batch: Batch) -> dict[str, torch.Tensor]:
        loss = plain(self, batch)["loss"]
        return {"loss": loss - loss.detach() + PLANTED, "planted": loss.detach() * 0 + PLANTED}

    monkeypatch.setattr(RectifiedFlow, "loss", planted)
    sets = [word for override in DECLARED for word in ("--set", override)]
    open_run, run = tmp_path / "open", tmp_path / "run"
    cli("train", "-c", tiny_config(), "-d", phantoms, "-o", open_run)
    assert "987654" in (open_run / "metrics.csv").read_text()  # else the test has no power
    code, out, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", run, *sets)
    assert code == 0, err
    assert "987654" not in out + err
    assert "images/s" not in out + err  # how many were drawn
    for path in run.rglob("*"):
        if path.suffix in (".csv", ".json", ".yaml", ".txt"):
            assert "98765" not in path.read_text(), path
    assert {*rows(run)[0]} == {
        "epoch", "step", "gradient_norm", "lr", "data_wait_percent", "memory_gb",
    }  # fmt: skip
    kept = {path.name for path in (run / "artifact").iterdir()}
    assert kept == {
        "artifact.json", "config.yaml", "image.json", "metrics.json", "privacy.json",
        "versions.json", "weights.safetensors",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt"}
    assert not (run / "samples").exists()
    assert not (run / "curve.png").exists()


def test_classes_that_are_only_in_the_data_are_not_told(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    train(tiny_config(), phantoms, tmp_path / "run", overrides=DECLARED)
    image = json.loads((tmp_path / "run" / "artifact" / "image.json").read_text())
    assert image["labels"] == []
    declared = [
        *DECLARED, "data.conditions={Label: class}",
        "data.classes={Label: [ring, disc, square, star]}",
    ]  # fmt: skip
    train(tiny_config(), phantoms, tmp_path / "told", overrides=declared)
    image = json.loads((tmp_path / "told" / "artifact" / "image.json").read_text())
    assert (
        image["labels"] == image["conditions"][0]["classes"] == ["ring", "disc", "square", "star"]
    )


REFUSED = {
    "training.early_stop={}": "training.early_stop: a loss of private images",
    "training.best={}": "training.best: a loss of private images would choose the model",
    "training.accumulate=2": "training.accumulate is 2",
    "training.gradient_clip_norm=1.0": "training.gradient_clip_norm: with privacy",
    "model.scheduler={name: reduce_on_plateau}": "follows a loss of private images",
    "compute.num_devices=2": "with privacy one process trains",
    "compute.precision=bf16-true": "compute.precision bf16-true",
    "compute.compile=true": "compute.compile does not work",
    "compute.activation_checkpointing=true": "compute.activation_checkpointing does not work",
    "data.conditions={Label: class, Age: number}": "data.classes: name the classes of the column",
}


def test_everything_that_would_tell_is_refused_at_once(cli, tiny_config, phantoms: Path) -> None:
    sets = [word for key in [*DECLARED, *REFUSED] for word in ("--set", key)]
    code, _, err = cli("check", "-c", tiny_config(), "-d", phantoms, *sets)
    assert code == 2
    for fault in [*REFUSED.values(), "data.ranges: declare the lowest and highest Age"]:
        assert fault in err


@pytest.mark.parametrize("change", REFUSED)
def test_each_is_allowed_without_privacy_and_alone_refused_with(
    change: str, tiny_config, phantoms: Path
) -> None:
    from synthcube import config

    without = [*DECLARED, change, "training.privacy=null"]
    config.load(tiny_config(), without)
    with pytest.raises(ConfigError) as error:
        config.load(tiny_config(), [*DECLARED, change])
    assert REFUSED[change] in str(error.value)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("vqvae", "its codebook follows the images without a gradient"),
        ("dcgan", "it is trained against a discriminator"),
        ("stylegan", "it is trained against a discriminator"),
        ("latent_diffusion", "model.latent_moments: give mean and standard deviation"),
    ],
)
def test_families_that_cannot_are_refused_by_name(
    cli, family: str, reason: str, tiny_config, phantoms: Path
) -> None:
    sets = [word for override in DECLARED for word in ("--set", override)]
    code, _, err = cli("check", "-c", tiny_config(family), "-d", phantoms, *sets)
    assert code == 2
    assert reason in err
    assert family in err or "latent_moments" in err


def test_a_discriminator_of_an_autoencoder_is_refused(tiny_config) -> None:
    from synthcube import config

    with pytest.raises(ConfigError, match=r"adversarial_weight: a discriminator is trained in"):
        config.load(tiny_config("autoencoder_kl"), [*DECLARED, "model.adversarial_weight=0.1"])


@pytest.mark.slow
def test_latent_moments_may_come_from_a_public_model(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    from synthcube import config

    public = tmp_path / "public"
    train(tiny_config("latent_diffusion"), phantoms, public, overrides=["training.max_epochs=1"])
    start = [*DECLARED, f"training.start_from={public}"]
    with pytest.raises(ConfigError, match="latent_moments"):
        config.load(tiny_config("latent_diffusion"), [*start, 'training.start_anew=["latent_*"]'])
    train(tiny_config("latent_diffusion"), phantoms, tmp_path / "run", overrides=start)
    before, after = (
        load_file(run / "artifact" / "weights.safetensors") for run in (public, tmp_path / "run")
    )
    assert before["latent_std"] == after["latent_std"] != 1
    assert len(statement(tmp_path / "run")["start_sha256"]) == 64


def test_frozen_weights_stay_and_need_no_noise(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    public = tmp_path / "public"
    train(tiny_config(), phantoms, public)
    start = [
        *DECLARED, f"training.start_from={public}", "training.max_epochs=1",
        'training.freeze=["network.[!o]*"]',
    ]  # fmt: skip
    sets = [word for override in start for word in ("--set", override)]
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms, *sets)
    assert code == 0, err
    assert "noise over the largest possible signal in a step:" in out
    train(tiny_config(), phantoms, tmp_path / "run", overrides=start)
    before, after = (
        load_file(run / "artifact" / "weights.safetensors") for run in (public, tmp_path / "run")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("network.o") for name in changed)


def test_check_says_that_it_is_hopeless(cli, tiny_config, phantoms: Path) -> None:
    sets = [word for override in DECLARED for word in ("--set", override)]
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms, *sets)
    assert code == 0, err
    assert "epsilon 7.9" in out or "epsilon 8" in out
    assert "noise multiplier (sigma)" in out
    assert "joins a step with probability 0.4" in out
    assert "hopeless at this n" in out + err


def test_a_batch_norm_is_refused(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    from synthcube.training.leaks import require_private

    family = family_of()
    require_private(family)
    family.network.norm = torch.nn.BatchNorm2d(4)
    with pytest.raises(ConfigError, match=r"network.norm and 1 batch norm\(s\) in all mix"):
        require_private(family)


def test_a_run_in_bfloat16_is_clipped_as_computed() -> None:
    family, batch = family_of(), batch_of(3)
    with torch.autocast("cpu", torch.bfloat16):
        total = clipped_sum(family, batch, clip_norm=0.25, draws=2, images_at_once=2)
    assert all(value.dtype == torch.float32 for value in total.values())
    assert 0.01 < norm_of(total) <= 0.75 * (1 + 1e-5)


def test_the_config_is_one_section() -> None:
    text = reading.dump({"training": {"privacy": {"epsilon": 3}}})
    values, _ = reading.parse(text, "text")
    from synthcube import config

    privacy = config.build(values).training.privacy
    assert privacy == PrivacyConfig(epsilon=3)
    assert (PrivacyConfig().draws, PrivacyConfig().images_at_once) == (8, 4)
