"""Prepare: the images of a site, checked, in one orientation, spacing and size, with an index."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from synthcube import __version__, runtime, storage, yaml_text
from synthcube.data.images import Image, read_image, write_image
from synthcube.data.loading import shape_faults
from synthcube.data.manifest import (
    FILE_NAME,
    Row,
    capped,
    read_manifest,
    require_outside,
    write_manifest,
)
from synthcube.data.transforms import DataConfig, Preprocessing
from synthcube.errors import ImageError, OutputError, SynthCubeError
from synthcube.tasks.medperf.parameters import PreparatorConfig, read_parameters
from synthcube.tasks.medperf.prepared import (
    IMAGES,
    VOXELS,
    Source,
    claim,
    clear,
    content_digest,
    voxel_digest,
    write_index,
)
from synthcube.tasks.medperf.raw import Cells, Raw, read_raw

log = logging.getLogger("synthcube")

_REPORT = "# How each subject fared in synthcube medperf prepare.\n"


class _Side:
    """The images of `data` or `labels` on their way into a folder."""

    def __init__(self, name: str, raw: Raw, folder: Path, config: DataConfig) -> None:
        self.name, self.raw, self.folder = name, raw, folder
        self.preprocessing = Preprocessing(config)
        self.rows: list[dict[str, str]] = []
        self.sources: list[Source] = []
        self.faults: dict[str, list[str]] = {}
        """By subject."""

    def write(self) -> None:
        """Write every image that can be used, and note what is wrong with the others."""
        (self.folder / IMAGES).mkdir()
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[str, str] = {}
        for row, cells in zip(self.raw.manifest.rows, self.raw.cells, strict=True):
            where = str(row.channels[0])
            try:
                image = read_image(row.channels)
                shapes[where], owners[where] = self._write(row, cells, image), row.subject
            except OutputError:
                raise
            except SynthCubeError as error:
                named = any(str(path) in str(error) for path in row.channels)
                self._fault(row.subject, str(error) if named else f"{where}: {error}")
        for text in shape_faults(shapes):
            self._fault(owners[text.split(": ")[0]], text)

    def _write(self, row: Row, cells: Cells, image: Image) -> tuple[int, ...]:
        tensor, affine = self.preprocessing.placed(image)
        whole = image.integer and bool((tensor == tensor.round()).all())
        # A picture stays one: what trains on or samples from it takes 0 to 255 for its range.
        picture = image.file_format == "png" and self.preprocessing.keeps_intensities
        suffix = ".png" if picture else ".nii.gz"
        layers = tensor.split(max(1, len(tensor) // len(row.channels)))
        written = {}
        for index, layer in enumerate(layers):
            ending = f"_{index}" if len(layers) > 1 else ""
            path = f"{IMAGES}/{row.name}{ending}{suffix}"
            voxels = layer[..., 0] if suffix == ".png" else layer
            write_image(self.folder / path, voxels, affine, integer=whole)
            written[f"Channel_{index}"] = path
        self.rows.append(written | cells)
        digest = voxel_digest(image.tensor)
        self.sources.append(Source(written["Channel_0"], row.subject, digest))
        return _without_depth(tensor)

    def _fault(self, subject: str, text: str) -> None:
        self.faults.setdefault(subject, []).append(text)

    def finish(self) -> None:
        """Write the manifest, and hold it to what every reader will hold it to."""
        write_manifest(self.folder / FILE_NAME, self.rows)
        read_manifest(self.folder)


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
    """Write the images of both inputs, all in one form, and say how many.

    Intensities stay in the source's units. Where anything is wrong, the report tells of every
    subject, and the outputs are left without an image.

    Args:
        labels_path: reference images, or a CSV of SubjectID and conditions of those at data_path.

    Raises:
        ConfigError: the parameters are not valid.
        ImageError: what is wrong with the inputs, all of it.
        OutputError: an output cannot be written, or holds something else.
    """
    settings = read_parameters(parameters_file, PreparatorConfig)
    folders = {"data": output_path, "labels": output_labels_path}
    outputs = {"output_path": output_path, "output_labels_path": output_labels_path}
    beside = {"report_file": report_file, "metadata_path": metadata_path}
    storage.require_separate(
        {**outputs, **beside},
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
    for side in raw.values():
        require_outside({**outputs, "metadata_path": metadata_path}, side.manifest)
    earlier = {
        name: claim(folder, parameter)
        for (name, folder), parameter in zip(folders.items(), outputs, strict=True)
        if raw or folder.exists()
    }
    try:
        with ExitStack() as stack:
            sides = [
                _Side(
                    name,
                    raw[name],
                    stack.enter_context(storage.replaced_folder(folders[name], earlier[name])),
                    settings.data,
                )
                for name in raw
            ]
            _write(sides, faults, report_file)
            record = {
                "synthcube": __version__,
                "settings": settings.data.preprocessing_key,
                "raw": content_digest([data_path, labels_path]),
            }
            _close(sides, record, metadata_path)
    except ImageError:  # what was prepared of other images must not pass for these
        for name in earlier:
            clear(folders[name])
        raise
    return ", ".join(f"{len(side.rows)} images of {side.name}" for side in sides)


def _write(sides: Sequence[_Side], faults: list[str], report_file: Path | None) -> None:
    for side in sides:
        log.info("Preparing %d images of %s ...", len(side.raw.manifest.rows), side.name)
        side.write()
    faults = [*faults, *(text for side in sides for each in side.faults.values() for text in each)]
    if report_file:
        storage.write_mounted(report_file, _REPORT + yaml_text.dump(_report(sides)))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ImageError(f"The raw images have {count}:", capped(list(dict.fromkeys(faults))))
    for side in sides:
        side.finish()


def _close(sides: Sequence[_Side], record: dict[str, Any], metadata_path: Path | None) -> None:
    if metadata_path:
        storage.make_folder(metadata_path, "metadata_path")
        versions = {"versions": runtime.versions()}
        text = json.dumps(record | versions, indent=2) + "\n"
        storage.write_text(metadata_path / "preparation.json", text)
        digests = {each.voxels for side in sides for each in side.sources}
        storage.write_json(metadata_path / VOXELS, sorted(digests))
    for side in reversed(sides):
        write_index(side.folder, side.sources, record | {"side": side.name})


def _report(sides: Sequence[_Side]) -> dict[str, dict[str, str | int]]:
    """A row for each subject; MedPerf counts what is in the column `status`."""
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


def _without_depth(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:-1] if shape[-1] == 1 else shape
