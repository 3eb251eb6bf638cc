"""Pictures of images for people: upright, and in one grid."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from synthcube.errors import ImageError
from synthcube.storage import write_with

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Size = tuple[int, int]  # height and width in pixels
P = TypeVar("P", bound=np.generic)

MIN_TILE = 96  # pixels: a smaller tile is enlarged by a whole factor
WRITTEN_TILE = 128  # the same under a caption: a seed of 19 digits fits
GAP = 2  # pixels between tiles
LINE = 14  # height of a line of text
PLANES = ("axial", "coronal", "sagittal")
CONVENTION = "Radiological: the patient's right is on the left."
_PLANE_AXES = ((0, 1), (0, 2), (1, 2))  # of each plane: the axis to the left, the axis up
_PLANE_GAP = 1  # between the planes or channels of one tile
_BACKGROUND = (64, 64, 96)  # not grey: no part of an image is mistaken for it
_TEXT = (240, 240, 240)
_NOT_A_NUMBER = (255, 0, 255)
_FONT_SIZE = 11
_MOST_LINES = 5  # of a caption
_FRAME_MS, _LAST_MS = 120, 1500  # how long a GIF shows a frame, and the last one


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of a picture, ready to be shown, with the text below it."""

    pixels: Pixels
    caption: str = ""
    parts: tuple[tuple[int, str], ...] = ()
    """Of a volume: where each plane begins, in pixels from the left, and its name."""


def grid(
    images: Sequence[torch.Tensor],
    columns: int | None = None,
    *,
    raster: bool = True,
    spacing_mm: Sequence[float] | None = None,
    captions: Sequence[str] = (),
    headings: Sequence[str] = (),
    title: str = "",
    masks: Collection[int] = (),
) -> PIL.Image.Image:
    """One RGB picture of all images, row by row. Raises ImageError.

    A 2D image is shown with x to the right; 3 channels are colours, others stand side by
    side. A volume is shown by its middle axial, coronal and sagittal planes, left to right, with
    their names above, scaled to one height and to millimetres. As radiologists see it, the
    patient's right is on the left and the front or head is up; in the sagittal plane the front is
    on the left. Its channels stand side by side. Voxels that are NaN are magenta.

    Args:
        images: each (C, X, Y) or (C, X, Y, Z) in [-1, 1]; values beyond are clipped.
        columns: tiles in a row; chosen so that the grid is about square where it is None.
        raster: 2D images have y down, as in a PNG; otherwise y up, as in RAS. Volumes are RAS.
        spacing_mm: voxel size along each axis, 1 mm where it is None.
        captions: what stands below each image; long lines are wrapped.
        headings: what stands above each column; they set the number of columns.
        title: what stands above everything.
        masks: channels that are no colours, and stand beside the three that are.
    """
    texts = captions or [""] * len(images)
    least = WRITTEN_TILE if any(texts) else MIN_TILE
    tiles = [
        tile(image, raster=raster, spacing_mm=spacing_mm, caption=text, least=least, masks=masks)
        for image, text in zip(images, texts, strict=True)
    ]
    return arranged(tiles, columns, headings=headings, title=title)


def tile(
    image: torch.Tensor, *, raster: bool = True, spacing_mm: Sequence[float] | None = None,
    caption: str = "", least: int = WRITTEN_TILE, masks: Collection[int] = (),
) -> Tile:  # fmt: skip
    """An image as :func:`grid` shows it, see there; the shorter side is at least `least` pixels."""
    voxels = image.detach().cpu().float().numpy()
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.ndim != 4 or not voxels.size:
        raise ImageError(
            f"An image of shape {tuple(image.shape)} cannot be shown; "
            "(C, X, Y) or (C, X, Y, Z) is needed."
        )
    spacing = _three_spacings(spacing_mm)
    if voxels.shape[-1] > 1:
        sizes = plane_sizes(voxels.shape[1:], spacing, least)
        planes = [
            resized(_grey(cut), size)
            for channel in voxels
            for cut, size in zip(middle_planes(channel), sizes, strict=True)
        ]
        starts = np.cumsum([0, *(plane.shape[1] + _PLANE_GAP for plane in planes)]).tolist()
        return Tile(
            _beside(planes), caption, tuple(zip(starts, PLANES * len(voxels), strict=False))
        )
    flat = voxels[..., 0].transpose(0, 2, 1)  # (C, Y, X)
    flat = flat if raster else flat[:, ::-1]
    channels = [_grey(channel) for channel in flat]
    images = [channel for channel in range(len(flat)) if channel not in masks]
    if len(images) == 3:
        labels = [channels[channel] for channel in range(len(flat)) if channel in masks]
        channels = [_colours(flat[images]), *labels]
    height, width = flat.shape[1:]
    size = _enlarged(height * spacing[1], width * spacing[0], min(spacing[:2]), least)
    return Tile(_beside(resized(channel, size) for channel in channels), caption)


