"""Which subject trains, which validates, which tests: seeded, by subject, stratified by class."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from synthcube.errors import ManifestError

TRAIN = "train"


def split_subjects(
    subjects: Sequence[str], labels: Sequence[int], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Assign every subject to one split.

    Subjects of one class (or of the same classes, where a subject has several) are spread
    over the splits in proportion. Presence comes before proportion: a class with at least as
    many subjects as there are splits is in each of them; and every split gets a subject as
    far as there are enough, train first. The result depends on the set of subjects, their
    labels and the seed: not on the order of the rows, nor on the machine.

    Args:
        subjects: subject of each row.
        labels: class id of each row, -1 where it has none.
        fractions: share of the subjects for each split, in 0..1; the remainder is "train".
        seed: another seed, another split.

    Returns:
        Split name by subject, sorted by subject.

    Raises:
        ManifestError: a fraction is negative or not a number, or they add up to more than 1.
    """
    shares = _shares(fractions)
    strata = _strata(subjects, labels, seed)
    splits: dict[str, str] = {}
    owed = dict.fromkeys(shares, 0.0)  # rounding of one class is made good in the next
    for members in strata:
        counts = _counts(len(members), shares, owed)
        names = [name for name in shares for _ in range(counts[name])]
        splits.update(zip(members, names, strict=True))
    _fill_empty(splits, shares, [subject for members in strata for subject in members])
    return dict(sorted(splits.items()))


def _shares(fractions: Mapping[str, float]) -> dict[str, float]:
    """Positive shares that add up to 1, train first."""
    total = sum(fractions.values())
    if not all(0 <= share <= 1 for share in fractions.values()) or total > 1 + 1e-9:
        given = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
        raise ManifestError(
            f"The fractions {given} cannot be split off; "
            "each must lie in 0 to 1, and together they must not exceed 1."
        )
    rest = fractions.get(TRAIN, 0.0) + 1 - total
    shares = {TRAIN: rest, **{name: share for name, share in fractions.items() if name != TRAIN}}
    return {name: share for name, share in shares.items() if share > 1e-9}


def _strata(subjects: Sequence[str], labels: Sequence[int], seed: int) -> list[list[str]]:
    """Subjects with the same classes, shuffled; large strata first, small ones even out."""
    classes: dict[str, set[int]] = {}
    for subject, label in zip(subjects, labels, strict=True):
        classes.setdefault(subject, set()).add(label)
    strata: dict[tuple[int, ...], list[str]] = {}
    for subject in sorted(classes, key=lambda name: _rank(seed, name)):
        strata.setdefault(tuple(sorted(classes[subject])), []).append(subject)
    return sorted(strata.values(), key=lambda members: (-len(members), _rank(seed, members[0])))


def _counts(size: int, shares: Mapping[str, float], owed: dict[str, float]) -> Counter[str]:
    """How many of `size` subjects each split gets; `owed` is brought up to date."""
    for name, share in shares.items():
        owed[name] += size * share
    counts: Counter[str] = Counter()
    if size > 1:  # presence: train, then the splits that are owed most
        counts.update(sorted(shares, key=lambda name: (name != TRAIN, -owed[name]))[:size])
    while counts.total() < size:
        # rounded, so that noise in the last digit does not decide; ties go to the first, train
        counts[max(shares, key=lambda name: round(owed[name] - counts[name], 6))] += 1
    for name in shares:
        owed[name] -= counts[name]
    return counts


def _fill_empty(splits: dict[str, str], shares: Mapping[str, float], order: Sequence[str]) -> None:
    """Give each empty split a subject of the largest one, out of the smallest class."""
    for name in shares:
        sizes = Counter(splits.values())
        if sizes[name] or not sizes:
            continue
        donor = max(shares, key=lambda other: sizes[other])
        if sizes[donor] > 1:
            splits[next(s for s in reversed(order) if splits[s] == donor)] = name


def _rank(seed: int, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}:{subject}".encode()).digest()
