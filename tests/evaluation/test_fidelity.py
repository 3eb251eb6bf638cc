"""Fidelity and diversity as a whole: splits, order, baselines, too little of everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from synthcube.evaluation.config import EvaluationConfig, ExtractorConfig
from synthcube.evaluation.extractors import load_extractor
from synthcube.evaluation.features import extract
from synthcube.evaluation.fidelity import diversity, draw_splits, fidelity
from synthcube.evaluation.fidelity_metrics import PRECISION_RECALL
from synthcube.evaluation.results import Section
from synthcube.evaluation.sets import subject_numbers


def split_subjects(subjects: tuple[np.ndarray, np.ndarray], number: int = 5, seed: int = 0):
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
def test_split_every_sample_is_as_large_as_the_smallest(predictions, labels, m):
    subjects = (np.arange(predictions), 1000 + np.arange(labels))
    for split, *_ in split_subjects(subjects):
        parts = (split.predictions, split.half, split.other)
        assert [len(set(part.tolist())) for part in parts] == [m, m, m]


def test_split_subjects_are_on_one_side():
    rng = np.random.default_rng(0)
    subjects = (rng.integers(0, 30, 80), rng.integers(0, 30, 120))
    for _, predictions, half, other in split_subjects(subjects):
        assert not half & other
        assert not half & predictions


def test_split_one_large_subject_leaves_the_halves_unequal_but_the_samples_equal():
    subjects = (np.arange(90), 1000 + np.r_[np.zeros(60, int), np.arange(1, 31)])
    for split, *_ in split_subjects(subjects):
        assert len(split.half) == len(split.other)
        assert len(split.half) == 30


def test_split_splits_differ_and_come_again():
    subjects = (np.arange(50), 100 + np.arange(60))
    one, again, other = (
        [split.half.tolist() for split in draw_splits(subjects, 3, seed)] for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert one[0] != one[1]


def test_split_subjects_of_both_sets_are_one(image_set):
    voxels = np.zeros((2, 1, 4, 4), np.float32)
    predictions = image_set("p", voxels, subjects=["a", "b"])
    labels = image_set("l", voxels, subjects=["b", "c"])
    p, q = subject_numbers(predictions, labels)
    assert p[1] == q[0]
    assert len({*p.tolist(), *q.tolist()}) == 3


CONFIG = EvaluationConfig(num_repeats=4, slices_per_plane=3)
EXTRACTOR = load_extractor(ExtractorConfig(name="radiomic"), rank=2)


def blobs(number: int, seed: int, side: int = 16, rank: int = 2) -> np.ndarray:
    """Smooth random images, (N, 1, *spatial)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((number, *[side] * rank))
    smooth = gaussian_filter(noise, 2, axes=tuple(range(1, rank + 1)))
    return (100 * smooth / smooth.std()).astype(np.float32)[:, None]


@pytest.fixture
def evaluate(image_set, tmp_path):
    def evaluate_fidelity(
        predictions: np.ndarray, labels: np.ndarray, seed: int = 0, **subjects
    ) -> Section:
        p = image_set("predictions", predictions, subjects=subjects.get("subjects_p"))
        q = image_set("labels", labels, subjects=subjects.get("subjects"))
        features = [extract(images, EXTRACTOR, q.bounds, CONFIG, tmp_path) for images in (p, q)]
        return fidelity(p, q, *features, CONFIG, seed)

    return evaluate_fidelity


def values(section: Section, name: str) -> tuple[float, float]:
    measure = section.measures[name]
    assert measure.value is not None
    assert measure.real_baseline is not None
    return measure.value, measure.real_baseline


def test_images_like_real_ones_reach_the_floor(evaluate):
    section = evaluate(blobs(80, 1), blobs(160, 2))
    kernel = section.measures["kernel_distance"]
    assert kernel.low < 0 < kernel.high
    for name, tolerance in (("frechet_distance", 0.4), ("precision", 0.1), ("recall", 0.1)):
        value, baseline = values(section, name)
        assert value == pytest.approx(baseline, rel=tolerance)
    assert section.facts["images_each_side"] == 80
    assert all(measure.count == 80 for measure in section.measures.values())


