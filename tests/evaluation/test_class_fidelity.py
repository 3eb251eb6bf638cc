"""Fidelity of each class, and generated images beside real ones of the same classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from synthcube.evaluation.class_fidelity import MEASURES, class_fidelity
from synthcube.evaluation.config import EvaluationConfig, ExtractorConfig
from synthcube.evaluation.extractors import load_extractor
from synthcube.evaluation.features import extract
from synthcube.evaluation.gallery import gallery
from synthcube.evaluation.results import Section
from synthcube.evaluation.sets import ImageSet

CONFIG = EvaluationConfig(extractor=ExtractorConfig(name="radiomic"), num_repeats=3)


def drawn(number: int, seed: int, brightness: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    images = random.normal(brightness, 1.0, (number, 1, 16, 16))
    return np.cumsum(images, axis=-1) / 4


@pytest.fixture
def sides(image_set) -> tuple[ImageSet, ImageSet]:
    """Predictions whose class `good` is like the real one and whose class `bad` is another."""
    predictions = [drawn(24, 1, 0.0), drawn(24, 2, 3.0), drawn(4, 3, 0.0)]
    labels = [drawn(40, 4, 0.0), drawn(40, 5, 0.0), drawn(40, 6, 0.0)]
    sets = []
    for name, parts in (("predictions", predictions), ("labels", labels)):
        counts = [len(part) for part in parts]
        classes = np.repeat(["good", "bad", "few"], counts).tolist()
        sets.append(image_set(name, np.concatenate(parts), classes=classes))
    return sets[0], sets[1]


def judged(sides: tuple[ImageSet, ImageSet], folder: Path) -> Section:
    extractor = load_extractor(CONFIG.extractor, 2, torch.device("cpu"))
    both = [
        extract(side, extractor, sides[1].bounds, CONFIG, folder, torch.device("cpu"))
        for side in sides
    ]
    return class_fidelity(*sides, (both[0], both[1]), "Label", CONFIG, 0)


def test_a_class_that_is_wrong_stands_out(sides, tmp_path: Path) -> None:
    section = judged(sides, tmp_path)
    good, bad = (section.measures[f"kernel_distance_{name}"] for name in ("good", "bad"))
    assert good.low <= max(good.real_baseline, 0)
    assert bad.low > good.high
    assert section.measures["coverage_bad"].value < 0.5 < section.measures["coverage_good"].value
    assert section.measures["precision_good"].count == 20
    (plot,) = section.plots
    assert plot.categories == ("bad", "good")
    assert plot.series["generated images"][1] == section.measures["coverage_good"].value


def test_a_class_of_few_images_says_how_many_are_needed(sides, tmp_path: Path) -> None:
    section = judged(sides, tmp_path)
    for measure in MEASURES:
        measured = section.measures[f"{measure}_few"]
        assert measured.value is None
        assert measured.reason == (
            "4 predictions and 40 labels of few: at least 10 predictions and 20 labels are "
            "needed, in two halves of different subjects"
        )
    assert any("at least 10 predictions and 20 held-out" in note for note in section.notes)


def test_the_gallery_has_both_sides_of_every_class(sides) -> None:
    picture = gallery(*sides, "Label", 0)
    assert picture.row_titles == (
        "bad: generated", "bad: real", "few: generated", "few: real",
        "good: generated", "good: real",
    )  # fmt: skip
    assert [len(row) for row in picture.rows] == [4] * 6
    low, high = sides[1].bounds[0]
    held = sides[1].read(range(40, 80))[:, 0]
    held = ((held - low) / (high - low)).clip(0, 1).transpose(0, 2, 1)
    for image in picture.rows[1]:
        assert (np.abs(held - image).max(axis=(1, 2)) < 1e-5).any(), "a real image of `bad`"
    again = gallery(*sides, "Label", 0)
    assert all((a == b).all() for a, b in zip(again.rows[0], picture.rows[0], strict=True))


def test_without_classes_the_gallery_has_two_rows(sides) -> None:
    picture = gallery(*sides, None, 0)
    assert picture.row_titles == ("Generated", "Real")
    assert [len(row) for row in picture.rows] == [12, 12]


def test_the_gallery_shows_volumes_in_proportion_and_says_how_they_are_turned(image_set) -> None:
    volumes = np.zeros((3, 1, 6, 6, 2), np.float32)
    volumes[:, :, 5, :, 1] = 1  # at the patient's right, at the head
    thick = [replace(image_set(name, volumes, raster=False), spacing_mm=(1, 1, 3))
             for name in ("predictions", "labels")]  # fmt: skip
    picture = gallery(*thick, None, 0)
    assert picture.title.endswith("(axial, coronal, sagittal; the patient's right is on the left)")
    for image in picture.rows[0] + picture.rows[1]:
        assert image.shape == (6, 18), "slices of 3 mm"
        assert (image[:, 0] == 1).all(), "axial"
        assert image[:, 6:12].sum() == 3, "coronal: half of the leftmost column"
