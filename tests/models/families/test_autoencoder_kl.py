"""The KL-autoencoder: its terms against references, its tiles against the whole."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from synthcube.models.families import autoencoder_kl
from synthcube.models.families.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from synthcube.models.nets.tiling import reach, windows
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.training.acceleration import recompute_blocks


def image_spec(*size: int) -> ImageSpec:
    eye = tuple(tuple(float(row == column) for column in range(4)) for row in range(4))
    return ImageSpec(
        size=size, channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=eye,
        intensity_range=((0.0, 255.0),), file_format="nii.gz",
    )  # fmt: skip


def batch(images: torch.Tensor) -> Batch:
    number = len(images)
    condition = Condition(values=torch.zeros(number, 0), source=torch.zeros(number, 0))
    return Batch(
        image=images, label=torch.zeros(number).long(), index=torch.arange(number),
        condition=condition,
    )  # fmt: skip


def model(*size: int, **settings: object) -> AutoencoderKL:
    torch.manual_seed(0)
    family = AutoencoderKLConfig(channels=(8, 16, 16), **settings).build(image_spec(*size))
    with torch.no_grad():
        for weight in family.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return family.eval()


def test_the_divergence_is_that_of_torch() -> None:
    mean, std = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.01
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(autoencoder_kl.kl_divergence(mean, std), expected)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    family = model(16, 16, kl_weight=0.01, spectral_weight=0.5)
    terms = family.loss(batch(torch.rand(2, 1, 16, 16)))
    expected = terms["reconstruction"] + 0.01 * terms["kl"] + 0.5 * terms["spectral"]
    torch.testing.assert_close(terms["loss"], expected)


def test_the_latent_is_the_mean_and_no_draw() -> None:
    family = model(16, 16)
    image = torch.rand(2, 1, 16, 16)
    assert torch.equal(family.encode(image), family.encode(image))
    torch.testing.assert_close(family.encode(image), family.network.encode(image)[0])


def test_checkpointed_activations_change_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        family = model(16, 16).train()
        if checkpointed:
            recompute_blocks(family)
        torch.manual_seed(1)
        family.loss(batch(torch.rand(2, 1, 16, 16)))["loss"].backward()
        gradients.append([weight.grad for weight in family.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [(96, 64), (64, 32, 32)])
def test_tiles_decode_to_what_the_whole_does(size: tuple[int, ...]) -> None:
    """Statistics of the norms included: nothing but rounding tells them apart, borders or not."""
    family = model(*size)
    tiled = model(*size, decode_voxels=24 ** len(size))
    latent = torch.randn(2, *family.latent_shape())
    with torch.inference_mode():
        whole, decoded = family.decode(latent), tiled.decode(latent)
        plain = family.network.decode(latent).clamp(-1, 1)
    assert torch.equal(whole, plain)
    assert not torch.equal(decoded, whole), "were there tiles?"
    assert (decoded - whole).abs().max() < 2e-5
    assert not any(module._forward_hooks for module in tiled.modules())


def test_tiles_of_a_smooth_image_have_no_seams() -> None:
    """Second differences along an axis: a jump at a border would stand out among its neighbours."""
    family = model(64, 64, decode_voxels=24**2)
    smooth = torch.linspace(-1, 1, 16).sin().expand(1, 4, 16, 16).contiguous()
    with torch.inference_mode():
        decoded = family.decode(smooth)[0, 0]
        whole = family.network.decode(smooth).clamp(-1, 1)[0, 0]
    jumps, expected = (line.diff(n=2, dim=0).abs().amax(dim=1) for line in (decoded, whole))
    torch.testing.assert_close(jumps, expected, rtol=0, atol=5e-5)


def test_attention_below_the_tiles_is_exact_and_within_them_avoids_them() -> None:
    latent = torch.randn(1, 4, 16, 16)
    for attention_from, are_tiles in ((2, True), (0, False)):
        family = model(64, 64, attention_from=attention_from, decode_voxels=24**2)
        with torch.inference_mode():
            whole, decoded = family.network.decode(latent).clamp(-1, 1), family.decode(latent)
        assert torch.equal(decoded, whole) is not are_tiles
        assert (decoded - whole).abs().max() < 2e-5


def test_the_reach_is_where_the_gradient_ends() -> None:
    """Of the convolutions alone: a group norm reaches everywhere, and is treated apart."""
    family = model(16, 16)
    blocks = family.network.decoder.blocks
    for block in blocks:
        if hasattr(block, "norm1"):
            block.norm1 = block.norm2 = torch.nn.Identity()
    blocks[-2] = torch.nn.Identity()
    x = torch.zeros(1, 4, 31, 31, requires_grad=True)
    y = x
    for block in blocks:
        y = block(y)
    middle = y.shape[-1] // 2
    y[0, 0, middle, middle].backward()
    seen = x.grad[0].abs().sum(dim=(0, 1)).nonzero()
    factor, halo = reach(blocks)
    assert factor == 4
    assert 2 * (halo - 1) < int(seen.max() - seen.min()) <= 2 * halo


@pytest.mark.parametrize(("length", "tile", "halo"), [(64, 20, 3), (17, 16, 2), (16, 16, 5)])
def test_cores_partition_an_axis(length: int, tile: int, halo: int) -> None:
    line = windows(length, tile, halo)
    assert [i for window in line for i in range(window.core_start, window.core_stop)] == [
        *range(length)
    ]
    assert all(window.stop - window.start <= tile for window in line)
    assert all(window.core_start - window.start == halo for window in line[1:])
