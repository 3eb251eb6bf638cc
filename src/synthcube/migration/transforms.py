"""Preprocessing and augmentation of GaNDLF, name by name, with what each did there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from synthcube.migration.project import Path, Project, is_number
from synthcube.plugins import did_you_mean

Pair = tuple[float, float]
_TRAIN: Path = ("data_preprocessing", "train")
_AUGMENTED: Path = ("data_augmentations", "train")


@dataclass
class Stage:
    """The preprocessing of the training images, translated step by step."""

    project: Project
    dims: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    size: list[int] | None = None
    units: Pair | None = None
    """The intensities that stood for the darkest and the brightest voxel there, where known."""
    image_range: Pair | None = None
    """Intensities of the file that become -1 and 1 here."""
    range_comment: str = ""
    percentiles: Pair | None = None
    is_normalised: bool = False

    def refuse(self, name: str, text: str) -> None:
        self.project.refuse((*_TRAIN, name), text)

    def note(self, name: str, text: str) -> None:
        self.project.note((*_TRAIN, name), text)

    def three(self, name: str, value: Any, last: float) -> list[Any] | None:
        """Three numbers; a picture's third is `last`. A fault where it is no list of them."""
        if isinstance(value, list) and len(value) in (2, 3) and all(map(is_number, value)):
            return value if len(value) == 3 else [*value, last]
        self.refuse(name, f"a list of two or three numbers is needed, not {value!r}")
        return None


_WITHOUT = {
    **dict.fromkeys(
        ("resample_min", "resample_minimum"),
        "its value was ignored: every side became the least of its own and 1 mm; write "
        "data.spacing_mm",
    ),
    "normalize_nonzero_masked": "it changes the voxels other than 0 alone, which no scaling of "
    "whole images can stand for; remove it to train without",
    "normalize_by_val": "GaNDLF-Synth stops at it with a TypeError",
    "rgb2rgba": "images have no alpha here: remove it, and train 3 channels",
    "histogram_matching": "training images are not matched here; HistogramStandardization of "
    "data.preprocessing does something like it",
    "stain_normalizer": "no transform here does it: a class of your own can, package.module:Class",
}
_SCALES = {"normalize_div_by_255": (0.0, 1.0), "normalize_standardize": (-1.0, 1.0)}
_AFFINE = ("normalize", "normalize_positive", "normalize_nonzero", "normalize_nonZero",
           "normalize_imagenet")  # fmt: skip
_AFTERWARDS = "it is dropped: a shift and a scale of each image change nothing, as [-1, 1] follows"
_INTENSITIES = {*_AFFINE, *_SCALES, "rescale", "normalize_nonzero_masked", "normalize_by_val"}


def _resize(stage: Stage, name: str, value: Any) -> None:
    if (shape := stage.three(name, value, 1)) is not None:
        sides = [int(side) for side in shape]
        stage.size = sides[: stage.dims]
        if not stage.project.is_modern:
            stage.steps.append({"name": "resize", "target_shape": sides})
            stage.note(name, "without anti-aliasing, as there; data.size alone would smooth first")


def _resample(stage: Stage, name: str, value: Any) -> None:
    resolution = value.get("resolution") if isinstance(value, Mapping) else value
    if (target := stage.three(name, resolution, 1.0)) is not None:
        stage.steps.append({"name": "resample", "target": [float(side) for side in target]})


def _crop(stage: Stage, name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) not in (3, 6):
        stage.refuse(name, f"three or six numbers are needed, not {value!r}; two crash there")
    else:
        stage.steps.append({"name": "crop", "cropping": value})


def _centercrop(stage: Stage, name: str, value: Any) -> None:
    if (shape := stage.three(name, value, 1)) is not None:
        sides = [int(side) for side in shape]
        stage.size = sides[: stage.dims]
        stage.steps.append({"name": "centercrop", "target_shape": sides})


def _zero_planes(stage: Stage, name: str, value: Any) -> None:
    stage.steps.append({"name": "crop_external_zero_planes"})
    stage.note(name, "in every stage here, and with no least size; GaNDLF-Synth stops at pictures "
               "and at several channels")  # fmt: skip


