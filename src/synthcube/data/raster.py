"""PNG, JPEG and TIFF files: pictures in grey and colour, and the pages of a TIFF as slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import SimpleITK as sitk
import torch

from synthcube.data.geometry import PICTURE_AFFINE
from synthcube.data.image_files import UNNAMED, Array, FileImage, check_declared, voxels_of
from synthcube.errors import ImageError
from synthcube.reading import open_file

# Pillow's mode -> the mode that is read: grey stays grey, colour stays colour, alpha is dropped.
# A palette is colour even where its colours happen to be grey: one data set, one channel count.
_MODES = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBX"), "RGB"),
    **{mode: mode for mode in ("I", "I;16", "I;16L", "I;16B", "F")},
}


def read_raster(path: Path) -> FileImage:
    """Read a picture; the pages of a TIFF become its slices, an EXIF rotation is applied."""
    with (
        open_file(path, ImageError) as file,
        PIL.Image.open(file, formats=("PNG", "JPEG", "TIFF")) as picture,
    ):
        pages = getattr(picture, "n_frames", 1)
        if picture.format == "PNG" and pages > 1:
            raise ImageError(f"{path} is an animation of {pages} pictures; store one per file.")
        check_declared(path, (*picture.size, pages, len(picture.getbands())), 1)
        if _has_deep_colour(picture):
            picture.load()  # finds out if it was cut short
            stack = _deep_colour(path)
        else:
            stack = _stack(path, picture, pages if picture.format == "TIFF" else 1)
    return FileImage(
        np.ascontiguousarray(stack.transpose(3, 2, 1, 0), dtype=np.float32),
        np.array(PICTURE_AFFINE),
        eight_bit=stack.dtype == np.uint8,
        integer=stack.dtype.kind in "iu",
        raster=True,
    )


def _stack(path: Path, picture: PIL.Image.Image, pages: int) -> Array:
    frames = []
    for page in range(pages):
        picture.seek(page)
        check_declared(path, (*picture.size, pages, len(picture.getbands())), 1)
        mode = _MODES.get(picture.mode)
        if mode is None:
            raise ImageError(
                f"{path} has the colour mode {picture.mode}; save it as grey, RGB or RGBA."
            )
        upright = PIL.ImageOps.exif_transpose(picture)
        frame = np.asarray(upright if upright.mode == mode else upright.convert(mode))
        frames.append(frame.reshape(*frame.shape[:2], -1))  # (Y, X, C)
    kinds = {(frame.shape, frame.dtype.str) for frame in frames}
    if len(kinds) > 1:
        sizes = ", ".join(sorted(f"{x} x {y}, {c} channels" for (y, x, c), _ in kinds))
        raise ImageError(
            f"{path} has pages that differ ({sizes}); store one page per file. If it is a whole "
            "slide, synthcube prepare --patch_size 256 cuts it."
        )
    return np.stack(frames)  # (Z, Y, X, C)


def _has_deep_colour(picture: PIL.Image.Image) -> bool:
    """Whether Pillow would cut several 16-bit channels down to 8 bits."""
    tile = getattr(picture, "tile", None)
    arguments = tile[0].args if tile else ""
    raw_mode = arguments if isinstance(arguments, str) else str((arguments or ("",))[0])
    return ";16" in raw_mode and not picture.mode.startswith("I")


def _deep_colour(path: Path) -> Array:
    image = sitk.ReadImage(str(path))
    pixels = sitk.GetArrayFromImage(image)
    pixels = pixels[None] if image.GetDimension() == 2 else pixels
    return np.asarray(pixels[..., :3])  # (Z, Y, X, C)


def picture_of(tensor: torch.Tensor, path: Path = UNNAMED) -> PIL.Image.Image:
    """An 8-bit picture of (C, X, Y) intensities, rounded and clipped to 0..255.

    Args:
        tensor: of 1 channel (grey) or 3 (colour).
        path: named by the ImageError about an image that is no picture.
    """
    voxels = voxels_of(path, tensor)
    channels, _, _, depth = voxels.shape
    if depth > 1 or channels not in (1, 3):
        raise ImageError(
            f"{path.name}: a PNG holds 2D images of 1 or 3 channels, this one has {channels} "
            f"and {depth} slices; write it as .nii.gz."
        )
    pixels = np.rint(voxels[..., 0]).clip(0, 255).astype(np.uint8).transpose(2, 1, 0)
    return PIL.Image.fromarray(pixels if channels == 3 else pixels[..., 0])
