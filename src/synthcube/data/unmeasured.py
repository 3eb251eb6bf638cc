"""The description of private images: what the config declares, and nothing that was measured."""

from __future__ import annotations

from collections.abc import Iterator

from synthcube.data.conditions import LABEL
from synthcube.data.geometry import as_rows, centred_affine
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ConfigError
from synthcube.schema import ImageSpec

_PICTURE, _PERCENTILES = (0.0, 255.0), (0.0, 1.0)


def unmeasured(image: ImageSpec, config: DataConfig) -> ImageSpec:
    """`image` with what is declared in place of what was measured; it becomes public.

    Size, number of channels and file format stay: they are the same for all images. Intensities
    that each image brings to [-1, 1] by its own percentiles go from 0 to 1.

    Raises ConfigError where something must be declared.
    """
    faults = [*undeclared(config)]
    if image.file_format != "png" and not _keeps_spacing(config):
        how = ", with data.fit crop_or_pad" if config.size and config.fit == "resize" else ""
        faults.append(
            f"data.spacing_mm: declare the voxel size of the images that are made{how}; the median "
            "of the images would become public"
        )
    if faults:
        raise ConfigError("With training.privacy nothing is measured on the images:", faults)
    is_picture = image.file_format == "png"
    targets = config.targets(image)
    ranges: list[tuple[float, float]] = []
    integer = image.integer
    for place, channel in enumerate(targets):
        declared = config.fixed_range(channel)[1]
        if place in image.masks:
            ranges.append(image.intensity_range[place])
        elif declared or is_picture:
            ranges.append(declared or _PICTURE)
        else:
            ranges.append(_PERCENTILES)
            integer = False
    spacing = image.spacing_mm if _keeps_spacing(config) else (1.0, 1.0, 1.0)
    changes = {
        "labels": config.classes.get(LABEL, ()),
        "intensity_range": tuple(ranges),
        "integer": integer,
        "spacing_mm": spacing,
        "affine": as_rows(centred_affine(spacing, image.size)),
    }
    return image.model_copy(update=changes)


def undeclared(config: DataConfig) -> Iterator[str]:
    """Yield what the config must declare before any image is read, one sentence each."""
    for name, kind in config.conditions.items():
        if kind == "class" and name not in config.classes:
            yield (
                f"data.classes: name the classes of the column {name}, as in "
                f"{{{name}: [first, second]}}; else those found in the data become public"
            )
        if kind == "number" and name not in config.ranges:
            yield (
                f"data.ranges: declare the lowest and highest {name}, as in {{{name}: [0, 100]}}; "
                "else those of two people become public"
            )


def _keeps_spacing(config: DataConfig) -> bool:
    """Whether every image has the voxel size of data.spacing_mm in the end."""
    return config.spacing_mm is not None and (config.size is None or config.fit == "crop_or_pad")
