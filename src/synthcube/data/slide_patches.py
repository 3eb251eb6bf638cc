"""How one slide is cut: the resolution of its patches, where there is tissue, and their pixels.

OpenSlide reads region by region, so that memory does not grow with the slide. Only the pyramid is
opened: label and macro image, which may show a patient's name, are neither read nor written.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from synthcube.data.tissue import tissue_mask, tissue_shares
from synthcube.errors import ImageError, ManifestError

if TYPE_CHECKING:
    import openslide

EXAMPLE = "--patch_size 256 --mpp 0.5 --max_patches 500"
LARGEST_PATCH = 4096  # pixels; a region of so many is in the memory
LARGEST_OVERLAP = 0.9
_LOWEST_MPP, _HIGHEST_MPP = 0.02, 50.0  # of microscopes; what lies beyond is no measurement
_SAME_MPP = 0.05  # between the two axes, relative
_ENLARGED = 0.9  # of the wanted resolution: a scanner's 0.253 microns pass for 0.25
_SAME_SCALE = 0.002  # a level that is so near is read as it is, without interpolation
_MASK_SIDE = 2048  # pixels of the thumbnail on which tissue is found
_BLOCK = 2048  # pixels that are read at once, each way
_MICRONS_AT_1X = 10.0  # per pixel, by convention: 20x is 0.5, 40x is 0.25
_IN_MICRONS = re.compile(r"(.+?)\s*(?:um|µm|μm)")


@dataclass(frozen=True)
class PatchOptions:
    """How slides are cut; :func:`patch_options` checks what a person typed."""

    size: float
    """Side of a patch, in pixels of the PNG, or in micrometres with `in_microns`."""
    in_microns: bool = False
    mpp: float | None = None
    """Microns per pixel of the patches; without it and `magnification`, those of the slide."""
    magnification: float | None = None
    overlap: float = 0.0
    """Share of a side that neighbours have in common."""
    max_patches: int | None = None
    """Of a slide, chosen by `seed`, evenly over the tissue; None: all."""
    min_tissue: float = 0.5
    """Share of a patch that is tissue."""
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the patches of a slide depend on."""
        seed = self.seed if self.max_patches else None
        return asdict(replace(self, seed=0)) | {"seed": seed}


def patch_options(
    patch_size: str | None,
    *,
    mpp: float | None = None,
    magnification: float | None = None,
    overlap: float | None = None,
    max_patches: int | None = None,
    min_tissue: float | None = None,
    seed: int = 0,
) -> PatchOptions | None:
    """The options of `prepare`, checked together; None where none is given. Raises ManifestError.

    Args:
        patch_size: "256" for pixels, "100um" for micrometres.
        mpp: and the following, None where they are not given.
    """
    others = {
        "--mpp": mpp, "--magnification": magnification, "--overlap": overlap,
        "--max_patches": max_patches, "--min_tissue": min_tissue,
    }  # fmt: skip
    named = [name for name, value in others.items() if value is not None]
    if patch_size is None:
        if named:
            raise ManifestError(
                f"{' and '.join(named)} cannot be used without --patch_size: add it, as in "
                f"{EXAMPLE}."
            )
        return None
    match = _IN_MICRONS.fullmatch(patch_size.strip())
    faults = [*_size_faults(match[1] if match else patch_size.strip(), is_pixels=not match)]
    if mpp is not None and magnification is not None:
        faults.append("--mpp and --magnification: only one of them can be used")
    if mpp is not None and not _LOWEST_MPP <= mpp <= _HIGHEST_MPP:
        faults.append(f"--mpp {mpp:g}: {_LOWEST_MPP:g} to {_HIGHEST_MPP:g} microns are possible")
    if magnification is not None and not 0.2 <= magnification <= 500:
        faults.append(f"--magnification {magnification:g}: 0.2 to 500 are possible")
    if overlap is not None and not 0 <= overlap <= LARGEST_OVERLAP:
        faults.append(f"--overlap {overlap:g}: a share of 0 to {LARGEST_OVERLAP} is possible")
    if max_patches is not None and max_patches < 1:
        faults.append(f"--max_patches {max_patches}: at least 1 is needed")
    if min_tissue is not None and not 0 <= min_tissue <= 1:
        faults.append(f"--min_tissue {min_tissue:g}: a share of 0 to 1 is possible")
    if faults:
        raise ManifestError("Slides cannot be cut with these settings:", faults)
    return PatchOptions(
        size=float(match[1] if match else patch_size),
        in_microns=bool(match),
        mpp=mpp,
        magnification=magnification,
        overlap=overlap or 0.0,
        max_patches=max_patches,
        min_tissue=0.5 if min_tissue is None else min_tissue,
        seed=seed,
    )