@pytest.mark.parametrize("damage", ["noise", "blur", "brightness"])
def test_distances_grow_with_the_damage(evaluate, damage):
    def damaged(strength: float) -> np.ndarray:
        images = blobs(60, 1)
        if damage == "noise":
            rng = np.random.default_rng(3)
            return images + (40 * strength * rng.standard_normal(images.shape)).astype(np.float32)
        if damage == "blur":
            return gaussian_filter(images, 1.5 * strength, axes=(2, 3)) if strength else images
        return images + np.float32(40 * strength)

    sections = [evaluate(damaged(strength), blobs(120, 2)) for strength in (0, 1, 2)]
    for name in ("frechet_distance", "kernel_distance"):
        none, some, much = (values(section, name)[0] for section in sections)
        assert none < some < much
    baselines = {values(section, "kernel_distance")[1] for section in sections}
    assert len(baselines) == 1  # real images are what they were
    coverage = [values(section, "coverage")[0] for section in sections]
    assert coverage[2] < coverage[0]
    kernel = sections[2].measures["kernel_distance"]
    assert kernel.low > kernel.real_baseline


def test_six_images_repeated_cover_little(evaluate):
    section = evaluate(np.tile(blobs(6, 1), (10, 1, 1, 1)), blobs(120, 2))
    for name in ("recall", "coverage"):
        value, baseline = values(section, name)
        assert value < 0.6 * baseline


def test_volumes_are_judged_in_three_planes(evaluate):
    section = evaluate(blobs(24, 1, 12, 3), blobs(48, 2, 12, 3))
    planes = [section.measures[f"kernel_distance_{plane}"].value for plane in ("yz", "xz", "xy")]
    assert section.measures["kernel_distance"].value == pytest.approx(np.mean(planes))
    assert section.measures["kernel_distance"].count == 24
    wide = blobs(24, 1, 12, 3)
    wide[..., ::2] *= -1  # only what is seen across the last axis stays smooth
    section = evaluate(wide, blobs(48, 2, 12, 3))
    assert values(section, "kernel_distance_xy")[0] < values(section, "kernel_distance_yz")[0]


def test_a_translation_is_not_compared_with_its_own_subject(evaluate):
    """Copies of the labels themselves: no nearer than other real images are."""
    labels = blobs(120, 2)
    names = [f"subject {i}" for i in range(120)]
    section = evaluate(labels, labels, subjects=names, subjects_p=names)
    assert section.facts["images_each_side"] == 60
    value, baseline = values(section, "frechet_distance")
    assert value == pytest.approx(baseline)


@pytest.mark.parametrize(
    ("predictions", "labels", "subjects", "reason"),
    [
        (5, 60, None, "5 predictions and 60 labels of 60 subjects leave 5 images on each side"),
        (60, 19, None, "leave 9 images on each side, at least 10 are needed"),
        (60, 60, ["one"] * 60, "the 60 labels are of one subject and cannot be split"),
    ],
)
def test_too_few_images_have_no_distance_but_a_reason(
    evaluate, predictions, labels, subjects, reason
):
    section = evaluate(blobs(predictions, 1), blobs(labels, 2), subjects=subjects)
    assert all(measure.value is None for measure in section.measures.values())
    assert all(reason in str(measure.reason) for measure in section.measures.values())
    assert reason in section.notes[0]


def test_too_few_for_a_covariance_is_said(evaluate):
    few = evaluate(blobs(20, 1), blobs(40, 2)).measures["frechet_distance"]
    assert "20 rows of 30 features are too few for a covariance" in few.reason
    assert few.value > 0
    assert few.real_baseline > 0


def test_two_subjects_have_no_kernel_distance(evaluate):
    section = evaluate(blobs(30, 1), blobs(40, 2), subjects=["a"] * 20 + ["b"] * 20)
    assert "a sample is of 1 subjects, 3 are needed" in section.measures["kernel_distance"].reason
    assert "neighbours of other subjects" in section.measures["recall"].reason
    assert section.measures["frechet_distance"].value is not None
    assert section.plots == [plot for plot in section.plots if plot.kind == "histogram"]


