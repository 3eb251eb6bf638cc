"""Pairs: which prediction is whose, and measures against scikit-image, MONAI and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from synthcube.data.manifest import read_manifest
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ManifestError
from synthcube.evaluation import similarity
from synthcube.evaluation.pairs import compare_pairs, match_pairs
from synthcube.evaluation.sets import open_sets

VOXELS = np.zeros((3, 1, 4, 4))


@pytest.fixture
def labels(image_set):
    return image_set("labels", VOXELS, subjects=["a", "b", "c"])


def sources(labels, order):
    return [{"Source": str(labels.rows[i].channels[0])} for i in order]


def test_translations_find_the_file_they_were_made_from(image_set, labels) -> None:
    predictions = image_set(
        "made", VOXELS, subjects=["x", "x", "x"], conditions=sources(labels, (2, 0, 1))
    )
    assert match_pairs(predictions, labels, None) == [(0, 2), (1, 0), (2, 1)]
    assert match_pairs(predictions, labels, False) is None


def test_a_source_elsewhere_is_found_by_subject_then_by_name(image_set, labels) -> None:
    elsewhere = [{"Source": f"/mnt/data/{name}.nii.gz"} for name in ("t2", "t3", "t1")]
    predictions = image_set("made", VOXELS, subjects=["b", "c", "a"], conditions=elsewhere)
    assert match_pairs(predictions, labels, None) == [(0, 1), (1, 2), (2, 0)]
    names = [{"Source": f"/mnt/data/0000{i}.png"} for i in (1, 2, 0)]
    predictions = image_set("named", VOXELS, subjects=["s", "s", "s"], conditions=names)
    assert match_pairs(predictions, labels, None) == [(0, 1), (1, 2), (2, 0)]


def test_images_out_of_noise_are_not_paired_by_their_running_numbers(image_set) -> None:
    numbers = ["00000", "00001", "00002"]
    labels = image_set("labels", VOXELS, subjects=numbers)
    predictions = image_set("made", VOXELS, subjects=numbers, conditions=[{"Seed": "1"}] * 3)
    assert match_pairs(predictions, labels, None) is None
    assert match_pairs(predictions, labels, True) == [(0, 0), (1, 1), (2, 2)]


def test_another_tools_folder_is_paired_where_all_names_match(image_set, labels) -> None:
    files = ["00002.nii.gz", "00000.nii.gz", "00001.nii.gz"]
    predictions = image_set("made", VOXELS, files=files)
    assert match_pairs(predictions, labels, None) == [(0, 2), (1, 0), (2, 1)]
    files[0] = "other.nii.gz"
    assert match_pairs(image_set("unlike", VOXELS, files=files), labels, None) is None


def test_several_images_of_a_subject_are_paired_by_file_name(image_set) -> None:
    labels = image_set("labels", VOXELS, subjects=["a", "a", "b"])
    predictions = image_set(
        "predictions", VOXELS, subjects=["b", "a", "a"],
        conditions=[{"Source": f"/mnt/data/0000{i}.png"} for i in (2, 0, 1)],
    )  # fmt: skip
    assert match_pairs(predictions, labels, None) == [(0, 2), (1, 0), (2, 1)]


def test_row_numbers_are_no_subjects(image_set) -> None:
    """Two CSVs without SubjectID that are sorted differently."""
    numbers = [f"row-{i + 2}" for i in range(3)]
    labels = image_set("labels", VOXELS, subjects=numbers, files=["c.png", "a.png", "b.png"])
    predictions = image_set(
        "made", VOXELS, subjects=numbers, files=["00002-row-2.png", "00003-row-3.png", "x.png"],
        conditions=[{"Source": f"/in/{name}.png"} for name in "abc"],
    )  # fmt: skip
    assert match_pairs(predictions, labels, None) == [(0, 1), (1, 2), (2, 0)]


def test_all_that_is_missing_extra_or_ambiguous_is_named_at_once(image_set) -> None:
    labels = image_set("labels", np.zeros((4, 1, 4, 4)), subjects=["a", "b", "c", "d"])
    predictions = image_set(
        "made", np.zeros((4, 1, 4, 4)), subjects=["a", "b", "b", "stranger"],
        conditions=[{"Source": f"/in/{name}.png"} for name in ("p", "q", "r", "s")],
    )  # fmt: skip
    with pytest.raises(ManifestError, match="do not match") as raised:
        match_pairs(predictions, labels, None)
    text = str(raised.value)
    assert "by SubjectID" in text
    assert "made/00003.png has no label" in text
    assert "labels/00002.png has no prediction" in text
    assert "labels/00003.png has no prediction" in text
    assert "labels/00001.png fits 2 predictions" in text
    assert "made/00002.png" in text


def test_wanted_pairs_that_are_none_are_refused(image_set, labels) -> None:
    predictions = image_set("made", VOXELS, files=["x.png", "y.png", "z.png"])
    with pytest.raises(ManifestError, match="3 predictions and 3 labels do not match"):
        match_pairs(predictions, labels, True)


def test_what_infer_writes_is_paired(cli, first_stage, phantoms, tmp_path) -> None:
    """A real reconstruction finds its originals; the labels are shuffled in between."""
    run = first_stage("autoencoder_kl")
    assert cli("infer", "-m", run, "-d", phantoms, "-o", tmp_path / "made")[0] == 0
    lines = (phantoms / "manifest.csv").read_text().splitlines()
    (phantoms / "shuffled.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    work = tmp_path / "work"
    work.mkdir()
    paths = {"predictions": tmp_path / "made", "labels": phantoms / "shuffled.csv"}
    manifests = {name: read_manifest(path) for name, path in paths.items()}
    sets, faults = open_sets(manifests, DataConfig(), work)
    assert not faults
    predictions, labels = sets["predictions"], sets["labels"]
    pairs = match_pairs(predictions, labels, None)
    assert pairs == [(i, 11 - i) for i in range(12)]
    section = compare_pairs(predictions, labels, pairs)
    for case in section.cases:
        assert case["subject"] in str(case["prediction"])
    assert section.facts["data_range_is"] == "pictures of 8 bits"


def scene(shape: tuple[int, ...], number: int = 4, seed: int = 0) -> np.ndarray:
    """Smooth random images (number, *shape) in 0 to 255, whole numbers."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 215, (number, shape[0], *[max(2, n // 8) for n in shape[1:]]))
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), shape[1:], mode="bilinear" if len(shape) == 3 else "trilinear"
    ).numpy()
    return np.rint(fine.clip(0, 255)).astype(np.float32)


