"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from synthcube.evaluation.results import Measure, Section

NONE = "none"
RESEARCH_ONLY = (
    "For research only: not a medical device, not for diagnosis. Nothing here shows that the "
    "people whose images a model was trained on are protected."
)
FLOOR = (
    "Unless its section says otherwise, the floor is the same measure between real images and "
    "other real images, at the same sample size. A value near its floor is as good as this number "
    "of images can show; that is no proof that the images are as good as real ones."
)

_DIGITS = 4
_ACRONYMS = {
    word.lower(): word
    for word in (
        "AUC", "dB", "FPR", "MAE", "MS", "NCC", "PSNR", "ROC", "SSIM", "TPR", "TRTR", "TSTR",
    )
}  # fmt: skip


def clean(text: str) -> str:
    """Without what a UTF-8 file or a page cannot hold or would not show: control characters,
    lone surrogates (of file names that are not UTF-8), marks that turn the direction of text."""
    return "".join(
        each if unicodedata.category(each) not in ("Cc", "Cf", "Cs") else _replaced(each)
        for each in str(text)
    )


def _replaced(character: str) -> str:
    return " " if character in "\n\r\t" else "\N{REPLACEMENT CHARACTER}"


def spoken(name: str) -> str:
    """`tpr_at_1_percent_fpr` as "TPR at 1 percent FPR"."""
    words = [_ACRONYMS.get(word, word) for word in clean(name).split("_")]
    words[:1] = ["number of"] if words[0] == "num" else words[:1]
    text = " ".join(words).replace("MS SSIM", "MS-SSIM").replace(" dB", " (dB)")
    return text[:1].upper() + text[1:]


def notes_of(header: Mapping[str, Any]) -> list[str]:
    """Sentences on the images as a whole."""
    return [str(each) for each in header.get("notes") or ()]


def floor_note(section: Section) -> str:
    """The section's own sentence on its floor, or nothing."""
    return next((each for each in section.notes if each.startswith("The floor")), "")


def number(value: float | None) -> str:
    """Four significant digits, of a whole number below a million all; "none" where not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    size = math.floor(math.log10(abs(value)))
    if not -6 <= size <= 8:
        return f"{value:.{_DIGITS}g}"
    text = f"{value:,.{max(0, _DIGITS - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def value_of(measure: Measure) -> str:
    """The value and its interval: "0.512 (0.48 to 0.544)"."""
    told = measure.plain()
    low, high = told.get("low"), told.get("high")
    if told["value"] is None or not isinstance(low, float) or not isinstance(high, float):
        return number_of(told, "value")
    return f"{number_of(told, 'value')} ({number(low)} to {number(high)})"


def number_of(told: dict[str, Any], name: str) -> str:
    """A number of a plain measure, or "none"."""
    return number(told.get(name))


def count_of(measure: Measure) -> str:
    """How many images, pairs or cases: "10,000"."""
    return NONE if measure.count is None else f"{measure.count:,}"


def remark_on(measure: Measure) -> str:
    """Why there is no value, or why it is to be read with care; else nothing."""
    told = measure.plain()
    if told["value"] is None:
        return f"No value: {clean(str(told.get('reason') or 'no reason was given'))}"
    return f"Read with care: {clean(str(told['reason']))}" if told.get("reason") else ""
