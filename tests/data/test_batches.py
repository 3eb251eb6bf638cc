"""Batches that subjects join by chance: mean, variance, no subject twice, empty ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthcube.data.batches import SubjectBatches, by_subject, steps_per_epoch, uniform
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.preprocessing import DataConfig

SUBJECTS = [[2 * place, 2 * place + 1] for place in range(24)]


def drawn(times: int = 400) -> list[list[int]]:
    batches = SubjectBatches(SUBJECTS, 8)
    return [[row for _, row in batch] for _ in range(times) for batch in batches]


def test_sizes_are_those_of_poisson_sampling() -> None:
    sizes = np.array([len(batch) for batch in drawn()])  # 1,200 batches
    rate = 8 / 24
    # Bounds of five standard errors: a right sampler fails once in a million times.
    assert abs(sizes.mean() - 8) < 5 * (24 * rate * (1 - rate) / len(sizes)) ** 0.5
    variance = 24 * rate * (1 - rate)  # a fixed batch size has 0
    assert abs(sizes.var() / variance - 1) < 5 * (2 / len(sizes)) ** 0.5 * 1.2


def test_nobody_is_twice_in_a_batch_and_every_image_has_its_turn() -> None:
    batches = drawn(100)
    for rows in batches:
        subjects = [row // 2 for row in rows]
        assert len(set(subjects)) == len(subjects)
    assert {row for rows in batches for row in rows} == set(range(48))


def test_the_choice_does_not_repeat() -> None:
    """Not for a seed either: none of these depends on one."""
    torch.manual_seed(0)
    first = drawn(10)
    torch.manual_seed(0)
    assert drawn(10) != first


def test_an_epoch_goes_on_where_a_checkpoint_stopped() -> None:
    batches = SubjectBatches(SUBJECTS, 8)
    assert len(batches) == steps_per_epoch(24, 8) == 3
    batches.epoch, batches.start = 5, 2
    batches.set_epoch(5)
    assert len(list(batches)) == 1
    batches.set_epoch(6)
    assert len(list(batches)) == 3
    assert {epoch for batch in batches for epoch, _ in batch} <= {6}


def test_everybody_is_drawn_where_the_batch_is_everybody() -> None:
    (batch,) = SubjectBatches(SUBJECTS, 24)
    assert len(batch) == 24


def test_rows_are_grouped_by_subject() -> None:
    assert by_subject(["a", "b", "a", "c", "b"], [0, 2, 3, 4]) == [[0, 2], [3], [4]]


def test_secret_numbers_fill_the_interval() -> None:
    numbers = uniform(100_000)
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005


@pytest.mark.parametrize("augmentation", [(), ({"name": "flip", "axes": [0]},)])
def test_an_empty_batch_has_the_shape_of_any_other(
    phantoms: Path, tmp_path: Path, augmentation: tuple[dict[str, object], ...]
) -> None:
    config = DataConfig.model_validate({
        "augmentation": list(augmentation), "conditions": {"Label": "class"},
        "classes": {"Label": ["disc", "square", "ring"]}, "validation_fraction": 0.0,
    })  # fmt: skip
    data = DataModule(
        read_manifest(phantoms), config, batch_size=4, seed=0, cache=tmp_path, private=True
    )
    loader = data.train_dataloader()
    assert isinstance(loader.batch_sampler, SubjectBatches)
    batch = loader.dataset.__getitems__([])
    assert batch["image"].shape == (0, 1, 16, 16)
    assert batch["condition"]["values"].shape == (0, 1)
    assert len(batch["index"]) == len(batch["label"]) == 0
