"""An audit of a private training by canaries: images of nobody, of which half are trained on.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023): who knows
the trained model guesses which canaries were in. Many right guesses disprove a small epsilon. Few
prove nothing: the result is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import binom

from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.environment import derived_seed
from synthcube.errors import EvaluationError
from synthcube.evaluation.intervals import auc
from synthcube.evaluation.membership import model_scores
from synthcube.models.artifact import Artifact

INCLUDED, LEFT_OUT = "included.csv", "left_out.csv"
_CONFIDENCE = 0.95
_LARGEST = 50.0


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found: no epsilon below `epsilon` holds, with a confidence of 95%.

    Args:
        area: probability that the model knows a canary of the training better than another, the
            area under the ROC curve; 0.5 by chance.
        canaries: how many there were.
    """

    epsilon: float
    area: float
    canaries: int


def write_canaries(folder: Path, number: int, size: Sequence[int], seed: int) -> tuple[Path, Path]:
    """Write pictures of random pixels, and the list of those to train on and of the others.

    Each is a subject of its own, and a coin decides whether it is trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(derived_seed(seed, "canaries"))
    rows: dict[str, list[dict[str, str]]] = {INCLUDED: [], LEFT_OUT: []}
    for place, is_in in enumerate(rng.integers(0, 2, number)):
        name = f"canary-{place:04d}"
        pixels = (255 * rng.integers(0, 2, tuple(size))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        row = {"SubjectID": name, "Channel_0": f"{name}.png"}
        rows[INCLUDED if is_in else LEFT_OUT].append(row)
    for name, listed in rows.items():
        write_manifest(folder / name, listed)
    return folder / INCLUDED, folder / LEFT_OUT


def audit(
    trained: Artifact, included: Path, left_out: Path, *,
    delta: float, seed: int = 0, cache: Path | None = None,
) -> Audit:  # fmt: skip
    """Audit a model by the canaries that it was trained on and those that were left out.

    Raises EvaluationError for a family that has no loss of single images.
    """
    manifests = read_manifest(included), read_manifest(left_out)
    rows = tuple(np.arange(len(manifest.rows)) for manifest in manifests)
    scores = model_scores(trained, manifests, (rows[0], rows[1]), seed, cache, torch.device("cpu"))
    if isinstance(scores, str):
        raise EvaluationError(f"These canaries cannot audit the model: {scores}")
    known, unknown = scores[1]
    count = len(known) + len(unknown)
    is_in = np.repeat([True, False], [len(known), len(unknown)])
    order = np.argsort(np.concatenate([known, unknown]), kind="stable")
    guesses = count // 4  # of each side; the others are not guessed
    right = int((~is_in[order[:guesses]]).sum() + is_in[order[-guesses:]].sum())
    epsilon = audited_epsilon(count, 2 * guesses, right, delta)
    return Audit(epsilon, auc(known, unknown), count)


def audited_epsilon(canaries: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon that so many right guesses disprove; 0 if none.

    Args:
        guesses: how many of the canaries were guessed, chosen in advance.
    """

    def is_disproved(epsilon: float) -> bool:
        return _probability(canaries, guesses, right, epsilon, delta) < 1 - _CONFIDENCE

    low, high = 0.0, _LARGEST
    if not is_disproved(low):
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if is_disproved(middle) else (low, middle)
    return low


def _probability(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """A bound of the probability of so many right guesses, or more, under that promise.

    Theorem 5.2 of the paper: a guess is right with probability e^epsilon / (1 + e^epsilon) at most,
    except for what delta allows.
    """
    share = 1 / (1 + math.exp(-epsilon))
    allowed = 0.0
    below = 0.0  # probability of less than `right`, by fewer than i
    for i in range(1, right + 1):
        below += float(binom.pmf(right - i, guesses, share))
        allowed = max(allowed, below / i)
    tail = float(binom.sf(right - 1, guesses, share))
    return min(1.0, tail + 2 * canaries * delta * allowed)
