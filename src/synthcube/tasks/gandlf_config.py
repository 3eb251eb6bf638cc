"""What `import` needs of a YAML of GaNDLF-Synth: the network, its images and their intensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthcube import reading
from synthcube.errors import ConfigError
from synthcube.models import gandlf

_RGB_RANGE = (0.0, 255.0)
_NORMALIZED = {"normalize_div_by_255": (0.0, 1.0), "normalize_standardize": (-1.0, 1.0)}
# Layers that halve and double every side: the only ones that SynthCube builds.
_HALVE, _DOUBLE = [2, 4, 1, 1], [2, 4, 1, 1, 0]


@dataclass(frozen=True, slots=True)
class OldConfig:
    """An old YAML in SynthCube's words."""

    values: dict[str, Any]
    """Sections `model`, `data` and `compute` of a config."""
    channels: int
    """Of one image."""
    seen: tuple[float, float] | None
    """What the network saw for the lowest and highest intensity; None: the YAML does not say."""
    source: tuple[float, float] | None
    """The intensities of the files that these stand for; None: other ones in each image."""
    unknown: str
    """Why `seen` is not known; empty where it is."""


def read(path: Path) -> OldConfig | None:
    """The old config at `path`; None where it is SynthCube's. Raises ConfigError with all faults.

    A file with `model_config` at top level is an old one.
    """
    values = reading.read_yaml(path, ConfigError, name="parameters_file (--config)", as_pyyaml=True)
    if "model_config" not in values:
        return None
    faults: list[str] = []
    section = _mapping(values, "model_config", faults)
    architecture = _mapping(section, "architecture", faults, "model_config.")
    kind = str(section.get("model_name"))
    if reason := gandlf.REFUSED.get(kind):
        raise ConfigError(f"{path}: model_config.model_name {kind}: {reason}")
    if kind not in _NETWORKS:
        raise ConfigError(
            f"{path}: model_config.model_name {kind}: {', '.join(_NETWORKS)} can be imported."
        )
    preprocessing = _mapping(values, "data_preprocessing", faults)
    transforms = _mapping(preprocessing, "train", faults, "data_preprocessing.")
    size = _size(section, transforms, faults)
    channels = _integer(section, "n_channels", None, faults, "model_config.")
    model = {"name": kind, **_NETWORKS[kind](architecture, faults)}
    seen, source, unknown = _intensities(transforms, faults)
    if faults:
        raise ConfigError(f"{path} cannot be imported, {len(faults)} fault(s):", faults)
    # GaNDLF-Synth computed in full precision where nothing else was asked for.
    sections = {"model": model, "data": {"size": size}, "compute": {"precision": 32}}
    return OldConfig(sections, channels, seen, source, unknown)


