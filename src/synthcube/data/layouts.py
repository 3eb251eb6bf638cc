"""Layouts of image folders that people have: which files are the channels of one image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from synthcube.data import bids
from synthcube.data.manifest import bids_subject, image_suffix, natural_key

Paradigm = Literal["unlabeled", "patient", "custom"]
LeftOut = list[tuple[Path, str]]
"""Files, or the folders of subjects, that are in no row, with the reasons."""

LAYOUTS = {
    "unlabeled": "SUBJECT/images, or images",
    "patient": "SUBJECT/images",
    "custom": "CLASS/SUBJECT/images, or CLASS/images",
}
MASK = "mask"
"""Name of the last channel of nnU-Net's layout."""
_MASK_WORDS = {"seg", "dseg", "segmentation", "mask", "label", "labels", "gt", "lesion", "roi"}
_IMAGE_WORDS = {
    "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n", "t2", "t2w", "t2f", "t2star", "flair", "pd", "pdw",
    "dwi", "adc", "swi", "ct", "cta", "cbct", "pet", "mr", "mri", "image", "img",
}  # fmt: skip
_NNUNET_FOLDERS = {"imagestr", "imagests", "labelstr", "labelsts"}
_NNUNET_CHANNEL = re.compile(r"(.+)_(\d{4})")
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One row to be: its channel files, its subject and class, and what its name states."""

    subject: str
    label_name: str
    files: tuple[Path, ...]
    name: str
    """Path below the folder, without the word of a channel."""
    entities: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Channel:
    """What the files of a channel have in their names.

    A pattern matches a whole word ("t1" is not in "t1ce"), with * or ? all of a name, and with the
    suffix of a file the end of a name ("t1.nii.gz"); case does not matter.
    """

    pattern: str
    is_last: bool = False
    """Whether it is the last word of a name only: p01_t1_seg.nii.gz is the channel seg."""

    def matches(self, file: Path) -> bool:
        stem, folded = _stem(file).casefold(), self.pattern.casefold()
        if self._is_end:
            return file.name.casefold().endswith(folded)
        if re.search(self._word, stem):
            return True
        is_glob = "*" in folded or "?" in folded
        return is_glob and (fnmatchcase(stem, folded) or fnmatchcase(file.name.casefold(), folded))

    def without(self, file: Path) -> str:
        """The name of a file that it matches, without what it matches."""
        stem = _stem(file)
        if self._is_end:
            return file.name[: -len(self.pattern)].strip("_-. ")
        rest = re.sub(self._word, "", stem, count=1, flags=re.IGNORECASE)
        if rest == stem:  # without the words that hold the longest literal of the glob
            literal = max(re.split(r"[*?]+", self.pattern.casefold()), key=len).strip("_-. ")
            words = re.split(r"([\W_]+)", stem)
            rest = "".join(word for word in words if literal not in word.casefold())
        return rest.strip("_-. ")

    @property
    def _is_end(self) -> bool:
        """Whether it is the end of a name with its suffix, as GaNDLF-Synth's -ch usually is."""
        return bool(image_suffix(Path(self.pattern))) and not set("*?") & set(self.pattern)

    @property
    def _word(self) -> str:
        """Of a folded name, with what separates it from the word before."""
        end = "$" if self.is_last else r"(?![^\W_])"
        word = self.pattern.casefold()
        return rf"[\W_]*(?<![^\W_]){re.escape(word.strip('_-. ') or word)}{end}"


@dataclass(slots=True)
class _Unit:
    """Files among which each channel is looked for: of a subject, of a session, of one name."""

    subject: str
    label_name: str
    place: Path
    """What a message calls it: the subject's folder, or a file."""
    files: list[Path]
    is_bids: bool = False


def is_nnunet(images: Sequence[Path]) -> bool:
    """Whether all images are in imagesTr, labelsTr, imagesTs and labelsTs."""
    tops = {image.parts[0].lower() for image in images}
    return tops <= _NNUNET_FOLDERS and any(top.startswith("images") for top in tops)