def worse(images: np.ndarray, level: float = 12.0, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, level, images.shape)
    return np.rint((images * 0.9 + noise + 8).clip(0, 255)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 48, 40), (3, 33, 47), (1, 24, 20, 22), (2, 16, 18, 17)])
def test_agrees_with_scikit_image_case_by_case(image_set, shape) -> None:
    y = scene(shape)
    x = worse(y)
    raster = len(shape) == 3
    section = compare_pairs(
        image_set("predictions", x, raster=raster), image_set("labels", y, raster=raster),
        [(i, i) for i in range(4)],
    )  # fmt: skip
    ranges = section.facts["data_range"]
    if raster:
        assert ranges == [[0.0, 255.0]] * shape[0]
    for i, case in enumerate(section.cases):
        # each channel in its own range; then 0 to 1
        width = np.array([b - a for a, b in ranges]).reshape(-1, *[1] * (len(shape) - 1))
        a, b = x[i].astype(float) / width, y[i].astype(float) / width
        assert case["psnr_db"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1))
        expected = structural_similarity(
            b, a, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert case["ssim"] == pytest.approx(expected, abs=1e-6)
        assert case["mae"] == pytest.approx(np.abs(x[i] - y[i]).mean(), rel=1e-6)
        pearson = [np.corrcoef(p.ravel(), q.ravel())[0, 1] for p, q in zip(x[i], y[i], strict=True)]
        assert case["ncc"] == pytest.approx(np.mean(pearson), abs=1e-9)
    overall = section.measures["ssim"]
    assert overall.value == pytest.approx(np.mean([case["ssim"] for case in section.cases]))
    assert overall.low <= overall.value <= overall.high
    assert overall.real_baseline < overall.low  # other images are less alike


@pytest.mark.parametrize(("shape", "scales"), [((1, 48, 50), 3), ((2, 177, 180), 5)])
def test_ms_ssim_agrees_with_monai(shape, scales) -> None:
    y = scene(shape, 2) / 255
    x = worse(y * 255) / 255
    assert similarity.num_scales(shape[1:]) == scales
    _, ours = similarity.structural_similarity(x.astype(float), y.astype(float), scales)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    weights = tuple((weights / weights.sum()).tolist())
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, weights=weights)
    monai = metric(torch.from_numpy(x), torch.from_numpy(y))[:, 0]
    np.testing.assert_allclose(ours, monai.numpy(), atol=1e-5)


def test_ms_ssim_agrees_with_torchmetrics() -> None:
    y = scene((1, 192, 208), 2) / 255
    x = worse(y * 255) / 255
    _, ours = similarity.structural_similarity(x.astype(float), y.astype(float), 5)
    theirs = multiscale_structural_similarity_index_measure(
        torch.from_numpy(x), torch.from_numpy(y), data_range=1.0, reduction="none"
    )
    # which reflects the borders at the coarsest scale, where the others leave them out
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-4)


