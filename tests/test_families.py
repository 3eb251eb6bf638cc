"""One contract over every registered family, in 2D and 3D: a new family is tested by existing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from synthcube import registry
from synthcube.family import Family, FamilyConfig, Reconstructs, Samples
from synthcube.schema import Batch, ImageSpec

EYE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def image_spec(rank: int, channels: int = 1) -> ImageSpec:
    return ImageSpec(
        size=(16, 16, 16)[:rank],
        channels=channels,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=EYE,
        intensity_range=((0.0, 255.0),) * channels,
        file_format="nii.gz",
    )


def batch(image: ImageSpec, number: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (number, image.channels, *image.size)
    return Batch(
        image=torch.rand(shape, generator=generator) * 2 - 1,
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.arange(number),
    )


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def perturbed(family: Family) -> Family:
    """Networks start with zeroed outputs, behind which mistakes would hide."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in family.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return family.eval()


@pytest.fixture(params=registry.names())
def config(request: pytest.FixtureRequest) -> FamilyConfig:
    return registry.find(request.param).tiny()


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def image(request: pytest.FixtureRequest) -> ImageSpec:
    return image_spec(request.param)


@pytest.fixture
def family(config: FamilyConfig, image: ImageSpec) -> Family:
    assert config.faults(image) == []
    torch.manual_seed(0)
    return config.build(image)


def test_two_steps_change_every_trained_weight_and_stay_finite(family: Family) -> None:
    perturbed(family).train()
    before = {name: weight.clone() for name, weight in family.named_parameters()}
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        terms = family.loss(batch(family.image))
        terms["loss"].backward()
        optimizer.step()
        assert all(torch.isfinite(value).all() and value.ndim == 0 for value in terms.values())
    unchanged = [
        name
        for name, weight in family.named_parameters()
        if weight.requires_grad and torch.equal(weight, before[name])
    ]
    assert unchanged == []


def test_samples_are_deterministic_and_independent_of_the_batch(family: Family) -> None:
    if not isinstance(family, Samples):
        assert isinstance(family, Reconstructs), "a family must be able to do something"
        return
    perturbed(family)
    with torch.inference_mode():
        together = family.sample(generators([1, 2, 3]))
        alone = torch.cat([family.sample(generators([seed])) for seed in (1, 2, 3)])
        turned = family.sample(generators([3, 1, 2]))[[1, 2, 0]]
    assert together.shape == (3, 1, *family.image.size)
    assert together.min() >= -1
    assert together.max() <= 1
    assert (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)
    torch.testing.assert_close(turned, together, rtol=0, atol=2e-5)


def test_reconstructions_have_the_shape_and_range_of_their_images(family: Family) -> None:
    if not isinstance(family, Reconstructs):
        assert isinstance(family, Samples), "a family must be able to do something"
        return
    perturbed(family)
    images = batch(family.image)["image"]
    with torch.inference_mode():
        made = family.reconstruct(images)
        alone = torch.cat([family.reconstruct(each[None]) for each in images])
    assert made.shape == images.shape
    assert made.abs().max() <= 1
    torch.testing.assert_close(alone, made, rtol=0, atol=1e-5)


def test_weights_survive_safetensors(family: Family, config: FamilyConfig) -> None:
    perturbed(family)
    twin = config.build(family.image).eval()
    stored = save({name: value.contiguous() for name, value in family.state_dict().items()})
    twin.load_state_dict(load(stored), strict=True)
    with torch.inference_mode():
        if isinstance(family, Samples):
            assert torch.equal(twin.sample(generators([5])), family.sample(generators([5])))
        if isinstance(family, Reconstructs):
            images = batch(family.image)["image"]
            assert torch.equal(twin.reconstruct(images), family.reconstruct(images))


def test_two_channels_train(config: FamilyConfig) -> None:
    image = image_spec(2, channels=2)
    assert torch.isfinite(config.build(image).loss(batch(image))["loss"])


def test_config_survives_a_dump(config: FamilyConfig) -> None:
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_every_field_is_described(config: FamilyConfig) -> None:
    bare = [name for name, field in type(config).model_fields.items() if not field.description]
    assert bare == []
    assert type(config).summary


def test_name_is_the_modules(config: FamilyConfig) -> None:
    assert type(config).__module__.rpartition(".")[2] == config.name


def test_sizes_that_do_not_fit_are_explained(config: FamilyConfig, image: ImageSpec) -> None:
    odd = image.model_copy(update={"size": (15, 16, 16)[: image.rank]})
    assert "multiple of" in config.faults(odd)[0]