def nnunet_items(
    folder: Path, images: Sequence[Path], channels: Sequence[str], left_out: LeftOut
) -> tuple[list[Item], tuple[str, ...]]:
    """Rows of imagesTr/case_0000.nii.gz with labelsTr/case.nii.gz as one more channel, the mask.

    With them the names of the channels.

    The numbers may be missing, as in the Medical Segmentation Decathlon.

    Args:
        images: relative to `folder`.
        channels: numbers and MASK, in the order of the channels; empty: all that there are.
    """
    masks = {
        (image.parts[0][-2:], _stem(image)): image
        for image in images
        if image.parts[0].lower().startswith("labels")
    }
    cases = {case: {MASK: mask} for case, mask in masks.items()}
    for image in images:
        part, stem = image.parts[0][-2:], _stem(image)
        if masks.get((part, stem)) == image:
            continue
        numbered = None if (part, stem) in masks else _NNUNET_CHANNEL.fullmatch(stem)
        case, number = numbered.groups() if numbered else (stem, "0000")
        cases.setdefault((part, case), {})[number] = image
    wanted = channels or sorted(set().union(*cases.values()))  # the mask last
    items = []
    for (_, case), files in cases.items():
        if lacking := [f"channel {name!r} has no file" for name in wanted if name not in files]:
            left_out.append((folder / min(files.values()), "; ".join(lacking)))
        else:
            items.append(Item(case, "", tuple(folder / files[name] for name in wanted), case))
    return items, tuple(wanted)


def is_mask_name(path: Path) -> bool:
    """Whether a file's name, or nnU-Net's folder of labels, says that it is a mask."""
    words = re.split(r"[\W_]+", _stem(path).casefold())
    return words[-1] in _MASK_WORDS or path.parent.name.casefold().startswith("labelst")


def recognised_channels(images: Sequence[Path], paradigm: Paradigm) -> tuple[Channel, ...]:
    """Words such as t1 and seg that name the channels of most subjects; masks come last.

    Empty where less than two such words are in the names of at least half of the subjects.
    """
    words: dict[str, set[str]] = {}
    is_bids = all(bids_subject(image.name) for image in images)
    for image in images:
        label, above = _folders(image, paradigm)
        *before, word = re.split(r"[\W_]+", _stem(image).casefold())
        base = "_".join(before)
        unit = bids.visit(image) if is_bids else f"{label}/{above[0] if above else base}"
        known = {word} & (_IMAGE_WORDS | _MASK_WORDS)
        words.setdefault(unit, set()).update(known)
    common = {
        word
        for word in set().union(*words.values())
        if 2 * sum(word in unit for unit in words.values()) >= len(words)
    }
    complete = sum(common <= unit for unit in words.values())
    if len(common) < 2 or 2 * complete < len(words):
        return ()
    ordered = sorted(common, key=lambda word: (word in _MASK_WORDS, natural_key(word)))
    return tuple(Channel(word, is_last=True) for word in ordered)


def items_of(
    folder: Path,
    images: Sequence[Path],
    paradigm: Paradigm,
    channels: Sequence[Channel],
    left_out: LeftOut,
) -> Iterator[Item]:
    """Rows of images, relative to `folder`, in the folders of subjects and classes.

    Without channels each image is a row. A loose image is a subject of its own, or with channels
    the images whose names differ only in the channel; where all names have BIDS subjects, a loose
    image belongs to that subject.
    """
    suffixes = {bids.suffix_of(image).casefold() for image in images}
    has_suffixes = not channels and len(suffixes) > 1
    if all(bids_subject(image.name) for image in images):  # sub-1_space-T1w_dseg is no T1w
        channels = [
            replace(channel, is_last=channel.is_last or channel.pattern.casefold() in suffixes)
            for channel in channels
        ]
    for unit in _units(folder, images, paradigm, channels, left_out):
        rows = [(file,) for file in unit.files] if not channels else _rows(unit, channels, left_out)
        for files in rows:
            name = files[0].relative_to(folder)
            base = _base(name, channels) or _stem(name)
            entities = bids.common_entities(files) if unit.is_bids else {}
            if has_suffixes and unit.is_bids:
                entities[bids.SUFFIX] = bids.suffix_of(name)
            stated = (name.parent / base).as_posix()
            yield Item(unit.subject, unit.label_name, files, stated, entities)