def _threshold(stage: Stage, name: str, value: Any) -> None:
    for key, is_above in (("max", False), ("min", True)):
        if (bound := _bound(stage, name, value, key)) is not None:
            step = {"name": "threshold", "threshold": bound}
            stage.steps.append(step if is_above else {**step, "above": False})


def _clip(stage: Stage, name: str, value: Any) -> None:
    low, high = _bound(stage, name, value, "min"), _bound(stage, name, value, "max")
    if low is not None and high is not None:
        stage.units = (low, high)
        if not _INTENSITIES & set(stage.project.section(*_TRAIN)):
            stage.image_range = (low, high)
            stage.note(name, f"data.intensity_range [{low:g}, {high:g}], which clips as well")
            return
    limits = {"out_min": low, "out_max": high}
    stage.steps.append({"name": "clip", **{k: v for k, v in limits.items() if v is not None}})


def _bound(stage: Stage, name: str, value: Any, key: str) -> float | None:
    bound = value.get(key) if isinstance(value, Mapping) else None
    if bound is None or is_number(bound):
        return None if bound is None else float(bound)
    stage.refuse(name, f"{key} {bound!r} is not a number")
    return None


def _rescale(stage: Stage, name: str, value: Any) -> None:
    section = value if isinstance(value, Mapping) else {}
    pairs = {
        key: _pair(section[key])
        for key in ("out_min_max", "percentiles", "in_min_max")
        if section.get(key) is not None
    }
    for key, pair in pairs.items():
        if pair is None:
            stage.refuse(name, f"{key} {section[key]!r}: two numbers are needed, low and high")
    stage.units = out = pairs.get("out_min_max") or (0.0, 1.0)
    if ends := pairs.get("in_min_max"):
        stage.image_range = ends
    stage.percentiles = pairs.get("percentiles") or (0.0, 100.0)
    stage.note(
        name, "data.percentiles and data.intensity_range, each channel by itself; weights of there "
        f"are imported with --model_range {out[0]:g} {out[1]:g}",
    )  # fmt: skip


def _scaled(stage: Stage, name: str, value: Any) -> None:
    stage.units = _SCALES[name]
    stage.image_range = (0.0, 255.0)
    low, high = stage.units
    stage.note(name, f"data.intensity_range, in which 0 and 255 are {low:g} and {high:g}")


def _affine(stage: Stage, name: str, value: Any) -> None:
    if stage.is_normalised:
        stage.project.drop((*_TRAIN, name), "GaNDLF-Synth applied the first normalize alone")
        return
    stage.is_normalised = True
    stage.note(name, _AFTERWARDS)


def _nothing(stage: Stage, name: str, value: Any) -> None:
    text = "alpha is dropped where a picture is read"
    if name == "to_canonical":
        text = "every volume is turned to RAS+ here"
    stage.project.drop((*_TRAIN, name), text)


PREPROCESSING: Mapping[str, Callable[[Stage, str, Any], None]] = {
    "resize": _resize, "resample": _resample, "to_canonical": _nothing, "threshold": _threshold,
    "clip": _clip, "clamp": _clip, "crop": _crop, "centercrop": _centercrop,
    "crop_external_zero_planes": _zero_planes, "rescale": _rescale, "rgba2rgb": _nothing,
    **dict.fromkeys(_AFFINE, _affine), **dict.fromkeys(_SCALES, _scaled),
}  # fmt: skip


def preprocessing(project: Project, dims: int) -> Stage:
    """Translate data_preprocessing and write the keys of `data`; what it came to."""
    stage = Stage(project, dims)
    for name, value in project.section(*_TRAIN).items():
        _translate(stage, str(name), value)
    for other in ("val", "test", "inference"):
        steps = project.get("data_preprocessing", other)
        if steps is not None and steps != project.get(*_TRAIN):
            project.refuse(
                ("data_preprocessing", other),
                "it differs from data_preprocessing.train, and one preparation serves all images "
                "here: make it equal, or remove it",
            )
    _write(stage)
    return stage


