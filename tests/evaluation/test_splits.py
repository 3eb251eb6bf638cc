"""Samples are of equal size, and no subject is on two sides."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.evaluation.fidelity.splits import draw_splits, joint_subjects


def sides(subjects: tuple[np.ndarray, np.ndarray], number: int = 5, seed: int = 0):
    for split in draw_splits(subjects, number, seed):
        yield (
            split,
            set(subjects[0][split.predictions]),
            set(subjects[1][split.half]),
            set(subjects[1][split.other]),
        )


@pytest.mark.parametrize(
    ("predictions", "labels", "m"), [(100, 40, 20), (12, 40, 12), (50, 41, 20), (3, 2, 1)]
)
def test_every_sample_is_as_large_as_the_smallest(predictions, labels, m):
    subjects = (np.arange(predictions), 1000 + np.arange(labels))
    for split, *_ in sides(subjects):
        parts = (split.predictions, split.half, split.other)
        assert [len(set(part.tolist())) for part in parts] == [m, m, m]


def test_subjects_are_on_one_side():
    rng = np.random.default_rng(0)
    subjects = (rng.integers(0, 30, 80), rng.integers(0, 30, 120))
    for _, made, half, other in sides(subjects):
        assert not half & other
        assert not half & made


def test_one_large_subject_leaves_the_halves_unequal_but_the_samples_equal():
    subjects = (np.arange(90), 1000 + np.r_[np.zeros(60, int), np.arange(1, 31)])
    for split, *_ in sides(subjects):
        assert len(split.half) == len(split.other)
        assert len(split.half) == 30


def test_splits_differ_and_come_again():
    subjects = (np.arange(50), 100 + np.arange(60))
    one, again, other = (
        [split.half.tolist() for split in draw_splits(subjects, 3, seed)] for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert one[0] != one[1]


def test_subjects_of_both_sets_are_one(image_set):
    voxels = np.zeros((2, 1, 4, 4), np.float32)
    made = image_set("p", voxels, subjects=["a", "b"])
    real = image_set("l", voxels, subjects=["b", "c"])
    p, q = joint_subjects(made, real)
    assert p[1] == q[0]
    assert len({*p.tolist(), *q.tolist()}) == 3