def _units(
    folder: Path, images: Sequence[Path], paradigm: Paradigm, channels: Sequence[Channel],
    left_out: LeftOut,
) -> Iterable[_Unit]:  # fmt: skip
    is_bids = all(bids_subject(image.name) for image in images)
    units: dict[tuple[str, str, str], _Unit] = {}
    for image in images:
        label, above = _folders(image, paradigm)
        if (paradigm == "custom" and not label) or (paradigm == "patient" and not above):
            reason = f"not in a folder of its own (layout: {LAYOUTS[paradigm]})"
            left_out.append((folder / image, reason))
            continue
        base = _base(image, channels) or _stem(image)
        if is_bids and (not above or any(part.startswith("sub-") for part in above)):
            subject = bids_subject(_stem(image))
        else:
            subject = above[0] if above else "/".join(filter(None, (label, base)))
        # without channels, loose images of one stem (a.png, a.jpg) are rows apart all the same
        part = bids.visit(image) if is_bids else "" if above else base if channels else str(image)
        label = subject if paradigm == "patient" else label
        place = folder / Path(*image.parts[: -len(above)]) if above else folder / image
        units.setdefault(
            (label, subject, part), _Unit(subject, label, place, [], is_bids)
        ).files.append(folder / image)
    return units.values()


def _folders(image: Path, paradigm: Paradigm) -> tuple[str, list[str]]:
    """The class of an image, and its folders from that of its subject on."""
    above = list(image.parts[:-1])
    label = above.pop(0) if paradigm == "custom" and above else ""
    return label, above


def _rows(unit: _Unit, channels: Sequence[Channel], left_out: LeftOut) -> list[tuple[Path, ...]]:
    """The rows of a unit: one, or one for each name that has all channels."""
    chosen, faults = _chosen(unit.files, channels)
    if not faults:
        left_out += [(f, "matches no channel") for f in unit.files if f not in chosen]
        return [chosen]
    named = [file for file in unit.files if any(channel.matches(file) for channel in channels)]
    runs = bids.by_run(named) if unit.is_bids else {}
    if len(runs) > 1:
        left_out += [(file, "matches no channel") for file in unit.files if file not in named]
        return [
            row
            for files in runs.values()
            for row in _rows(replace(unit, files=files, place=files[0]), channels, left_out)
        ]
    samples: dict[tuple[Path, str], list[Path]] = {}
    for file in unit.files:
        if (base := _base(file, channels)) is not None:
            samples.setdefault((file.parent, base.casefold()), []).append(file)
    outcomes = {sample: _chosen(files, channels) for sample, files in samples.items()}
    whole = [sample for sample, (_, lacking) in outcomes.items() if not lacking]
    is_unclear = len(whole) == 1 and any(_is_rival(whole[0], sample) for sample in samples)
    if not whole or is_unclear:
        left_out.append((unit.place, "; ".join(faults)))
        return []
    for sample, (_, lacking) in outcomes.items():
        if lacking:
            left_out.append((samples[sample][0], "; ".join(lacking)))
    in_samples = {file for files in samples.values() for file in files}
    left_out += [(f, "matches no channel") for f in unit.files if f not in in_samples]
    return [outcomes[sample][0] for sample in whole]


def _is_rival(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    """Whether two names in one folder may be the same image: which t2 of t1, t2 and x_t2?"""
    (folder, base), (other_folder, other_base) = one, other
    is_similar = base in other_base or other_base in base
    return folder == other_folder and base != other_base and is_similar


def _chosen(
    files: Sequence[Path], channels: Sequence[Channel]
) -> tuple[tuple[Path, ...], list[str]]:
    """The file of each channel, and what is wrong with that."""
    matches = [[file for file in files if channel.matches(file)] for channel in channels]
    faults = []
    for channel, matching in zip(channels, matches, strict=True):
        names = ", ".join(file.name for file in matching[:_NAMES_SHOWN])
        names += ", ..." if len(matching) > _NAMES_SHOWN else ""
        if len(matching) > 1:
            faults.append(f"channel {channel.pattern!r} has {len(matching)} files ({names})")
        elif not matching:
            faults.append(f"channel {channel.pattern!r} has no file")
    chosen = [matching[0] for matching in matches if matching]
    if not faults and (twice := {file.name for file in chosen if chosen.count(file) > 1}):
        faults.append(f"{min(twice)} matches several channels")
    return tuple(chosen), faults


def _base(file: Path, channels: Sequence[Channel]) -> str | None:
    """A file's name without the word of its channel; None where it has none."""
    return next((channel.without(file) for channel in channels if channel.matches(file)), None)


def _stem(path: Path) -> str:
    suffix = image_suffix(path) or path.suffix  # of an image, or of a slide
    return path.name[: len(path.name) - len(suffix)]
