"""Planted copies are found at the rate at which they were planted, and no others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from synthcube.data.phantom import phantom
from synthcube.errors import ImageError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.memorisation import (
    FEWEST,
    NO_COPIES,
    calibrate,
    memorisation,
    share_measures,
)


def test_no_more_false_alarms_than_allowed_on_average() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        calibration = calibrate(rng.normal(size=299), np.arange(299), 0.01, 0)
        assert calibration is not None
        shares.append(calibration.flagged(rng.normal(size=2000)).mean())
    assert np.mean(shares) == pytest.approx(0.01, abs=0.002)


def test_false_alarms_are_counted_between_subjects() -> None:
    """A subject whose images are all near is flagged by the others' threshold."""
    rng = np.random.default_rng(1)
    subjects = np.repeat(np.arange(20), 20)
    distances = rng.uniform(1, 2, 400)
    distances[:20] = rng.uniform(0.1, 0.2, 20)
    calibration = calibrate(distances, subjects, 0.01, 0)
    assert calibration is not None
    assert calibration.false_alarms >= 0.05
    assert "20 subjects" in calibration.reason


def test_few_images_or_one_subject_set_no_threshold() -> None:
    assert calibrate(np.arange(FEWEST - 1.0), np.arange(FEWEST - 1), 0.01, 0) is None
    assert calibrate(np.arange(50.0), np.zeros(50, int), 0.01, 0) is None
    few = calibrate(np.arange(50.0), np.arange(50), 0.01, 0)
    assert few is not None
    assert "99 are needed" in few.reason
    assert few.threshold == 0


def test_the_share_beyond_chance_leaves_the_false_alarms_out() -> None:
    calibration = calibrate(np.arange(1000.0), np.arange(1000), 0.05, 0)
    assert calibration is not None
    share, beyond = share_measures(np.arange(1000) < 240, calibration)
    assert share.value == 0.24
    chance = calibration.false_alarms
    assert beyond.value == pytest.approx((0.24 - chance) / (1 - chance))
    assert beyond.low < beyond.value < beyond.high


CONFIG = EvaluationConfig()
KINDS = ("exact", "mirrored", "noised", "shifted")
RATES = (0.01, 0.05, 0.2)


def phantoms(number: int, seed: int, size: tuple[int, ...] = (32, 32)) -> np.ndarray:
    return np.stack([phantom(i, size=size, seed=seed).image.numpy() for i in range(number)])


def copied(images: np.ndarray, kind: str, noise: float = 2.0) -> np.ndarray:
    """Copies of (N, C, *spatial), intensities in 0 to 255."""
    rng = np.random.default_rng(9)
    if kind == "mirrored":
        return np.stack(
            [np.flip(image, 1 + i % (image.ndim - 1)) for i, image in enumerate(images)]
        ).copy()
    if kind == "noised":
        return np.rint((images + rng.normal(0, noise, images.shape)).clip(0, 255))
    if kind == "shifted":
        return np.stack([moved(image, 1 + i % 2) for i, image in enumerate(images)])
    return images.copy()


def moved(image: np.ndarray, by: int) -> np.ndarray:
    """By so many voxels, there and back along the axes in turn; the border is repeated."""
    sides = image.shape[1:]
    padded = np.pad(image, ((0, 0), *((by, by),) * len(sides)), mode="edge")
    starts = (by + by * (-1) ** axis for axis in range(len(sides)))
    windows = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return padded[(slice(None), *windows)]


def planted(fresh: np.ndarray, trained: np.ndarray, rate: float, kind: str, **how) -> np.ndarray:
    predictions = fresh.copy()
    number = round(rate * len(fresh))
    if number:
        predictions[:number] = copied(trained[:number], kind, **how)
    return predictions


def recovers(measures, rate: float, number: int) -> None:
    """Within three standard deviations of the planted copies and the false alarms together."""
    share, beyond = measures["near_copies_pixels"], measures["beyond_chance_pixels"]
    chance = max(share.real_baseline, CONFIG.copy_false_alarms)
    slack = 3 * math.sqrt(chance * (1 - chance) / number) + 1 / number
    assert 0.95 * rate - 1e-9 <= share.value <= rate + chance + slack
    assert beyond.value == pytest.approx(rate, abs=chance + slack)
    assert beyond.low <= rate <= beyond.high


