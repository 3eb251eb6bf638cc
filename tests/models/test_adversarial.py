"""Training against a discriminator: losses, accumulation, clipping, schedules, counting, resume."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from synthcube import reading
from synthcube.errors import ConfigError
from synthcube.models.adversarial import (
    AdversarialFamily,
    discriminator_term,
    generator_term,
    sliced_wasserstein,
)
from synthcube.models.families.dcgan import DCGAN
from synthcube.tasks.train import train
from synthcube.training import TrainingConfig, checkpoints
from synthcube.training.ema import RampedEMA

REAL, FAKE = torch.tensor([2.0, -0.5]), torch.tensor([0.5, -3.0])


def log(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "generator", "discriminator"),
    [
        ("non_saturating", (log(-0.5) + log(3)) / 2, (log(-2) + log(0.5) + log(0.5) + log(-3)) / 2),
        ("hinge", 1.25, (0 + 1.5) / 2 + (1.5 + 0) / 2),
        ("least_squares", (0.25 + 16) / 2, ((1 + 2.25) / 2 + (0.25 + 9) / 2) / 2),
    ],
)
def test_losses_are_those_of_their_papers(name, generator, discriminator) -> None:
    assert generator_term(FAKE, name).item() == pytest.approx(generator)
    assert discriminator_term(REAL, FAKE, name).item() == pytest.approx(discriminator)


def test_non_saturating_is_cross_entropy_with_flipped_labels() -> None:
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(2), torch.zeros(2)
    torch.testing.assert_close(generator_term(FAKE, "non_saturating"), entropy(FAKE, ones))
    torch.testing.assert_close(
        discriminator_term(REAL, FAKE, "non_saturating"), entropy(REAL, ones) + entropy(FAKE, zeros)
    )


def test_large_logits_stay_finite() -> None:
    huge = torch.tensor([1e4, -1e4], dtype=torch.float16)
    for name in ("non_saturating", "hinge", "least_squares"):
        assert generator_term(huge, name).isfinite()
        assert discriminator_term(huge, huge, name).isfinite()


def test_sliced_wasserstein_against_what_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 4, 4, generator=generator)
    assert sliced_wasserstein(images, images[torch.randperm(64, generator=generator)]) < 1e-6
    # A shift by the same vector moves every projection by its product with the direction: on
    # average the norm of the vector times E|cos| of a random direction in 16 dimensions.
    shifted = sliced_wasserstein(images, images + 3.0)
    cosine = math.gamma(8) / (math.sqrt(math.pi) * math.gamma(8.5))
    assert shifted.item() == pytest.approx(3 * 4 * cosine, rel=0.15)
    volumes = images.view(64, 1, 4, 2, 2)
    assert torch.equal(sliced_wasserstein(volumes, volumes + 3.0), shifted)


@pytest.fixture
def config(tmp_path: Path):
    """A tiny adversarial training, whose norms look at one image alone."""

    def write(**training: Any) -> Path:
        model = {"name": "dcgan", "latent_dim": 8, "channels": [8, 8], "norm": "instance",
                 "discriminator_channels": [8, 8], "discriminator_norm": "instance"}  # fmt: skip
        values = {
            "model": model,
            "data": {"validation_fraction": 0},
            "training": {"max_epochs": 2, "batch_size": 4, "log_every_n_steps": 1,
                         "sample_every_n_epochs": 0, "ema": None} | training,
            "compute": {"accelerator": "cpu", "precision": "32"},
        }  # fmt: skip
        path = tmp_path / "adversarial.yaml"
        path.write_text(reading.dump(values), encoding="utf-8")
        return path

    return write


def last(run: Path) -> dict[str, Any]:
    return checkpoints.load(run / "checkpoints" / "last.ckpt")


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the manifest gets the same latent, in whatever batch it comes."""

    def generator_loss(self: DCGAN, batch: Any) -> Any:
        seeds = batch["index"].tolist()
        latents = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        generated = self.generator(torch.stack(latents), batch["condition"]["values"])
        return {
            "loss": generator_term(self._logits(generated, generated[:, :0, 0, 0]), "hinge")
        }, generated

    monkeypatch.setattr(DCGAN, "generator_loss", generator_loss)


SGD = [
    "model.optimizer={name: SGD, lr: 0.1}", "model.discriminator_optimizer={name: SGD, lr: 0.1}",
]  # fmt: skip


