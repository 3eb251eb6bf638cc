"""Import: turn weights of monai-generative or GaNDLF-Synth into a verified artifact."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from synthcube import config, environment
from synthcube.config import RunConfig
from synthcube.data.geometry import as_rows, centred_affine
from synthcube.errors import ArtifactError, ConfigError, FamilyError, OutputError
from synthcube.models import artifact, legacy
from synthcube.schema import ImageSpec
from synthcube.storage import contents, require_separate, settle

log = logging.getLogger("synthcube")


def import_weights(
    checkpoint: Path,
    family_name: str,
    config_path: Path,
    out: Path,
    *,
    channels: int = 1,
    model_range: tuple[float, float] = (-1.0, 1.0),
    discriminator: Path | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Write an artifact with the weights of `checkpoint`; returns its folder.

    Raises ArtifactError if the checkpoint does not fit or computes something else.

    Args:
        config_path: YAML that describes the network as it was trained, with data.size, and
            data.intensity_range where it is not 0 to 255.
        channels: of one image.
        model_range: what the lowest and highest intensity were scaled to when it was trained.
        discriminator: weights of the discriminator against which an autoencoder was trained.
    """
    require_separate(
        {"output_path": out},
        {"checkpoint": checkpoint, "discriminator": discriminator, "config": config_path},
    )
    settings = config.load(config_path, [*overrides, f"model.name={family_name}"])
    weights = legacy.read_weights(checkpoint)
    if out.is_dir():
        settle(out)
    is_taken = out.exists() and bool(contents(out))
    if is_taken and not (out / artifact.INDEX).is_file():
        raise OutputError(f"output_path {out} is not empty: give another one.")
    image = _image_spec(settings, channels, model_range)
    if faults := settings.model.faults(image):
        raise ConfigError("The config does not describe a network:", faults)
    torch.manual_seed(environment.derived_seed(settings.seed, "weights"))
    family = settings.model.build(image).eval()
    if not isinstance(family, legacy.Imports):
        raise FamilyError(f"{family_name} has no counterpart in monai-generative 0.2.3.")
    critic = _discriminator(family, discriminator)
    differences = {"imported_difference": _load(checkpoint, weights, family)}
    if critic and discriminator:
        critic_weights = legacy.read_weights(discriminator)
        _check_norm(discriminator, critic_weights, critic)
        differences["imported_discriminator_difference"] = _load(
            discriminator, critic_weights, critic
        )
    if is_taken:
        if not _holds(out, settings, image, family.state_dict()):
            raise OutputError(f"output_path {out} holds another model: give another one.")
        return out
    artifact.save(
        out,
        config=settings.dump(),
        image=image,
        weights=family.state_dict(),
        metrics=differences,
    )
    return out


def _holds(
    out: Path, settings: RunConfig, image: ImageSpec, weights: Mapping[str, torch.Tensor]
) -> bool:
    """Whether `out` holds the result of this very import, which may have been killed at its end."""
    before = artifact.load(out)
    if (dict(before.config), before.image) != (settings.dump(), image):
        return False
    saved = load_file(before.weights)
    return saved.keys() == weights.keys() and all(
        torch.equal(saved[name], weights[name]) for name in saved
    )


def _load(path: Path, weights: Mapping[str, torch.Tensor], model: legacy.Imports) -> float:
    """Load weights into `model`; returns the largest difference to monai-generative's outputs."""
    converted = legacy.converted(weights, model.network)
    model.network.load_state_dict(converted.state, strict=True)
    difference = legacy.largest_difference(model, converted)
    if not difference < legacy.TOLERANCE:
        raise ArtifactError(
            f"{path}: with these weights our network differs from monai-generative's by "
            f"{difference:.2g} (allowed: {legacy.TOLERANCE:g}), so it is not imported."
        )
    for name in converted.dropped:
        log.info("Not used: %s", name)
    log.info("Same output as monai-generative within %.1e: %s", difference, path)
    return difference


def _discriminator(family: legacy.Imports, path: Path | None) -> legacy.Imports | None:
    """The discriminator to load weights into; without weights it would be saved untrained."""
    if not isinstance(family, legacy.ImportsDiscriminator):
        if path:
            raise ConfigError(f"discriminator {path}: this family trains without one.")
        return None
    critic = family.discriminator_import()
    if path and critic is None:
        raise ConfigError(
            f"discriminator {path}: model.adversarial_weight is 0, so the model has none; set the "
            "weight that the adversarial loss had in the training."
        )
    if critic and not path:
        raise ConfigError(
            "model.adversarial_weight needs a discriminator, and no weights are given for it: "
            "give them with --discriminator, or set model.adversarial_weight to 0."
        )
    return critic


def _check_norm(path: Path, weights: Mapping[str, torch.Tensor], critic: legacy.Imports) -> None:
    has_norms, needs_norms = (
        any(name.endswith(".running_mean") for name in names)
        for names in (weights, critic.network.state_dict())
    )
    if has_norms != needs_norms:
        raise ConfigError(
            f"discriminator {path}: it was trained {'with' if has_norms else 'without'} batch "
            f"norms: set model.discriminator_norm to {'batch' if has_norms else 'instance'}."
        )


def _image_spec(settings: RunConfig, channels: int, model_range: tuple[float, float]) -> ImageSpec:
    data = settings.data
    if data.size is None:
        raise ConfigError("data.size is needed: the size of the images the model was trained on.")
    low, high = model_range
    if not -1 <= low < high <= 1:
        raise ConfigError(f"model_range {low:g},{high:g}: two numbers from -1 to 1, in order.")
    spacing = [*(data.spacing_mm or ()), 1.0, 1.0, 1.0][:3]
    dark, bright = data.intensity_range or (0.0, 255.0)
    unit = (bright - dark) / (high - low)  # intensities for a step of 1 in the model
    ends = (dark + (-1 - low) * unit, bright + (1 - high) * unit)
    return ImageSpec(
        size=data.size,
        channels=channels,
        spacing_mm=tuple(spacing),
        affine=as_rows(centred_affine(spacing, data.size)),
        intensity_range=(ends,) * channels,
        file_format="png" if len(data.size) == 2 and channels in (1, 3) else "nii.gz",
        integer=data.intensity_range is None,
    )