def arranged(
    tiles: Sequence[Tile], columns: int | None = None, *, headings: Sequence[str] = (),
    title: str = "",
) -> PIL.Image.Image:  # fmt: skip
    """One RGB picture of tiles, row by row; see :func:`grid`. Raises ImageError."""
    if not tiles:
        raise ImageError("There is no image to show.")
    height = max(tile.pixels.shape[0] for tile in tiles)
    width = max(tile.pixels.shape[1] for tile in tiles)
    captions = [_wrapped(tile.caption, width) for tile in tiles]
    pitch = height + LINE * max(map(len, captions)) + GAP
    if headings:
        columns = len(headings)
    elif columns is None:
        about = math.sqrt(len(tiles) * pitch / (width + GAP))
        # of the two that make it about square, the one that leaves fewer places empty
        either = [max(1, math.ceil(about - 1e-9)), max(1, math.floor(about))]
        columns = min(either, key=lambda number: -len(tiles) % number)
    columns = min(max(columns, 1), len(tiles))
    has_volumes = any(tile.parts for tile in tiles)
    full = columns * (width + GAP) - GAP
    above, below = _wrapped(title, full), _wrapped(CONVENTION if has_volumes else "", full)
    names = [_wrapped(heading, width) for heading in headings[:columns]]
    top = LINE * (len(above) + max(map(len, names), default=0) + has_volumes)
    bottom = top + math.ceil(len(tiles) / columns) * pitch - GAP
    picture = PIL.Image.fromarray(_canvas(bottom + LINE * len(below), full))
    draw = PIL.ImageDraw.Draw(picture)
    _write(draw, 0, 0, above)
    for column, lines in enumerate(names):
        _write(draw, column * (width + GAP), LINE * len(above), lines)
    for i, (shown, lines) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(i, columns)
        x, y = column * (width + GAP), top + row * pitch
        picture.paste(PIL.Image.fromarray(shown.pixels), (x, y))
        _write(draw, x, y + height, lines)
        for start, name in shown.parts if row == 0 else ():
            _write(draw, x + start, top - LINE, [name])
    _write(draw, 0, bottom, below)
    return picture