def _ddpm(values: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    at = "model_config.architecture."
    channels = _integers(values, "num_channels", [32, 64, 64, 64], faults)
    attends = values.get("attention_levels", [False, False, True, True])
    if not (isinstance(attends, list) and len(attends) == len(channels)):
        faults.append(f"{at}attention_levels {attends}: true or false for each of num_channels")
        attends = [False] * len(channels)
    if attends != sorted(attends):
        faults.append(f"{at}attention_levels {attends}: only the coarsest levels can attend here")
    heads = _integers(values, "num_head_channels", 8, faults, length=len(channels))
    counted = {n for n, attend in zip(heads, attends, strict=False) if attend} | {*heads[-1:]}
    if len(counted) > 1:
        faults.append(f"{at}num_head_channels {heads}: they must be equal where levels attend")
    num_blocks = _integers(values, "num_res_blocks", [2] * len(channels), faults, len(channels))
    if len(set(num_blocks)) > 1:
        faults.append(f"{at}num_res_blocks {num_blocks}: all must be equal")
    _require(values, "norm_eps", 1e-6, 1e-6, faults)
    for key in ("resblock_updown", "with_conditioning"):
        _require(values, key, False, False, faults)
    _require(values, "num_class_embeds", None, None, faults)
    num_steps = _integer(values, "num_train_timesteps", 1000, faults)
    num_sampled = _integer(values, "num_eval_timesteps", num_steps, faults)
    # GaNDLF-Synth took ancestral steps; with fewer than all, noise stayed in its images.
    sampling = (
        {"sampler": "ddpm"}
        if num_sampled >= num_steps
        else {"sampler": "ddim", "num_sampling_steps": num_sampled}
    )
    return {
        "channels": channels,
        "num_res_blocks": num_blocks[0] if num_blocks else 2,
        "attention_from": attends.index(True) if True in attends else len(attends),
        "num_head_channels": next(iter(counted), 8),
        "num_norm_groups": _integer(values, "norm_num_groups", 32, faults),
        "attention_projection": False,
        "num_train_steps": num_steps,
        **gandlf.DIFFUSION,
        **sampling,
    }


def _vqvae(values: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    channels = _integers(values, "num_channels_upsample_downsample_layers", [96, 96, 192], faults)
    _require(values, "num_residual_channels", channels, [96, 96, 192], faults)
    num_levels = len(channels)
    _require(values, "downsample_conv_parameters", [_HALVE] * num_levels, [_HALVE] * 3, faults)
    _require(values, "upsample_conv_parameters", [_DOUBLE] * num_levels, [_DOUBLE] * 3, faults)
    _require(values, "epsilon", 1e-5, 1e-5, faults)
    return {
        "channels": channels,
        "num_res_layers": _integer(values, "num_residual_layers", 3, faults),
        "num_embeddings": _integer(values, "num_embeddings", 32, faults),
        "embedding_dim": _integer(values, "embedding_dim", 64, faults),
        "commitment_cost": values.get("loss_scaling_commitment_cost", 0.25),
        "codebook_decay": values.get("EMA_decay", 0.5),
        "revive_below": 0,
    }


def _dcgan(values: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    widest = _integer(values, "init_channels_generator", 512, faults)
    shrink = _integer(values, "growth_rate_generator", 2, faults)
    finest = _integer(values, "init_channels_discriminator", 64, faults)
    growth = _integer(values, "growth_rate_discriminator", 2, faults)
    return {
        "latent_dim": _integer(values, "latent_vector_size", 100, faults),
        "channels": [widest // shrink**level for level in (3, 2, 1, 0)],
        "discriminator_channels": [finest * growth**level for level in range(4)],
        "negative_slope": values.get("leaky_relu_slope", 0.2),
        "smoothing": True,
    }


_NETWORKS = {"ddpm": _ddpm, "vqvae": _vqvae, "dcgan": _dcgan}


def _size(
    section: Mapping[str, Any], transforms: Mapping[str, Any], faults: list[str]
) -> list[int]:
    """Sides of the images of the training: those of `resize`, else of `tensor_shape`."""
    key = "data_preprocessing.train.resize" if "resize" in transforms else "tensor_shape"
    size = transforms.get("resize", section.get("tensor_shape"))
    rank = section.get("n_dimensions")
    if rank not in (2, 3):
        faults.append(f"model_config.n_dimensions {rank}: 2 or 3 is needed")
        return []
    if rank == 2 and isinstance(size, list) and size[2:] == [1]:
        size = size[:2]
    if not (_is_integers(size) and len(size) == rank):
        faults.append(f"{key} {size}: {rank} whole numbers are needed, the sides of an image")
    return list(size or [])


def _intensities(
    transforms: Mapping[str, Any], faults: list[str]
) -> tuple[tuple[float, float] | None, tuple[float, float] | None, str]:
    """`seen`, `source` and `unknown` of an OldConfig."""
    # GaNDLF-Synth applied the first normalisation last, and no other.
    normalization = next((name for name in transforms if "normalize" in name.lower()), "")
    if seen := _NORMALIZED.get(normalization.lower()):
        return seen, _RGB_RANGE, ""
    if normalization:
        return None, None, f"{normalization} gave each image other intensities"
    if "rescale" in transforms:
        settings = transforms["rescale"] or {}
        if not isinstance(settings, dict):
            faults.append(f"data_preprocessing.train.rescale {settings}: a mapping is needed")
            return None, None, ""
        seen = _pair(settings.get("out_min_max", [0, 1]), "rescale.out_min_max", faults)
        before = settings.get("in_min_max")
        return seen, _pair(before, "rescale.in_min_max", faults) if before else None, ""
    for name in ("clip", "clamp"):
        limits = transforms.get(name)
        if isinstance(limits, dict):
            seen = _pair([limits.get("min"), limits.get("max")], f"{name}, min and max", faults)
            return seen, seen, ""
    return None, None, "no transform scaled the intensities of the files"


def _pair(value: Any, key: str, faults: list[str]) -> tuple[float, float] | None:
    numbers = isinstance(value, list) and all(type(end) in (int, float) for end in value)
    if numbers and len(value) == 2 and value[0] < value[1]:
        return float(value[0]), float(value[1])
    faults.append(f"data_preprocessing.train.{key} {value}: two numbers in order are needed")
    return None


def _mapping(
    values: Mapping[str, Any], key: str, faults: list[str], at: str = ""
) -> Mapping[str, Any]:
    inner = values.get(key) or {}
    if isinstance(inner, dict):
        return inner
    faults.append(f"{at}{key}: a mapping is needed, not {type(inner).__name__}")
    return {}


def _integer(
    values: Mapping[str, Any],
    key: str,
    default: int | None,
    faults: list[str],
    at: str = "model_config.architecture.",
) -> int:
    number = values.get(key, default)
    if type(number) is int and number > 0:
        return number
    faults.append(f"{at}{key} {number}: a whole number above 0 is needed")
    return 1


def _integers(
    values: Mapping[str, Any],
    key: str,
    default: int | list[int],
    faults: list[str],
    length: int | None = None,
) -> list[int]:
    numbers = values.get(key, default)
    if length and type(numbers) is int:
        numbers = [numbers] * length
    if _is_integers(numbers) and len(numbers) == (length or len(numbers)):
        return list(numbers)
    faults.append(
        f"model_config.architecture.{key} {numbers}: {length or 'some'} whole numbers are needed"
    )
    return []


def _is_integers(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(type(n) is int for n in value)


def _require(
    values: Mapping[str, Any], key: str, needed: Any, default: Any, faults: list[str]
) -> None:
    if (value := values.get(key, default)) != needed:
        faults.append(f"model_config.architecture.{key} {value}: SynthCube has only {needed}")
