"""One HTML page that holds all it shows: it opens offline, asks for nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthcube.evaluation.report import pictures, plots, tables
from synthcube.evaluation.report.markup import Markup, joined, tag
from synthcube.evaluation.report.words import FLOOR, RESEARCH_ONLY, notes_of, spoken
from synthcube.evaluation.results import Section

TITLE = "SynthCube evaluation"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Should a text get past the escaping, the browser still fetches and runs nothing."""
_READING = (
    FLOOR,
    "The farther a value is from such a floor, the more the images differ from real ones in what "
    "it measures. A value better than its floor does not make them better than real: copies and "
    "too little variety can do that. There is no mark of pass or fail here: what is good enough "
    "depends on what the images are for.",
    "The interval in brackets is the 95% confidence interval, where one was computed. The count "
    "is of images, pairs or cases on each side.",
    "Where there is no value, its reason stands below; it speaks neither for the images nor "
    "against them.",
    "Distances compare only with those from the same extractor (name and hash), preprocessing "
    "and counts, which stand at the end of this page.",
)


def page(header: dict[str, Any], sections: Sequence[Section]) -> str:
    """The whole page, the same for the same arguments.

    Args:
        header: plain values with which the evaluation can be done again; its `notes`, sentences
            on the images, stand below the summary.
    """
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", TITLE),
        tag("link", rel="icon", href="data:,"),  # browsers ask for one otherwise
        tag("style", style),
    )
    body = tag("body", tag("main", *_content(header, sections)))
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n{body}</html>\n'


def _content(header: dict[str, Any], sections: Sequence[Section]) -> list[Markup]:
    parts = [tag("h1", TITLE), tag("p", RESEARCH_ONLY, class_="notice"), tag("h2", "Summary")]
    parts.append(tables.summary(sections) if sections else tag("p", "Nothing was evaluated."))
    parts += [tag("p", each) for each in notes_of(header)]
    parts += [tag("h2", "How to read it"), tag("ul", *(tag("li", each) for each in _READING))]
    parts += [_section(each, tables.anchor(each, sections)) for each in sections]
    parts.append(tag("h2", "To do it again"))
    told = {name: each for name, each in header.items() if name != "notes"}
    parts.append(tables.facts(told, "What was evaluated, and how", exact=True))
    return parts


def _section(section: Section, anchor: str) -> Markup:
    parts = [tag("h2", spoken(section.name), id=anchor)]
    parts += [tag("p", each) for each in section.notes]
    if section.facts:
        parts += [tag("h3", "Settings and facts"), tables.facts(section.facts, "Facts")]
    if section.plots:
        drawn = [plots.figure(each) for each in section.plots]
        parts += [tag("h3", "Plots"), tag("div", *drawn, class_="plots")]
    if section.pictures:
        parts += [tag("h3", "Pictures"), *(pictures.figure(each) for each in section.pictures)]
    if section.cases:
        parts += [tag("h3", "Cases"), tables.cases(section)]
    if len(parts) == 1:
        parts.append(tag("p", "All it holds is in the summary."))
    return tag("section", joined(*parts), aria_labelledby=anchor)
