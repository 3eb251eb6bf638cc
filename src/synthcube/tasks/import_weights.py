"""Import: turn weights of monai-generative or GaNDLF-Synth into a verified artifact."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from synthcube import config, environment
from synthcube.config import RunConfig
from synthcube.data.geometry import as_rows, centred_affine
from synthcube.errors import ArtifactError, ConfigError, FamilyError, OutputError
from synthcube.models import artifact, gandlf, gandlf_dcgan, legacy, registry
from synthcube.models.diffusion import DiffusionFields
from synthcube.models.family import Family
from synthcube.schema import ImageSpec
from synthcube.storage import contents, require_separate, settle
from synthcube.tasks import gandlf_config
from synthcube.tasks.gandlf_config import OldConfig

log = logging.getLogger("synthcube")

# Where a model folder of GaNDLF-Synth has its checkpoints, the one that it used itself first.
_IN_FOLDER = (
    "checkpoints/last.ckpt",
    "checkpoints/*.ckpt",
    "training_logs/version_*/checkpoints/*.ckpt",
    "version_*/checkpoints/*.ckpt",
    "last.ckpt",
    "*.ckpt",
)
_USUAL = {
    "schedule": "linear unless monai-generative's DDPMScheduler got another one",
    "prediction": "epsilon unless monai-generative's DDPMScheduler got another prediction_type",
}


def import_weights(
    checkpoint: Path,
    family_name: str,
    config_path: Path,
    out: Path,
    *,
    channels: int | None = None,
    model_range: tuple[float, float] | None = None,
    discriminator: Path | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Write an artifact with the weights of `checkpoint`; returns its folder.

    Raises ArtifactError if the checkpoint does not fit or computes something else.

    Args:
        checkpoint: a file, or a model folder of GaNDLF-Synth.
        config_path: YAML that describes the network as it was trained, with data.size, and
            data.intensity_range where it is not 0 to 255; or the YAML of GaNDLF-Synth.
        channels: of one image; None: those of GaNDLF-Synth's YAML, else 1.
        model_range: what the lowest and highest intensity were scaled to when it was trained;
            None: that of GaNDLF-Synth's YAML, else -1 to 1.
        discriminator: weights of the discriminator against which an autoencoder was trained.
    """
    require_separate(
        {"output_path": out},
        {"checkpoint": checkpoint, "discriminator": discriminator, "config": config_path},
    )
    path = _file_of(checkpoint)
    if not gandlf_config.read(config_path):  # its faults come before those of the weights
        config.load_any(config_path, [*overrides, f"model.name={family_name}"])
    weights = legacy.read_weights(path)
    kind = gandlf.kind_of(weights)
    if reason := gandlf.REFUSED.get(kind or ""):
        raise ArtifactError(f"{path}: {reason}")
    if kind not in (None, family_name):
        raise ConfigError(f"{path} holds a {kind} of GaNDLF-Synth: give --family {kind}.")
    settings, image = _described(config_path, family_name, kind, channels, model_range, overrides)
    if out.is_dir():
        settle(out)
    is_taken = out.exists() and bool(contents(out))
    if is_taken and not (out / artifact.INDEX).is_file():
        raise OutputError(f"output_path {out} is not empty: give another one.")
    if faults := settings.model.faults(image):
        raise ConfigError("The config does not describe a network:", faults)
    torch.manual_seed(environment.derived_seed(settings.seed, "weights"))
    family = settings.model.build(image).eval()
    differences = _loaded(path, weights, family, discriminator)
    if is_taken:
        if not _holds(out, settings, image, family.state_dict()):
            raise OutputError(f"output_path {out} holds another model: give another one.")
        return out
    artifact.save(
        out, config=settings.dump(), image=image, weights=family.state_dict(), metrics=differences
    )
    return out


def _described(
    path: Path,
    family_name: str,
    kind: str | None,
    channels: int | None,
    model_range: tuple[float, float] | None,
    overrides: Sequence[str],
) -> tuple[RunConfig, ImageSpec]:
    """The config and the images of the model, by the YAML at `path`, an old one or ours."""
    source: Path | dict[str, Any] = path
    if old := gandlf_config.read(path):
        source = _checked(old, path, family_name, channels)
        channels = old.channels
        model_range, source["data"]["intensity_range"] = _intensities(
            old, path, family_name, model_range
        )
    channels, model_range = channels or 1, model_range or (-1.0, 1.0)
    overrides = [*_scaling(family_name, model_range), *overrides, f"model.name={family_name}"]
    settings = config.load_any(source, overrides)
    if isinstance(settings.model, DiffusionFields) and (
        missing := _unwritten(settings.model, kind)
    ):
        settings = config.load_any(source, [*missing, *overrides])
        log.info("As GaNDLF-Synth trained every DDPM: %s", ", ".join(missing))
    return settings, _image_spec(settings, channels, model_range)


