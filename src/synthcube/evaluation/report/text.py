"""Numbers and names as people read them."""

from __future__ import annotations

import json
import math
from typing import Any

from synthcube.escapes import printable
from synthcube.evaluation.measures import ARROWS, SECTIONS, meaning
from synthcube.evaluation.results import Cell, Measure

NONE = "none"
_LONGEST_LIST = 20
_DIGITS = 4
_ACRONYMS = {
    word.lower(): word
    for word in (
        "AUC", "dB", "FPR", "MAE", "MS", "NCC", "PSNR", "ROC", "SSIM", "TPR", "TRTR", "TSTR",
    )
}  # fmt: skip


def cell_text(value: Any, *, exact: bool = False) -> str:
    """The text of a plain value; a number is rounded for people unless `exact`."""
    if value is None or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if any(isinstance(entry, (list, dict)) for entry in value):
            return json.dumps(value, ensure_ascii=False)
        more = f", ... ({len(value)} in all)" if len(value) > _LONGEST_LIST else ""
        text = ", ".join(cell_text(entry, exact=exact) for entry in value[:_LONGEST_LIST]) + more
        return f"[{text}]" if exact else text
    return number(value) if isinstance(value, float) and not exact else str(value)


def spoken(name: str) -> str:
    """`tpr_at_1_percent_fpr` as "TPR at 1 percent FPR"."""
    words = [_ACRONYMS.get(word, word) for word in printable(name).split("_")]
    words[:1] = ["number of"] if words[0] == "num" else words[:1]
    text = " ".join(words).replace("MS SSIM", "MS-SSIM").replace(" dB", " (dB)")
    return text[:1].upper() + text[1:]


def section_title(name: str) -> str:
    """What a section is called; its written-out name where it is not known."""
    return SECTIONS.get(name) or spoken(name)


def measure_label(name: str, section: str) -> str:
    """What a measure of a section is called; its written-out name where it is not known."""
    known = meaning(section, name)
    return printable(known.label) if known else spoken(name)


def better(name: str, section: str) -> str:
    """An arrow and a word: which direction is better; empty of an unknown measure."""
    known = meaning(section, name)
    return ARROWS[known.better] if known else ""


def number(value: Cell) -> str:
    """Four significant digits, all digits of a whole number below a million; "none" for NaN."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    size = math.floor(math.log10(abs(value)))
    if not -6 <= size <= 8:
        return f"{value:.{_DIGITS}g}"
    text = f"{value:,.{max(0, _DIGITS - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def value_text(measure: Measure) -> str:
    """The value and its interval: "0.512 (0.48 to 0.544)"."""
    fields = measure.plain()
    value, low, high = (number(fields.get(name)) for name in ("value", "low", "high"))
    return value if NONE in (value, low, high) else f"{value} ({low} to {high})"


def remark(measure: Measure) -> str:
    """Why there is no value, or why it should be read with care; empty where neither is so."""
    fields = measure.plain()
    if fields["value"] is None:
        return f"No value: {fields.get('reason') or 'no reason was given'}"
    return f"Read with care: {fields['reason']}" if "reason" in fields else ""
