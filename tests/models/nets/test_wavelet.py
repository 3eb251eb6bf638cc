"""The Haar transform is exact and orthonormal; a U-Net on its bands makes whole images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from synthcube.models import registry
from synthcube.models.family import size_faults
from synthcube.models.nets import wavelet
from synthcube.models.nets.unet import ConditionalUNet
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec

EYE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 2, 4, 8, 12)])
def test_the_transform_is_orthonormal_and_inverted_exactly(shape, levels: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bands = wavelet.bands_of(x, levels)
    rank, factor = len(shape) - 2, 2**levels
    assert bands.shape[:2] == (shape[0], shape[1] * factor**rank)
    assert bands.shape[2:] == tuple(side // factor for side in shape[2:])
    assert bands.square().sum().item() == pytest.approx(x.square().sum().item())
    torch.testing.assert_close(wavelet.image_of(bands, levels), x)
    ones = wavelet.bands_of(torch.ones(shape), levels)
    torch.testing.assert_close(ones[:, : shape[1]], torch.full_like(ones[:, : shape[1]],
                               (factor**rank) ** 0.5))  # fmt: skip
    assert ones[:, shape[1] :].abs().max() < 1e-6


def test_the_bands_of_a_square_of_four_pixels() -> None:
    square = torch.tensor([[1.0, 2.0], [3.0, 5.0]])[None, None]
    # Rows first: their sums and differences; then the same along the columns.
    assert wavelet.bands_of(square, 1).flatten().tolist() == pytest.approx([5.5, -2.5, -1.5, 0.5])


def image_spec(rank: int, **fields: Any) -> ImageSpec:
    return ImageSpec(
        size=(16, 16, 16)[:rank], channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=EYE,
        intensity_range=((0.0, 255.0),), file_format="nii.gz", **fields,
    )  # fmt: skip


@pytest.mark.parametrize("refinement", [0, 4])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    ("name", "fields"),
    [("rectified_flow", {}), ("ddpm", {"variance": "learned", "sampler": "ddpm"})],
)
def test_a_family_trains_and_draws_on_bands(
    name: str, fields: dict[str, Any], rank: int, refinement: int
) -> None:
    kind = registry.find(name)
    steps = 3 if name == "rectified_flow" else 5
    fields |= {"num_sampling_steps": steps, "wavelet_levels": 1, "refinement_channels": refinement}
    if name == "ddpm":
        fields |= {"num_train_steps": steps}
    config = kind.model_validate(kind.tiny().model_dump() | fields)
    specs = (ConditionSpec(name="Label", kind="class", classes=("a", "b")),)
    image = image_spec(rank, source_channels=(0,), conditions=specs)
    assert config.faults(image) == []
    family = config.build(image)
    assert isinstance(family.network, ConditionalUNet)
    assert family.network.levels == 1
    pictures = torch.rand(2, 2, *image.size) * 2 - 1
    condition = Condition(values=torch.tensor([[0.0], [1.0]]), source=pictures[:, 1:])
    family.loss(
        Batch(
            image=pictures[:, :1], label=torch.zeros(2, dtype=torch.int64), index=torch.arange(2),
            augmented=False, condition=condition,
        )
    )["loss"].backward()  # fmt: skip
    gradients = [weight.grad for weight in family.parameters() if weight.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    family.eval()
    with torch.no_grad():
        assert family.sample(seeds, condition).shape == (2, 1, *image.size)


def test_a_refinement_begins_with_no_correction_and_sees_over_the_edges_of_blocks() -> None:
    kind = registry.find("rectified_flow")
    tiny = kind.tiny().model_dump() | {"wavelet_levels": 1}
    image = image_spec(2)
    torch.manual_seed(0)
    plain = kind.model_validate(tiny | {"refinement_channels": 0}).build(image).network
    network = kind.model_validate(tiny | {"refinement_channels": 4}).build(image).network
    refinement = network.refinement
    others = {name for name in network.state_dict() if not name.startswith("refinement.")}
    assert others == set(plain.state_dict())
    x_t, time = torch.randn(1, 1, 16, 16), torch.tensor([300.0])
    condition = Condition(values=torch.zeros(1, 0), source=torch.zeros(1, 0, 16, 16))
    # MONAI's last layer begins at zero too.
    assert network(x_t, time, condition).abs().max() == 0
    torch.nn.init.normal_(refinement.last.weight)
    one = torch.zeros(1, 1, 16, 16)
    one[0, 0, 7, 7] = 1  # the last voxel of its block
    changed = network(x_t + one, time, condition) - network(x_t, time, condition)
    seen = changed[0, 0].abs().nonzero()
    assert seen.min().item() == 4  # three layers of three voxels
    assert seen.max().item() == 10
    torch.nn.init.normal_(refinement.modulation.weight)
    early, late = (network(x_t, torch.tensor([t]), condition) for t in (100.0, 900.0))
    assert not torch.allclose(early, late, atol=1e-3)


def test_the_bands_of_images_come_before_those_of_sources() -> None:
    """As in weights that were trained before."""
    kind = registry.find("rectified_flow")
    fields = kind.tiny().model_dump() | {"wavelet_levels": 1}
    image = image_spec(2, source_channels=(0,))
    network = kind.model_validate(fields).build(image).network
    seen = []
    network.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t, source = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    network(x_t, torch.ones(2), Condition(values=torch.zeros(2, 0), source=source))
    expected = torch.cat([wavelet.bands_of(x_t, 1), wavelet.bands_of(source, 1)], dim=1)
    assert torch.equal(seen[0], expected)


def test_a_refined_network_without_sources_draws() -> None:
    """A request without sources has none of (B, 0), not of (B, 0, *spatial)."""
    kind = registry.find("rectified_flow")
    fields = {"wavelet_levels": 1, "refinement_channels": 4}
    family = kind.model_validate(kind.tiny().model_dump() | fields).build(image_spec(2))
    condition = Condition(values=torch.zeros(1, 0), source=torch.zeros(1, 0))
    with torch.no_grad():
        drawn = family.sample([torch.Generator().manual_seed(1)], condition)
    assert drawn.shape == (1, 1, 16, 16)


def test_a_refinement_without_wavelets_is_named() -> None:
    kind = registry.find("rectified_flow")
    config = kind.model_validate(
        kind.tiny().model_dump() | {"wavelet_levels": 0, "refinement_channels": 4}
    )
    assert config.faults(image_spec(2)) == [
        "model.refinement_channels: it belongs to model.wavelet_levels; leave it out"
    ]


def test_a_size_that_cannot_be_halved_so_often_is_named() -> None:
    kind = registry.find("rectified_flow")
    config = kind.model_validate(
        kind.tiny().model_dump() | {"channels": (8, 8, 8), "wavelet_levels": 3}
    )
    image = image_spec(2)
    assert config.faults(image) == size_faults(
        image, 32, 6, key="model.channels with model.wavelet_levels"
    )
    assert "[16, 16]: every side must be a multiple of 32" in config.faults(image)[0]