@pytest.fixture(scope="module")
def drawn():
    return {name: phantoms(200, seed) for seed, name in enumerate(("train", "held", "fresh"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", RATES)
def test_planted_phantoms_are_recovered(image_set, drawn, kind, rate) -> None:
    predictions = image_set("predictions", planted(drawn["fresh"], drawn["train"], rate, kind))
    section = memorisation(
        predictions, image_set("labels", drawn["held"]), image_set("train", drawn["train"]), None,
        CONFIG, 0,
    )  # fmt: skip
    recovers(section.measures, rate, 200)
    number = round(rate * 200)
    assert section.facts["num_exact_copies"] == (number if kind == "exact" else 0)
    files = [case["nearest_pixels"].split("/")[-1] for case in section.cases[:number]]
    right = sum(name == f"{i:05d}.png" for i, name in enumerate(files))
    assert right >= 0.95 * number
    if kind == "mirrored":
        assert section.facts["num_mirrored_near_copies"] >= number


def test_without_copies_there_are_as_many_as_false_alarms(image_set) -> None:
    """And the note does not promise privacy."""
    held, train, fresh = (phantoms(400, seed, (16, 16)) for seed in (11, 12, 13))
    config = EvaluationConfig(copy_false_alarms=0.05)
    sets = [image_set(n, v) for n, v in (("made", fresh), ("labels", held), ("train", train))]
    section = memorisation(*sets, None, config, 0)
    share = section.measures["near_copies_pixels"]
    spread = math.sqrt(0.05 * 0.95 / 400)
    assert share.real_baseline == pytest.approx(0.05, abs=3 * spread)
    assert share.value == pytest.approx(0.05, abs=3 * 2**0.5 * spread)
    assert section.measures["beyond_chance_pixels"].low == 0
    nearer = section.measures["nearer_than_labels_pixels"]
    assert nearer.low <= 0.5 <= nearer.high
    assert section.measures["exact_copies"].value == 0


def test_no_copies_are_said_to_be_found_at_this_threshold(image_set) -> None:
    rng = np.random.default_rng(0)
    predictions, held, train = (rng.uniform(0, 255, (n, 1, 16, 16)) for n in (20, 150, 100))
    sets = [image_set(n, v) for n, v in (("made", predictions), ("labels", held), ("train", train))]
    section = memorisation(*sets, None, CONFIG, 0)
    if section.facts["num_near_copies_pixels"] == 0:
        assert f"In pixels: {NO_COPIES}" in section.notes
    text = " ".join([*section.notes, str(section.plain())]).lower()
    assert "private" not in text
    assert section.measures["near_copies_pixels"].reason is None


@pytest.mark.parametrize("kind", KINDS)
def test_planted_volumes_are_recovered(image_set, kind) -> None:
    train, held, fresh = (phantoms(n, s, (16, 16, 16)) for s, n in enumerate((40, 120, 40)))
    if kind == "shifted":
        predictions = fresh.copy()
        predictions[:8] = np.stack([moved(image, 1) for image in train[:8]])
    else:
        predictions = planted(fresh, train, 0.2, kind)
    sets = [image_set(n, v, raster=False)
            for n, v in (("made", predictions), ("labels", held), ("train", train))]  # fmt: skip
    section = memorisation(*sets, None, CONFIG, 0)
    recovers(section.measures, 0.2, 40)
    assert len(section.pictures[0].rows) == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, *RATES])
def test_planted_hands_are_recovered(image_set, mednist: Path, kind, rate) -> None:
    files = sorted((mednist / "Hand").glob("*.jpeg"))[:1200]
    images = np.stack([np.asarray(PIL.Image.open(image), np.float32).T[None] for image in files])
    images = images[np.random.default_rng(0).permutation(len(images))]
    train, held, fresh = images[:600], images[600:900], images[900:]
    predictions = planted(fresh, train, rate, kind, noise=10)
    sets = [image_set(n, v) for n, v in (("made", predictions), ("labels", held), ("train", train))]
    section = memorisation(*sets, None, CONFIG, 0)
    share = section.measures["near_copies_pixels"]
    assert share.value == pytest.approx(rate, abs=0.03)
    assert share.value >= rate - 0.02
    assert section.measures["beyond_chance_pixels"].high >= rate


def test_features_find_copies_too(image_set, drawn) -> None:
    predictions = planted(drawn["fresh"], drawn["train"], 0.2, "noised")
    project = np.random.default_rng(3).normal(size=(32 * 32, 64)).astype(np.float32) / 32
    tables = {
        name: voxels.reshape(200, -1).astype(np.float32) @ project
        for name, voxels in (
            ("predictions", predictions), ("labels", drawn["held"]), ("train_data", drawn["train"]),
        )
    }  # fmt: skip
    section = memorisation(
        image_set("predictions", predictions), image_set("labels", drawn["held"]),
        image_set("train", drawn["train"]), tables, CONFIG, 0,
    )  # fmt: skip
    share = section.measures["near_copies_features"]
    assert share.value == pytest.approx(0.2, abs=0.05)
    assert [plot.title for plot in section.plots][1].endswith("in features")
    assert any(note.startswith("In features: 4") for note in section.notes)


def test_labels_among_the_training_data_calibrate_nothing(image_set, drawn, caplog) -> None:
    held = drawn["held"].copy()
    held[7] = drawn["train"][3]
    predictions = planted(drawn["fresh"], drawn["train"], 0.05, "exact")
    section = memorisation(
        image_set("predictions", predictions), image_set("labels", held),
        image_set("train", drawn["train"]), None, CONFIG, 0,
    )  # fmt: skip
    plain = section.plain()
    assert plain["near_copies_pixels"]["value"] is None
    assert "1 of them are training images" in plain["near_copies_pixels"]["reason"]
    assert "1 of them are training images" in " ".join(plain["notes"])
    assert "labels/00007.png" in caplog.text
    assert "00007" not in str(plain), "what may leave the site names no file"
    assert plain["exact_copies"]["value"] == 0.05  # needs no threshold
    assert plain["distance_pixels"]["value"] > 0
    assert "cannot calibrate" in plain["nearer_than_labels_pixels"]["reason"]


def test_subjects_on_both_sides_calibrate_nothing(image_set, drawn) -> None:
    held = image_set("labels", drawn["held"], subjects=["p7"] * 100 + ["p8"] * 100)
    train = image_set("train", drawn["train"], subjects=["p1"] * 150 + ["p8"] * 50)
    section = memorisation(image_set("made", drawn["fresh"]), held, train, None, CONFIG, 0)
    assert "1 subjects are in both" in section.measures["near_copies_pixels"].reason


def test_mirrored_training_images_calibrate_nothing(image_set, drawn) -> None:
    held = drawn["held"].copy()
    held[:4] = drawn["train"][:4, :, ::-1]
    sets = [image_set("made", drawn["fresh"]), image_set("labels", held),
            image_set("train", drawn["train"])]  # fmt: skip
    section = memorisation(*sets, None, CONFIG, 0)
    reason = section.measures["near_copies_pixels"].reason
    assert "copies of training images themselves" in reason


def test_few_held_out_images_are_said_to_be_few(image_set, drawn) -> None:
    sets = [image_set("made", drawn["fresh"][:50]), image_set("labels", drawn["held"][:40]),
            image_set("train", drawn["train"])]  # fmt: skip
    share = memorisation(*sets, None, CONFIG, 0).measures["near_copies_pixels"]
    assert share.value is not None
    assert "99 are needed" in share.reason
    sets[1] = image_set("very-few", drawn["held"][:4])
    assert memorisation(*sets, None, CONFIG, 0).plain()["near_copies_pixels"]["value"] is None


def test_predictions_that_repeat_each_other_are_counted(image_set, drawn) -> None:
    predictions = drawn["fresh"].copy()
    predictions[:20] = predictions[100]
    predictions[20:40] = copied(predictions[120:140], "noised", noise=1)
    sets = [image_set("made", predictions), image_set("labels", drawn["held"]),
            image_set("train", drawn["train"])]  # fmt: skip
    measures = memorisation(*sets, None, CONFIG, 0).measures
    assert measures["exact_duplicates"].value == pytest.approx(21 / 200)
    assert measures["near_duplicates"].value >= 55 / 200
    assert measures["near_duplicates"].real_baseline < 0.05


def test_constant_predictions_and_a_single_one(image_set, drawn) -> None:
    sets = [image_set("made", np.full((1, 1, 32, 32), 7.0)), image_set("labels", drawn["held"]),
            image_set("train", drawn["train"])]  # fmt: skip
    plain = memorisation(*sets, None, CONFIG, 0).plain()
    assert plain["near_copies_pixels"]["value"] == 0
    assert plain["near_duplicates"]["value"] is None


def test_sets_of_other_shapes_are_refused(image_set, drawn) -> None:
    sets = [image_set("made", drawn["fresh"][:, :, :16]), image_set("labels", drawn["held"]),
            image_set("train", drawn["train"])]  # fmt: skip
    with pytest.raises(ImageError, match=r"labels: shape \[1, 32, 32\], made \[1, 16, 32\]"):
        memorisation(*sets, None, CONFIG, 0)


def test_the_same_input_gives_the_same_numbers(image_set, drawn) -> None:
    sets = [image_set("made", drawn["fresh"][:60]), image_set("labels", drawn["held"]),
            image_set("train", drawn["train"])]  # fmt: skip
    first, second = (memorisation(*sets, None, CONFIG, 5).plain() for _ in range(2))
    assert first == second
    assert not list(sets[0].voxels.path.parent.glob("tmp*"))
