"""A prepared folder: images, their manifest, and an index that is written last.

Without its index a folder counts for nothing: its preparation was cut short.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field

from synthcube import __version__, environment, reading, storage
from synthcube.data.cache import shape_faults
from synthcube.data.conditions import cell
from synthcube.data.images import Image, read_image, write_image
from synthcube.data.manifest import (
    FILE_NAME,
    KNOWN_COLUMNS,
    Manifest,
    Row,
    capped,
    image_suffix,
    read_manifest,
    read_table,
    require_outside,
    write_manifest,
)
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.errors import ImageError, ManifestError, OutputError, SynthCubeError
from synthcube.medperf.infer import PreparatorConfig, read_parameters
from synthcube.schema import Schema

IMAGES, INDEX = "images", "prepared.json"
VOXELS = "voxels.json"  # a list of digests alone, to be shown to others


class _Image(Schema):
    """An image of the index."""

    subject: str = Field(description="Whose it is.")
    voxels: str = Field(description="voxel_digest of the raw image.")


class _Index(Schema):
    """prepared.json; what else is recorded there is for people."""

    model_config = ConfigDict(extra="ignore")

    images: dict[str, _Image] = Field(default={}, description="By its path in the folder.")
    files: dict[str, str] = Field(description="SHA-256 of each file.")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prepared image comes from."""

    path: str  # of its first file, relative to the prepared folder
    subject: str
    voxels: str  # voxel_digest of the raw image


