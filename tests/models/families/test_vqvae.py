"""The VQ-VAE and VQ-GAN: codebook, codes and usage against computations by hand."""

from __future__ import annotations

import math

import pytest
import torch

from synthcube.models.families.vqvae import VQVAE, VQVAEConfig, codebook_usage
from synthcube.schema import Batch, Condition, ImageSpec

EYE = tuple(tuple(float(row == column) for column in range(4)) for row in range(4))


def model(*size: int, **settings: object) -> VQVAE:
    image = ImageSpec(
        size=size, channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=EYE,
        intensity_range=((0.0, 255.0),), file_format="nii.gz",
    )  # fmt: skip
    torch.manual_seed(0)
    tiny = VQVAEConfig.tiny().model_copy(update=settings)
    return tiny.build(image)


def batch(images: torch.Tensor) -> Batch:
    number = len(images)
    condition = Condition(values=torch.zeros(number, 0), source=torch.zeros(number, 0))
    return Batch(
        image=images, label=torch.zeros(number).long(), index=torch.arange(number),
        condition=condition,
    )  # fmt: skip


def test_usage_is_that_of_a_hand() -> None:
    """Codes 0, 0, 1, 3 of 5: shares 1/2, 1/4, 0, 1/4, 0; entropy 3/2 bits, so 2^1.5 codes."""
    perplexity, used = codebook_usage(torch.tensor([[0, 0], [1, 3]]), 5)
    assert float(perplexity) == pytest.approx(2**1.5)
    assert float(used) == pytest.approx(3 / 5)


@pytest.mark.parametrize("codes", [torch.zeros(2, 3).long(), torch.arange(8)[None]])
def test_usage_at_its_ends(codes: torch.Tensor) -> None:
    perplexity, used = codebook_usage(codes, 8)
    expected = len(codes.unique())
    assert (float(perplexity), float(used)) == pytest.approx((expected, expected / 8))


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_codes_are_the_nearest_and_decode_to_the_reconstruction(size: tuple[int, ...]) -> None:
    family = model(*size).eval()
    images = torch.rand(2, 1, *size) * 2 - 1
    with torch.inference_mode():
        latent, codes = family.encode(images), family.encode_codes(images)
        table = family.network.quantizer.quantizer.embedding.weight
        distances = (latent.movedim(1, -1)[..., None, :] - table).square().sum(dim=-1)
        assert torch.equal(codes, distances.argmin(dim=-1))
        assert codes.shape == (2, *family.code_shape())
        assert codes.dtype == torch.int64
        assert latent.shape == (2, *family.latent_shape())
        assert torch.equal(family.decode_codes(codes), family.reconstruct(images))
        assert torch.equal(family.decode(latent), family.reconstruct(images))


def test_looking_at_codes_leaves_the_codebook_alone() -> None:
    family = model(16, 16).train()
    before = {name: value.clone() for name, value in family.state_dict().items()}
    family.encode_codes(torch.rand(2, 1, 16, 16))
    family.reconstruct(torch.rand(2, 1, 16, 16))
    assert all(torch.equal(before[name], value) for name, value in family.state_dict().items())


def test_the_codebook_moves_as_in_the_paper() -> None:
    """N <- d N + (1 - d) n, m <- d m + (1 - d) sum z, e = m / N (appendix A.1)."""
    family = model(16, 16, revive_below=0.0, num_embeddings=4).train()
    quantizer = family.network.quantizer.quantizer
    quantizer.ema_cluster_size.fill_(10.0)
    quantizer.ema_w.copy_(quantizer.embedding.weight * 10)
    size, sums = quantizer.ema_cluster_size.clone(), quantizer.ema_w.clone()
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        z = family.encode(images).movedim(1, -1).reshape(-1, 4)
        codes = family.encode_codes(images).flatten()
        family.loss(batch(images))
    for code in range(4):
        own = z[codes == code]
        n = 0.99 * size[code] + 0.01 * len(own)
        total = 0.99 * sums[code] + 0.01 * own.sum(dim=0)
        torch.testing.assert_close(quantizer.ema_cluster_size[code], n)
        torch.testing.assert_close(
            quantizer.embedding.weight[code], total / n, rtol=1e-4, atol=1e-5
        )


def test_an_unused_code_is_put_on_an_output_of_the_encoder() -> None:
    family = model(16, 16, num_embeddings=4).train()
    quantizer = family.network.quantizer.quantizer
    quantizer.ema_cluster_size.copy_(torch.tensor([5.0, 0.01, 5.0, 5.0]))
    before = quantizer.embedding.weight.clone()
    z = torch.randn(2, 4, 4, 4)
    family._revive_codes(z)
    after = quantizer.embedding.weight
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    outputs = z.movedim(1, -1).reshape(-1, 4)
    assert (outputs == after[1]).all(dim=1).any()


def test_usage_is_logged_beside_the_loss() -> None:
    with torch.no_grad():
        terms = model(16, 16).eval().loss(batch(torch.rand(2, 1, 16, 16)))
    assert 1 <= float(terms["perplexity"]) <= 8
    assert 1 / 8 <= float(terms["codes_used"]) <= 1
    assert math.isclose(
        float(terms["loss"]), float(terms["reconstruction"] + terms["commitment"]), rel_tol=1e-6
    )
