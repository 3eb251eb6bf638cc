"""Losses by name, with arguments checked at the start, and their weighted sum."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import plugins
from synthcube.errors import ConfigError
from synthcube.schema import ImageSpec, List, Schema

# As GaNDLF-Synth has them; plain_mean is our own.
_INHERITED = {
    "cel": "CrossEntropyLoss",
    "l1": "L1Loss",
    "bce": "BCELoss",
    "bcelogits": "BCEWithLogitsLoss",
    "mse": "MSELoss",
}
# Each was reviewed: none opens, downloads or imports what an argument names.
_OF_TORCH = (
    "BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "HingeEmbeddingLoss", "HuberLoss",
    "KLDivLoss", "L1Loss", "MSELoss", "MultiLabelMarginLoss", "MultiLabelSoftMarginLoss",
    "MultiMarginLoss", "NLLLoss", "PoissonNLLLoss", "SmoothL1Loss", "SoftMarginLoss",
)  # fmt: skip
_OF_MONAI = (
    "AsymmetricUnifiedFocalLoss", "BarlowTwinsLoss", "BoundaryLoss", "BoxGIoULoss",
    "ContrastiveLoss", "Dice", "DiceCELoss", "DiceFocalLoss", "DiceLoss", "FocalLoss",
    "GeneralizedDiceFocalLoss", "GeneralizedDiceLoss", "GeneralizedWassersteinDiceLoss",
    "GlobalMutualInformationLoss", "HausdorffDTLoss", "JukeboxLoss",
    "LocalNormalizedCrossCorrelationLoss", "LogHausdorffDTLoss", "MCCLoss", "NACLLoss", "SSIMLoss",
    "SoftDiceclDiceLoss", "SoftclDiceLoss", "TverskyLoss", "dice_ce", "dice_focal",
    "generalized_dice", "generalized_dice_focal", "generalized_wasserstein_dice", "giou",
)  # fmt: skip
_COMPARE_OTHERS = (
    "BendingEnergyLoss", "CTCLoss", "CosineEmbeddingLoss", "DiffusionLoss", "GaussianNLLLoss",
    "MarginRankingLoss", "PatchAdversarialLoss", "SURELoss", "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
)  # fmt: skip
_NESTED = "it takes another loss; list that one itself"
_TRAINED = "it has weights of its own to train"
UNUSABLE_LOSSES = {
    **dict.fromkeys(("AUCMLoss", "AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"), _TRAINED),
    "NLLLoss2d": "it is deprecated for NLLLoss",
    **dict.fromkeys(_COMPARE_OTHERS, "it does not compare one prediction with one target"),
    **dict.fromkeys(("DeepSupervisionLoss", "MaskedLoss", "MultiScaleLoss"), _NESTED),
    "MaskedDiceLoss": "it takes a mask too; DiceLoss is the same without",
    "PerceptualLoss": "it downloads a network, and code that it runs",
}
_UNBUILDABLE = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
# Voxels along an axis, at most, of the noise on which a loss is tried before a training.
_TRIAL_SIZE = 32


class LossConfig(Schema):
    """A loss by name, with its weight; every further key is one of its arguments.

    It is a class of torch.nn or monai.losses that docs/names.md lists, in any case; what
    GaNDLF-Synth calls one (``cel``, ``l1``, ``bce``, ``bcelogits``, ``mse``, ``plain_mean``); or a
    user's own ``package.module:MyLoss``. A list of numbers becomes a tensor where the class takes
    one.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Name of the loss (docs/names.md), or package.module:MyLoss.")
    weight: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.0,
        description="Weight in the sum of losses. What a class calls weight is class_weights here.",
    )

    # Whether a training needs it; the losses of a trained model are not even looked up.
    _trains: bool = PrivateAttr(default=True)

    def __eq__(self, other: object) -> bool:
        """Whether name, weight and arguments are the same; pydantic compares `_trains` as well."""
        return isinstance(other, LossConfig) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash((self.name, self.weight))

    @model_validator(mode="after")
    def _can_be_built(self, info: ValidationInfo) -> Self:
        if plugins.is_needless(info):
            self._trains = False
            return self
        kind = self._kind()
        plugins.check_arguments(kind, self._named(2), taken=("size_average", "reduce"))
        if (self.model_extra or {}).get("reduction") == "none":
            raise ValueError("reduction none: a loss is one number, take mean or sum")
        if not plugins.is_own(self.name):
            plugins.attempt(lambda: self.build(2), plugins.called(kind))
        return self

    def build(self, spatial_dims: int) -> torch.nn.Module:
        """The loss for images of that many spatial axes: (prediction, target) to a scalar."""
        plugins.arguments(self.name, self.model_extra)
        kind, settings = self._kind(), self._named(spatial_dims)
        for name, parameter in inspect.signature(kind).parameters.items():
            if isinstance(settings.get(name), list) and "Tensor" in str(parameter.annotation):
                settings[name] = torch.tensor(settings[name], dtype=torch.float32)
        loss: torch.nn.Module = kind(**settings)
        return loss

    def _kind(self) -> Any:
        kind = plugins.find(self.name, known_losses(), "loss", UNUSABLE_LOSSES)
        is_module = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
        if plugins.is_own(self.name) and not is_module:
            raise ValueError(f"{self.name!r} is no loss: it must be a subclass of torch.nn.Module")
        return kind

    def _named(self, spatial_dims: int) -> dict[str, Any]:
        """The arguments of the class by its own names for them."""
        parameters = inspect.signature(self._kind()).parameters
        # Images lie in [-1, 1].
        defaults: dict[str, Any] = {"spatial_dims": spatial_dims, "data_range": 2.0}
        settings = {name: value for name, value in defaults.items() if name in parameters}
        for name, value in (self.model_extra or {}).items():
            renamed = name == "class_weights" and "weight" in parameters
            settings["weight" if renamed else name] = value
        return settings