def _translate(stage: Stage, name: str, value: Any) -> None:
    spelt = name.replace("_to_", "2").replace("to", "2").replace("_", "")
    plain = spelt if spelt in ("rgba2rgb", "rgb2rgba") else name
    if plain in _WITHOUT:
        stage.refuse(name, _WITHOUT[plain])
    elif plain in PREPROCESSING:
        PREPROCESSING[plain](stage, name, value)
    else:
        hint = did_you_mean(name, [*PREPROCESSING, *_WITHOUT])
        stage.project.drop((*_TRAIN, name), f"GaNDLF-Synth has no such transform{hint}")


def _keep_units(stage: Stage) -> None:
    """Let the network see the values of there where the file says what they were."""
    project, units = stage.project, stage.units
    if units is None or units == (-1.0, 1.0) or stage.is_normalised or project.is_modern:
        return
    low, high = units
    text = f"the network sees {low:g} to {high:g}, as there"
    if stage.image_range and -1 <= low < high <= 1:
        dark, bright = stage.image_range
        unit = (bright - dark) / (high - low)  # intensities for a step of 1
        stage.image_range = (dark + (-1 - low) * unit, dark + (1 - low) * unit)
        stage.range_comment = text
        stage.units = (-1.0, 1.0)  # images have the values of there
    elif project.model == "vqvae" and low < high:
        project.state("model.network_range", [low, high], text)
        half = (high - low) / 2
        losses = project.new.get("model.losses")
        power = {"mse": 2, "l1": 1}.get(losses.value[0]["name"]) if losses else None
        if losses and power:  # our loss is of images in [-1, 1], theirs was of these values
            entry = {**losses.value[0], "weight": half**power}
            project.state("model.losses", [entry], f"{losses.comment}; weighted as if of {low:g} "
                          f"to {high:g}")  # fmt: skip


def _write(stage: Stage) -> None:
    project = stage.project
    _keep_units(stage)
    if stage.steps:
        comment = "data_preprocessing.train, in its order; done once, before anything else"
        project.state("data.preprocessing", stage.steps, comment)
    if stage.image_range:
        comment = "data_preprocessing.train: the intensities that become -1 and 1"
        comment += f"; {stage.range_comment}" if stage.range_comment else ""
        project.state("data.intensity_range", list(stage.image_range), comment)
    if stage.percentiles:
        comment = "data_preprocessing.train: what becomes -1 and 1 in each image"
        project.state("data.percentiles", list(stage.percentiles), comment)
    elif not stage.image_range:
        comment = "nothing was cut off there; images become [-1, 1] here, and were not scaled"
        project.imply("data.percentiles", [0.0, 100.0], comment)


def _pair(value: Any) -> Pair | None:
    if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)):
        return float(value[0]), float(value[1])
    return None


_SAME_NAMES = {
    "affine": ("scales", "degrees", "translation"),
    "bias": ("coefficients", "order"),
    "blur": ("std",),
    "gamma": ("log_gamma",),
    "kspace": (),
    "motion": ("degrees", "translation", "num_transforms", "interpolation"),
    "elastic": ("patch_size", "num_control_points", "max_displacement", "locked_borders"),
    "swap": ("patch_size", "num_iterations"),
    "noise": ("mean", "std"),
    "noise_var": ("mean", "std"),
    "flip": ("axis",),
    "rotate_90": ("axis",),
    "rotate_180": ("axis",),
    "anisotropic": ("axis", "downsampling"),
}
_OF_COLOURS = ("colorjitter", "hed_transform")
AUGMENTATIONS = (*_SAME_NAMES, *_OF_COLOURS)
_RENAMED = {"interpolation": "image_interpolation", "axis": "axes"}


def augmentation(project: Project, stage: Stage) -> None:
    """Translate data_augmentations.train."""
    steps = []
    for name, value in project.section(*_AUGMENTED).items():
        path = (*_AUGMENTED, name)
        if name in _OF_COLOURS:
            text = "no transform here does it: a class of your own can, package.module:Class"
            project.refuse(path, text)
        elif name not in _SAME_NAMES:
            hint = did_you_mean(str(name), AUGMENTATIONS)
            project.refuse(path, f"it is no augmentation of GaNDLF{hint}")
        elif not isinstance(value, Mapping) or not is_number(value.get("probability")):
            project.refuse(path, "GaNDLF-Synth stops where `probability` is not given")
        else:
            steps += _augmented(project, path, dict(value), stage)
    if steps:
        project.state("data.augmentation", steps, "data_augmentations.train, anew in every epoch")