def _checked(old: OldConfig, path: Path, family_name: str, channels: int | None) -> dict[str, Any]:
    """Sections of an old YAML, which must be of the family and of images with these channels."""
    if (name := old.values["model"]["name"]) != family_name:
        raise ConfigError(f"{path} describes a {name} of GaNDLF-Synth: give --family {name}.")
    if channels not in (None, old.channels):
        raise ConfigError(
            f"--channels {channels}: {path} has n_channels {old.channels}; leave --channels out."
        )
    return deepcopy(old.values)


def _file_of(checkpoint: Path) -> Path:
    """The file itself, or the newest checkpoint in a model folder of GaNDLF-Synth."""
    if not checkpoint.is_dir():
        return checkpoint
    if checkpoint.suffix == ".ckpt":
        raise ArtifactError(
            f"{checkpoint} is a folder: DeepSpeed's shards of a checkpoint. Join them where it was "
            "trained, with lightning.pytorch.utilities.deepspeed."
            "convert_zero_checkpoint_to_fp32_state_dict."
        )
    # With its default of saving, GaNDLF-Synth left the choice of the folder to Lightning.
    for pattern in _IN_FOLDER:
        if paths := list(checkpoint.glob(pattern)):
            newest = max(paths, key=lambda path: _numbers(path.relative_to(checkpoint)))
            log.info("Checkpoint: %s", newest)
            return _file_of(newest)
    raise ArtifactError(
        f"{checkpoint} is a folder without a checkpoint: none of {', '.join(_IN_FOLDER)} is in it."
    )


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _intensities(
    old: OldConfig, path: Path, family_name: str, model_range: tuple[float, float] | None
) -> tuple[tuple[float, float], list[float]]:
    """What the network saw of the lowest and highest intensity, and these in the source's units.

    Where the YAML does not have the latter, images stay in the units of the network.
    """
    if model_range:
        return model_range, list(old.source or model_range)
    if _is_scalable(family_name):
        if old.seen is None:
            raise ConfigError(
                f"--model_range is needed: in {path}, {old.unknown}. Give the lowest and highest "
                "value that the network saw, as in --model_range 0 255."
            )
        return old.seen, list(old.source or old.seen)
    if old.seen is None or not _is_within(old.seen):
        ends = [0.0, 1.0] if family_name == "dcgan" else [-1.0, 1.0]
        log.warning(
            "%s: %s. Images come out from %g to 1, as GaNDLF-Synth's did; --set "
            "data.intensity_range=[LOW,HIGH] gives other units.",
            path, old.unknown or f"the network saw values from {old.seen}, outside -1 to 1",
            ends[0],
        )  # fmt: skip
        return (-1.0, 1.0), ends
    return old.seen, list(old.source or old.seen)


def _is_within(model_range: tuple[float, float]) -> bool:
    return model_range[0] >= -1 and model_range[1] <= 1


def _is_scalable(family_name: str) -> bool:
    """Whether networks of the family can see other values than -1 to 1."""
    return "network_range" in registry.find(family_name).model_fields


def _scaling(family_name: str, model_range: tuple[float, float]) -> list[str]:
    """Overrides that let the network see values outside -1 to 1."""
    low, high = model_range
    if not low < high:
        raise ConfigError(f"model_range {low:g},{high:g}: two numbers are needed, the lower first.")
    if _is_within(model_range):
        return []
    if not _is_scalable(family_name):
        raise ConfigError(
            f"model_range {low:g},{high:g}: two numbers from -1 to 1, in order; a {family_name} "
            "makes no others."
        )
    # Half precision has too few digits for raw intensities.
    return [f"model.network_range=[{low!r}, {high!r}]", "compute.precision=32"]


