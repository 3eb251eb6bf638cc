"""Whether predictions, or the model, tell who was among the training data.

Membership inference: Shokri et al. (IEEE S&P 2017); from samples alone as in GAN-Leaks (Chen et
al., CCS 2020), from the loss as in Yeom et al. (CSF 2018) and, for diffusion, Carlini et al.,
"Extracting Training Data from Diffusion Models" (USENIX Security 2023), who ask for the rate of
true positives at few false ones (Carlini et al., IEEE S&P 2022).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube import runtime
from synthcube.artifact import Artifact
from synthcube.errors import SynthCubeError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.copies.lookalikes import most_alike
from synthcube.evaluation.copies.model_scores import ModelScores, model_scores
from synthcube.evaluation.copies.overlap import overlap
from synthcube.evaluation.copies.views import views
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.intervals import auc, auc_interval, share_interval
from synthcube.evaluation.results import Measure, Plot, Section, missing

log = logging.getLogger("synthcube")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEWEST = 8
_FEWEST_FOR_TPR = 100
_FALSE_POSITIVES = 0.01
_MOST_ASKED = 200
"""Images of each side that a model is asked about, at most: each takes several of its passes."""
_ATTACKS = {"samples": "nearness to the predictions", "model": "how well the model knows it"}


def membership(
    predictions: ImageSet,
    labels: ImageSet,
    train_data: ImageSet,
    config: EvaluationConfig,
    seed: int,
    trained: Artifact | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> Section:
    """How well training images are told from held-out ones, which 0.5 and 0.01 are chance for.

    From the predictions: an image is the more likely a training image, the more it looks like
    its nearest prediction. From the model, where it is given and has a loss of single images:
    the lower its loss, or its error of reconstruction, over fixed draws of noise.

    As many training images as held-out ones are taken, at random.

    Args:
        trained: the model that made the predictions.
        cache: folder of preprocessed images; the user's by default.
        device: that the model is asked on; the CPU by default.
    """
    section = Section("membership")
    members, others = _drawn(train_data, labels, seed)
    section.facts = {
        "num_training_images": len(members), "num_held_out": len(others),
        "false_positive_rate": _FALSE_POSITIVES,
    }  # fmt: skip
    section.notes = [
        "The floor is chance. These two attacks are simple ones: where they fail, a better one may "
        "succeed, so that chance here is no proof that no patient can be recognised."
    ]
    if void := _void(labels, train_data):
        for attack in _ATTACKS:
            _leave_out(section, attack, void)
        return section
    owners = train_data.subjects(), labels.subjects()
    near = _nearness(predictions, train_data, labels, members, others)
    _add(section, "samples", near, (owners[0][members], owners[1][others]))
    asked = tuple(_some(each, seed) for each in (members, others))
    known = _known((train_data, labels), (asked[0], asked[1]), seed, trained, cache, device)
    if isinstance(known, str):
        _leave_out(section, "model", known)
    else:
        _add(section, "model", known.scores, (owners[0][asked[0]], owners[1][asked[1]]))
        section.facts |= {"model_score": known.what, "num_asked": len(asked[0])}
    return section


def _void(labels: ImageSet, train_data: ImageSet) -> str:
    if shared := overlap(labels, train_data):
        return f"the labels are not held out: {shared.told()}"
    if min(len(labels), len(train_data)) < FEWEST:
        return f"at least {FEWEST} training and {FEWEST} held-out images are needed"
    return ""


def _drawn(train_data: ImageSet, labels: ImageSet, seed: int) -> tuple[Ints, Ints]:
    """Places of as many training as held-out images, in their order."""
    count = min(len(train_data), len(labels))
    drawn = []
    for each in (train_data, labels):
        rng = np.random.default_rng(runtime.derived_seed(seed, "membership", each.name))
        drawn.append(np.sort(rng.permutation(len(each))[:count]))
    return drawn[0], drawn[1]


def _nearness(
    predictions: ImageSet, train_data: ImageSet, labels: ImageSet, members: Ints, others: Ints
) -> tuple[Floats, Floats]:
    with views(predictions, train_data, labels) as (p, t, held_out):
        found = [
            most_alike(each.taken(rows), p, flips=False).similarity.astype(np.float64)
            for each, rows in ((t, members), (held_out, others))
        ]
    return found[0], found[1]


def _some(rows: Ints, seed: int) -> Ints:
    rng = np.random.default_rng(runtime.derived_seed(seed, "asked"))
    return np.sort(rng.permutation(rows)[:_MOST_ASKED])


def _known(
    sets: tuple[ImageSet, ImageSet],
    rows: tuple[Ints, Ints],
    seed: int,
    trained: Artifact | None,
    cache: Path | None,
    device: torch.device | None,
) -> ModelScores | str:
    """Scores, or why there are none."""
    if trained is None:
        return "the model was not given"
    try:
        manifests = sets[0].manifest, sets[1].manifest
        return model_scores(trained, manifests, rows, seed, cache, device)
    except SynthCubeError as error:
        log.warning("The model cannot be asked who was trained on: %s", error)
        return "the model cannot be asked about these images; the log says why"


def _leave_out(section: Section, attack: str, reason: str) -> None:
    section.measures |= {f"auc_{attack}": missing(reason), f"tpr_{attack}": missing(reason)}


def _add(
    section: Section, attack: str, scores: tuple[Floats, Floats], subjects: tuple[Ints, Ints]
) -> None:
    positive, negative = scores
    low, high = auc_interval(positive, negative, subjects)
    area = auc(positive, negative)
    section.measures[f"auc_{attack}"] = Measure(area, 0.5, low, high, len(positive))
    section.measures[f"tpr_{attack}"] = _true_positives(positive, negative)
    section.plots.append(
        Plot(
            f"Membership by {_ATTACKS[attack]}", "histogram",
            {"training images": positive.tolist(), "held-out images": negative.tolist()},
            "score", "images",
        )
    )  # fmt: skip
    verdict = "no better than by chance" if low <= 0.5 <= high else "better than by chance"
    if high < 0.5:
        verdict = "worse than by chance: the two sets differ in something else"
    section.notes.append(f"By {_ATTACKS[attack]} training images are recognised {verdict}.")


def _true_positives(positive: Floats, negative: Floats) -> Measure:
    """At a threshold that at most 1% of the held-out images are above."""
    if len(negative) < _FEWEST_FOR_TPR:
        return missing(
            f"{len(negative)} held-out images: at least {_FEWEST_FOR_TPR} are needed for a false "
            f"positive rate of {_FALSE_POSITIVES:g}"
        )
    allowed = math.floor(_FALSE_POSITIVES * len(negative))
    threshold = np.sort(negative)[::-1][allowed]  # `allowed` of them are above, ties aside
    hits = int((positive > threshold).sum())
    low, high = share_interval(hits, len(positive))
    return Measure(hits / len(positive), _FALSE_POSITIVES, low, high, len(positive))
