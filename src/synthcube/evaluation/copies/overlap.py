"""Images that two sets share, and images that a set holds twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.pairs.pairing import has_subjects

_NAMED = 5


@dataclass(frozen=True, slots=True)
class Overlap:
    """What held-out images have in common with the training images."""

    images: tuple[int, ...]
    """Places of held-out images whose voxels are those of a training image."""
    subjects: tuple[str, ...]
    """Subjects of both, where both manifests say whose images they are."""

    def __bool__(self) -> bool:
        return bool(self.images or self.subjects)

    def told(self) -> str:
        """One clause that names nobody, for it may leave the site."""
        parts = []
        if self.images:
            parts.append(f"{len(self.images)} of them are training images")
        if self.subjects:
            parts.append(f"{len(self.subjects)} subjects are in both")
        return " and ".join(parts)

    def named(self, labels: ImageSet) -> str:
        """The same with the first names, for the log."""
        files = tuple(str(labels.rows[place].channels[0]) for place in self.images)
        return "; ".join(_few(each) for each in (files, self.subjects) if each)


def overlap(labels: ImageSet, train_data: ImageSet) -> Overlap:
    """What `labels` and `train_data` share: voxels, or subjects by SubjectID."""
    known = set(train_data.digests)
    places = tuple(i for i, each in enumerate(labels.digests) if each in known)
    subjects: set[str] = set()
    if has_subjects(labels) and has_subjects(train_data):
        subjects = {row.subject for row in labels.rows} & {row.subject for row in train_data.rows}
    return Overlap(places, tuple(sorted(subjects)))


def repeated(found: Sequence[bytes]) -> list[int]:
    """Places whose digest is there more than once."""
    counts = Counter(found)
    return [place for place, each in enumerate(found) if counts[each] > 1]


def _few(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
