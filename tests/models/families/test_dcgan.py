"""The networks of dcgan against their papers, and that its conditions are followed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from synthcube import reading
from synthcube.data.images import read_image, write_image
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.models.families.dcgan import DCGAN, DCGANConfig
from synthcube.schema import ConditionSpec, ImageSpec
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

EYE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
CONDITIONS = (
    ConditionSpec(name="Label", kind="class", classes=("disc", "ring", "square")),
    ConditionSpec(name="Age", kind="number", low=20, high=80),
)


def image_spec(*size: int, **extra: Any) -> ImageSpec:
    return ImageSpec(
        size=size, channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=EYE,
        intensity_range=((0.0, 255.0),), file_format="nii.gz", **extra,
    )  # fmt: skip


def tiny(*size: int, conditions: Any = CONDITIONS, **settings: Any) -> DCGAN:
    torch.manual_seed(0)
    settings = {"latent_dim": 8, "channels": (8, 16), "discriminator_channels": (8, 16)} | settings
    return DCGANConfig(**settings).build(image_spec(*size, conditions=conditions))


def test_the_default_is_the_predecessors_but_for_its_superfluous_layers() -> None:
    """64x64: 512-256-128-64 channels and back; its smoothing after an upsampling is left out."""
    family = DCGANConfig().build(image_spec(64, 64))
    convolutions = 16 * (64 + 64 * 128 + 128 * 256 + 256 * 512)
    weights = convolutions + 100 * 512 * 16 + 2 * (512 + 256 + 128 + 64) + 1
    judged = convolutions + 64 + 512 * 16 + 1 + 2 * (128 + 256 + 512)
    numbers = [
        sum(weight.numel() for weight in network.parameters())
        for network in (family.generator, family.discriminator)
    ]
    assert numbers == [weights, judged]


@pytest.mark.parametrize("size", [(24, 40), (16, 24, 32)])
def test_every_level_doubles_from_a_start_that_fits(size: tuple[int, ...]) -> None:
    family = tiny(*size, conditions=())
    sizes: list[tuple[int, ...]] = []
    for layer in family.generator.doublings:
        layer.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[2:]))
    images = family.generator(torch.randn(2, 8), torch.zeros(2, 0))
    assert family.generator.start == tuple(side // 4 for side in size)
    assert sizes == [tuple(side // 2 for side in size), size]
    assert images.shape == (2, 1, *size)
    assert not [module for module in family.modules() if isinstance(module, nn.Upsample)]


def test_weights_start_as_in_the_paper() -> None:
    family = DCGANConfig().build(image_spec(64, 64))
    for name, weight in family.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
            continue
        mean = 1.0 if ".norms." in name else 0.0
        error = 4 * 0.02 / math.sqrt(weight.numel())
        assert weight.mean().item() == pytest.approx(mean, abs=error), name
        assert weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(weight.numel())), name


def test_conditions_scale_and_shift_the_norm() -> None:
    norm = tiny(16, 16).generator.norms[0]
    x, embedded = torch.randn(5, 16, 4, 4), torch.randn(5, 128)
    scale, shift = norm.affine(embedded)[..., None, None].chunk(2, dim=1)
    expected = (1 + scale) * functional.batch_norm(x, None, None, training=True) + shift
    torch.testing.assert_close(norm(x, embedded), expected)


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_the_discriminator_projects_features_on_conditions(size: tuple[int, ...]) -> None:
    judge = tiny(*size, discriminator_norm="none").discriminator
    images, values = torch.randn(3, 1, *size), torch.tensor([[0, 0.5], [1, -1], [2, math.nan]])
    features: list[torch.Tensor] = []
    judge.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        judged = judge(images, values)
        plain = features[0] @ judge.head.weight[0] + judge.head.bias
        embedded = functional.layer_norm(judge.embed[0](values), (128,))
        projected = torch.einsum("bf,fe,be->b", features[0], judge.project.weight, embedded)
    torch.testing.assert_close(judged, plain + projected)
    assert projected.abs().min() > 0


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_spectral_norm_holds_every_layer_of_the_discriminator(size: tuple[int, ...]) -> None:
    family = tiny(*size, spectral_norm=True, discriminator_norm="none")
    judge = family.train().discriminator
    values = torch.tensor([[0.0, 0.5], [1, -1]])
    for _ in range(200):
        judge(torch.randn(2, 1, *size), values)
    held = [module for module in judge.modules() if hasattr(module, "parametrizations")]
    assert len(held) == 2 + 1 + 1 + 3, "convolutions, head, projection, embeddings"
    for layer in held:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
        assert largest == pytest.approx(1, rel=0.02)
    assert not [
        module for module in family.generator.modules() if hasattr(module, "parametrizations")
    ]


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares"])
def test_norms_and_losses_train(norm: Any, loss: Any) -> None:
    family = tiny(16, 16, norm=norm, discriminator_norm=norm, adversarial_loss=loss)
    batch: Any = {
        "image": torch.rand(4, 1, 16, 16) * 2 - 1,
        "condition": {"values": torch.zeros(4, 2), "source": torch.zeros(4, 0, 16, 16)},
        "index": torch.arange(4),
    }
    terms, generated = family.generator_loss(batch)
    judged = family.discriminator_loss(batch, generated.detach())
    (terms["loss"] + judged["loss"]).backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in family.parameters()
    )


def test_the_validated_distance_is_the_same_at_every_look() -> None:
    family = tiny(16, 16, conditions=()).eval()
    batch: Any = {
        "image": torch.rand(4, 1, 16, 16) * 2 - 1,
        "condition": {"values": torch.zeros(4, 0), "source": torch.zeros(4, 0, 16, 16)},
        "index": torch.arange(4),
    }
    one = family.loss(batch)["loss"]
    torch.manual_seed(99)
    assert torch.equal(family.loss(batch)["loss"], one)
    black = batch | {"image": torch.full((4, 1, 16, 16), -1.0)}
    assert family.loss(black)["loss"] > one


def test_what_cannot_be_made_is_said() -> None:
    config = DCGANConfig()
    assert config.faults(image_spec(64, 96)) == []
    (fault,) = DCGANConfig(discriminator_channels=(8, 8)).faults(image_spec(64, 24))
    assert "every side must be a multiple of 16" in fault
    assert "model.channels has 4 levels" in fault
    (fault,) = DCGANConfig(discriminator_channels=(8, 8)).faults(image_spec(16, 16))
    assert "at least 32" in fault, "one voxel cannot be normalised"
    (fault,) = config.faults(image_spec(64, 64, source_channels=(0,)))
    assert "out of noise alone" in fault


def draw(folder: Path, rank: int) -> None:
    """A bright half, the first or the last by class, as bright as the number says."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(128):
        level = 80 + 160 * torch.rand((), generator=generator).item()
        size = (16, 16) if rank == 2 else (16, 8, 8)
        image = torch.randn(1, *size, generator=generator) * 3 + 20
        image[:, slice(8) if index % 2 == 0 else slice(8, 16)] += level - 20
        name = f"{index}.png" if rank == 2 else f"{index}.nii.gz"
        write_image(folder / name, image.clamp(0, 255), torch.eye(4).numpy(), integer=True)
        rows.append({"Channel_0": name, "SubjectID": str(index),
                     "Half": ("first", "last")[index % 2], "Level": f"{level:.2f}"})  # fmt: skip
    write_manifest(folder / "manifest.csv", rows)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3])
