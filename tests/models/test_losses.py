"""Losses by name: each one builds and teaches, and what cannot is refused before a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from synthcube import plugins
from synthcube.models import artifact, registry
from synthcube.models.losses import (
    UNUSABLE_LOSSES,
    LossConfig,
    WeightedLosses,
    known_losses,
    loss_faults,
)
from synthcube.schema import Batch, Condition, ImageSpec

SIZE = (16, 16)
AXES = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
Tensors = tuple[torch.Tensor, torch.Tensor]


def image_spec(*size: int, channels: int = 1) -> ImageSpec:
    return ImageSpec(
        size=size,
        channels=channels,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=AXES,
        intensity_range=((0.0, 255.0),) * channels,
        file_format="png",
    )


def images(prediction: torch.Tensor) -> Tensors:
    return prediction, torch.linspace(-1, 1, prediction.numel()).view_as(prediction)


def masks(prediction: torch.Tensor) -> Tensors:
    halves = (
        torch.arange(prediction.shape[-1]).expand(prediction[:, 0].shape)
        >= prediction.shape[-1] // 2
    )
    return prediction.sigmoid(), torch.stack([halves, ~halves], dim=1).float()


def signs(prediction: torch.Tensor) -> Tensors:
    return prediction, masks(prediction)[1] * 2 - 1


def classes(prediction: torch.Tensor) -> Tensors:
    return prediction.log_softmax(1), masks(prediction)[1][:, 0].long()


def labels(prediction: torch.Tensor) -> Tensors:
    return prediction.softmax(1), masks(prediction)[1][:, :1]


def shares(prediction: torch.Tensor) -> Tensors:
    return prediction.log_softmax(1), masks(prediction)[1] * 0.8 + 0.1


def vectors(prediction: torch.Tensor) -> Tensors:
    prediction = prediction.flatten(1)[:, :8]
    return prediction, torch.linspace(-1, 1, 32).view(4, 8).roll(3, 1)


def single_classes(prediction: torch.Tensor) -> Tensors:
    return prediction.mean((2, 3)), torch.tensor([0, 1, 1, 0])


def class_lists(prediction: torch.Tensor) -> Tensors:
    return prediction.mean((2, 3)), torch.tensor([[0, -1], [1, -1]] * 2)


def boxes(prediction: torch.Tensor) -> Tensors:
    corner = prediction.mean((2, 3))
    return torch.cat([corner, corner + 2], 1), torch.tensor([[0.5, 0.5, 3.0, 3.0]] * 4)


# What a loss is for, where it is not for real-valued images.
KINDS: dict[str, Callable[[torch.Tensor], Tensors]] = {
    **dict.fromkeys(["bce", "BCELoss", "BoundaryLoss", "HausdorffDTLoss"], masks),
    **dict.fromkeys(["LogHausdorffDTLoss", "MCCLoss", "TverskyLoss", "FocalLoss"], masks),
    **dict.fromkeys([name for name in known_losses() if "dice" in name.lower()], masks),
    **dict.fromkeys(["bcelogits", "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"], masks),
    **dict.fromkeys(["SoftclDiceLoss", "AsymmetricUnifiedFocalLoss"], masks),
    **dict.fromkeys(["cel", "CrossEntropyLoss", "NLLLoss", "NACLLoss"], classes),
    **dict.fromkeys(["GeneralizedWassersteinDiceLoss", "generalized_wasserstein_dice"], labels),
    **dict.fromkeys(["HingeEmbeddingLoss", "SoftMarginLoss"], signs),
    **dict.fromkeys(["BarlowTwinsLoss", "ContrastiveLoss"], vectors),
    **dict.fromkeys(["BoxGIoULoss", "giou"], boxes),
    "KLDivLoss": shares,
    "MultiMarginLoss": single_classes,
    "MultiLabelMarginLoss": class_lists,
}
DISTANCES = {"dist_matrix": [[0, 1], [1, 0]]}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "GeneralizedWassersteinDiceLoss": DISTANCES,
    "generalized_wasserstein_dice": DISTANCES,
    "KLDivLoss": {"reduction": "batchmean"},
    "NACLLoss": {"classes": 2, "dim": 2},
}


@pytest.mark.parametrize("name", known_losses())
def test_every_name_builds_and_teaches(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(2, 2, 3, padding=1)
    x = torch.rand(4, 2, *SIZE)
    config = LossConfig(name=name, **ARGUMENTS.get(name, {}))
    loss = config.build(spatial_dims=2)
    compared = KINDS.get(name, images)

    def value() -> torch.Tensor:
        result: torch.Tensor = loss(*compared(model(x)))
        return result

    before = value()
    assert before.shape == ()
    before.backward()
    length = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    assert 0 < length < float("inf")
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 1e-3 * weight.grad / length
        assert value() < before
    assert LossConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", known_losses())
def test_names_are_found_in_any_case(name: str) -> None:
    arguments = ARGUMENTS.get(name, {})
    loss = LossConfig(name=name.swapcase(), **arguments).build(2)
    assert type(loss).__name__ == type(LossConfig(name=name, **arguments).build(2)).__name__


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", F.l1_loss),
        ("mse", F.mse_loss),
        ("bcelogits", F.binary_cross_entropy_with_logits),
        ("cel", F.cross_entropy),
        ("bce", lambda prediction, target: F.binary_cross_entropy(prediction, target)),
        ("plain_mean", lambda prediction, _: prediction.mean()),
    ],
)
def test_inherited_names_are_what_they_were(name: str, expected: Any) -> None:
    prediction, target = torch.rand(2, 2, 3, *SIZE)
    torch.testing.assert_close(
        LossConfig(name=name).build(2)(prediction, target), expected(prediction, target)
    )


def test_several_losses_are_added_with_their_weights() -> None:
    prediction, target = torch.rand(2, 2, 1, *SIZE)
    both = WeightedLosses([LossConfig(name="mse"), LossConfig(name="l1", weight=0.5)], 2)
    expected = F.mse_loss(prediction, target) + 0.5 * F.l1_loss(prediction, target)
    torch.testing.assert_close(both(prediction, target), expected)


def test_losses_are_told_the_rank_and_the_range_of_the_images() -> None:
    volume = torch.rand(1, 1, 12, 12, 12)
    for name in ("SSIMLoss", "LocalNormalizedCrossCorrelationLoss", "JukeboxLoss"):
        assert torch.isfinite(LossConfig(name=name).build(3)(volume, volume.flip(2)))
    ssim: Any = LossConfig(name="SSIMLoss").build(2)
    assert ssim.ssim_metric.data_range == 2


def test_lists_become_tensors_and_class_weights_have_a_key() -> None:
    prediction, target = torch.randn(2, 2, *SIZE), torch.zeros(2, *SIZE, dtype=torch.int64)
    target[1] = 1
    weighted = LossConfig(name="cel", class_weights=[0.2, 0.8]).build(2)
    expected = F.cross_entropy(prediction, target, torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(weighted(prediction, target), expected)
    scaled: Any = LossConfig(name="bcelogits", pos_weight=[3.0]).build(2)
    assert scaled.pos_weight.tolist() == [3.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "mes"}, "unknown loss 'mes'; did you mean mse? Known: cel, l1, "),
        ({"name": "DiceLos"}, "did you mean DiceLoss?"),
        ({"name": "HuberLoss", "detla": 1}, "HuberLoss takes no argument 'detla'; it takes "),
        ({"name": "HuberLoss", "delta": "a"}, "HuberLoss does not take these arguments: "),
        ({"name": "DiceLoss", "reduction": "max"}, "DiceLoss does not take these arguments: "),
        ({"name": "l1", "class_weights": [1]}, "L1Loss takes no argument 'class_weights'"),
        ({"name": "NACLLoss"}, "NACLLoss needs 'classes', 'dim'"),
        ({"name": "l1", "reduction": "none"}, "a loss is one number, take mean or sum"),
        ({"name": "l1", "weight": 0}, "greater than 0"),
        ({"name": "PerceptualLoss"}, "PerceptualLoss cannot be used by name: it downloads"),
        (
            {"name": "gaussiannllloss"},
            "GaussianNLLLoss cannot be used by name: it does not compare",
        ),
        ({"name": "nowhere.at_all:Loss"}, "nowhere.at_all:Loss is code that does not belong"),
    ],
)
def test_faults_are_found_at_start(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LossConfig(**arguments)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", UNUSABLE_LOSSES)
def test_what_cannot_be_used_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} cannot be used by name: "):
        LossConfig(name=name)


def test_a_users_own_loss(tmp_path: Path) -> None:
    (tmp_path / "own_losses.py").write_text(
        "import torch\n"
        "def no_class(): pass\n"
        "class Cubed(torch.nn.Module):\n"
        "    def __init__(self, spatial_dims, scale=1.0):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.tensor(scale / spatial_dims))\n"
        "    def forward(self, prediction, target):\n"
        "        return self.scale * (prediction - target).abs().pow(3).mean()\n"
    )
    plugins.vouch([tmp_path])
    config = LossConfig(name="own_losses:Cubed", scale=4.0)
    losses = WeightedLosses([config], spatial_dims=2)
    prediction, target = torch.rand(2, 2, 1, *SIZE)
    expected = 2 * (prediction - target).abs().pow(3).mean()
    torch.testing.assert_close(losses(prediction, target), expected)
    with pytest.raises(ValidationError, match=r"Cubed takes no argument 'sale'"):
        LossConfig(name="own_losses:Cubed", sale=4.0)
    with pytest.raises(ValidationError, match="'own_losses:no_class' is no loss: it must be a sub"):
        LossConfig(name="own_losses:no_class")


@pytest.mark.parametrize("key", ["losses", "optimizer", "scheduler"])
def test_a_trained_model_neither_needs_nor_imports_own_code_for_training(
    key: str, tmp_path: Path
) -> None:
    (tmp_path / "surprise.py").write_text("raise SystemExit('imported')\n")
    kind, image = registry.find("ddpm"), image_spec(*SIZE)
    own = {"name": "surprise:Named"}
    section = {**kind.tiny().model_dump(mode="json"), key: [own] if key == "losses" else own}
    artifact.save(
        tmp_path / "artifact",
        config={"seed": 0, "model": section, "data": {}, "sampling": {}, "compute": {}},
        image=image,
        weights=kind.tiny().build(image).state_dict(),
        metrics={},
    )
    artifact.load(tmp_path / "artifact").build(torch.device("cpu"))
    plugins.vouch([tmp_path])
    with pytest.raises(SystemExit, match="imported"):
        kind.model_validate(section)


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        ("mse", 1, []),
        ("cel", 3, []),
        ("bce", 1, ["bce cannot compare images of [16, 16]: all elements of input should be"]),
        ("cel", 1, ["cel does not tell one prediction from another"]),
        ("ContrastiveLoss", 1, ["ContrastiveLoss cannot compare images of [16, 16]: "]),
    ],
)
def test_losses_that_do_not_fit_the_images_are_explained(
    name: str, channels: int, expected: list[str]
) -> None:
    told = loss_faults([LossConfig(name=name)], image_spec(*SIZE, channels=channels))
    assert len(told) == len(expected)
    assert all(f"model.losses: {part}" in fault for part, fault in zip(expected, told, strict=True))


def test_images_smaller_than_a_window_are_explained() -> None:
    (fault,) = loss_faults([LossConfig(name="SSIMLoss")], image_spec(8, 8, 8))
    assert fault.startswith("model.losses: SSIMLoss cannot compare images of [8, 8, 8]: ")


@pytest.mark.parametrize("family", ["ddpm", "rectified_flow", "vqvae"])
def test_families_train_on_the_losses_listed(family: str) -> None:
    kind, image = registry.find(family), image_spec(*SIZE)
    batch = Batch(
        image=torch.rand(2, 1, *SIZE) * 2 - 1,
        label=torch.zeros(2).long(),
        index=torch.arange(2),
        augmented=False,
        condition=Condition(values=torch.zeros(2, 0), source=torch.zeros(2, 0, *SIZE)),
    )

    def error(*losses: dict[str, Any]) -> torch.Tensor:
        config = kind.model_validate({**kind.tiny().model_dump(), "losses": losses})
        torch.manual_seed(0)
        model = config.build(image)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05)
        terms = model.eval().loss(batch)
        return terms.get("reconstruction", terms["loss"])

    mse, l1 = error({"name": "mse"}), error({"name": "l1"})
    both = error({"name": "mse"}, {"name": "l1", "weight": 0.5})
    torch.testing.assert_close(both, mse + 0.5 * l1)
    with pytest.raises(ValidationError, match="at least 1 item"):
        error()
    unfit = kind.model_validate({**kind.tiny().model_dump(), "losses": [{"name": "bce"}]})
    assert unfit.faults(image)[0].startswith("model.losses: bce cannot compare images")


def test_what_a_loss_holds_is_no_part_of_the_model() -> None:
    kind, image = registry.find("ddpm"), image_spec(*SIZE)
    losses = [{"name": "bcelogits", "pos_weight": [2.0]}]
    model = kind.model_validate({**kind.tiny().model_dump(), "losses": losses}).build(image)
    assert model.state_dict().keys() == kind.tiny().build(image).state_dict().keys()
