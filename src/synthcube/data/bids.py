"""A BIDS data set: which of its images are the raw ones, and what its file names state.

The Brain Imaging Data Structure, https://bids-specification.readthedocs.io: images are in
sub-LABEL/[ses-LABEL/]DATATYPE and have names of entities and a suffix, sub-01_run-1_T1w.nii.gz;
what was made of them is in derivatives/, what they were made of in sourcedata/.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from synthcube.data.manifest import bids_subject, image_suffix
from synthcube.data.tables import KNOWN_COLUMNS

DESCRIPTION = "dataset_description.json"
SUFFIX = "suffix"
"""The column of the last word of a name, T1w or bold, where each file is a row."""
_DERIVATIVES = "derivatives"
_NOT_RAW = (_DERIVATIVES, "sourcedata", "code", "stimuli", "phenotype")
_ENTITY = re.compile(r"(?:^|_)([a-z]+)-([A-Za-z0-9+]+)(?=_|$)")


def raw_images(
    folder: Path,
    images: Sequence[Path],
    left_out: list[tuple[Path, str]],
    *,
    derivatives: bool = False,
) -> list[Path]:
    """The images, relative to `folder`, that count in a BIDS data set; all of them in another.

    Of the others each folder, or each file whose name states no subject, is added to `left_out`.

    Args:
        derivatives: those below derivatives/ count as well.
    """
    outside = [image for image in images if image.parts[0] not in _NOT_RAW]
    is_described = (folder / DESCRIPTION).is_file()
    if not is_described and not (outside and all(bids_subject(i.name) for i in outside)):
        return list(images)
    set_aside: Counter[str] = Counter()
    raw = []
    for image in images:
        top = image.parts[0]
        if top in _NOT_RAW and not (derivatives and top == _DERIVATIVES):
            set_aside[top] += 1
        elif bids_subject(image.name):
            raw.append(image)
        else:
            left_out.append((folder / image, "no name of BIDS, which begins with sub-LABEL_"))
    for top, count in set_aside.items():
        number = "1 image" if count == 1 else f"{count} images"
        how = "; --derivatives adds them" if top == _DERIVATIVES else ""
        left_out.append((folder / top, f"{number} beside the raw ones of a BIDS data set{how}"))
    return raw


def entities_of(file: Path) -> dict[str, str]:
    """What a BIDS name states: {"sub": "01", "run": "1"}, for run-01 as for run-1."""
    entities = dict(_ENTITY.findall(_stem(file)))
    return entities | ({"run": entities["run"].lstrip("0")} if "run" in entities else {})


def common_entities(files: Iterable[Path]) -> dict[str, str]:
    """The entities that all files of a row share, without the subject: columns of a manifest."""
    first, *others = map(entities_of, files)
    known = {"sub", *(name.casefold() for name in KNOWN_COLUMNS)}
    return {
        name: value
        for name, value in first.items()
        if name not in known and all(other.get(name) == value for other in others)
    }


def suffix_of(file: Path) -> str:
    """The last word of a BIDS name, T1w; empty where it is an entity."""
    word = _stem(file).rpartition("_")[2]
    return "" if "-" in word else word


def visit(file: Path) -> str:
    """Subject and session, within which each channel is looked for."""
    return f"{bids_subject(_stem(file))}/{entities_of(file).get('ses', '')}"


def by_run(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files by their entity `run`; those without one are a group too."""
    runs: dict[str, list[Path]] = {}
    for file in files:
        runs.setdefault(entities_of(file).get("run", ""), []).append(file)
    return runs


def _stem(path: Path) -> str:
    return path.name[: -len(image_suffix(path))]