def _unwritten(model: DiffusionFields, kind: str | None) -> list[str]:
    """Overrides that set what every DDPM of GaNDLF-Synth has and the config leaves out.

    A wrong noise schedule makes noise, and no checkpoint holds it: ConfigError where it differs
    from GaNDLF-Synth's, and where nobody says what it was.
    """
    if kind is None:
        if unknown := [k for k in ("schedule", "prediction") if k not in model.model_fields_set]:
            raise ConfigError(
                "No checkpoint says how its diffusion was trained, and a wrong guess makes noise:",
                [f"model.{key} is needed, {_USUAL[key]}" for key in unknown],
            )
        return []
    written = {key for key in gandlf.DIFFUSION if key in model.model_fields_set}
    if wrong := [
        f"model.{key} {getattr(model, key)}: GaNDLF-Synth trained with {gandlf.DIFFUSION[key]}"
        for key in sorted(written)
        if getattr(model, key) != gandlf.DIFFUSION[key]
    ]:
        raise ConfigError("With this config the imported model would make noise:", wrong)
    return [f"model.{key}={gandlf.DIFFUSION[key]}" for key in gandlf.DIFFUSION.keys() - written]


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


def _loaded(
    path: Path, weights: Mapping[str, torch.Tensor], family: Family, discriminator: Path | None
) -> dict[str, float]:
    """Load all weights into `family`; returns the largest differences to the old outputs."""
    if gandlf.kind_of(weights) == "dcgan":
        if discriminator:
            raise ConfigError(f"discriminator {discriminator}: that of a DCGAN is in {path}.")
        return {"imported_difference": _load_dcgan(path, weights, family)}
    if not isinstance(family, legacy.Imports):
        raise FamilyError(f"{family.config.name} has no counterpart in monai-generative 0.2.3.")
    critic = _discriminator(family, discriminator)
    differences = {"imported_difference": _load(path, weights, family)}
    if critic and discriminator:
        critic_weights = legacy.read_weights(discriminator)
        _check_norm(discriminator, critic_weights, critic)
        differences["imported_discriminator_difference"] = _load(
            discriminator, critic_weights, critic
        )
    return differences


def _load_dcgan(path: Path, weights: Mapping[str, torch.Tensor], family: Any) -> float:
    """Load weights of GaNDLF-Synth; returns the largest difference to what it computes."""
    state, strange = gandlf_dcgan.converted(weights, family.image.size)
    wanted = family.state_dict()
    strange += sorted(state.keys() - wanted.keys())
    legacy.check({k: v for k, v in state.items() if k in wanted}, wanted, strange)
    family.load_state_dict(state, strict=True)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, family.config.latent_dim, generator=generator)
    image = torch.randn(2, family.image.channels, *family.image.size, generator=generator)
    with torch.inference_mode():
        images, logits = gandlf_dcgan.outputs(weights, latent, image, family.config.negative_slope)
        ours = (
            family.generator(latent, torch.zeros(1, 0)),
            family.discriminator(image, torch.zeros(2, 0)),
        )
    # Logits have no bounds, so they are compared by their size.
    logits_size = max(1.0, float(logits.abs().max()))
    difference = max(
        float((ours[0] - images).abs().max()), float((ours[1] - logits).abs().max()) / logits_size
    )
    if not difference < legacy.TOLERANCE:
        raise ArtifactError(
            f"{path}: with these weights our networks differ from GaNDLF-Synth's by "
            f"{difference:.2g} (allowed: {legacy.TOLERANCE:g}), so it is not imported."
        )
    log.info("Same output as GaNDLF-Synth within %.1e: %s", difference, path)
    return difference


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
    # Beyond -1 to 1 the network scales by itself.
    low, high = model_range if _is_within(model_range) else (-1.0, 1.0)
    spacing = [*(data.spacing_mm or ()), 1.0, 1.0, 1.0][:3]
    dark, bright = data.intensity_range or (0.0, 255.0)
    unit = (bright - dark) / (high - low)  # intensities for a step of 1 in the model
    # Pixels of a PNG are 0 to 255.
    is_picture = len(data.size) == 2 and channels in (1, 3) and (dark, bright) == (0, 255)
    ends = (dark + (-1 - low) * unit, bright + (1 - high) * unit)
    return ImageSpec(
        size=data.size,
        channels=channels,
        spacing_mm=tuple(spacing),
        affine=as_rows(centred_affine(spacing, data.size)),
        intensity_range=(ends,) * channels,
        file_format="png" if is_picture else "nii.gz",
        integer=data.intensity_range is None,
    )