def _size_faults(number: str, *, is_pixels: bool) -> Iterator[str]:
    what = f"--patch_size {number}{'' if is_pixels else 'um'}"
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        yield f"{what}: write 256 for pixels, or 100um for micrometres"
    elif is_pixels and not (size.is_integer() and 8 <= size <= LARGEST_PATCH):
        yield f"{what}: a whole number of 8 to {LARGEST_PATCH} pixels is needed"
    elif size <= 0:
        yield f"{what}: a size above 0 is needed"


@dataclass(frozen=True)
class Cut:
    """How the patches of one slide are read.

    `side` is that of a patch in pixels of level 0, `pixels` in those of the PNG, `part` in those of
    the level that is read; `mpp` is empty where the slide does not state it.
    """

    side: float
    pixels: int
    part: float
    level: int
    mpp: str
    background: tuple[int, int, int]

    @classmethod
    def of(cls, slide: openslide.OpenSlide, options: PatchOptions) -> Cut:
        """Raises ImageError where the metadata of the slide do not allow what is asked."""
        mpp = _microns_per_pixel(slide, is_needed=options.in_microns or options.mpp is not None)
        wanted_mpp = options.mpp
        if options.in_microns and options.magnification:
            wanted_mpp = _MICRONS_AT_1X / options.magnification  # patches of one size and field
        if mpp and wanted_mpp:
            downsample = wanted_mpp / mpp
        elif options.magnification:
            downsample = _objective_power(slide, mpp) / options.magnification
        else:
            downsample, wanted_mpp = 1.0, mpp
        if downsample < _ENLARGED:
            raise ImageError(
                f"is too coarse: it would be enlarged {1 / downsample:.3g} times. Ask for more "
                "microns per pixel, for a lower magnification, or for neither"
            )
        pixels = options.size
        if options.in_microns and wanted_mpp:
            pixels /= wanted_mpp
        if not 8 <= round(pixels) <= LARGEST_PATCH:
            raise ImageError(
                f"would have patches of {pixels:.3g} pixels; 8 to {LARGEST_PATCH} are possible"
            )
        factors = slide.level_downsamples
        level = max(i for i, factor in enumerate(factors) if factor <= downsample * 1.01 or not i)
        if abs(downsample / factors[level] - 1) <= _SAME_SCALE:
            downsample = factors[level]
        side = round(pixels) * downsample
        return cls(
            side=side,
            pixels=round(pixels),
            part=round(side / factors[level], 6),
            level=level,
            mpp=f"{mpp * downsample:.6g}" if mpp else "",
            background=_background(slide),
        )

    def patch(self, slide: openslide.OpenSlide, x: int, y: int) -> PIL.Image.Image:
        """The patch whose upper left corner is there, in pixels of level 0."""
        factor = max(1, int(self.part / self.pixels / 2))
        extent = (self.part, self.part)
        canvas = _reduced(slide, self.level, (x, y), extent, factor, self.background)
        if self.part == self.pixels:
            return canvas
        box = (0.0, 0.0, self.part / factor, self.part / factor)
        return canvas.resize((self.pixels, self.pixels), PIL.Image.Resampling.LANCZOS, box)


