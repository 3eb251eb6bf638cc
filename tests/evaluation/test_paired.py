"""Pairs against scikit-image, MONAI and torchmetrics, and what happens at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from synthcube.evaluation import similarity
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.pairs.findings import compare

CONFIG = EvaluationConfig()


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
    section = compare(
        image_set("predictions", x, raster=raster), image_set("labels", y, raster=raster),
        [(i, i) for i in range(4)], CONFIG,
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
    assert overall.floor < overall.low  # other images are less alike


@pytest.mark.parametrize(("shape", "scales"), [((1, 48, 50), 3), ((2, 177, 180), 5)])
def test_ms_ssim_agrees_with_monai(shape, scales) -> None:
    y = scene(shape, 2) / 255
    x = worse(y * 255) / 255
    assert similarity.num_scales(shape[1:]) == scales
    _, ours = similarity.structural(x.astype(float), y.astype(float), scales)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    weights = tuple((weights / weights.sum()).tolist())
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, weights=weights)
    monai = metric(torch.from_numpy(x), torch.from_numpy(y))[:, 0]
    np.testing.assert_allclose(ours, monai.numpy(), atol=1e-5)


def test_ms_ssim_agrees_with_torchmetrics() -> None:
    y = scene((1, 192, 208), 2) / 255
    x = worse(y * 255) / 255
    _, ours = similarity.structural(x.astype(float), y.astype(float), 5)
    theirs = multiscale_structural_similarity_index_measure(
        torch.from_numpy(x), torch.from_numpy(y), data_range=1.0, reduction="none"
    )
    # which reflects the borders at the coarsest scale, where the others leave them out
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-4)


def test_ms_ssim_of_volumes_agrees_with_monai() -> None:
    y = scene((1, 24, 24, 26), 2) / 255
    x = worse(y * 255) / 255
    _, ours = similarity.structural(x.astype(float), y.astype(float), 2)
    weights = (0.0448 / 0.3304, 0.2856 / 0.3304)
    metric = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, weights=weights)
    monai = metric(torch.from_numpy(x), torch.from_numpy(y))[:, 0]
    np.testing.assert_allclose(ours, monai.numpy(), atol=1e-4)


def test_negative_intensities_are_counted_from_the_lowest(image_set) -> None:
    """Hounsfield units: around 0 the luminance term would be negative."""
    y = scene((1, 32, 32)) * 8 - 1000
    x = y + 40
    labels, made = image_set("labels", y, raster=False), image_set("predictions", x, raster=False)
    section = compare(made, labels, [(i, i) for i in range(4)], CONFIG)
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
    plain, _ = similarity.structural(x / 10, y / 10, 1)
    # far from 0 the luminance term is 1, so that nothing but contrast and structure is left
    high, _ = similarity.structural((x + 1e5) / 10, (y + 1e5) / 10, 1)
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
    labels, made = image_set("labels", y), image_set("predictions", x)
    section = compare(made, labels, [(i, i) for i in range(4)], CONFIG)
    plain = section.plain()["psnr_db"]
    assert plain["value"] == pytest.approx(section.cases[0]["psnr_db"], rel=1e-5)
    assert plain["count"] == 1
    assert "3 of 4 pairs are identical" in plain["reason"]
    assert section.cases[1]["psnr_db"] is None
    assert "infinite" in section.cases[1]["reason"]
    alone = compare(image_set("copies", y), labels, [(i, i) for i in range(4)], CONFIG).plain()
    assert alone["psnr_db"]["value"] is None
    assert alone["ssim"]["value"] == 1


def test_constant_and_small_images(image_set) -> None:
    y = scene((1, 8, 8))
    x = np.full_like(y, 100)
    section = compare(
        image_set("predictions", x), image_set("labels", y), [(i, i) for i in range(4)], CONFIG
    ).plain()
    assert section["ncc"]["value"] is None
    assert "constant channel" in section["ncc"]["reason"]
    assert section["ssim"]["value"] is None
    assert "fewer than 11 voxels" in section["ssim"]["reason"]
    assert section["mae"]["value"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)


def test_pictures_show_label_prediction_and_difference(image_set) -> None:
    y = scene((1, 16, 20, 12))
    labels = image_set("labels", y, raster=False)
    made = image_set("predictions", worse(y), raster=False)
    (picture,) = compare(made, labels, [(i, i) for i in range(4)], CONFIG).pictures
    assert [len(row) for row in picture.rows] == [3] * 6
    # slices of 20 by 12, 16 by 12 and 16 by 20 voxels (width by height), side by side
    assert picture.rows[0][0].shape == (20, 20 + 16 + 16)
    for row in picture.rows:
        for image in row:
            assert image.ndim == 2
            assert 0 <= image.min() <= image.max() <= 1


def test_a_channel_that_never_changes_takes_the_range_of_the_others(image_set) -> None:
    y = scene((2, 16, 16)) * 10
    y[:, 1] = 7
    x = y + 3
    section = compare(
        image_set("predictions", x, raster=False), image_set("labels", y, raster=False),
        [(i, i) for i in range(4)], CONFIG,
    )  # fmt: skip
    assert section.facts["data_range"][1] == [min(7, y.min()), y.max()]
    assert 0 < section.measures["psnr_db"].value < 100