@pytest.mark.parametrize("clip", ["null", "0.01"])
def test_accumulated_batches_are_one_large_batch(
    clip: str, config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_latents(monkeypatch)
    overrides = [*SGD, "training.max_epochs=3", f"training.gradient_clip_norm={clip}"]
    small = [*overrides, "training.batch_size=3", "training.accumulate=4"]
    train(config(), phantoms, tmp_path / "one", overrides=[*overrides, "training.batch_size=12"])
    train(config(), phantoms, tmp_path / "four", overrides=small)
    one, four = last(tmp_path / "one"), last(tmp_path / "four")
    assert one["global_step"] == four["global_step"] == 3
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(four["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_clipping_limits_the_norm_of_both(
    config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = [], []
    hook = AdversarialFamily.on_before_optimizer_step

    def norm(optimizer: Any) -> float:
        grads = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        return torch.nn.utils.get_total_norm(grads).item()

    def spy(self: Any, optimizer: Any) -> None:
        before.append(norm(optimizer))
        hook(self, optimizer)
        after.append(norm(optimizer))

    monkeypatch.setattr(AdversarialFamily, "on_before_optimizer_step", spy)
    train(config(gradient_clip_norm=0.01), phantoms, tmp_path / "run", overrides=SGD)
    assert len(after) == 2 * 6, "a step of each in every batch"
    assert min(before) > 0.01
    assert after == pytest.approx([0.01] * 12, rel=1e-3)


def test_clipping_is_for_families_without_an_opponent_unless_asked_for() -> None:
    assert TrainingConfig().clip_norm(by_hand=False) == 1.0
    assert TrainingConfig().clip_norm(by_hand=True) is None
    for asked in (0.5, None):
        config = TrainingConfig(gradient_clip_norm=asked)
        assert config.clip_norm(by_hand=True) == config.clip_norm(by_hand=False) == asked


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("{name: StepLR, step_size: 1, gamma: 0.1}", [1e-1, 1e-2, 1e-3]),
        ("{name: StepLR, step_size: 1, gamma: 0.1, interval: step}", [1e-2, 1e-4, 1e-6]),
        ("{name: linear, warmup_steps: 0}", [4 / 6, 2 / 6, 0.0]),
        (
            "{name: ReduceLROnPlateau, patience: 0, factor: 0.5, threshold: 1000000.0}",
            [0.5, 0.25, 0.125],
        ),
    ],
)
def test_schedules_of_both_really_step(
    scheduler: str, expected: list[float], config, phantoms: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rates after each epoch of three batches, of which the first two and the rest make steps."""
    rates: list[list[float]] = []
    hook = AdversarialFamily.on_train_epoch_end

    def note(self: Any) -> None:
        hook(self)
        rates.append(
            [optimizer.param_groups[0]["lr"] / 2e-4 for optimizer in self.trainer.optimizers]
        )

    monkeypatch.setattr(AdversarialFamily, "on_train_epoch_end", note)
    overrides = [
        f"model.scheduler={scheduler}", f"model.discriminator_scheduler={scheduler}",
        "training.max_epochs=3", "training.accumulate=2",
    ]  # fmt: skip
    if "Plateau" in scheduler:
        overrides.append("data.validation_fraction=0.25")
    train(config(), phantoms, tmp_path / "run", overrides=overrides)
    assert rates == [pytest.approx([rate, rate], abs=1e-9) for rate in expected]


def test_a_plateau_of_nothing_is_refused(config, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no validation images: raise data\.valid"):
        train(config(), phantoms, tmp_path / "run",
              overrides=["model.scheduler={name: ReduceLROnPlateau}"])  # fmt: skip


def test_a_step_of_both_counts_once(config, phantoms: Path, tmp_path: Path) -> None:
    train(config(ema={"decay": 0.9}), phantoms, tmp_path / "run")
    state = last(tmp_path / "run")
    assert state["global_step"] == 6
    assert state["averaging_state"]["n_averaged"] == 6
    assert [state_of_one["state"][0]["step"] for state_of_one in state["optimizer_states"]] == [
        6,
        6,
    ]
    assert [row["step"] for row in table(tmp_path / "run") if row["lr/generator"]] == list("123456")


def test_a_stopped_run_goes_on_exactly(config, phantoms: Path, tmp_path: Path) -> None:
    """With all that has a state: two schedules, accumulation, averages, batch norms."""
    overrides = [
        "model.scheduler={name: StepLR, step_size: 1, gamma: 0.5}",
        "model.discriminator_scheduler={name: StepLR, step_size: 2, gamma: 0.5, interval: step}",
        "model.norm=batch", "model.discriminator_norm=batch", "model.spectral_norm=true",
        "training.accumulate=2", "training.ema={decay: 0.9}",
    ]  # fmt: skip
    for name, lengths in (("straight", [3]), ("stopped", [1, 3])):
        for length in lengths:
            longer = [*overrides, f"training.max_epochs={length}"]
            train(config(), phantoms, tmp_path / name, overrides=longer)
    straight, stopped = last(tmp_path / "straight"), last(tmp_path / "stopped")
    for key in ("state_dict", "current_model_state"):
        for name, value in straight[key].items():
            assert torch.equal(stopped[key][name], value), f"{key}: {name}"
    assert straight["lr_schedulers"] == stopped["lr_schedulers"]
    assert table(tmp_path / "straight")[-1] == table(tmp_path / "stopped")[-1]


def test_without_validation_the_last_weights_are_shared(
    config, phantoms: Path, tmp_path: Path
) -> None:
    """The generator's loss is lowest where the discriminator is worst: it chooses nothing."""
    run = tmp_path / "run"
    train(config(), phantoms, run)
    assert not (run / "checkpoints" / "best.ckpt").exists()
    state = load_file(run / "artifact" / "weights.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in last(run)["state_dict"].items())


def test_statistics_of_batch_norms_are_averaged_with_the_weights() -> None:
    """An affine layer in front of a batch norm: by hand, over two updates."""

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)

    model, ema = Model(), RampedEMA(0.5)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    ema.setup(trainer, model, "fit")
    for step, mean in enumerate((1.0, 2.0, 4.0), start=1):
        model.norm.running_mean.fill_(mean)
        model.norm.num_batches_tracked.fill_(step)
        ema.on_train_batch_end(SimpleNamespace(global_step=step), model, None, None, 0)
    averaged = ema.model.norm
    # copied, then decays of 2/11 and 3/12
    assert averaged.running_mean.item() == pytest.approx((1 * 2 / 11 + 2 * 9 / 11) / 4 + 4 * 3 / 4)
    assert averaged.num_batches_tracked == 3
