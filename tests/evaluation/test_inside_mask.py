"""SSIM, PSNR and MSE inside a mask, against torchmetrics and numbers known by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from synthcube import reading
from synthcube.data.manifest import read_manifest
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import EvaluationError
from synthcube.evaluation.inside_mask import MEASURES, _scores, add_inside_mask
from synthcube.evaluation.pairs import compare_pairs, match_pairs
from synthcube.evaluation.sets import open_sets


@pytest.mark.parametrize("size", [(32, 28, 20), (40, 36)])
@pytest.mark.parametrize("place", ["middle", "border"])
def test_they_are_those_of_torchmetrics(size: tuple[int, ...], place: str) -> None:
    rng = np.random.default_rng(0)
    label = gaussian_filter(rng.normal(0, 400, size), 2) + 500
    prediction = label + gaussian_filter(rng.normal(0, 90, size), 1)
    mask = np.zeros(size, bool)
    mask[tuple(slice(0, 8) if place == "border" else slice(8, 17) for _ in size)] = True
    low, high = np.percentile(np.where(mask, 0, label), (0.5, 99.5))
    low = max(low, 0)
    x, y = ((image.clip(low, high) - low) / (high - low) for image in (prediction, label))
    ssim, psnr, mse = _scores(prediction[None], label[None], mask)
    assert mse == pytest.approx(((x - y)[mask] ** 2).mean(), rel=1e-9)
    inside = [torch.from_numpy(image[mask]) for image in (x, y)]
    assert psnr == pytest.approx(float(peak_signal_noise_ratio(*inside, data_range=1.0)), rel=1e-5)
    # (1, X, Y, Z): sagittal slices are its channels; of a picture, (1, 1, X, Y)
    lead = (None,) * (4 - len(size))
    both = [torch.from_numpy(image * mask)[lead] for image in (x, y)]
    _, full = structural_similarity_index_measure(*both, return_full_image=True)
    assert ssim == pytest.approx(float(full[torch.from_numpy(mask)[lead]].mean()), rel=1e-5)


def test_numbers_known_by_hand() -> None:
    label = np.zeros((1, 20, 20, 20))
    label[:, :10] = 1000  # so that 0 and 1000 become 0 and 1
    mask = np.zeros((20, 20, 20), bool)
    mask[2:6, 5:9, 5:9] = True
    wrong = label.copy()
    wrong[:, mask] = 900
    ssim, psnr, mse = _scores(wrong, label, mask)
    assert mse == pytest.approx(0.01)
    assert psnr == pytest.approx(20)
    assert 0.9 < ssim < 1
    wrong[:, ~mask] = 7  # what is outside does not count
    assert _scores(wrong, label, mask) == pytest.approx((ssim, psnr, mse))
    assert _scores(label, label, mask) == (pytest.approx(1), np.inf, 0)
    assert np.isnan(_scores(wrong, label, np.zeros_like(mask))).all()
    wrong[:, mask] = 5000  # clipped at the highest intensity of the voided label
    assert _scores(wrong, label, mask)[2] == pytest.approx(0)


@pytest.fixture
def cases(brats: ModuleType, tmp_path: Path) -> Path:
    """A manifest.csv of the labels of four cases in data, and one of the predictions in made."""
    names = [f"BraTS-GLI-0000{i}-000" for i in range(4)]
    data = brats.inpainting_cases(tmp_path / "data", names, whole=True)
    brats.manifest(data, ("t1n-voided", "mask", "t1n"))
    rows = []
    for seed, name in enumerate(names):
        image, mask = brats.head(brats.SIZE, seed), brats.hole(brats.SIZE, seed)
        filled = np.where(mask, image + 40 * (seed + 1), image)
        path = brats.write(tmp_path / "made" / f"{name}-t1n-inference.nii.gz", filled)
        rows.append({"Channel_0": path.name, "SubjectID": name})
    with (tmp_path / "made" / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


KEYS = ["--set", "data={source_channels: [0, 1], channels: {1: {kind: mask}}}",
        "--set", "evaluation.extractor={name: radiomic}", "--set", "evaluation.num_repeats=2",
        "--set", "evaluation.usefulness=false"]  # fmt: skip


def test_evaluate_has_them_for_each_case_and_on_average(cli, cases: Path) -> None:
    words = ["evaluate", "-p", cases / "made", "-l", cases / "data", "-o", cases / "results.yaml",
             "--report", cases / "report", *KEYS]  # fmt: skip
    code, _, err = cli(*words, "--set", "evaluation.mask_channel=1")
    assert code == 0, err
    results = reading.read_yaml(cases / "results.yaml", EvaluationError)
    paired = results["paired"]
    assert {*MEASURES} <= paired.keys()
    with (cases / "report" / "cases.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row.get("mse_in_mask")]
    errors = [float(row["mse_in_mask"]) for row in table]
    assert len(errors) == 4
    assert errors == sorted(errors)
    # of an error of 40, where about 640 become 0 to 1
    assert errors[0] == pytest.approx((40 / 640) ** 2, rel=0.2)
    assert paired["mse_in_mask"]["value"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert paired["mse_in_mask"]["real_baseline"] > 0
    assert paired["psnr_db_in_mask"]["count"] == 4
    assert "inside the mask" in (cases / "report" / "report.html").read_text(encoding="utf-8")
    code, _, err = cli(*words, "--set", "evaluation.mask_channel=3")
    assert code == 2
    assert "evaluation.mask_channel is 3, and label " in err
    assert "has 3 channel(s), counted from 0." in err


def test_empty_masks_and_identical_images_are_left_out_and_told(
    cases: Path, brats: ModuleType, tmp_path: Path
) -> None:
    name = "BraTS-GLI-00001-000"
    brats.write(cases / "data" / name / f"{name}-mask.nii.gz", np.zeros(brats.SIZE), "u1")
    data = DataConfig.model_validate(
        {"source_channels": [0, 1], "channels": {"1": {"kind": "mask"}}}
    )
    manifests = {
        "predictions": read_manifest(cases / "made"),
        "labels": read_manifest(cases / "data"),
    }
    (tmp_path / "sets").mkdir()
    sets, faults = open_sets(manifests, data, tmp_path / "sets")
    assert faults == []
    both = sets["predictions"], sets["labels"]
    pairs = match_pairs(*both, None)
    assert pairs
    section = compare_pairs(*both, pairs)
    add_inside_mask(section, *both, pairs, data, 1, seed=0)
    assert section.measures["mse_in_mask"].count == 3
    assert section.measures["mse_in_mask"].reason == "1 of 4 masks are empty, they are left out"
    assert [case["mse_in_mask"] is None for case in section.cases] == [False, True, False, False]
    same = compare_pairs(both[1], both[1], [(i, i) for i in range(4)])
    add_inside_mask(same, both[1], both[1], [(i, i) for i in range(4)], data, 1, seed=0)
    assert same.measures["mse_in_mask"].value == 0
    assert same.measures["psnr_db_in_mask"].value is None
    assert same.measures["psnr_db_in_mask"].reason == "3 of 4 pairs are identical inside the mask"