def _augmented(
    project: Project, path: Path, arguments: dict[str, Any], stage: Stage
) -> list[dict[str, Any]]:
    name = str(path[-1])
    probability = float(arguments.pop("probability"))
    for key in [key for key in arguments if key not in _SAME_NAMES[name]]:
        project.drop((*path, key), f"{name} does not read it")
        del arguments[key]
    special = _SPECIAL.get(name)
    if special is None:
        settings: dict[str, Any] | None = {_RENAMED.get(k, k): v for k, v in arguments.items()}
    else:
        settings = special(project, path, arguments, stage)
    if settings is None:
        return []
    return [{"name": settings.pop("name", name), **settings, "p": probability}]


def _turned(project: Project, path: Path, arguments: dict[str, Any], stage: Stage) -> Any:
    """Axes counted from 1 there; if 0 was among them, all were raised by 1."""
    axis = arguments.get("axis", 3)
    axes = axis if isinstance(axis, list) else [axis]
    if len(axes) != 1 or axes[0] not in (0, 1, 2, 3) or isinstance(axes[0], bool):
        text = "one axis at a time is turned about here; several made a mirror image, or nothing"
        project.refuse(path, f"axis {axis!r}: {text}: give one from 1 to 3")
        return None
    return {"axis": max(axes[0] - 1, 0)}


def _noisy(project: Project, path: Path, arguments: dict[str, Any], stage: Stage) -> Any:
    """Mean and deviation in the image's units there, in [-1, 1] here."""
    std = arguments.get("std")
    if std is None and path[-1] == "noise_var":
        project.note(path, "std is a share of the image's deviation: 0 to 1.5 %, as there")
        return {"std": [0.0, 0.015]}
    if std is None:
        project.refuse(path, "std is missing: GaNDLF-Synth stops at it")
        return None
    units = None if stage.is_normalised else stage.units
    if units is None or units[0] >= units[1]:
        project.refuse(
            path, "mean and std were in the units of the images, whose range the file does not "
            "say: give it with `clip` or `rescale`, or remove the noise and write "
            "data.augmentation in [-1, 1]",
        )  # fmt: skip
        return None
    scale = 2 / (units[1] - units[0])
    values = {key: _times(arguments[key], scale) for key in ("mean", "std") if key in arguments}
    if None in values.values():
        project.refuse(path, "mean and std are numbers, or lists of two")
        return None
    return {"name": "noise", **values}


def _times(value: Any, scale: float) -> Any:
    if is_number(value):
        return value * scale
    pair = _pair(value)
    return [number * scale for number in pair] if pair else None


def _elastic(project: Project, path: Path, arguments: dict[str, Any], stage: Stage) -> Any:
    """Control points and displacement followed from the size of a patch."""
    patch = arguments.pop("patch_size", None)
    if not isinstance(patch, list) or not patch or not all(map(is_number, patch)):
        project.refuse(path, f"patch_size must be a list of numbers, not {patch!r}")
        return None
    sides = [*patch, 1, 1][:3]
    points = [max(int(side), 5) for side in sides]
    defaults = {"num_control_points": points, "max_displacement": [side / 10 for side in sides]}
    return defaults | {"locked_borders": 2} | arguments


def _blurred(project: Project, path: Path, arguments: dict[str, Any], stage: Stage) -> Any:
    if arguments.get("std") is None:
        project.refuse(path, "std was a share of the image's deviation there: give it in mm")
        return None
    return arguments


def _swapped(project: Project, path: Path, arguments: dict[str, Any], stage: Stage) -> Any:
    patch = arguments.get("patch_size")
    sides = [*patch, 1][:3] if isinstance(patch, list) else patch
    return {"num_iterations": 100} | arguments | ({"patch_size": sides} if sides else {})


_SPECIAL: Mapping[str, Callable[[Project, Path, dict[str, Any], Stage], Any]] = {
    "rotate_90": _turned, "rotate_180": _turned, "noise": _noisy, "noise_var": _noisy,
    "elastic": _elastic, "blur": _blurred, "swap": _swapped,
}  # fmt: skip
