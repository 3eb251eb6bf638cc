"""One contract over every registered family, in 2D and 3D: a new family is tested by existing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from synthcube.models import registry
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family, FamilyConfig, Reconstructs, Samples
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec

EYE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


CONDITIONS = (
    ConditionSpec(name="Label", kind="class", classes=("disc", "ring", "square")),
    ConditionSpec(name="Age", kind="number", low=20, high=80),
)


def image_spec(rank: int, channels: int = 1, **extra: Any) -> ImageSpec:
    return ImageSpec(
        size=(16, 16, 16)[:rank],
        channels=channels,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=EYE,
        intensity_range=((0.0, 255.0),) * channels,
        file_format="nii.gz",
        **extra,
    )


def batch(image: ImageSpec, number: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (number, image.channels + len(image.source_channels), *image.size)
    images = torch.rand(shape, generator=generator) * 2 - 1
    numbers = torch.tensor([[i % 3, i / number - 0.5] for i in range(number)])
    values = numbers[:, : len(image.conditions)]
    reconstructed = images[:, : image.channels]
    return Batch(
        image=reconstructed,
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.arange(number),
        augmented=False,
        condition=Condition(values=values, source=images[:, image.channels :]),
    )


def rows(condition: Condition, chosen: list[int]) -> Condition:
    return Condition(values=condition["values"][chosen], source=condition["source"][chosen])


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


@pytest.fixture(params=["2D", "3D", "2D conditional", "3D conditional"])
def image(request: pytest.FixtureRequest) -> ImageSpec:
    rank = 2 if "2D" in request.param else 3
    return image_spec(rank, conditions=CONDITIONS if "conditional" in request.param else ())


@pytest.fixture
def family(config: FamilyConfig, image: ImageSpec) -> Family:
    assert config.faults(image) == []
    torch.manual_seed(0)
    return config.build(image)


def losses(family: Family, examples: Batch) -> list[dict[str, torch.Tensor]]:
    """What is trained, in the order in which it is."""
    if isinstance(family, AdversarialFamily) and family.discriminator is not None:
        terms, generated = family.generator_loss(examples)
        return [terms, family.discriminator_loss(examples, generated.detach())]
    return [family.loss(examples)]


def test_two_steps_change_every_trained_weight_and_stay_finite(family: Family) -> None:
    perturbed(family).train()
    examples = batch(family.image, 4)
    before = {name: weight.clone() for name, weight in family.named_parameters()}
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        trained = losses(family, examples)
        sum(terms["loss"] for terms in trained).backward()
        optimizer.step()
        for terms in trained:
            assert all(torch.isfinite(value).all() and value.ndim == 0 for value in terms.values())
    unchanged = [
        name
        for name, weight in family.named_parameters()
        if weight.requires_grad and torch.equal(weight, before[name])
    ]
    assert unchanged == []
    assert torch.isfinite(family.eval().loss(examples)["loss"]), "what is validated"


def test_conditions_change_the_image(family: Family) -> None:
    if not (isinstance(family, Samples) and family.image.conditions):
        return
    perturbed(family)
    condition = batch(family.image)["condition"]
    with torch.inference_mode():
        one, other = (family.sample(generators([1]), rows(condition, [row])) for row in (0, 1))
    assert (one - other).abs().max() > 1e-4


def test_samples_are_deterministic_and_independent_of_the_batch(family: Family) -> None:
    if not isinstance(family, Samples):
        assert isinstance(family, Reconstructs), "a family must be able to do something"
        return
    perturbed(family)
    condition = batch(family.image)["condition"]
    with torch.inference_mode():
        together = family.sample(generators([1, 2, 3]), condition)
        alone = torch.cat(
            [family.sample(generators([i + 1]), rows(condition, [i])) for i in range(3)]
        )
        turned = family.sample(generators([3, 1, 2]), rows(condition, [2, 0, 1]))[[1, 2, 0]]
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
        reconstructed = family.reconstruct(images)
        alone = torch.cat([family.reconstruct(single[None]) for single in images])
    assert reconstructed.shape == images.shape
    assert reconstructed.abs().max() <= 1
    torch.testing.assert_close(alone, reconstructed, rtol=0, atol=1e-5)


def test_weights_survive_safetensors(family: Family, config: FamilyConfig) -> None:
    perturbed(family)
    twin = config.build(family.image).eval()
    stored = save({name: value.contiguous() for name, value in family.state_dict().items()})
    twin.load_state_dict(load(stored), strict=True)
    with torch.inference_mode():
        if isinstance(family, Samples):
            condition = rows(batch(family.image)["condition"], [0])
            one, other = (sampler.sample(generators([5]), condition) for sampler in (twin, family))
            assert torch.equal(one, other)
        if isinstance(family, Reconstructs):
            images = batch(family.image)["image"]
            assert torch.equal(twin.reconstruct(images), family.reconstruct(images))


def test_two_channels_train(config: FamilyConfig) -> None:
    image = image_spec(2, channels=2)
    family = config.build(image)
    assert all(torch.isfinite(terms["loss"]) for terms in losses(family, batch(image, 4)))


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


@pytest.mark.parametrize("name", registry.names())
def test_a_rate_alone_keeps_the_familys_optimizer(name: str) -> None:
    kind = registry.find(name)
    for field, info in kind.model_fields.items():
        if field.endswith("optimizer"):
            default = info.default.model_dump()
            changed = kind.model_validate({"name": name, field: {"lr": 0.5}})
            assert getattr(changed, field).model_dump() == {**default, "lr": 0.5}
