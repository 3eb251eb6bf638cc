"""Two sentences on an evaluation: what is good, and what is not.

Each rule looks at one question, and compares its measure with the measure's own real baseline.
A question without a number, or with one that says nothing, is listed as not judged. The rules say
nothing on privacy or on clinical use, because no measure here shows either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from synthcube.evaluation.measures import ARROWS, Meaning, meaning
from synthcube.evaluation.report.text import number
from synthcube.evaluation.results import Section
from synthcube.evaluation.usefulness import BARELY, TOO_EASY

Results = Mapping[str, Any]
"""results.yaml: sections by name, in each the measures by name."""

AS_FAR = 1.25
"""A Frechet distance of at most so many times its real baseline is as near as real images are."""
NEARLY = 0.9
"""Precision and coverage of at least this share of their real baseline are as good as real."""
ALIKE = 0.05
"""MS-SSIM farther from its real baseline than this is too little variety, or noise."""
SIZES_ALIKE = 0.1
"""A class of a mask whose mean size differs by up to this share is as large as in real masks."""
TEACHES_LESS = 0.05
"""Accuracy lost by training on generated images; up to this it is as good."""


_MAIN = (
    ("paired", "ssim"), ("paired", "psnr_db"), ("fidelity", "frechet_distance"),
    ("fidelity", "kernel_distance"), ("fidelity", "precision"), ("fidelity", "recall"),
    ("fidelity", "coverage"), ("diversity", "ms_ssim"), ("memorisation", "near_copies_pixels"),
    ("membership", "auc_model"), ("membership", "auc_samples"),
    ("usefulness", "accuracy_synthetic"),
)  # fmt: skip
"""The numbers that a terminal shows."""


_OF_MASKS = ("dice", "volume_channel", "area_channel")
"""How the names of those of masks begin, which end in a channel and a class."""


class Finding(NamedTuple):
    """The answer of one rule."""

    question: str
    good: bool | None  # None: not judged
    text: str = ""  # a clause with its numbers; why, where it was not judged


class Verdict(NamedTuple):
    """A headline of two sentences."""

    good: str
    not_good: str


def plain_results(sections: Sequence[Section]) -> dict[str, Any]:
    """The sections as results.yaml has them."""
    return {section.name: section.plain() for section in sections}


def verdict(results: Results) -> Verdict:
    """What is good and what is not, from the measures of an evaluation beside their baselines."""
    answers = findings(results)
    good = "; ".join(answer.text for answer in answers if answer.good)
    bad = "; ".join(answer.text for answer in answers if answer.good is False)
    unknown = "; ".join(answer.question for answer in answers if answer.good is None)
    not_judged = f" (not judged: {unknown})" if unknown else ""
    if not good:
        good = "nothing that was judged"
    if not bad:
        bad = "nothing that was judged, at this number of images"
    return Verdict(f"What is good about these images: {good}.", f"What is not: {bad}{not_judged}.")


def main_lines(results: Results) -> list[str]:
    """A table for a terminal: the main numbers with their real baselines, then the verdict."""
    rows = [("", "value (95% interval)", "real baseline", "better")]
    masks = results.get("masks") or {}
    of_masks = [("masks", name) for name in masks if name.startswith(_OF_MASKS)]
    for section, name in (*_MAIN, *of_masks):
        if measured := _measured(results, section, name):
            label, better = meaning(section, name) or Meaning(name, "")
            value = number(measured.value)
            if measured.low < measured.high:
                value += f" ({number(measured.low)} to {number(measured.high)})"
            value += " *" if measured.has_reason else ""
            short = label.partition(":")[0].replace("_", " ")
            rows.append((short, value, number(measured.baseline), ARROWS[better]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if any(value.endswith("*") for _, value, *_ in rows):
        lines.append("* read with care: the reason is in the results")
    return [*(lines if len(rows) > 1 else ["No main number could be computed."]), *verdict(results)]


def findings(results: Results) -> list[Finding]:
    """The answer of every rule, in the order of the report."""
    return [
        *([_pairs(results)] if "paired" in results else []),
        _nearness(results),
        _at_least(results, "precision", "realism", "single images look real"),
        _at_least(results, "coverage", "coverage", "they cover the kinds of real images"),
        _variety(results),
        *([_masks(results)] if "masks" in results else []),
        _copies(results),
        *_membership(results),
        _usefulness(results),
    ]


class _Number(NamedTuple):
    value: float
    baseline: float
    low: float
    high: float
    has_reason: bool

    @property
    def text(self) -> str:
        return f"{number(self.value)}, real baseline {number(self.baseline)}"


def _measured(results: Results, section: str, name: str) -> _Number | None:
    """The measure; None without a value. Without an interval it is its own interval."""
    measure = (results.get(section) or {}).get(name)
    if not isinstance(measure, Mapping) or measure.get("value") is None:
        return None
    value = float(measure["value"])
    baseline, low, high = (measure.get(key) for key in ("real_baseline", "low", "high"))
    return _Number(
        value,
        math.nan if baseline is None else float(baseline),
        value if low is None else float(low),
        value if high is None else float(high),
        "reason" in measure,
    )


def _pairs(results: Results) -> Finding:
    """Good where the interval of SSIM (or else PSNR) is above that of unrelated real images."""
    for name, label in (("ssim", "SSIM"), ("psnr_db", "PSNR")):
        measured = _measured(results, "paired", name)
        if measured and not math.isnan(measured.baseline):
            good = measured.low > measured.baseline
            text = "predictions are nearer to their own label than other real images are"
            if not good:
                text = "predictions are no nearer to their own label than other real images are"
            return Finding("pairs", good, f"{text} ({label} {measured.text})")
    return Finding("pairs", None)


def _nearness(results: Results) -> Finding:
    """Good where the kernel distance cannot be told from its baseline, or the Frechet distance is
    at most AS_FAR times its own and has enough rows."""
    kernel = _measured(results, "fidelity", "kernel_distance")
    frechet = _measured(results, "fidelity", "frechet_distance")
    if not kernel and not frechet:
        return Finding("nearness to real images", None)
    same = bool(kernel and kernel.low <= max(kernel.baseline, 0.0))
    reliable = bool(frechet and (not frechet.has_reason or not kernel))
    near = bool(frechet and reliable and frechet.value <= AS_FAR * frechet.baseline)
    shown = f"kernel distance {kernel.text}" if kernel else ""
    if frechet and (not kernel or (near and not same)):
        shown = f"Frechet distance {frechet.text}"
    text = "as a set, they are as near to real images as other real images are"
    if not same and not near:
        text = "as a set, they differ from real images"
    return Finding("nearness to real images", same or near, f"{text} ({shown})")


def _at_least(results: Results, name: str, question: str, text: str) -> Finding:
    """Good from NEARLY of the baseline on."""
    measured = _measured(results, "fidelity", name)
    if not measured or math.isnan(measured.baseline):
        return Finding(question, None)
    good = measured.value >= NEARLY * measured.baseline
    text = text if good else f"{text} less often than they should"
    if not good and name == "coverage":
        text = "they miss kinds of real images"
    return Finding(question, good, f"{text} ({name} {measured.text})")


def _variety(results: Results) -> Finding:
    """Good where random pairs are about as alike as real ones: not beyond chance, or by no more
    than ALIKE."""
    measured = _measured(results, "diversity", "ms_ssim")
    if not measured or math.isnan(measured.baseline):
        return Finding("variety", None)
    difference = measured.value - measured.baseline
    by_chance = measured.low <= measured.baseline <= measured.high
    good = by_chance or abs(difference) <= ALIKE
    text = "they are as varied as real images"
    if not good:
        text = "they vary in ways that real images do not, such as noise"
        text = "they are more alike than real images are" if difference > 0 else text
    return Finding("variety", good, f"{text} (MS-SSIM {measured.text})")


def _masks(results: Results) -> Finding:
    """Good where each class is about as large as in real masks: not beyond chance, or by no more
    than the share SIZES_ALIKE."""
    differing, judged = [], False
    for name in results["masks"]:
        measured = _measured(results, "masks", name)
        if not measured or not name.startswith(_OF_MASKS[1:]) or math.isnan(measured.baseline):
            continue
        judged = True
        by_chance = measured.low <= measured.baseline <= measured.high
        if not by_chance and abs(measured.value / (measured.baseline or 1) - 1) > SIZES_ALIKE:
            of = name.split("_", 1)[1].replace("_", " ")
            differing.append(f"{of}: {measured.text}")
    if not judged:
        return Finding("masks", None)
    if differing:
        return Finding("masks", False, f"masks have other sizes ({'; '.join(differing)})")
    return Finding("masks", True, "masks have the sizes of real ones")


def _copies(results: Results) -> Finding:
    """Not good with any exact copy, or where the interval of near-copies is above false alarms."""
    near = _measured(results, "memorisation", "near_copies_pixels")
    exact = _measured(results, "memorisation", "exact_copies")
    if exact and exact.value > 0:
        return Finding("copies", False, f"{exact.value:.1%} are exact copies of training images")
    if not near:
        return Finding("copies", None)
    if near.low > near.baseline:
        text = f"near-copies of training images were found ({near.text})"
        return Finding("copies", False, text)
    text = "no more near-copies of training images were found than among real ones"
    return Finding("copies", True, f"{text} ({near.text})")


def _membership(results: Results) -> list[Finding]:
    """Not good where an attack does better than by chance; nothing is good about one that fails,
    because a better one may succeed."""
    for name in ("auc_model", "auc_samples"):
        measured = _measured(results, "membership", name)
        if measured and measured.low > measured.baseline:
            text = f"training images can be recognised (AUC {number(measured.value)}, chance 0.5)"
            return [Finding("membership", False, text)]
    return []


def _usefulness(results: Results) -> Finding:
    """Not good where accuracy is lost by more than TEACHES_LESS, beyond chance; good otherwise,
    unless the task is too easy (TOO_EASY) or can hardly be learned (BARELY)."""
    real = _measured(results, "usefulness", "balanced_accuracy_real")
    lost = _measured(results, "usefulness", "accuracy_difference")
    if not real or not lost:
        return Finding("usefulness", None)
    if real.value < real.baseline + BARELY:
        return Finding("usefulness, whose task is too hard", None)
    synthetic = _measured(results, "usefulness", "accuracy_synthetic")
    shown = f" (accuracy {synthetic.text})" if synthetic else ""
    if lost.value < -TEACHES_LESS and lost.high < 0:
        return Finding("usefulness", False, f"they teach a classifier less than real ones{shown}")
    if real.value >= TOO_EASY:
        return Finding("usefulness, whose task is too easy", None)
    return Finding("usefulness", True, f"they teach a classifier as much as real ones{shown}")