def voxel_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the shape (C, X, Y, Z) and the float32 voxels: of content, whatever the file."""
    voxels = tensor.float().contiguous().numpy()
    return hashlib.sha256(str(voxels.shape).encode() + voxels.tobytes()).hexdigest()


def claim(folder: Path, name: str) -> list[str]:
    """Take a folder that is empty, or holds what an earlier preparation wrote, and no more.

    Returns:
        The names of the files in it.

    Raises:
        OutputError: it holds something else, or cannot be written.
    """
    storage.make_folder(folder, name)
    storage.settle(folder)
    if not storage.contents(folder):
        return []
    index = folder / INDEX
    listed = [INDEX, *_read(index).files] if index.is_file() else []
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if strange := sorted({*found} - {*listed}):
        raise OutputError(
            f"{name} {folder} holds something else than prepared images ({strange[0]}): "
            "give another one, or empty it."
        )
    return found


def clear(folder: Path) -> None:
    """Remove what an earlier preparation wrote into a folder; the index goes first."""
    with storage.storage_errors(folder):
        (folder / INDEX).unlink(missing_ok=True)
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / IMAGES, ignore_errors=True)


def content_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of all files at or below `paths`, whatever their names.

    In an index it makes that unlike any file that was prepared, an older index among them:
    MedPerf takes data whose files are all the same before and after for unprepared.
    """
    found = (file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    digests = sorted(storage.sha256(file) for file in found)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def write_index(folder: Path, sources: list[Source], record: dict[str, Any]) -> None:
    """Close the folder: every file with its hash, every image with that of its source."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    storage.write_json(
        folder / INDEX,
        record
        | {
            "images": {
                each.path: {"subject": each.subject, "voxels": each.voxels} for each in sources
            },
            "files": {name: storage.sha256(folder / name) for name in names if name != INDEX},
        },
    )


def read_sources(index: Path) -> list[Source]:
    """The images that an index lists.

    Raises:
        ManifestError: it is missing or no index.
    """
    images = _read(index).images
    return [Source(path, each.subject, each.voxels) for path, each in images.items()]


def read_digests(path: Path) -> list[str]:
    """The digests of images in a list that prepare has written to its metadata.

    Raises:
        ManifestError: it is no such list.
    """
    found = reading.read_json(path, ManifestError, limit=reading.MAX_LIST_BYTES)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ManifestError(f"{path} is not a list of digests, as prepare writes {VOXELS}.")
    return found


def changed_files(folder: Path) -> list[str]:
    """What is wrong with the files of a prepared folder, one line each.

    Raises:
        ManifestError: there is no index.
    """
    folder = storage.recovered_folder(folder)
    listed = _read(folder / INDEX).files
    faults = []
    for name, digest in listed.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            faults.append(f"{folder / INDEX} lists {name}, which is not in its folder")
        elif not (folder / name).is_file():
            faults.append(f"{folder / name} is missing")
        elif storage.sha256(folder / name) != digest:
            faults.append(f"{folder / name} has changed since it was prepared (SHA-256 differs)")
    return faults


def _read(index: Path) -> _Index:
    if not index.is_file():
        raise ManifestError(
            f"{index.parent} was not prepared, or its preparation was cut short: it has no {INDEX}."
        )
    values = reading.read_object(index, ManifestError, limit=reading.MAX_LIST_BYTES)
    return reading.validated(values, _Index, index, ManifestError)


SUBJECT = "SubjectID"
Cells = dict[str, str]


@dataclass(frozen=True, slots=True)
class Raw:
    """The images of one side, and the cells of each one's row but for its files."""

    manifest: Manifest
    cells: tuple[Cells, ...]


def read_raw(
    data_path: Path, labels_path: Path, kinds: Mapping[str, str]
) -> tuple[dict[str, Raw], list[str]]:
    """Both sides, `data` and `labels`.

    Labels that are no images, but a CSV with a column SubjectID, tell of the images of `data`,
    which then are the reference images as well.

    Args:
        kinds: columns that the images of `data` must have, "class" or "number".

    Returns:
        The sides that could be read, and all that is wrong.
    """
    faults: list[str] = []
    found: dict[str, Raw] = {}
    try:
        found["data"] = _images(data_path)
    except SynthCubeError as error:
        faults += _lines(error)
    try:
        if table := _table(labels_path):
            if "data" in found:
                joined, told = _joined(found["data"], table)
                found, faults = {"data": joined, "labels": joined}, faults + told
        else:
            found["labels"] = _images(labels_path, "labels_path")
    except SynthCubeError as error:
        faults += _lines(error)
    if "data" in found:
        faults += condition_faults(found["data"], kinds)
    return found, faults


def condition_faults(raw: Raw, kinds: Mapping[str, str]) -> list[str]:
    """What is wrong with the columns of data.conditions, one line each."""
    faults = []
    for name, kind in kinds.items():
        texts = [_text(cells, name) for cells in raw.cells]
        if not any(texts):
            faults.append(f"data.conditions names the column {name!r}, which is missing or empty")
        elif kind == "number":
            faults += [
                f"{row.subject}, column {name}: {text!r} is not a number"
                for row, text in zip(raw.manifest.rows, texts, strict=True)
                if text and not is_number(text)
            ]
    return faults


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _text(cells: Cells, name: str) -> str:
    named = cells.get("LabelMapping", "") if name == "Label" else ""
    return named or cells.get(name, "")


def _images(path: Path, name: str = "data_path") -> Raw:
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        headline = error.headline.replace("data_path", name, 1)
        raise ManifestError(headline, error.faults) from error
    return raw_of(manifest)


def raw_of(manifest: Manifest) -> Raw:
    """The images of a manifest as it tells of them."""
    return Raw(manifest, tuple(_cells(row) for row in manifest.rows))


def _cells(row: Row) -> Cells:
    label = {"Label": str(row.label), "LabelMapping": cell(row, "Label")} if row.label >= 0 else {}
    split = {"Split": row.split} if row.split else {}
    return {SUBJECT: row.subject, **label, **split, **row.conditions}


def _table(path: Path) -> Path | None:
    """The CSV of conditions that stands at `path`, or nothing where images do."""
    if path.is_dir():
        files = [each for each in sorted(path.rglob("*")) if each.is_file()]
        named = path / FILE_NAME
        tables = [each for each in files if each.suffix.lower() == ".csv"]
        if named in tables:
            tables = [named]
        elif any(image_suffix(each) for each in files):
            return None
        if len(tables) > 1:
            names = ", ".join(each.name for each in tables)
            raise ManifestError(f"labels_path {path} holds several tables ({names}): keep one.")
        path = tables[0] if tables else path
    if path.is_file() and not any(name.startswith("Channel_") for name in read_table(path).header):
        return path
    return None


def _joined(raw: Raw, path: Path) -> tuple[Raw, list[str]]:
    table = read_table(path)
    if SUBJECT not in table.header:
        raise ManifestError(
            f"labels_path {path} has neither a column Channel_0 with images nor a column "
            f"{SUBJECT} that says whose conditions it holds; it has: {', '.join(table.header)}."
        )
    faults = [f"{path}: {text}" for text in table.faults]
    known = {name for cells in raw.cells for name in cells}
    twice = sorted(known & set(table.header) - {SUBJECT})
    faults += [f"{path}: the column {name} is in the data as well: keep one" for name in twice]
    faults += [
        f"{path}: the column {name!r} should be spelled {right!r}"
        for name in table.header
        for right in KNOWN_COLUMNS
        if name != right and name.casefold() == right.casefold()
    ]
    told: dict[str, Cells] = {}
    for number, cells in table.records.items():
        if cells[SUBJECT] in told:
            faults.append(f"{path}, row {number}: subject {cells[SUBJECT]!r} is there already")
        told[cells[SUBJECT]] = cells
    subjects = dict.fromkeys(row.subject for row in raw.manifest.rows)
    faults += [
        f"{path}: subject {name!r} of the data is not in it"
        for name in subjects
        if name not in told
    ]
    merged = tuple(cells | told.get(cells[SUBJECT], {}) for cells in raw.cells)
    return Raw(raw.manifest, merged), faults


def _lines(error: SynthCubeError) -> list[str]:
    return [error.headline, *error.faults] if error.faults else [str(error)]


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
        storage.write_mounted(report_file, _REPORT + reading.dump(_report(sides)))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ImageError(f"The raw images have {count}:", capped(list(dict.fromkeys(faults))))
    for side in sides:
        side.finish()


def _close(sides: Sequence[_Side], record: dict[str, Any], metadata_path: Path | None) -> None:
    if metadata_path:
        storage.make_folder(metadata_path, "metadata_path")
        versions = {"versions": environment.versions()}
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
