"""DICOM series below a folder to NIfTI volumes and pictures, without what identifies a person.

A series becomes one NIfTI with its true geometry. Pictures, which have no place in space, become
one file each: a PNG where they have 8 bits or colour, else a NIfTI of one slice.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from synthcube.data.dicom_columns import cells_of
from synthcube.data.dicom_files import (
    NEEDS_EXTRA,
    Array,
    Header,
    Pixels,
    is_readable,
    quiet,
    read_header,
    read_pixels,
)
from synthcube.data.dicom_geometry import flat_affine, stacked
from synthcube.data.geometry import Affine
from synthcube.data.image_files import check_declared
from synthcube.data.images import write_image
from synthcube.data.layouts import Item, LeftOut, Paradigm
from synthcube.data.manifest import natural_key
from synthcube.errors import ImageError
from synthcube.storage import make_folder, require_separate, sha256
from synthcube.terminal import followed

IMAGES = "images"
"""The folder of what is written, beside the manifest."""
_NAME_DIGITS = 12  # of a subject; two of a million people share one in 1 of 500 data sets


@dataclass(frozen=True, slots=True)
class _Image:
    """One image to be: the files of its slices, or one file of one or many frames."""

    subject: str
    label_name: str
    headers: tuple[Header, ...]
    stem: str


def converted(
    data: Path,
    files: Sequence[Path],
    output: Path,
    left_out: LeftOut,
    *,
    paradigm: Paradigm = "unlabeled",
    columns: Sequence[str] = (),
) -> list[Item]:
    """Write the series of DICOM files as images into `output`/images; returns a row for each.

    Memory holds one series at a time. The same call writes the same files again.

    Args:
        data: the folder in which the files lie; its folders name the classes of `paradigm` custom.
        columns: keywords of DICOM, see :func:`synthcube.data.dicom_columns.check_columns`.
    """
    if not files:
        return []
    if not is_readable():
        left_out += [(file, NEEDS_EXTRA) for file in files]
        return []
    folder = output / IMAGES
    require_separate({"output_path": folder}, {"data_path": data})
    items = []
    with quiet():
        images = _images(data, _headers(files, left_out), paradigm, left_out)
        for image in followed(images, len(images), "Converting DICOM series", "series"):
            try:
                path, cells = _convert(image, folder, columns)
            except ImageError as error:
                left_out.append((image.headers[0].path, _reason(str(error), image.headers)))
            else:
                name = f"{image.subject}/{image.stem}"
                items.append(Item(image.subject, image.label_name, (path,), name, cells))
    return items


def _headers(files: Sequence[Path], left_out: LeftOut) -> list[Header]:
    """The headers of the files that are images; a file that is there twice counts once."""
    headers: dict[str, Header] = {}
    for file in followed(files, len(files), "Reading DICOM headers", "file"):
        try:
            header = read_header(file)
        except ImageError as error:
            left_out.append((file, str(error)))
            continue
        first = headers.setdefault(header.instance, header)
        if first is not header:
            is_copy = sha256(first.path) == sha256(file)
            other = "a copy of" if is_copy else "another image under the same UID as"
            left_out.append((file, f"{other} {first.path.name}"))
    return list(headers.values())


def _images(
    data: Path, headers: Sequence[Header], paradigm: Paradigm, left_out: LeftOut
) -> list[_Image]:
    """The images in headers, series by series, with the subjects' pseudonyms."""
    series: dict[str, list[Header]] = {}
    for header in headers:
        series.setdefault(header.series, []).append(header)
    subjects = _pseudonyms(headers)
    images: list[_Image] = []
    numbers: Counter[str] = Counter()
    for _, group in sorted(series.items(), key=lambda item: (item[1][0].series_number, item[0])):
        group.sort(key=lambda header: (header.number, natural_key(header.instance)))
        classes = {_class_of(header.path, data) for header in group}
        fault = ""
        if len({header.patient for header in group}) > 1:
            fault = "the files of one series are of different patients"
        elif paradigm == "custom" and (len(classes) > 1 or "" in classes):
            fault = "its files are not all in the folder of one class"
        if fault:
            left_out.append((group[0].path, _reason(fault, group)))
            continue
        subject = subjects[group[0].patient]
        labels = {"unlabeled": "", "patient": subject, "custom": min(classes)}
        # Its slices are one image, each picture and each multi-frame file is one of its own.
        parts = [[header] for header in group if not header.plane]
        if slices := [header for header in group if header.plane]:
            parts.append(slices)
        for part in parts:
            stem = f"{subject}_{group[0].series_number:03d}"
            numbers[stem] += 1
            stem += f"-{numbers[stem]}" if numbers[stem] > 1 else ""
            images.append(_Image(subject, labels[paradigm], tuple(part), stem))
    return sorted(images, key=lambda image: natural_key(image.stem))


