"""What each measure is called for people, and which direction is better."""

from __future__ import annotations

from typing import Literal, NamedTuple

Better = Literal["lower", "higher", "near", ""]
"""near: the closer to the real baseline. Empty: neither direction is better."""

ARROWS: dict[Better, str] = {"lower": "↓ lower", "higher": "↑ higher", "near": "≈ baseline", "": ""}


SECTIONS = {
    "fidelity": "Fidelity: how near to real images",
    "fidelity_by_class": "Fidelity of each class",
    "diversity": "Variety",
    "paired": "Pairs: each prediction beside its label",
    "masks": "Masks: the size of each class, and overlap",
    "memorisation": "Copies of training images",
    "membership": "Whether training images can be recognised",
    "usefulness": "Usefulness for training a classifier",
}


class Meaning(NamedTuple):
    """How a measure is shown."""

    label: str
    better: Better


_MEANINGS: dict[str, dict[str, Meaning]] = {
    "fidelity": {
        "frechet_distance": Meaning("Distance to real images (Frechet)", "lower"),
        "kernel_distance": Meaning("Distance to real images (kernel)", "lower"),
        "precision": Meaning("Precision: share of generated images that look real", "higher"),
        "recall": Meaning("Recall: share of real images that are within reach", "higher"),
        "density": Meaning("Density: how closely generated images lie to real ones", "near"),
        "coverage": Meaning("Coverage: share of real images with a generated one nearby", "higher"),
    },
    "fidelity_by_class": {
        "kernel_distance": Meaning("Distance (kernel)", "lower"),
        "precision": Meaning("Precision", "higher"),
        "coverage": Meaning("Coverage", "higher"),
    },
    "diversity": {"ms_ssim": Meaning("Likeness of two random images (MS-SSIM)", "near")},
    "paired": {
        "psnr_db": Meaning("PSNR (dB)", "higher"),
        "ssim": Meaning("SSIM", "higher"),
        "ms_ssim": Meaning("MS-SSIM", "higher"),
        "mae": Meaning("Mean absolute error (MAE)", "lower"),
        "ncc": Meaning("Correlation (NCC)", "higher"),
        "ssim_in_mask": Meaning("SSIM inside the mask", "higher"),
        "psnr_db_in_mask": Meaning("PSNR (dB) inside the mask", "higher"),
        "mse_in_mask": Meaning("Mean squared error (MSE) inside the mask", "lower"),
    },
    "masks": {
        "dice": Meaning("Overlap with the label (Dice)", "higher"),
        "volume": Meaning("Volume (ml), mean", "near"),
        "area": Meaning("Area (voxels), mean", "near"),
        "volume_distance": Meaning("Distance of volumes, share of the real mean", "lower"),
        "area_distance": Meaning("Distance of areas, share of the real mean", "lower"),
        "present": Meaning("Share of images that have the class", "near"),
    },
    "memorisation": {
        "distance": Meaning("Distance to the nearest training image, median", "near"),
        "nearer_than_labels": Meaning("Nearer to training images than real ones are", "lower"),
        "near_copies": Meaning("Near-copies of training images", "lower"),
        "beyond_chance": Meaning("Near-copies beyond chance", "lower"),
        "copied_share": Meaning("Share of training images with a near-copy", "lower"),
        "exact_copies": Meaning("Exact copies of training images", "lower"),
        "exact_duplicates": Meaning("Exact duplicates among generated images", "lower"),
        "near_duplicates": Meaning("Near-duplicates among generated images", "lower"),
    },
    "membership": {
        "auc": Meaning("Training images recognised, AUC", "lower"),
        "tpr": Meaning("Training images recognised at 1% false alarms", "lower"),
    },
    "usefulness": {
        "accuracy": Meaning("Classifier accuracy", "higher"),
        "balanced_accuracy": Meaning("Classifier balanced accuracy", "higher"),
        "auc": Meaning("Classifier AUC", "higher"),
        "accuracy_difference": Meaning("Accuracy: generated minus real training images", "higher"),
    },
}
_SUFFIXES = {
    "usefulness": {
        "synthetic": "trained on generated", "real": "trained on real",
    },
    "membership": {"samples": "from images", "model": "from model"},
    "memorisation": {"pixels": "in pixels", "features": "in features"},
}  # fmt: skip


def meaning(section: str, name: str) -> Meaning | None:
    """Label and better direction of a measure of results.yaml; None of an unknown one.

    What follows the known part of the name (a plane, a class, a space) stands in brackets.
    """
    known = _MEANINGS.get(section, {})
    begins = [key for key in known if name == key or name.startswith(f"{key}_")]
    if not begins:
        return None
    key = max(begins, key=len)
    label, better = known[key]
    suffix = name[len(key) + 1 :]
    suffix = _SUFFIXES.get(section, {}).get(suffix, suffix)
    return Meaning(f"{label} ({suffix})" if suffix else label, better)
