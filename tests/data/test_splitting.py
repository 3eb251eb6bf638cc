from __future__ import annotations

import random
from collections import Counter

import pytest

from synthcube.data.module import split_subjects
from synthcube.errors import ManifestError

BOTH = {"validation": 0.1, "test": 0.2}


def names(num: int) -> list[str]:
    return [f"s{i}" for i in range(num)]


def test_proportions() -> None:
    splits = split_subjects(names(100), [-1] * 100, BOTH, 0)
    assert Counter(splits.values()) == {"train": 70, "validation": 10, "test": 20}


def test_same_split_on_every_machine() -> None:
    splits = split_subjects(names(6), [0] * 6, {"test": 0.5}, 3)
    # the order that `printf 3:s0 | sha256sum` and so on gives: s2 s0 s3 | s4 s5 s1
    assert {name for name, split in splits.items() if split == "train"} == {"s0", "s2", "s3"}


def test_does_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    rows = [(f"s{i % 30}", i % 30 % 3) for i in range(90)]
    first = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 1)  # type: ignore[arg-type]
    random.Random(0).shuffle(rows)
    again = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 1)  # type: ignore[arg-type]
    other = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 2)  # type: ignore[arg-type]
    assert first == again != other
    assert len(first) == 30


@pytest.mark.parametrize("sizes", [(3, 3, 3), (50, 3, 7), (4,) * 10])
def test_every_class_is_in_every_split(sizes: tuple[int, ...]) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    splits = split_subjects(names(len(labels)), labels, BOTH, 0)
    found = {(splits[f"s{i}"], label) for i, label in enumerate(labels)}
    assert len(found) == 3 * len(sizes)


def test_small_classes_are_in_train_first() -> None:
    labels = [0] * 20 + [1] * 2
    splits = split_subjects(names(22), labels, BOTH, 0)
    assert "train" in {splits["s20"], splits["s21"]}


def test_classes_of_one_subject_are_split_in_proportion() -> None:
    splits = split_subjects(names(50), list(range(50)), BOTH, 0)
    assert Counter(splits.values()) == {"train": 35, "validation": 5, "test": 10}


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
def test_small_fractions_still_get_a_subject(labels: list[int]) -> None:
    splits = split_subjects(names(5), labels, {"validation": 0.01, "test": 0.01}, 0)
    assert Counter(splits.values()) == {"train": 3, "validation": 1, "test": 1}


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_two_subjects(labels: list[int]) -> None:
    splits = split_subjects(["a", "b"], labels, {"validation": 0.1}, 0)
    assert sorted(splits.values()) == ["train", "validation"]
    assert "train" in split_subjects(["a", "b"], labels, BOTH, 0).values()


def test_extremes() -> None:
    assert split_subjects([], [], BOTH, 0) == {}
    assert split_subjects(["a"], [0], BOTH, 0) == {"a": "train"}
    assert set(split_subjects(names(9), [0] * 9, {"test": 0.0}, 0).values()) == {"train"}
    assert set(split_subjects(names(9), [0] * 9, {"test": 1.0}, 0).values()) == {"test"}
    explicit = split_subjects(names(10), [0] * 10, {"train": 0.8, "test": 0.2}, 0)
    assert Counter(explicit.values()) == {"train": 8, "test": 2}


def test_a_subject_of_two_classes_is_in_one_split() -> None:
    splits = split_subjects(["a", "a", "b", "c"], [0, 1, 0, 1], {"test": 0.3}, 0)
    assert set(splits) == {"a", "b", "c"}


@pytest.mark.parametrize("fractions", [{"test": -0.1}, {"a": 0.6, "b": 0.6}, {"a": float("nan")}])
def test_impossible_fractions(fractions: dict[str, float]) -> None:
    with pytest.raises(ManifestError, match="cannot be split off"):
        split_subjects(["a"], [0], fractions, 0)