def save_animation(
    path: Path, frames: Sequence[Sequence[Tile]], titles: Sequence[str],
    columns: int | None = None, *, headings: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write a GIF that repeats, each frame a picture of tiles; the last one stays for longer.

    Grey images keep every level; colours are reduced to 256.

    Args:
        frames: the tiles of each, of one size in all.
        titles: what stands above each frame.

    Raises:
        OutputError: `path` cannot be written.
    """
    pixels = (shown.pixels for tiles in frames for shown in tiles)
    mode = "L" if all((part == part[..., :1]).all() for part in pixels) else "RGB"
    pictures = [
        arranged(tiles, columns, headings=headings, title=title).convert(mode)
        for tiles, title in zip(frames, titles, strict=True)
    ]
    durations = [_FRAME_MS] * (len(pictures) - 1) + [_LAST_MS]

    def write(temporary: Path) -> None:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:],
            duration=durations, loop=0, optimize=False,
        )  # fmt: skip

    write_with(path, write)


def axial_slices(
    image: torch.Tensor, places: Sequence[int], *, spacing_mm: Sequence[float] | None = None,
    caption: str = "",
) -> list[Tile]:  # fmt: skip
    """Axial slices of a volume, (C, X, Y, Z) in [-1, 1], turned as :func:`grid` turns them.

    Channels stand side by side.

    Args:
        places: the slices, from 0 at the feet.
    """
    voxels = image.detach().cpu().float().numpy()
    spacing = _three_spacings(spacing_mm)
    extent = voxels.shape[2] * spacing[1], voxels.shape[1] * spacing[0]
    size = _enlarged(*extent, min(spacing), WRITTEN_TILE)
    tiles = []
    for cuts in np.moveaxis(voxels[..., list(places)], -1, 0):
        pixels = _beside(resized(_grey(_turned(cut)), size) for cut in cuts)
        tiles.append(Tile(pixels, caption, ((0, PLANES[0]),)))
    return tiles


def plane_of(
    image: torch.Tensor, plane: str = "axial", *, spacing_mm: Sequence[float] | None = None
) -> PIL.Image.Image:
    """One pixel a voxel: a 2D image, or the middle plane of a volume, as :func:`grid` turns it.

    Grey; channels stand side by side. Where voxels are not square, the shorter side is a pixel.

    Args:
        image: (C, X, Y) or (C, X, Y, Z) in [-1, 1], RAS; values beyond are clipped.
        plane: of a volume: axial, coronal or sagittal.
        spacing_mm: voxel size along each axis, 1 mm where it is None.

    Raises:
        ImageError: there is no such plane.
    """
    if plane not in PLANES:
        raise ImageError(f"plane is {plane!r}: use {', '.join(PLANES)}.")
    voxels = image.detach().cpu().float().numpy()
    spacing = _three_spacings(spacing_mm)
    index = PLANES.index(plane if voxels.ndim == 4 else "axial")
    right, up = _PLANE_AXES[index]
    pixel = min(spacing[right], spacing[up])
    cuts = [
        middle_planes(channel)[index] if voxels.ndim == 4 else channel.T[::-1] for channel in voxels
    ]
    rows, columns = cuts[0].shape
    size = _enlarged(rows * spacing[up], columns * spacing[right], pixel, 1)
    return PIL.Image.fromarray(_beside(resized(_grey(cut), size) for cut in cuts)).convert("L")


def save_picture(path: Path, picture: PIL.Image.Image) -> None:
    """Write a PNG in one step. Raises OutputError."""
    write_with(path, lambda temporary: picture.save(temporary, format="PNG"))


def _three_spacings(spacing_mm: Sequence[float] | None) -> list[float]:
    """Voxel size along three axes; 1 mm where none is given."""
    return [*(() if spacing_mm is None else map(float, spacing_mm)), 1.0, 1.0, 1.0][:3]


def _turned(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A plane of a RAS volume with its second axis up and its first to the left."""
    turned: npt.NDArray[Any] = plane.T[::-1, ::-1]
    return turned


def middle_planes(volume: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Middle axial, coronal and sagittal plane of an (X, Y, Z) volume in RAS, as radiologists
    see them: rows run down, the patient's right, or the front, is on the left."""
    x, y, z = (side // 2 for side in volume.shape)
    return [_turned(plane) for plane in (volume[:, :, z], volume[:, y], volume[x])]


def plane_sizes(shape: Sequence[int], spacing: Sequence[float], least: int = 1) -> list[Size]:
    """Height and width in pixels of the three planes of a volume, in millimetres alike.

    All have one height; the shorter side of each is at least `least`.
    """
    extent = [side * step for side, step in zip(shape, spacing, strict=True)]
    pixel = min(spacing)
    sizes = [_enlarged(extent[up], extent[left], pixel, least) for left, up in _PLANE_AXES]
    height = max(size[0] for size in sizes)
    return [(height, max(1, round(height * extent[i] / extent[up]))) for i, up in _PLANE_AXES]


def _enlarged(height: float, width: float, pixel: float, least: int) -> Size:
    """Pixels for a plane of that many millimetres: the shorter side at least `least`."""
    rows, columns = max(1, round(height / pixel)), max(1, round(width / pixel))
    factor = math.ceil(least / min(rows, columns))
    return rows * factor, columns * factor


def resized(pixels: npt.NDArray[P], size: Size) -> npt.NDArray[P]:
    """(height, width) or (height, width, 3) by nearest neighbour: voxels stay visible."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for old, new in zip(pixels.shape, size, strict=False)
    )
    scaled: npt.NDArray[P] = pixels[rows][:, columns]
    return scaled


def _grey(plane: npt.NDArray[Any]) -> Pixels:
    return _colours(np.stack([plane] * 3))


def _colours(planes: npt.NDArray[Any]) -> Pixels:
    """(3, height, width) in [-1, 1] to pixels."""
    colours = np.nan_to_num(planes, nan=0, posinf=1, neginf=-1)
    pixels: Pixels = np.rint((colours.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    pixels[np.isnan(planes).any(axis=0)] = _NOT_A_NUMBER
    return pixels


def _beside(planes: Iterable[Pixels]) -> Pixels:
    """Planes of one height, left to right."""
    strip: list[Pixels] = []
    for plane in planes:
        if strip:
            strip.append(_canvas(len(plane), _PLANE_GAP))
        strip.append(plane)
    return np.concatenate(strip, axis=1)


def _canvas(height: int, width: int) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = _BACKGROUND
    return canvas


@cache
def font() -> Any:
    """Pillow's own font, which has the characters of ASCII."""
    return PIL.ImageFont.load_default(_FONT_SIZE)


def ascii_text(text: str) -> str:
    """`text` as the font can write it: letters without accents, ? for what has no likeness."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in plain)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text that are at most `width` pixels wide; words too long are broken."""
    room = width - 2
    lines: list[str] = []
    for paragraph in filter(None, text.split("\n")):
        line = ""
        for word in ascii_text(paragraph).split():
            joined = f"{line} {word}".lstrip()
            if line and font().getlength(joined) > room:
                lines.append(line)
                joined = word
            while len(joined) > 1 and font().getlength(joined) > room:
                fits = len(joined) - 1
                while fits > 1 and font().getlength(joined[:fits]) > room:
                    fits -= 1
                lines.append(joined[:fits])
                joined = joined[fits:]
            line = joined
        lines.append(line)
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], "..."]
    return lines


def _write(draw: PIL.ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        draw.text((x + 1, y + number * LINE), line, fill=_TEXT, font=font())