def _microns_per_pixel(slide: openslide.OpenSlide, *, is_needed: bool) -> float | None:
    """What the slide states, the mean of both axes; None where that cannot be used."""
    stated = [slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    x, y = (_number(text) for text in stated)
    fault = ""
    if stated == [None, None]:
        fault = "does not state its microns per pixel"
    elif not all(_LOWEST_MPP <= value <= _HIGHEST_MPP for value in (x, y)):
        listed = " x ".join(dict.fromkeys(map(str, stated)))
        fault = (
            f"states {listed} microns per pixel, where {_LOWEST_MPP:g} to {_HIGHEST_MPP:g} are "
            "possible"
        )
    elif abs(x - y) > _SAME_MPP * max(x, y):
        fault = f"states pixels that are not square, {x:g} x {y:g} microns"
    if fault and is_needed:
        raise ImageError(
            f"{fault}; --mpp and sizes in micrometres need them. Without --mpp, --patch_size in "
            "pixels cuts it as it is"
        )
    return None if fault else (x + y) / 2


def _objective_power(slide: openslide.OpenSlide, mpp: float | None) -> float:
    """The magnification at which a slide was scanned."""
    power = _number(slide.properties.get("openslide.objective-power"))
    if 0.2 <= power <= 500:
        return power
    if mpp:
        return _MICRONS_AT_1X / mpp
    raise ImageError(
        "states neither the power of its objective nor its microns per pixel, of which "
        "--magnification needs one: leave it out"
    )


def _number(text: str | None) -> float:
    """A number in the metadata; NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _background(slide: openslide.OpenSlide) -> tuple[int, int, int]:
    """The colour of places that were not scanned: the slide's own, or white."""
    text = slide.properties.get("openslide.background-color", "")
    if re.fullmatch(r"[0-9A-Fa-f]{6}", text):
        red, green, blue = bytes.fromhex(text)
        return red, green, blue
    return 255, 255, 255


def _reduced(
    slide: openslide.OpenSlide, level: int, corner: tuple[int, int], extent: tuple[float, float],
    factor: int, background: tuple[int, int, int],
) -> PIL.Image.Image:  # fmt: skip
    """A region of a level, each pixel the mean of `factor` x `factor`; it is read in blocks.

    Args:
        corner: in pixels of level 0.
        extent: width and height, in pixels of the level.
    """
    width, height = (math.ceil(round(side, 6)) for side in extent)
    downsample = slide.level_downsamples[level]
    canvas = PIL.Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    block = max(1, _BLOCK // factor) * factor
    for top in range(0, height, block):
        for left in range(0, width, block):
            at = (round(corner[0] + left * downsample), round(corner[1] + top * downsample))
            size = (min(block, width - left), min(block, height - top))
            region = slide.read_region(at, level, size)
            opaque = PIL.Image.new("RGB", size, background)
            opaque.paste(region, mask=region.getchannel("A"))
            part = opaque.reduce(factor) if factor > 1 else opaque
            canvas.paste(part, (left // factor, top // factor))
    return canvas


def thumbnail_of(slide: openslide.OpenSlide, longest: int = _MASK_SIDE) -> PIL.Image.Image:
    """The whole slide in RGB, at most `longest` pixels wide or high."""
    downsample = max(1.0, max(slide.dimensions) / longest)
    level = slide.get_best_level_for_downsample(downsample)
    width, height = slide.level_dimensions[level]
    factor = max(1, int(downsample / slide.level_downsamples[level]))
    canvas = _reduced(slide, level, (0, 0), (width, height), factor, _background(slide))
    size = tuple(max(1, round(side / downsample)) for side in slide.dimensions)
    box = (0.0, 0.0, width / factor, height / factor)
    return canvas.resize((size[0], size[1]), PIL.Image.Resampling.BOX, box)


def patch_corners(
    slide: openslide.OpenSlide, cut: Cut, options: PatchOptions, name: str
) -> list[tuple[int, int]]:
    """Where patches with enough tissue are, row by row. Raises ImageError where there are none."""
    left, top, width, height = _bounds(slide)
    if cut.side > min(width, height):
        raise ImageError(
            f"has {width} x {height} pixels: a patch of {cut.side:.6g} of them is larger"
        )
    step = cut.side * (1 - options.overlap)
    x = left + np.rint(np.arange(int((width - cut.side) / step + 1e-6) + 1) * step).astype(np.int64)
    y = top + np.rint(np.arange(int((height - cut.side) / step + 1e-6) + 1) * step).astype(np.int64)
    mask = tissue_mask(thumbnail_of(slide))
    if not mask.any() and options.min_tissue:
        raise ImageError("shows no tissue")
    shares = tissue_shares(mask, x, y, cut.side, slide.dimensions)
    rows, columns = np.nonzero(shares >= options.min_tissue)
    if not len(rows):
        raise ImageError(
            f"has no patch with so much tissue: {shares.max():.2f} at most, and --min_tissue is "
            f"{options.min_tissue:g}"
        )
    if options.max_patches and len(rows) > options.max_patches:
        generator = np.random.default_rng([options.seed, zlib.crc32(name.encode())])
        chosen = _evenly_chosen(rows, columns, options.max_patches, float(generator.random()))
        rows, columns = rows[chosen], columns[chosen]
    return list(zip(x[columns].tolist(), y[rows].tolist(), strict=True))


def _bounds(slide: openslide.OpenSlide) -> tuple[int, int, int, int]:
    """Left, top, width and height of what was scanned, in pixels of level 0."""
    names = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
    stated = [slide.properties.get(f"openslide.{name}", "") for name in names]
    width, height = slide.dimensions
    if all(text.isdecimal() for text in stated):
        left, top, inner_width, inner_height = map(int, stated)
        if left + inner_width <= width and top + inner_height <= height:
            return left, top, inner_width, inner_height
    return 0, 0, width, height


def _evenly_chosen(rows: Any, columns: Any, count: int, start: float) -> Any:
    """Indices of `count` places, in order: every n-th along a Z-order curve, so evenly over them.

    It is the idea of spatially balanced samples: Stevens and Olsen 2004,
    doi:10.1198/016214504000000250.
    """
    code = np.zeros(len(rows), np.int64)
    for bit in range(24):
        code |= ((columns >> bit) & 1) << 2 * bit | ((rows >> bit) & 1) << 2 * bit + 1
    picked = ((np.arange(count) + start) * len(rows) / count).astype(np.int64)
    return np.sort(np.argsort(code, kind="stable")[picked])
