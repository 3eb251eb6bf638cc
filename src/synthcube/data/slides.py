"""Whole slides to patches of tissue: PNG files of one size and resolution, with their places.

OpenSlide reads the slides, region by region, so that memory does not grow with them. Only the
pyramid of a slide is opened: its label and macro image, which may show a patient's name, and the
texts in its metadata are neither read nor written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL.Image

from synthcube.data.layouts import Item, LeftOut, Paradigm, items_of
from synthcube.data.slide_patches import EXAMPLE, Cut, PatchOptions, patch_corners
from synthcube.errors import ImageError, ManifestError, OutputError, first_faults
from synthcube.reading import MAX_LIST_BYTES, open_file, read_object
from synthcube.storage import replaced_folder, settle, write_json
from synthcube.terminal import followed

if TYPE_CHECKING:
    import openslide

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")
_PERHAPS_SLIDES = (".tif", ".tiff", ".dcm")  # OpenSlide looks into the file
FOLDER = "patches"
"""Of the output: the patches, in a folder for each slide."""
RECORD = "patches.json"
"""In the folder of a slide, its settings and places: a repeated command cuts nothing twice."""
_BESIDE = "an image beside slides: only the slides are cut"
_UNREADABLE = "is not a slide (of TIFFs, a tiled pyramid) that OpenSlide can read, or is cut short"
COLUMNS = ("x", "y", "level", "mpp")


def split_off_slides(
    folder: Path, files: Sequence[Path], options: PatchOptions | None, left_out: LeftOut
) -> tuple[list[Path], list[Path]]:
    """The images and the slides among `files`, which are relative to `folder`.

    With slides the images are left out, and files that belong to a slide or to its patches are not
    mentioned. A ManifestError says so where there are slides without options, or the other way.
    """
    slides = [file for file in files if is_slide(folder / file)]
    images = [folder / file for file in files if file not in {*slides}]
    why_not = [(image, _UNREADABLE if _may_be_slide(image) else _BESIDE) for image in images]
    if not slides:
        if options:
            raise ManifestError(
                f"--patch_size cuts slides, but {folder} holds none; names of slides end in "
                f"{', '.join((*SLIDE_SUFFIXES, *_PERHAPS_SLIDES))}.",
                first_faults([f"{path}: {why}" for path, why in why_not if why != _BESIDE]),
            )
        return [*files], []
    if not options:
        names = ", ".join(first_faults([file.name for file in slides], 3))
        raise ManifestError(
            f"{folder} holds whole slides ({names}), which are cut into patches: say how large the "
            f"patches are, as in synthcube prepare -d {folder} -o OUTPUT {EXAMPLE}. Sizes can be "
            "in micrometres too: --patch_size 100um."
        )
    if not _can_read_slides():
        raise ManifestError(
            f"{folder / slides[0]} is a slide; openslide-python and openslide-bin, which read "
            "slides, are not installed: pip install 'synthcube[histology]'."
        )
    is_part = _parts_of([folder / file for file in slides])
    left_out[:] = [(path, why) for path, why in [*left_out, *why_not] if not is_part(path)]
    return [], _without_repeats(folder, slides)


def is_slide(path: Path) -> bool:
    """Whether a file is a slide: by its name, or as OpenSlide finds in a TIFF or DICOM file.

    A TIFF is a slide where it has several levels, or more pixels than a picture may have.
    """
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    if not _may_be_slide(path) or not _can_read_slides():
        return False
    import openslide

    try:
        vendor = openslide.OpenSlide.detect_format(path)
        if vendor != "generic-tiff":
            return vendor is not None
        with openslide.OpenSlide(path) as slide:
            most = PIL.Image.MAX_IMAGE_PIXELS or math.inf
            return slide.level_count > 1 or math.prod(slide.dimensions) > most
    except openslide.OpenSlideError:
        return False  # reading it as an image names its fault


def _may_be_slide(path: Path) -> bool:
    return path.suffix.lower() in _PERHAPS_SLIDES


def _can_read_slides() -> bool:
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError):  # OSError: its C library is missing
        return False
    return True


def _parts_of(slides: Iterable[Path]) -> Callable[[Path], bool]:
    """Whether a file is a part of a slide in several files, or was written by this module."""
    folders = {slide.with_suffix("") for slide in slides if slide.suffix.lower() == ".mrxs"}
    hamamatsu = [slide for slide in slides if slide.suffix.lower() == ".vms"]

    def is_part(path: Path) -> bool:
        if (path.parent / RECORD).is_file() or not folders.isdisjoint(path.parents):
            return True
        return any(
            slide.parent == path.parent and path.name.startswith(slide.stem) for slide in hamamatsu
        )

    return is_part


def _without_repeats(folder: Path, slides: Sequence[Path]) -> list[Path]:
    """The slides, of which a DICOM series of several files is one: its first file."""
    import openslide

    known: set[str] = set()
    kept = []
    for file in slides:
        if file.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(folder / file) as slide:
                    series = str(slide.properties.get("dicom.SeriesInstanceUID", file))
            except openslide.OpenSlideError:
                series = str(file)  # its fault is told where it is cut
            if series in known:
                continue
            known.add(series)
        kept.append(file)
    return kept


def patch_items(
    folder: Path,
    slides: Sequence[Path],
    output: Path,
    options: PatchOptions,
    left_out: LeftOut,
    paradigm: Paradigm = "unlabeled",
) -> list[Item]:
    """A row for each patch of the slides, which are relative to `folder`.

    The patches are written to the folder FOLDER of `output`. A slide that cannot be cut is added
    to `left_out` with the reason, and leaves no files.
    """
    rows = list(items_of(folder, slides, paradigm, (), left_out))
    # With its suffix the name is unique, and that of no folder beside it.
    places = {row.files: output / FOLDER / row.files[0].relative_to(folder) for row in rows}
    _require_same_settings(places.values(), options)
    items = []
    for row in followed(rows, len(rows), "Cutting slides", "slide"):
        (path,) = row.files
        try:
            patches = _patches_of(path, places[row.files], options)
        except ImageError as error:
            left_out.append((path, error.headline))
            continue
        for x, y in patches.corners:
            name = places[row.files] / _file_name(path, x, y)
            cells = (str(x), str(y), str(patches.level), patches.mpp)
            entities = {**row.entities, **dict(zip(COLUMNS, cells, strict=True))}
            items.append(replace(row, files=(name,), entities=entities))
    return items


def _file_name(slide: Path, x: int, y: int) -> str:
    return f"{slide.stem}_x{x}_y{y}.png"


class _Patches(NamedTuple):
    """The patches of a slide: their upper left corners in pixels of level 0, level and mpp."""

    corners: list[tuple[int, int]]
    level: int
    mpp: str


def _require_same_settings(places: Iterable[Path], options: PatchOptions) -> None:
    """Refuse to replace patches of other settings, which an earlier manifest may list."""
    faults = []
    for place in places:
        if not place.is_dir():
            continue
        settle(place)
        record = place / RECORD
        if not record.is_file():
            faults.append(f"{place} was not written by synthcube prepare")
        elif read_object(record, OutputError, limit=MAX_LIST_BYTES).get("settings") != (
            options.settings
        ):
            faults.append(f"{place} holds patches that were cut with other settings")
    if faults:
        raise OutputError(
            "These folders stay as they are; give another output_path, or remove them:",
            first_faults(faults),
        )


def _patches_of(path: Path, place: Path, options: PatchOptions) -> _Patches:
    """The patches of a slide, cut now or by an earlier call. Raises ImageError with the reason."""
    stat = path.stat()
    key = {
        "settings": options.settings,
        "slide": {"bytes": stat.st_size, "modified": stat.st_mtime_ns},
    }
    record = place / RECORD
    earlier = read_object(record, OutputError, limit=MAX_LIST_BYTES) if record.is_file() else {}
    known = _recorded(record, earlier) if earlier else None
    written = [_file_name(path, x, y) for x, y in known.corners] if known else []
    is_current = all(earlier.get(name) == value for name, value in key.items())
    if known and is_current and all((place / name).is_file() for name in written):
        return known
    with _opened(path) as slide:
        cut = Cut.of(slide, options)
        corners = patch_corners(slide, cut, options, path.name)
        with replaced_folder(place, written) as staging:
            kept = []
            for x, y in corners:
                patch = cut.patch(slide, x, y)
                if patch.getcolors(1):
                    continue  # of one colour, which no training can use
                patch.save(staging / _file_name(path, x, y), format="PNG", compress_level=3)
                kept.append((x, y))
            if not kept:
                raise ImageError("has only patches of one colour")
            content = {**key, "level": cut.level, "mpp": cut.mpp, "corners": kept}
            write_json(staging / RECORD, content)
    return _Patches(kept, cut.level, cut.mpp)


def _recorded(record: Path, value: dict[str, Any]) -> _Patches:
    try:
        corners = [(int(x), int(y)) for x, y in value["corners"]]
        return _Patches(corners, int(value["level"]), str(value["mpp"]))
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{record} is damaged: remove its folder.") from error


@contextmanager
def _opened(path: Path) -> Iterator[openslide.OpenSlide]:
    """An open slide; what OpenSlide cannot read, now or later, is an ImageError with the reason."""
    import openslide

    try:
        open_file(path, ImageError).close()  # a pipe or a device is refused, not waited for
    except ImageError as error:
        raise ImageError(error.headline.removeprefix(f"{path}: ")) from error
    try:
        if openslide.OpenSlide.detect_format(path) is None:
            raise ImageError(_UNREADABLE)
        with openslide.OpenSlide(path) as slide:
            yield slide
    except openslide.OpenSlideError as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImageError(f"is damaged, or cannot be read by OpenSlide ({text})") from error
