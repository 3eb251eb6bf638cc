"""Each rule on both sides of its threshold, and the sentences as people read them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from synthcube.evaluation import verdict as rules
from synthcube.evaluation.measures import SECTIONS, meaning
from synthcube.evaluation.results import Measure, Section, missing
from synthcube.evaluation.verdict import findings, main_lines, plain_results, verdict


def results(**sections: dict[str, Measure]) -> dict[str, Any]:
    return plain_results([Section(name, measures) for name, measures in sections.items()])


def answer(question: str, **sections: dict[str, Measure]) -> tuple[bool | None, str]:
    findings_of = [
        finding
        for finding in findings(results(**sections))
        if finding.question.startswith(question)
    ]
    assert len(findings_of) == 1
    return findings_of[0].good, findings_of[0].text


GOOD = {
    "fidelity": {
        "frechet_distance": Measure(9.5, 8.9, 9, 10),
        "kernel_distance": Measure(0.002, 0.001, -0.001, 0.005),
        "precision": Measure(0.9, 0.95), "recall": Measure(0.9, 0.95),
        "coverage": Measure(0.88, 0.95),
    },
    "diversity": {"ms_ssim": Measure(0.31, 0.3, 0.29, 0.33)},
    "memorisation": {
        "near_copies_pixels": Measure(0.01, 0.01, 0.0, 0.04), "exact_copies": Measure(0.0),
    },
    "membership": {"auc_samples": Measure(0.52, 0.5, 0.45, 0.59)},
    "usefulness": {
        "accuracy_synthetic": Measure(0.81, 0.82, 0.7, 0.9),
        "balanced_accuracy_real": Measure(0.82, 0.33),
        "accuracy_difference": Measure(-0.01, None, -0.05, 0.03),
    },
}  # fmt: skip
BAD = {
    "fidelity": {
        "frechet_distance": Measure(30.0, 8.9, 28, 32),
        "kernel_distance": Measure(0.2, 0.001, 0.15, 0.25),
        "precision": Measure(0.4, 0.95), "coverage": Measure(0.2, 0.95),
    },
    "diversity": {"ms_ssim": Measure(0.6, 0.3, 0.55, 0.65)},
    "memorisation": {"near_copies_pixels": Measure(0.5, 0.01, 0.4, 0.6)},
    "membership": {"auc_model": Measure(0.8, 0.5, 0.7, 0.9)},
    "usefulness": {
        "accuracy_synthetic": Measure(0.5, 0.82, 0.4, 0.6),
        "balanced_accuracy_real": Measure(0.82, 0.33),
        "accuracy_difference": Measure(-0.32, None, -0.4, -0.2),
    },
}  # fmt: skip


def test_good_images_have_nothing_in_the_second_sentence() -> None:
    good, not_good = verdict(results(**GOOD))
    assert good == (
        "What is good about these images: as a set, they are as near to real images "
        "as other real images are (kernel distance 0.002, real baseline 0.001); "
        "single images look real (precision 0.9, real baseline 0.95); "
        "they cover the kinds of real images (coverage 0.88, real baseline 0.95); "
        "they are as varied as real images (MS-SSIM 0.31, real baseline 0.3); "
        "no more near-copies of training images were found than among real ones "
        "(0.01, real baseline 0.01); "
        "they teach a classifier as much as real ones (accuracy 0.81, real baseline 0.82)."
    )
    assert not_good == "What is not: nothing that was judged, at this number of images."


def test_poor_images_have_nothing_in_the_first_sentence() -> None:
    good, not_good = verdict(results(**BAD))
    assert good == "What is good about these images: nothing that was judged."
    for text in (
        "as a set, they differ from real images (kernel distance 0.2, real baseline 0.001)",
        "single images look real less often than they should (precision 0.4",
        "they miss kinds of real images (coverage 0.2",
        "they are more alike than real images are (MS-SSIM 0.6",
        "near-copies of training images were found (0.5, real baseline 0.01)",
        "training images can be recognised (AUC 0.8, chance 0.5)",
        "they teach a classifier less than real ones (accuracy 0.5, real baseline 0.82)",
    ):
        assert text in not_good
    assert "not judged" not in not_good


@pytest.mark.parametrize("sections", [GOOD, BAD, {}])
def test_neither_privacy_nor_clinical_use_is_claimed(sections) -> None:
    text = " ".join(verdict(results(**sections)))
    assert not re.search(r"privat|privacy|safe|anonym|clinic|diagnos|patient", text, re.IGNORECASE)


def test_what_has_no_number_is_not_judged() -> None:
    none = {"memorisation": {"near_copies_pixels": missing("no training images")}}
    good, not_good = verdict(results(**none))
    assert good == "What is good about these images: nothing that was judged."
    assert not_good == (
        "What is not: nothing that was judged, at this number of images (not judged: nearness to "
        "real images; realism; coverage; variety; copies; usefulness)."
    )
    assert main_lines(results(**none))[0] == "No main number could be computed."


@pytest.mark.parametrize(
    ("kernel", "frechet", "good"),
    [
        (Measure(0.01, 0.001, 0.0005, 0.02), Measure(30, 8), True),  # within its interval
        (Measure(0.01, 0.001, 0.005, 0.02), Measure(8.9 * rules.AS_FAR, 8.9), True),
        (Measure(0.01, 0.001, 0.005, 0.02), Measure(8.9 * rules.AS_FAR + 0.01, 8.9), False),
        (Measure(0.01, 0.001, 0.005, 0.02), Measure(9, 8.9, reason="few rows"), False),
        (missing("3 subjects"), Measure(9, 8.9, reason="few rows"), True),
        (Measure(0.01, -0.02, -0.001, 0.02), Measure(30, 8), True),  # an estimate may be negative
        (missing("x"), missing("y"), None),
    ],
)
def test_nearness(kernel: Measure, frechet: Measure, good: bool | None) -> None:
    fidelity = {"kernel_distance": kernel, "frechet_distance": frechet}
    assert answer("nearness", fidelity=fidelity)[0] is good


@pytest.mark.parametrize(("value", "good"), [(0.81, True), (0.8, False), (1.0, True)])
@pytest.mark.parametrize(("name", "question"), [("precision", "realism"), ("coverage", "coverage")])
def test_shares_reach_nine_tenths_of_their_ceiling(name, question, value, good) -> None:
    assert answer(question, fidelity={name: Measure(value, 0.9)})[0] is good


@pytest.mark.parametrize(
    ("measure", "good", "text"),
    [
        (Measure(0.36, 0.3, 0.31, 0.41), False, "more alike"),
        (Measure(0.36, 0.3, 0.29, 0.43), True, "as varied"),  # by chance
        (Measure(0.34, 0.3, 0.33, 0.35), True, "as varied"),  # too little to matter
        (Measure(0.1, 0.3, 0.05, 0.15), False, "such as noise"),
    ],
)
def test_variety(measure: Measure, good: bool, text: str) -> None:
    finding = answer("variety", diversity={"ms_ssim": measure})
    assert (finding[0], text in finding[1]) == (good, True)


def test_one_exact_copy_is_not_good() -> None:
    measures = {**GOOD["memorisation"], "exact_copies": Measure(0.025)}
    good, text = answer("copies", memorisation=measures)
    assert (good, text) == (False, "2.5% are exact copies of training images")


@pytest.mark.parametrize(("low", "good"), [(0.011, False), (0.01, True)])
def test_near_copies_beyond_false_alarms(low: float, good: bool) -> None:
    near = {"near_copies_pixels": Measure(0.03, 0.01, low, 0.05)}
    assert answer("copies", memorisation=near)[0] is good


@pytest.mark.parametrize(
    ("real", "question", "good"),
    [
        (rules.TOO_EASY, "usefulness, whose task is too easy", None),
        (0.33 + rules.BARELY - 0.01, "usefulness, whose task is too hard", None),
        (0.9, "usefulness", True),
        (1.0, "usefulness", False),
    ],
)
def test_a_task_that_tells_nothing_is_not_judged(real, question, good) -> None:
    of = BAD if good is False else GOOD  # in an easy task a low accuracy still tells something
    measures = {**of["usefulness"], "balanced_accuracy_real": Measure(real, 0.33)}
    assert answer(question, usefulness=measures)[0] is good


@pytest.mark.parametrize(
    ("lost", "high", "good"), [(-0.06, -0.01, False), (-0.06, 0.01, True), (-0.04, -0.01, True)]
)
def test_accuracy_that_is_lost(lost: float, high: float, good: bool) -> None:
    measures = {**GOOD["usefulness"], "accuracy_difference": Measure(lost, None, -0.2, high)}
    assert answer("usefulness", usefulness=measures)[0] is good


@pytest.mark.parametrize(("low", "good"), [(0.6, True), (0.4, False)])
def test_pairs(low: float, good: bool) -> None:
    assert answer("pairs", paired={"ssim": Measure(0.7, 0.5, low, 0.8)})[0] is good


@pytest.mark.parametrize(
    ("volume", "good", "text"),
    [
        (Measure(4.9, 5.0, 4.5, 5.3), True, "masks have the sizes of real ones"),
        (Measure(5.4, 5.0, 5.3, 5.5), True, "masks have the sizes of real ones"),
        (
            Measure(9.0, 5.0, 8.0, 9.9), False,
            "masks have other sizes (channel 1 class 2: 9, real baseline 5)",
        ),
        (missing("none"), None, ""),
    ],
)  # fmt: skip
def test_masks_are_as_large_as_real_ones(volume: Measure, good: bool | None, text: str) -> None:
    finding = answer("masks", masks={"volume_channel_1_class_2": volume})
    assert finding == (good, text)


def test_the_terminal_shows_masks() -> None:
    of_masks = {
        "dice_channel_1_class_2": Measure(0.8, 0.3, 0.7, 0.9),
        "volume_channel_1_class_2": Measure(4.9, 5.0, 4.5, 5.3),
        "present_channel_1_class_2": Measure(1.0, 1.0),
    }
    lines = main_lines(results(masks=of_masks))
    assert lines[1].split("  ")[0] == "Overlap with the label (Dice) (channel 1 class 2)"
    assert sum("class 2)" in line for line in lines) == 2


def test_the_lines_of_a_terminal() -> None:
    lines = main_lines(results(**GOOD))
    assert [*map(str.strip, re.split(r"\s{2,}", lines[0].strip()))] == [
        "value (95% interval)", "real baseline", "better",
    ]  # fmt: skip
    assert [re.split(r"\s{2,}", line) for line in lines[1:4]] == [
        ["Distance to real images (Frechet)", "9.5 (9 to 10)", "8.9", "↓ lower"],
        ["Distance to real images (kernel)", "0.002 (-0.001 to 0.005)", "0.001", "↓ lower"],
        ["Precision", "0.9", "0.95", "↑ higher"],
    ]
    assert lines[-2:] == [*verdict(results(**GOOD))]
    assert max(map(len, lines[:-2])) <= 100
    careful = {"frechet_distance": Measure(9.5, 8.9, reason="few rows")}
    lines = main_lines(results(fidelity=careful))
    assert "9.5 *" in lines[1]
    assert lines[2] == "* read with care: the reason is in the results"


@pytest.mark.parametrize(
    ("section", "name", "label", "better"),
    [
        ("fidelity", "precision_xy", "Precision: share of generated images that look real (xy)",
         "higher"),
        ("fidelity_by_class", "coverage_Hand",
         "Coverage (Hand)", "higher"),
        ("diversity", "ms_ssim", "Likeness of two random images (MS-SSIM)", "near"),
        ("paired", "ms_ssim", "MS-SSIM", "higher"),
        ("membership", "auc_model", "Training images recognised, AUC (from model)", "lower"),
        ("usefulness", "accuracy_real", "Classifier accuracy (trained on real)",
         "higher"),
        ("usefulness", "accuracy_difference", "Accuracy: generated minus real training images",
         "higher"),
    ],
)  # fmt: skip
def test_measures_have_plain_labels(section: str, name: str, label: str, better: str) -> None:
    assert meaning(section, name) == (label, better)


@pytest.mark.parametrize(
    ("name", "title"),
    [("memorisation", "Copies of training images"), ("fidelity_by_class", "Fidelity of each class"),
     ("other", None)],
)  # fmt: skip
def test_sections_have_plain_titles(name: str, title: str | None) -> None:
    assert SECTIONS.get(name) == title


def test_an_unknown_measure_has_no_label() -> None:
    assert meaning("fidelity", "precisions") is None
    assert meaning("other", "precision") is None