def test_sampled_images_follow_class_and_number(rank: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    draw(tmp_path / "data", rank)
    values = {
        "seed": 3,  # with seed 0 the game is lost on some processors
        "model": {"name": "dcgan", "latent_dim": 8, "channels": [16, 32],
                  "discriminator_channels": [16, 32]},
        "data": {"conditions": {"Half": "class", "Level": "number"},
                 "intensity_range": [0, 255], "validation_fraction": 0.125},
        "training": {"max_epochs": 60 if rank == 2 else 90, "batch_size": 8,
                     "sample_every_n_epochs": 0, "ema": {"decay": 0.99}},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(reading.dump(values), encoding="utf-8")
    train(tmp_path / "run.yaml", tmp_path / "data", tmp_path / "run")
    infer(InferRequest(tmp_path / "run", tmp_path / "out", num_images=64))
    asked, measured, right = [], [], []
    for row in read_manifest(tmp_path / "out").rows:
        image = read_image(row.channels).tensor.float()
        first, last = image[:, :8].mean().item(), image[:, 8:].mean().item()
        bright, dark = (first, last) if row.conditions["Half"] == "first" else (last, first)
        right.append(bright > dark)
        asked.append(float(row.conditions["Level"]))
        measured.append(bright)
    together = torch.corrcoef(torch.tensor([asked, measured]))[0, 1].item()
    error = (torch.tensor(asked) - torch.tensor(measured)).abs().mean().item()
    print(f"correlation {together:.3f}, mean error {error:.1f} of levels 80 to 240")
    assert sum(right) >= 62
    assert together > 0.9
    assert error < 20
