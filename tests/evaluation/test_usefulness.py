"""Synthetic images that are as good as real ones teach as much, and wrong classes teach less."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.data.phantom import KINDS, phantom
from synthcube.evaluation.usefulness import usefulness


def shapes(
    number: int, seed: int, size: tuple[int, ...] = (16, 16)
) -> tuple[np.ndarray, list[str]]:
    drawn = [phantom(i, size=size, seed=seed) for i in range(number)]
    return np.stack([item.image.numpy() for item in drawn]), [item.label_name for item in drawn]


@pytest.fixture
def sides(image_set):
    def make(size=(16, 16), number=90, raster=True, **changes):
        sets = []
        for seed, name in enumerate(("predictions", "labels", "train")):
            voxels, classes = shapes(number, seed, size)
            settings = {"classes": classes, "raster": raster}
            if name == "predictions":
                settings |= changes
            sets.append(image_set(name, settings.pop("voxels", voxels), **settings))
        return sets

    return make


@pytest.mark.parametrize("size", [(16, 16), (8, 8, 8)])
def test_images_as_good_as_real_ones_teach_as_much(sides, size) -> None:
    section = usefulness(*sides(size, raster=len(size) == 2), 0)
    measures = section.measures
    assert measures["accuracy_real"].value > 0.8
    assert measures["accuracy_synthetic"].real_baseline == measures["accuracy_real"].value
    difference = measures["accuracy_difference"]
    assert difference.low <= 0 <= difference.high or abs(difference.value) < 0.05
    assert measures["auc_synthetic"].value > 0.9
    assert section.facts["classes"] == sorted(KINDS[len(size)])
    assert section.facts["num_training_images"] == 90
    low, high = (getattr(measures["balanced_accuracy_real"], end) for end in ("low", "high"))
    assert low <= measures["balanced_accuracy_real"].value <= high
    assert measures["balanced_accuracy_real"].real_baseline == pytest.approx(1 / 3)


def test_a_task_that_is_too_easy_is_warned_of(image_set) -> None:
    sets = []
    for seed, name in enumerate(("predictions", "labels", "train")):
        random = np.random.default_rng(seed)
        dark = np.arange(60) % 2 == 0
        voxels = random.normal(0, 0.1, (60, 1, 16, 16)) + 4 * dark[:, None, None, None]
        sets.append(image_set(name, voxels, classes=["dark" if d else "light" for d in dark]))
    section = usefulness(*sets, 0)
    assert section.measures["balanced_accuracy_real"].value == 1
    assert section.notes[0].startswith("Warning: the task is too easy: the classifier trained on")
    reason = section.measures["accuracy_synthetic"].reason
    assert reason.endswith("(balanced accuracy 1), so poor images may teach it as well, and a high "
                           "number says nothing")  # fmt: skip


def test_a_task_of_some_difficulty_is_not(sides, image_set) -> None:
    predictions, _, train = sides()
    voxels, classes = shapes(90, 1)
    wrong = sorted(set(classes))[0]
    classes = [wrong if i % 5 == 0 else name for i, name in enumerate(classes)]
    section = usefulness(predictions, image_set("wrong", voxels, classes=classes), train, 0)
    assert section.measures["balanced_accuracy_real"].value < 0.98
    assert section.measures["accuracy_synthetic"].reason is None
    assert not any(note.startswith("Warning") for note in section.notes)


@pytest.mark.slow
def test_classes_that_are_mixed_up_teach_less(sides) -> None:
    _, names = shapes(90, 0)
    mixed = [names[(i * 7 + i // 3) % 90] for i in range(90)]
    measures = usefulness(*sides(classes=mixed), 0).measures
    assert measures["accuracy_synthetic"].high < measures["accuracy_real"].low
    assert measures["accuracy_difference"].high < 0


@pytest.mark.slow
def test_predictions_of_another_range_teach_less(sides) -> None:
    voxels, _ = shapes(90, 0)
    measures = usefulness(*sides(voxels=voxels / 255 - 1), 0).measures
    assert measures["accuracy_synthetic"].value < measures["accuracy_real"].value - 0.2


@pytest.mark.slow
def test_without_training_data_half_of_the_labels_teach(sides) -> None:
    predictions, labels, _ = sides()
    section = usefulness(predictions, labels, None, 0)
    assert section.facts["real_training_images"] == "half of the labels"
    assert section.facts["num_training_images"] + section.facts["num_test_images"] == 90
    assert section.plain() == usefulness(predictions, labels, None, 0).plain()


@pytest.mark.slow
def test_labels_that_were_trained_on_do_not_test(image_set, sides) -> None:
    predictions, labels, _ = sides()
    voxels, classes = shapes(90, 1)
    voxels[:30] = shapes(90, 2)[0][:30]
    labels = image_set("overlapping", voxels, classes=classes)
    train = image_set("again", shapes(90, 2)[0], classes=classes)
    assert usefulness(predictions, labels, train, 0).facts["num_test_images"] == 60


@pytest.mark.slow
def test_a_condition_of_infer_is_a_class_too(image_set) -> None:
    voxels, classes = shapes(60, 0)
    held, held_classes = shapes(60, 1)
    predictions = image_set("made", voxels, conditions=[
        {"Seed": str(i), "Kind": name} for i, name in enumerate(classes)])  # fmt: skip
    labels = image_set("labels", held, conditions=[
        {"Age": str(i), "Kind": name} for i, name in enumerate(held_classes)])  # fmt: skip
    section = usefulness(predictions, labels, None, 0)
    assert section.facts["column"] == "Kind"


def test_what_is_missing_is_the_reason(image_set, sides) -> None:
    predictions, labels, train = sides()
    bare = image_set("bare", shapes(90, 0)[0])
    assert "share no column" in usefulness(bare, labels, train, 0)
    assert "share no column" in usefulness(predictions, bare, train, 0)
    voxels, classes = shapes(90, 0)
    kept = [i for i, name in enumerate(classes) if name != "ring"]
    some = image_set("some", voxels[kept], classes=[classes[i] for i in kept])
    assert "predictions have no image of ring" in usefulness(some, labels, train, 0)
    few = image_set("few", shapes(9, 1)[0], classes=shapes(9, 1)[1])
    reason = usefulness(predictions, few, train, 0)
    assert "at least 5 real images to test on of each class are needed (disc: 3" in reason