def test_identical_images_give_numbers_and_not_nan(evaluate):
    section = evaluate(np.repeat(blobs(1, 1), 30, axis=0), blobs(60, 2))
    for measure in section.measures.values():
        numbers = (measure.value, measure.real_baseline, measure.low, measure.high)
        assert all(number is not None and math.isfinite(number) for number in numbers)


def test_the_same_input_gives_the_same_numbers(evaluate):
    one, again = (evaluate(blobs(30, 1), blobs(60, 2)) for _ in range(2))
    assert one.plain() == again.plain()
    assert evaluate(blobs(30, 1), blobs(60, 2), seed=1).plain() != one.plain()


def test_plots_show_every_sample(evaluate):
    bars, histogram = evaluate(blobs(30, 1), blobs(60, 2)).plots
    assert bars.categories == PRECISION_RECALL
    assert {len(numbers) for numbers in bars.series.values()} == {4}
    assert {name: len(numbers) for name, numbers in histogram.series.items()} == {
        "predictions": 30, "other real images": 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("side", "rank", "scales"), [(16, 2, 1), (24, 2, 2), (48, 2, 3), (12, 3, 1)]
)
def test_diversity_stands_beside_that_of_real_images(image_set, side, rank, scales):
    labels = image_set("labels", blobs(60, 2, side, rank))
    same, mode = blobs(60, 1, side, rank), np.tile(blobs(3, 1, side, rank), (20, *[1] * (rank + 1)))
    alike = diversity(image_set("predictions", same), labels, 0)
    collapsed = diversity(image_set("predictions", mode), labels, 0)
    assert alike.facts["scales"] == scales
    measure = alike.measures["ms_ssim"]
    assert measure.count == 30
    assert measure.value == pytest.approx(measure.real_baseline, abs=0.1)
    assert collapsed.measures["ms_ssim"].value > measure.real_baseline + 0.15
    assert collapsed.measures["ms_ssim"].low > measure.real_baseline


def test_identical_predictions_have_ms_ssim_one(image_set):
    images = image_set("predictions", np.repeat(blobs(1, 1), 20, axis=0))
    section = diversity(images, image_set("labels", blobs(20, 2)), 0)
    assert section.measures["ms_ssim"].value == pytest.approx(1)


@pytest.mark.parametrize(
    ("number", "side", "reason"),
    [(8, 16, "4 pairs of different subjects; 5 are needed"), (20, 10, "an axis of 10 voxels")],
)
def test_too_little_for_ms_ssim_is_said(image_set, number, side, reason):
    sets = [image_set(name, blobs(number, 1, side)) for name in ("predictions", "labels")]
    measure = diversity(*sets, 0).measures["ms_ssim"]
    assert measure.value is None
    assert reason in measure.reason


@pytest.mark.slow
def test_real_images_are_near_their_own_kind_and_far_from_others(mednist, image_set, tmp_path):
    from PIL import Image

    def read(kind: str, first: int, number: int) -> np.ndarray:
        files = sorted((mednist / kind).glob("*.*"))[first : first + number]
        return np.stack([np.asarray(Image.open(file).convert("L")).T for file in files])[:, None]

    extractor = load_extractor(ExtractorConfig(), rank=2)
    labels = image_set("labels", read("Hand", 0, 160))

    def evaluate_fidelity(predictions: np.ndarray) -> Section:
        sets = (image_set("predictions", predictions), labels)
        features = [extract(images, extractor, labels.bounds, CONFIG, tmp_path) for images in sets]
        return fidelity(*sets, *features, CONFIG, 0)

    same = evaluate_fidelity(read("Hand", 160, 80))
    blurred = evaluate_fidelity(
        gaussian_filter(read("Hand", 160, 80).astype(np.float32), 1, axes=(2, 3))
    )
    other = evaluate_fidelity(read("HeadCT", 0, 80))
    for name in ("frechet_distance", "kernel_distance"):
        assert values(same, name)[0] < values(blurred, name)[0] < values(other, name)[0]
    assert same.measures["kernel_distance"].low < 0 < same.measures["kernel_distance"].high
    assert values(same, "frechet_distance")[0] == pytest.approx(
        values(same, "frechet_distance")[1], rel=0.15
    )
    assert values(other, "coverage")[0] < 0.05