Losses = Annotated[List[LossConfig], Field(min_length=1)]
"""The field of a family's config: at least one loss."""


class WeightedLosses:
    """The weighted sum of losses, which are built at the first call.

    It is no module, so that the tensors of a loss are neither trained, nor averaged, nor saved.
    """

    def __init__(self, losses: Iterable[LossConfig], spatial_dims: int) -> None:
        self.losses = tuple(losses)
        self.spatial_dims = spatial_dims

    @cached_property
    def terms(self) -> list[tuple[float, torch.nn.Module]]:
        """Weights and losses, which are not themselves trained."""
        try:
            return [
                (loss.weight, loss.build(self.spatial_dims).requires_grad_(False).eval())
                for loss in self.losses
            ]
        except _UNBUILDABLE as error:
            raise ConfigError(f"model.losses: {error}") from error  # of a trained model

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two (B, C, *spatial) to a scalar."""
        device = prediction.device
        first, *others = (w * loss.to(device)(prediction, target) for w, loss in self.terms)
        total: torch.Tensor = sum(others, start=first)
        return total


def loss_faults(losses: Iterable[LossConfig], image: ImageSpec) -> list[str]:
    """A sentence for each loss that cannot compare two such images of real values."""
    return [
        f"model.losses: {loss.name} {fault}"
        for loss in losses
        if loss._trains and (fault := _fault(loss, image))
    ]


def known_losses() -> dict[str, Any]:
    """All known loss classes by name."""
    import monai.losses

    kinds = plugins.classes(torch.nn, _OF_TORCH) | plugins.classes(monai.losses, _OF_MONAI)
    inherited = {name: kinds[stands_for] for name, stands_for in _INHERITED.items()}
    return {**inherited, "plain_mean": plain_mean, **kinds}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` as float32, in which losses are computed; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def plain_mean() -> torch.nn.Module:
    """The mean of the prediction, whatever the target: the loss of a Wasserstein critic."""
    return _PlainMean()


class _PlainMean(torch.nn.Module):
    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return prediction.mean()


def _fault(loss: LossConfig, image: ImageSpec) -> str:
    generator = torch.Generator().manual_seed(0)
    shape = (2, image.channels, *(min(side, _TRIAL_SIZE) for side in image.size))
    prediction, target = torch.rand(2, *shape, generator=generator) * 2 - 1
    prediction.requires_grad_()
    try:
        value = WeightedLosses([loss], image.rank)(prediction, target)
    except _UNBUILDABLE as error:
        return f"cannot compare images of {list(image.size)}: {error}"
    if value.ndim:
        return f"gives {list(value.shape)} numbers for two images, not one"
    if not value.requires_grad or not torch.autograd.grad(value, prediction)[0].any():
        return "does not tell one prediction from another"
    return ""
