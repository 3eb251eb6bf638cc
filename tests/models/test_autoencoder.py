"""The terms that autoencoders share: adversarial, spectral, perceptual; and what they can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import PatchDiscriminator
from PIL import Image
from safetensors.torch import load_file

from synthcube.data.phantom import write_phantoms
from synthcube.errors import FamilyError
from synthcube.models import registry
from synthcube.models.autoencoder import Autoencoder, SpectralLoss
from synthcube.models.nets import perceptual
from synthcube.models.nets.norm import BatchNorm
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.tasks.train import train
from synthcube.training import checkpoints

NAMES = ("autoencoder_kl", "vqvae")
EACH_RANK = Path(__file__).parents[1] / "each_rank.py"
EYE = tuple(tuple(float(row == column) for column in range(4)) for row in range(4))
ADVERSARIAL = ["model.adversarial_weight=0.1", "model.discriminator_channels=4"]


def image_spec(*size: int) -> ImageSpec:
    return ImageSpec(
        size=size, channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=EYE,
        intensity_range=((0.0, 255.0),), file_format="nii.gz",
    )  # fmt: skip


def model(name: str, size: tuple[int, ...] = (16, 16), **settings: object) -> Autoencoder:
    torch.manual_seed(0)
    family = registry.find(name).tiny().model_copy(update=settings).build(image_spec(*size))
    assert isinstance(family, Autoencoder)
    return family


def batch(images: torch.Tensor) -> Batch:
    number = len(images)
    condition = Condition(values=torch.zeros(number, 0), source=torch.zeros(number, 0))
    return Batch(
        image=images, label=torch.zeros(number).long(), index=torch.arange(number),
        condition=condition,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16), (4, 4), (20, 12)])
def test_both_sides_learn(name: str, size: tuple[int, ...]) -> None:
    family = model(
        name, size, adversarial_weight=0.1, adversarial_from_step=0, discriminator_channels=4
    )
    images = torch.rand(2, 1, *size) * 2 - 1
    terms, reconstructed = family.generator_loss(batch(images))
    assert not family.automatic_optimization
    torch.testing.assert_close(
        terms["loss"],
        sum(value for key, value in terms.items() if key in ("reconstruction", "commitment"))
        + 1e-6 * terms.get("kl", 0)
        + 0.1 * terms["adversarial"],
    )
    terms["loss"].backward()
    judged = family.discriminator_loss(batch(images), reconstructed.detach())["loss"]
    family.discriminator.zero_grad()
    judged.backward()
    idle = [key for key, weight in family.named_parameters()
            if weight.requires_grad and weight.grad is None]  # fmt: skip
    assert idle == []
    assert "adversarial" not in family.eval().loss(batch(images))


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_batch_norms_of_the_discriminator_are_shared_by_all_processes(
    size: tuple[int, ...],
) -> None:
    settings = {"adversarial_weight": 0.1, "discriminator_channels": 4}
    assert not norms(model("vqvae", size, **settings))
    family = model("vqvae", size, discriminator_norm="batch", **settings).train()
    assert [type(norm) for norm in norms(family)] == [BatchNorm, BatchNorm]
    config = family.config
    described = {**config.discriminator_settings(family.image), "channels": 4}
    del described["num_channels"]
    theirs = PatchDiscriminator(**described)
    theirs.load_state_dict(family.discriminator.state_dict())
    images = torch.randn(3, 1, *size)
    torch.testing.assert_close(family.discriminator(images)[-1], theirs(images)[-1])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(family.discriminator.state_dict()[name], value)


def norms(family: Autoencoder) -> list[torch.nn.Module]:
    judge: Any = family.discriminator
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [module for module in judge.modules() if isinstance(module, kind)]


def test_without_a_weight_it_is_a_plain_family() -> None:
    family = model("vqvae")
    assert family.discriminator is None
    assert family.automatic_optimization


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("autoencoder_kl", [16, 32]), ("vqvae", [32])])
def test_it_learns_to_reconstruct_unseen_images(
    name: str, channels: list[int], tmp_path: Path
) -> None:
    """Against the best that no look at the image can beat: the mean of the training images."""
    images = pictures(tmp_path)
    torch.manual_seed(0)
    config = registry.find(name).model_validate({"name": name, "channels": channels})
    family = config.build(image_spec(16, 16))
    optimizer = torch.optim.AdamW(family.parameters(), lr=2e-3)
    for step in range(200):
        optimizer.zero_grad()
        family.loss(batch(images[step % 4 * 16 :][:16]))["loss"].backward()
        optimizer.step()
    with torch.inference_mode():
        error = (family.eval().reconstruct(images[64:]) - images[64:]).abs().mean()
    of_the_mean = (images[:64].mean(dim=0) - images[64:]).abs().mean()
    assert error < 0.5 * of_the_mean


def pictures(folder: Path) -> torch.Tensor:
    """Eighty 16x16 phantoms, (80, 1, 16, 16) in [-1, 1]."""
    manifest = write_phantoms(folder, num=80, size=(16, 16))
    files = sorted(manifest.parent.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) for file in files])
    assert pixels.shape == (80, 16, 16)
    return torch.from_numpy(pixels)[:, None] / 127.5 - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_discriminator_waits(name: str, tiny_config, phantoms: Path, tmp_path: Path) -> None:
    """Twelve images in batches of four: three steps in an epoch, so its first step is the third."""
    last = []
    for number, start in enumerate((100, 3)):
        run = tmp_path / str(number)
        overrides = [*ADVERSARIAL, f"model.adversarial_from_step={start}",
                     "data.validation_fraction=0", "training.max_epochs=1"]  # fmt: skip
        train(tiny_config(name), phantoms, run, overrides=overrides)
        state = checkpoints.load(run / "checkpoints" / "last.ckpt")
        assert state["global_step"] == 3, "the generator's steps count"
        last.append(state["current_model_state"])
    judge = [key for key in last[0] if key.startswith("discriminator.")]
    moved = [key for key in judge if not torch.equal(last[0][key], last[1][key])]
    assert moved == judge
    for key, value in last[0].items():
        if key not in judge:
            assert torch.equal(value, last[1][key]), f"{key}: no verdict yet"


@pytest.mark.parametrize("name", NAMES)
def test_an_adversarial_training_resumes_bit_for_bit(
    name: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    common = [*ADVERSARIAL, "model.adversarial_from_step=3", "model.spectral_weight=0.1",
              "model.scheduler=null"]  # fmt: skip
    config = tiny_config(name)
    train(config, phantoms, tmp_path / "straight", overrides=[*common, "training.max_epochs=3"])
    for epochs in (2, 3):
        overrides = [*common, f"training.max_epochs={epochs}"]
        train(config, phantoms, tmp_path / "stopped", overrides=overrides)
    one, other = (
        checkpoints.load(tmp_path / run / "checkpoints" / "last.ckpt")["current_model_state"]
        for run in ("straight", "stopped")
    )
    assert any(key.startswith("discriminator.") for key in one)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_waiting_discriminator_keeps_its_schedule(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Three steps in each of four epochs, two accumulated: eight steps, of which it takes six."""
    overrides = [
        *ADVERSARIAL, "model.adversarial_from_step=3",
        "model.discriminator_scheduler={name: cosine}",
        "data.validation_fraction=0", "training.accumulate=2", "training.max_epochs=4",
        "compute.precision=bf16",
    ]  # fmt: skip
    train(tiny_config("vqvae"), phantoms, tmp_path / "run", overrides=overrides)
    state = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 8
    assert state["lr_schedulers"][-1]["last_epoch"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_one_discriminator(
    name: str, norm: str, tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    forks.script_together(
        EACH_RANK, tiny_config(name), phantoms, tmp_path / "run", "compute.num_devices=2",
        *ADVERSARIAL, "model.adversarial_from_step=2", f"model.discriminator_norm={norm}",
    )  # fmt: skip
    first, second = (load_file(tmp_path / "run" / f"rank_{i}.safetensors") for i in (0, 1))
    assert any(key.startswith("discriminator.") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("size", [(16, 16), (8, 8, 8)])
def test_the_spectral_term_compares_amplitudes(size: tuple[int, ...]) -> None:
    image = torch.rand(2, 1, *size)
    loss = SpectralLoss(len(size))
    assert loss(image, image) == 0
    moved = image.roll(3, dims=-1)
    assert loss(image, moved) < 1e-12, "a shift changes phases alone"
    other = torch.rand(2, 1, *size)
    axes = tuple(range(2, 2 + len(size)))
    amplitudes = [torch.fft.fftn(signal, dim=axes, norm="ortho").abs() for signal in (image, other)]
    torch.testing.assert_close(loss(image, other), (amplitudes[0] - amplitudes[1]).square().mean())


def test_the_spectral_term_of_an_empty_image_has_a_gradient() -> None:
    reconstructed = torch.zeros(1, 1, 8, 8, requires_grad=True)
    SpectralLoss(2)(reconstructed, torch.ones(1, 1, 8, 8)).backward()
    assert torch.isfinite(reconstructed.grad).all()


def test_missing_perceptual_packages_are_named_before_the_training(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    overrides = ["model.perceptual_weight=0.1"]
    with pytest.raises(FamilyError, match=r"pip install 'synthcube\[perceptual\]'"):
        train(tiny_config("vqvae"), phantoms, tmp_path / "run", overrides=overrides)
    model("vqvae", perceptual_weight=0.1)  # who only samples needs none


@pytest.mark.parametrize("size", [(24, 24), (16, 12, 20)])
def test_the_perceptual_term_grows_with_blur_and_is_not_trained(size: tuple[int, ...]) -> None:
    family = model("vqvae", (16, 16) if len(size) == 2 else (16, 16, 16), perceptual_weight=0.1)
    images = torch.rand(2, 1, *family.image.size) * 2 - 1
    family.loss(batch(images))["loss"].backward()
    assert not any("efficient" in key or "perceptual" in key for key in family.state_dict())
    distance = perceptual.PerceptualDistance()
    image = torch.rand(2, 1, *size) * 2 - 1
    pool = torch.nn.functional.avg_pool2d if len(size) == 2 else torch.nn.functional.avg_pool3d
    distances = [
        float(distance(image, pool(image, k, stride=1, padding=k // 2))) for k in (1, 3, 5)
    ]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]
