"""All images of a manifest, read, preprocessed and kept; or all that is wrong with them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from synthcube.data.cache import ImageCache, cache_key, open_cache
from synthcube.data.images import read_image
from synthcube.data.manifest import Manifest, capped
from synthcube.data.transforms import DataConfig, Prepared, Preprocessing
from synthcube.errors import ImageError, SynthCubeError
from synthcube.runtime import told

log = logging.getLogger("synthcube")

_GREY_LEVEL = 2 / 255  # of a picture of 8 bits, in [-1, 1]


def load_images(manifest: Manifest, config: DataConfig, cache: Path) -> ImageCache:
    """The preprocessed images of `manifest`, in its order; made only where they are not kept yet.

    Raises:
        ImageError: images that cannot be read, are constant, or differ in shape; all at once.
        OutputError: the cache does not fit its limit or the disk.
    """
    files = [row.channels for row in manifest.rows]
    key = cache_key(files, config.preprocessing_key, cache)
    return open_cache(
        cache, key, len(files), lambda: _prepared(manifest, config), config.cache_gb * 1e9
    )


def _prepared(manifest: Manifest, config: DataConfig) -> Iterator[Prepared]:
    """Every image preprocessed, in the manifest's order; faults of all are raised together."""
    preprocessing = Preprocessing(config)
    faults: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    contrasts = _Contrasts()
    log.info("Preprocessing %d images (kept for next time) ...", len(manifest.rows))
    for row in told(manifest.rows, len(manifest.rows), "Preprocessing images"):
        where = str(row.channels[0])
        try:
            prepared = preprocessing(read_image(row.channels))
        except SynthCubeError as error:
            text = str(error)
            names_it = any(str(path) in text for path in row.channels)
            faults.append(text if names_it else f"{where}: {text}")
            continue
        shapes[where] = tuple(prepared.tensor.shape)
        contrasts.add(prepared)
        if not faults:
            yield prepared
    if config.intensity_range and not faults and (lost := contrasts.faults()):
        raise ImageError(
            f"data.intensity_range {list(config.intensity_range)} leaves nothing to see in any "
            f"image of {manifest.path}:",
            lost,
        )
    faults += shape_faults(shapes)
    if faults:
        count = "1 image" if len(faults) == 1 else f"{len(faults)} images"
        raise ImageError(
            f"{count} of {manifest.path} cannot be used "
            "(synthcube prepare --verify leaves them out):",
            capped(faults),
        )


class _Contrasts:
    """What each channel of all images spans, before intensities are brought to [-1, 1] and after.

    A fixed range may leave one image all black; where it does so to all of them, it is a mistake.
    """

    def __init__(self) -> None:
        self.before: list[tuple[float, float]] = []
        self.after: list[float] = []

    def add(self, image: Prepared) -> None:
        low, high = image.tensor.flatten(1).aminmax(dim=1)
        after = (high - low).tolist()
        self.before = [
            (min(a, c), max(b, d))
            for (a, b), (c, d) in zip(self.before or image.found, image.found, strict=False)
        ]
        self.after = [max(pair) for pair in zip(self.after or after, after, strict=False)]

    def faults(self) -> list[str]:
        """One line for each channel that is left with less than a grey level in every image."""
        return [
            f"channel {index}: its intensities are {low:g} to {high:g}"
            for index, ((low, high), after) in enumerate(zip(self.before, self.after, strict=True))
            if low < high and after < _GREY_LEVEL
        ]


def shape_faults(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """One line for each image, by its name, whose shape (C, *spatial) is not the usual one."""
    if len(set(shapes.values())) <= 1:
        return []
    usual, _ = Counter(shapes.values()).most_common(1)[0]
    faults = []
    for name, shape in shapes.items():
        if shape[0] != usual[0]:
            faults.append(
                f"{name}: {shape[0]} channels, the others have {usual[0]}; "
                "convert it, or leave it out"
            )
        elif len(shape) != len(usual):
            faults.append(
                f"{name}: {len(shape) - 1} spatial axes, the others have {len(usual) - 1}; "
                "leave it out"
            )
        elif shape != usual:
            faults.append(
                f"{name}: shape {shape[1:]}, the others {usual[1:]}; data.size: {list(usual[1:])} "
                "brings all to one shape (data.spacing_mm and fit: crop_or_pad keep proportions)"
            )
    return faults
