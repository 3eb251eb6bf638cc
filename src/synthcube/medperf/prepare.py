"""Task `prepare`: check the raw images of a site and bring them to one form."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from synthcube import __version__, environment, reading, storage
from synthcube.data.cache import shape_faults
from synthcube.data.images import Image, read_images, write_image
from synthcube.data.manifest import FILE_NAME, Row, read_manifest, require_outside, write_manifest
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.errors import ImageError, first_faults
from synthcube.medperf.infer import PreparatorConfig, read_parameters
from synthcube.medperf.prepared_folder import (
    IMAGES,
    VOXELS,
    PreparedImage,
    claim,
    clear,
    content_digest,
    voxel_digest,
    write_index,
)
from synthcube.medperf.raw_images import Cells, RawImages, read_raw

log = logging.getLogger("synthcube")

_REPORT = "# How each subject fared in synthcube medperf prepare.\n"


def prepare(
    data_path: Path,
    labels_path: Path,
    output_path: Path,
    output_labels_path: Path,
    *,
    parameters_file: Path | None = None,
    report_file: Path | None = None,
    metadata_path: Path | None = None,
) -> str:
    """Write the images of both inputs in one form, and return a line with their numbers.

    Intensities keep the units of the source. After any fault the outputs hold no image, and the
    report lists the faults of every subject.

    Args:
        labels_path: reference images, or a CSV of SubjectID and conditions of those at data_path.

    Raises:
        ConfigError: the parameters are not valid.
        ImageError: every fault of the inputs.
        OutputError: an output cannot be written, or holds other files.
    """
    settings = read_parameters(parameters_file, PreparatorConfig)
    folders = {"data": output_path, "labels": output_labels_path}
    outputs = {"output_path": output_path, "output_labels_path": output_labels_path}
    storage.require_separate(
        {**outputs, "report_file": report_file, "metadata_path": metadata_path},
        {"data_path": data_path, "labels_path": labels_path, "parameters_file": parameters_file},
    )
    storage.require_separate(
        {"output_path": output_path, "report_file": report_file},
        {"output_labels_path": output_labels_path},
    )
    storage.require_separate({"report_file": report_file}, {"output_path": output_path})
    if report_file:
        storage.require_own_file(report_file, _REPORT, "report_file")
    raw, faults = read_raw(data_path, labels_path, settings.data.conditions)
    for images in raw.values():
        require_outside({**outputs, "metadata_path": metadata_path}, images.manifest)
    earlier = {
        name: claim(folder, parameter)
        for (name, folder), parameter in zip(folders.items(), outputs, strict=True)
        if raw or folder.exists()
    }
    try:
        with ExitStack() as stack:
            sides = []
            for name, images in raw.items():
                staging = storage.replaced_folder(folders[name], earlier[name])
                sides.append(_Side(name, images, stack.enter_context(staging), settings.data))
            _write_images(sides, faults, report_file)
            record = {
                "synthcube": __version__,
                "settings": settings.data.preprocessing_key,
                "raw": content_digest([data_path, labels_path]),
            }
            if metadata_path:
                _write_metadata(metadata_path, sides, record)
            for side in reversed(sides):
                write_index(side.folder, side.images, record | {"side": side.name})
    except ImageError:  # earlier prepared images must not be mistaken for those of these inputs
        for name in earlier:
            clear(folders[name])
        raise
    return ", ".join(f"{len(side.rows)} images of {side.name}" for side in sides)


class _Side:
    """The images of `data` or `labels`, and the folder that they are written to."""

    def __init__(self, name: str, raw: RawImages, folder: Path, config: DataConfig) -> None:
        self.name, self.raw, self.folder = name, raw, folder
        self.preprocessing = Preprocessing(config)
        self.rows: list[dict[str, str]] = []
        self.images: dict[str, PreparedImage] = {}  # by the path of the first channel's file
        self.faults: dict[str, list[str]] = {}  # by subject

    def write(self) -> None:
        """Write every valid image, and collect the faults of the others."""
        (self.folder / IMAGES).mkdir()
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[str, str] = {}
        cells = dict(zip(self.raw.manifest.rows, self.raw.cells, strict=True))
        faults: dict[Row, str] = {}
        written = read_images(
            self.raw.manifest.rows, lambda row, image: self._write(row, cells[row], image), faults
        )
        for row, shape in written:
            where = str(row.channels[0])
            shapes[where], owners[where] = shape, row.subject
        for row, text in faults.items():
            self.faults.setdefault(row.subject, []).append(text)
        for text in shape_faults(shapes):
            self.faults.setdefault(owners[text.split(": ")[0]], []).append(text)

    def _write(self, row: Row, cells: Cells, image: Image) -> tuple[int, ...]:
        tensor, affine = self.preprocessing.placed(image)
        # A picture stays a picture: training and sampling then take 0 to 255 as its range.
        picture = image.file_format == "png" and self.preprocessing.keeps_intensities
        suffix = ".png" if picture else ".nii.gz"
        width = max(1, len(tensor) // len(row.channels))
        layers = tensor.split(width)
        written = {}
        for index, layer in enumerate(layers):
            ending = f"_{index}" if len(layers) > 1 else ""
            path = f"{IMAGES}/{row.name}{ending}{suffix}"
            voxels = layer[..., 0] if suffix == ".png" else layer
            first = index * width
            integer = first in self.preprocessing.masks or (
                all(image.integers[first : first + width]) and bool((layer == layer.round()).all())
            )
            write_image(self.folder / path, voxels, affine, integer=integer)
            written[f"Channel_{index}"] = path
        self.rows.append(written | cells)
        image_record = PreparedImage(subject=row.subject, voxels=voxel_digest(image.tensor))
        self.images[written["Channel_0"]] = image_record
        shape = tuple(tensor.shape)
        return shape[:-1] if shape[-1] == 1 else shape


def _write_images(sides: Sequence[_Side], faults: list[str], report_file: Path | None) -> None:
    for side in sides:
        log.info("Preparing %d images of %s ...", len(side.raw.manifest.rows), side.name)
        side.write()
    for side in sides:
        faults = faults + [text for texts in side.faults.values() for text in texts]
    if report_file:
        storage.write_mounted(report_file, _REPORT + reading.dump(_report(sides)))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ImageError(f"The raw images have {count}:", first_faults(list(dict.fromkeys(faults))))
    for side in sides:
        write_manifest(side.folder / FILE_NAME, side.rows)
        read_manifest(side.folder)  # as a check


def _write_metadata(folder: Path, sides: Sequence[_Side], record: dict[str, Any]) -> None:
    storage.make_folder(folder, "metadata_path")
    versions = environment.versions()
    storage.write_json(folder / "preparation.json", record | {"versions": versions})
    digests = {image.voxels for side in sides for image in side.images.values()}
    storage.write_json(folder / VOXELS, sorted(digests))


def _report(sides: Sequence[_Side]) -> dict[str, dict[str, str | int]]:
    """Return a row for each subject; MedPerf counts the values of its column `status`."""
    images = {side.name: Counter(row.subject for row in side.raw.manifest.rows) for side in sides}
    report: dict[str, dict[str, str | int]] = {}
    for subject in dict.fromkeys(name for counts in images.values() for name in counts):
        faults = [text for side in sides for text in side.faults.get(subject, ())]
        report[subject] = {
            "status": "faulty" if faults else "prepared",
            **{name: counts[subject] for name, counts in images.items()},
            "comment": "; ".join(faults),
        }
    return report
