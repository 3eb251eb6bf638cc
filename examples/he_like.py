"""Write whole slides that look like H&E, of tissue that nobody has: for the page on slides.

    python examples/he_like.py my-slides
    python examples/he_like.py my-slides --overview my-patches overview.png

Each is a tiled pyramid (TIFF) at 0.5 microns per pixel, with glands, nuclei, a tear and a mark of a
green pen. The same number gives the same pixels. The second command draws the first slide, its
tissue mask and the patches that `synthcube prepare` has cut from it. It needs
`pip install tifffile`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import openslide
import PIL.Image
import PIL.ImageDraw
import tifffile
from scipy import ndimage

from synthcube.data.manifest import read_manifest
from synthcube.data.slide_patches import thumbnail_of
from synthcube.data.tissue import tissue_mask

SIZE, MPP, SLIDES = (3072, 2304), 0.5, 6
# Optical densities of red, green and blue: Ruifrok and Johnston 2001, PMID 11531144.
HEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
GLASS, PEN = 244.0, (40, 150, 70)


def slide(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The pixels of a slide, (Y, X, 3) uint8."""
    random = np.random.default_rng(number)
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    place = np.hypot((x / width - 0.5) / 0.40, (y / height - 0.54) / 0.36)
    tissue = place + 0.9 * _cloud(random, size, 48) < 1
    tear = x / width - 0.55 - 0.1 * (y / height - 0.5) + 0.3 * _cloud(random, size, 48)
    tissue &= np.abs(tear) > 0.012
    eosin = (0.42 + 0.5 * _cloud(random, size, 200) + 0.15 * _cloud(random, size, 700)) * tissue
    density = np.full((height, width), 0.0012, np.float32)
    for _ in range(width * height // 45_000):
        radius = random.uniform(26, 60)
        column, row = random.uniform((0, 0), size)
        top, left = max(0, int(row - 2 * radius)), max(0, int(column - 2 * radius))
        part = np.s_[top : int(row + 2 * radius), left : int(column + 2 * radius)]
        distance = np.hypot(x[part] - column, (y[part] - row) * random.uniform(0.7, 1.3)) / radius
        density[part] = np.where(np.abs(distance - 1) < 0.2, 0.012, density[part])
        density[part][distance < 0.75] = 0
        eosin[part][distance < 0.7] = 0  # the lumen
    nuclei = ((random.random((height, width)) < density) & tissue).astype(np.float32)
    hematoxylin = 130 * ndimage.gaussian_filter(nuclei, 3.2) + 0.10 * tissue * (eosin > 0)
    stains = hematoxylin.clip(0, 1.3)[..., None] * HEMATOXYLIN + eosin.clip(0, 1)[..., None] * EOSIN
    pixels = GLASS * np.exp(-stains)
    stroke = np.abs(y - height * 0.05 - 0.02 * height * np.sin(x / width * 9)) < height * 0.012
    pixels[stroke & (x > width * 0.6) & (x < width * 0.9)] = PEN
    pixels += random.normal(0, 2, pixels.shape)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _cloud(random: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise between about -0.5 and 0.5, of so many cells along the width."""
    step = max(1, size[0] // cells)
    small = random.normal(0, 1, (size[1] // step + 2, size[0] // step + 2))
    small = ndimage.gaussian_filter(small, 2)
    small = (small - small.mean()) / small.std() / 4
    return ndimage.zoom(small, step, order=1)[: size[1], : size[0]].astype(np.float32)


def write(folder: Path, slides: int = SLIDES, size: tuple[int, int] = SIZE) -> None:
    """Write so many slides into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(slides):
        level = PIL.Image.fromarray(slide(number, size))
        with tifffile.TiffWriter(folder / f"slide_{number}.tif") as file:
            for power in range(3):
                file.write(
                    np.asarray(level), tile=(256, 256), photometric="rgb", compression="zlib",
                    metadata=None, subfiletype=int(power > 0), resolutionunit="CENTIMETER",
                    resolution=(1e4 / MPP / 2**power,) * 2,
                )  # fmt: skip
                level = level.reduce(2)


def overview(folder: Path, patches: Path, target: Path, width: int = 380) -> None:
    """Draw the first slide of `folder`, its tissue mask, and its patches in the manifest."""
    path = min(folder.glob("*.tif"))
    with openslide.OpenSlide(path) as opened:
        thumbnail = thumbnail_of(opened, width)
        scale = thumbnail.width / opened.dimensions[0]
    mask = PIL.Image.fromarray(tissue_mask(thumbnail)).convert("RGB")
    places = thumbnail.copy()
    drawing = PIL.ImageDraw.Draw(places)
    for row in read_manifest(patches).rows:
        if row.channels[0].parent.name == path.name:
            x, y = float(row.conditions["x"]), float(row.conditions["y"])
            with PIL.Image.open(row.channels[0]) as patch:
                side = patch.width * float(row.conditions["mpp"]) / MPP
            drawing.rectangle([x * scale, y * scale, (x + side) * scale, (y + side) * scale],
                              outline=(20, 90, 200), width=1)  # fmt: skip
    gap = 8
    picture = PIL.Image.new("RGB", (3 * width + 2 * gap, thumbnail.height), "white")
    for index, part in enumerate((thumbnail, mask, places)):
        picture.paste(part, (index * (width + gap), 0))
    picture.quantize(128, dither=PIL.Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--overview", nargs=2, type=Path, metavar=("PATCHES", "PICTURE"))
    arguments = parser.parse_args()
    if arguments.overview:
        overview(arguments.folder, *arguments.overview)
    else:
        write(arguments.folder)


if __name__ == "__main__":
    main()
