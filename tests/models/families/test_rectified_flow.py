"""A flow that starts at its source image, and one that is a regression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthcube.errors import ConfigError
from synthcube.models.families.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec

SIZE = (8, 8)


def image_spec(channels: int = 1, sources: int = 1) -> ImageSpec:
    return ImageSpec(
        size=SIZE, channels=channels, source_channels=tuple(range(sources)), file_format="png",
        spacing_mm=(1.0, 1.0, 1.0), affine=tuple(tuple(row) for row in torch.eye(4).tolist()),
        intensity_range=((0.0, 255.0),) * channels,
    )  # fmt: skip


def config(**fields: Any) -> RectifiedFlowConfig:
    tiny = RectifiedFlowConfig.tiny()
    return RectifiedFlowConfig.model_validate(tiny.model_dump() | fields)


class Recorder(nn.Module):
    """A network that keeps what it was called with, and predicts what it is told."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x_t.clone(), time.clone()))
        answer: Tensor = self.answer(x_t, condition)
        return answer


def batch(sources: int = 1) -> Batch:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1 + sources, *SIZE, generator=random) * 2 - 1
    condition = Condition(values=torch.zeros(64, 0), source=images[:, 1:])
    return Batch(
        image=images[:, :1], label=torch.zeros(64, dtype=torch.int64), index=torch.arange(64),
        augmented=False, condition=condition,
    )  # fmt: skip


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_a_flow_that_starts_at_its_source_is_on_the_line_between_the_two() -> None:
    family = RectifiedFlow(config(start="source"), image_spec(sources=2))
    examples = batch(sources=2)
    image, first = examples["image"], examples["condition"]["source"][:, :1]
    family.network = network = Recorder(lambda x_t, condition: condition["source"][:, :1] - image)
    assert family.loss(examples)["loss"].item() == pytest.approx(0, abs=1e-12)
    ((x_t, time),) = network.calls
    t = (time / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(x_t, (1 - t) * image + t * first, atol=1e-6)
    assert t.std() > 0.1


@pytest.mark.parametrize(("sampler", "tolerance"), [("dpm-solver++", 3e-3), ("euler", 1e-5)])
def test_images_of_a_flow_with_the_true_velocity_are_the_true_images(
    sampler: str, tolerance: float
) -> None:
    """The first time of dpm-solver++ is 0.999 in place of 1."""
    family = RectifiedFlow(config(start="source", sampler=sampler), image_spec())
    examples = batch()
    image, source = examples["image"][:3], examples["condition"]["source"][:3]
    family.network = network = Recorder(lambda x_t, condition: source - image)
    condition = Condition(values=torch.zeros(3, 0), source=source)
    drawn = family.sample(seeds(1, 2, 3), condition)
    assert torch.equal(network.calls[0][0], source)
    assert torch.allclose(drawn, image, atol=tolerance)


@pytest.mark.parametrize("start_noise", [0.0, 0.3])
def test_seeds_matter_only_with_noise_at_the_start(start_noise: float) -> None:
    family = RectifiedFlow(config(start="source", start_noise=start_noise), image_spec())
    family.network = network = Recorder(lambda x_t, condition: x_t * 0)
    source = torch.rand(1, 1, *SIZE).expand(400, -1, -1, -1) * 0.1
    family.sample(seeds(*range(400)), Condition(values=torch.zeros(400, 0), source=source))
    spread = network.calls[0][0].std(dim=0).mean().item()
    assert spread == pytest.approx(start_noise, abs=0.01)


@pytest.mark.parametrize("start", ["noise", "source"])
def test_a_regression_calls_the_network_once_at_the_end_of_the_flow(start: str) -> None:
    family = RectifiedFlow(config(mode="regression", start=start), image_spec())
    examples = batch()
    source = examples["condition"]["source"]
    begin = source if start == "source" else torch.zeros_like(source)
    family.network = network = Recorder(lambda x_t, condition: 0.25 * condition["source"])
    expected = (0.25 * source - (begin - examples["image"])).square().mean()
    assert family.loss(examples)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    drawn = family.sample(seeds(*range(64)), examples["condition"])
    assert len(network.calls) == 2
    for x_t, time in network.calls:
        assert torch.equal(x_t, begin)
        assert (time == 1000).all()
    assert torch.allclose(drawn, begin - 0.25 * source, atol=1e-6)


def test_what_does_not_fit_is_named() -> None:
    assert config(start="source").faults(image_spec(channels=2)) == [
        "model.start source: it needs as many source channels as are generated, 2; "
        "data.source_channels names 1"
    ]
    assert config(mode="regression").faults(image_spec(sources=0)) == [
        "model.mode regression: it makes images out of others, and data.source_channels names none"
    ]
    assert config(start_noise=0.1).faults(image_spec()) == [
        "model.start_noise: it belongs to start: source; leave it out"
    ]
    assert config(mode="regression", start="source").faults(image_spec(sources=2)) == []


def test_a_regression_has_no_sampler_and_no_steps() -> None:
    regression = config(mode="regression")
    assert regression.sampling() == {"guidance": 1.0}
    with pytest.raises(ConfigError, match=r"one step and no sampler: leave out sampling\.steps"):
        regression.with_sampling({"steps": 5})
    assert regression.with_sampling({"guidance": 2.0}).guidance == 2.0
    assert config().with_sampling({"steps": 5}).num_sampling_steps == 5


@pytest.mark.parametrize(
    ("size", "fields", "classes", "groups", "refinement"),
    [
        ((16, 16), {}, (), 32, 16),
        ((16, 16), {}, ("a", "b"), 8, 16),
        ((16, 16), {"num_norm_groups": 16}, ("a", "b"), 16, 16),
        ((16, 16, 16), {}, (), 32, 8),
        ((16, 16), {"wavelet_levels": 0}, (), 32, None),
        ((16, 16), {"refinement_channels": 0}, (), 32, None),
    ],
)
def test_defaults_follow_rank_and_conditions(
    size: tuple[int, ...], fields: dict[str, Any], classes: tuple[str, ...], groups: int,
    refinement: int | None,
) -> None:  # fmt: skip
    named = (ConditionSpec(name="Label", kind="class", classes=classes),) if classes else ()
    image = image_spec(sources=0).model_copy(update={"size": size, "conditions": named})
    network = RectifiedFlowConfig(**fields).build(image).network
    norms = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    assert norms == {groups}
    width = network.refinement.stem.weight.shape[0] if network.refinement else None
    assert width == refinement