def _class_of(path: Path, data: Path) -> str:
    folders = path.relative_to(data).parts[:-1]
    return folders[0] if folders else ""


def _pseudonyms(headers: Sequence[Header]) -> dict[str, str]:
    """A subject's name for each patient.

    It is a hash of the patient's id and of one of the patient's files: whoever has only the names
    cannot try ids, as in a hash of the id alone, because the content of a file cannot be guessed.
    Names do not depend on the other patients, so that a data set can grow, and neither they nor
    their order follow those of the ids. The file is the one with the lowest UID.
    """
    first: dict[str, Header] = {}
    for header in sorted(headers, key=lambda header: natural_key(header.instance)):
        first.setdefault(header.patient, header)
    return {
        patient: "sub-"
        + hashlib.sha256(f"{sha256(header.path)}\n{patient}".encode()).hexdigest()[:_NAME_DIGITS]
        for patient, header in first.items()
    }


def _reason(text: str, headers: Sequence[Header]) -> str:
    text = text.removeprefix(f"{headers[0].path} ")
    return text if len(headers) == 1 else f"a series of {len(headers)} files: {text}"


def _convert(image: _Image, folder: Path, columns: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Read and write an image; returns its file and the cells of its columns."""
    first = image.headers[0]
    _check_alike(image.headers)
    frames = len(image.headers) if len(image.headers) > 1 else first.frames
    check_declared(first.path, (*first.size, frames, 3 if first.is_colour else 1), 2)
    if len(image.headers) > 1:
        voxels, affine, integer, pixels = _volume_of_slices(image.headers)
    else:
        pixels = read_pixels(first)
        voxels, affine, integer = _volume_of_frames(first, pixels)
    is_flat = voxels.shape[-1] == 1
    has_8_bits = (
        is_flat and integer and first.bits <= 8 and 0 <= voxels.min() <= voxels.max() <= 255
    )
    is_picture = is_flat and (first.is_colour or (first.plane is None and has_8_bits))
    path = make_folder(folder, "output_path") / f"{image.stem}.{'png' if is_picture else 'nii.gz'}"
    tensor = torch.from_numpy(voxels)
    write_image(path, tensor[..., 0] if is_picture else tensor, affine, integer=integer)
    return path, cells_of(pixels.dataset, columns)


def _check_alike(headers: Sequence[Header]) -> None:
    """Raise an ImageError unless the slices of a series have the same size and colours."""
    sizes = sorted({header.size for header in headers}, key=str)
    if len(sizes) > 1:
        raise ImageError(f"its slices have different sizes ({', '.join(map(str, sizes[:3]))})")
    if len({header.is_colour for header in headers}) > 1:
        raise ImageError("its slices have different colours")


def _volume_of_slices(headers: Sequence[Header]) -> tuple[Array, Affine, bool, Pixels]:
    """Voxels (C, X, Y, Z), affine, whether they are whole numbers, and the first slice as read."""
    planes = [header.plane for header in headers if header.plane]
    order, affine = stacked(planes, headers[0].thickness)
    rows, columns = headers[0].size
    shape = (3 if headers[0].is_colour else 1, columns, rows, len(headers))
    voxels, are_integers, first = np.empty(shape, np.float32), [], None
    for place, index in enumerate(order):
        try:
            pixels = read_pixels(headers[index])
        except ImageError as error:
            raise ImageError(f"{headers[index].path.name}: {error}") from error
        voxels[..., place] = pixels.values[0].transpose(2, 1, 0)
        are_integers.append(pixels.integer)
        first = first or pixels
    assert first
    return voxels, affine, all(are_integers), first


def _volume_of_frames(header: Header, pixels: Pixels) -> tuple[Array, Affine, bool]:
    """Voxels (C, X, Y, Z), affine, and whether they are whole numbers, of one file."""
    planes = [plane for plane in pixels.planes if plane]
    order = [0]
    if len(planes) == len(pixels.values):
        order, affine = stacked(planes, pixels.thickness)
    elif len(pixels.values) > 1:
        raise ImageError(
            f"its {len(pixels.values)} frames have no place in space, as those of a film"
        )
    else:
        affine = flat_affine(header.spacing)
    voxels = pixels.values[order].transpose(3, 2, 1, 0)
    return np.ascontiguousarray(voxels, np.float32), affine, pixels.integer