def test_ms_ssim_of_volumes_agrees_with_monai() -> None:
    y = scene((1, 24, 24, 26), 2) / 255
    x = worse(y * 255) / 255
    _, ours = similarity.structural_similarity(x.astype(float), y.astype(float), 2)
    weights = (0.0448 / 0.3304, 0.2856 / 0.3304)
    metric = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, weights=weights)
    monai = metric(torch.from_numpy(x), torch.from_numpy(y))[:, 0]
    np.testing.assert_allclose(ours, monai.numpy(), atol=1e-4)


def test_negative_intensities_are_counted_from_the_lowest(image_set) -> None:
    """Hounsfield units: around 0 the luminance term would be negative."""
    y = scene((1, 32, 32)) * 8 - 1000
    x = y + 40
    labels, predictions = (
        image_set("labels", y, raster=False),
        image_set("predictions", x, raster=False),
    )
    section = compare_pairs(predictions, labels, [(i, i) for i in range(4)])
    (low, high), base = section.facts["data_range"][0], y.min()
    assert (low, high) == (y.min(), y.max())
    expected = structural_similarity(
        y[0, 0] - base, x[0, 0] - base, data_range=high - low, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert section.cases[0]["ssim"] == pytest.approx(expected, abs=1e-4)
    assert section.cases[0]["mae"] == pytest.approx(40, abs=1e-3)


def test_a_high_mean_does_not_swallow_the_variance() -> None:
    """At 100,000 with a range of about 10, float32 squares differ by hundreds."""
    y = scene((1, 32, 32)).astype(np.float64) / 25
    x = worse(y.astype(np.float32) * 25).astype(np.float64) / 25
    plain, _ = similarity.structural_similarity(x / 10, y / 10, 1)
    # far from 0 the luminance term is 1, so that nothing but contrast and structure is left
    high, _ = similarity.structural_similarity((x + 1e5) / 10, (y + 1e5) / 10, 1)
    theirs = structural_similarity(
        y[0, 0] + 1e5, x[0, 0] + 1e5, data_range=10, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert high[0] == pytest.approx(theirs, abs=1e-4)
    assert high[0] >= plain[0]


def test_identical_pairs_have_no_psnr_but_a_reason(image_set) -> None:
    y = scene((1, 16, 16))
    x = y.copy()
    x[0] = worse(y)[0]
    labels, predictions = image_set("labels", y), image_set("predictions", x)
    section = compare_pairs(predictions, labels, [(i, i) for i in range(4)])
    plain = section.plain()["psnr_db"]
    assert plain["value"] == pytest.approx(section.cases[0]["psnr_db"], rel=1e-5)
    assert plain["count"] == 1
    assert "3 of 4 pairs are identical" in plain["reason"]
    assert section.cases[1]["psnr_db"] is None
    assert "infinite" in section.cases[1]["reason"]
    alone = compare_pairs(image_set("copies", y), labels, [(i, i) for i in range(4)]).plain()
    assert alone["psnr_db"]["value"] is None
    assert alone["ssim"]["value"] == 1


def test_constant_and_small_images(image_set) -> None:
    y = scene((1, 8, 8))
    x = np.full_like(y, 100)
    section = compare_pairs(
        image_set("predictions", x), image_set("labels", y), [(i, i) for i in range(4)]
    ).plain()
    assert section["ncc"]["value"] is None
    assert "constant channel" in section["ncc"]["reason"]
    assert section["ssim"]["value"] is None
    assert "fewer than 11 voxels" in section["ssim"]["reason"]
    assert section["mae"]["value"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)


def test_pictures_show_label_prediction_and_difference(image_set) -> None:
    y = scene((1, 16, 20, 12))
    labels = image_set("labels", y, raster=False)
    predictions = image_set("predictions", worse(y), raster=False)
    (picture,) = compare_pairs(predictions, labels, [(i, i) for i in range(4)]).pictures
    assert [len(row) for row in picture.rows] == [3] * 6
    # planes of 16 x 20, 16 x 12 and 20 x 12 voxels (width x height), of one height, side by side
    assert picture.rows[0][0].shape == (20, 16 + round(16 * 20 / 12) + round(20 * 20 / 12))
    for row in picture.rows:
        for image in row:
            assert image.ndim == 2
            assert 0 <= image.min() <= image.max() <= 1


def test_a_channel_that_never_changes_takes_the_range_of_the_others(image_set) -> None:
    y = scene((2, 16, 16)) * 10
    y[:, 1] = 7
    x = y + 3
    section = compare_pairs(
        image_set("predictions", x, raster=False), image_set("labels", y, raster=False),
        [(i, i) for i in range(4)],
    )  # fmt: skip
    assert section.facts["data_range"][1] == [min(7, y.min()), y.max()]
    assert 0 < section.measures["psnr_db"].value < 100
