"""The page's tables: measures, facts, cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from synthcube.evaluation.report.markup import Markup, tag
from synthcube.evaluation.report.words import (
    NONE,
    count_of,
    floor_note,
    number,
    number_of,
    remark_on,
    spoken,
    value_of,
)
from synthcube.evaluation.results import Measure, Section, plain

MAX_CASES = 200
_LONGEST_LIST = 20
_HEADINGS = ("Measure", "Value (95% interval)", "Floor", "Count")


def summary(sections: Sequence[Section]) -> Markup:
    """Each measure of each section: value, interval, floor, count, and a remark below it."""
    parts = []
    for section in sections:
        link = tag("a", spoken(section.name), href=f"#{anchor(section, sections)}")
        group = tag("tr", tag("th", link, scope="rowgroup", colspan=len(_HEADINGS)))
        rows = [row for name, each in section.measures.items() for row in _measure(name, each)]
        none = _across("No measure", "remark")
        own = _across(floor_note(section), "remark") if floor_note(section) else Markup()
        parts.append(tag("tbody", group, own, *(rows or [none])))
    titles = [tag("th", each, scope="col") for each in _HEADINGS]
    head = tag("thead", tag("tr", *titles))
    caption = tag("caption", "Every measure beside its floor")
    return _scrolled(tag("table", caption, head, *parts, class_="summary"), "Measures")


def anchor(section: Section, sections: Sequence[Section]) -> str:
    """The id of a section's heading: its place, as names may hold anything."""
    return f"section-{[id(each) for each in sections].index(id(section)) + 1}"


def _measure(name: str, measure: Measure) -> list[Markup]:
    numbers = [value_of(measure), number_of(measure.plain(), "floor"), count_of(measure)]
    cells = [tag("td", each, class_="none" if each == NONE else "number") for each in numbers]
    remark = remark_on(measure)
    rows = [tag("tr", tag("th", spoken(name), scope="row"), *cells, class_="measure")]
    if remark:
        rows.append(_across(remark, "remark"))
    return rows


def _across(text: str, class_: str) -> Markup:
    return tag("tr", tag("td", text, colspan=len(_HEADINGS)), class_=class_)


def facts(values: Mapping[str, Any], title: str, *, exact: bool = False) -> Markup:
    """Plain values by name; a mapping among them is a group of its own.

    Args:
        exact: names and numbers as they stand in a config, not as people read them.
    """
    told: dict[str, Any] = plain(dict(values))
    single = {name: each for name, each in told.items() if not isinstance(each, dict)}
    groups = {name: each for name, each in told.items() if isinstance(each, dict)}
    bodies = [tag("tbody", *(_fact(name, each, exact) for name, each in single.items()))]
    for name, group in groups.items():
        title_row = tag("th", name if exact else spoken(name), scope="rowgroup", colspan=2)
        rows = [_fact(key, each, True) for key, each in flat(group).items()]
        bodies.append(tag("tbody", tag("tr", title_row), *rows))
    titles = (tag("th", each, scope="col") for each in ("Name", "Value"))
    head = tag("thead", tag("tr", *titles), class_="unseen")
    table = tag("table", tag("caption", title, class_="unseen"), head, *bodies, class_="facts")
    return _scrolled(table, title)


def _fact(name: str, value: Any, exact: bool) -> Markup:
    heading = tag("th", name if exact else spoken(name), scope="row")
    return tag("tr", heading, tag("td", said(value, exact=exact)))


def said(value: Any, *, exact: bool) -> str:
    """A plain value as text; a number as it stands or, not `exact`, rounded for people."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if any(isinstance(each, (list, dict)) for each in value):
            return json.dumps(value, ensure_ascii=False)
        more = f", ... ({len(value)} in all)" if len(value) > _LONGEST_LIST else ""
        text = ", ".join(said(each, exact=exact) for each in value[:_LONGEST_LIST]) + more
        return f"[{text}]" if exact else text
    return number(value) if isinstance(value, float) and not exact else str(value)


def flat(group: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Mappings within mappings as one, with dots in the names."""
    found: dict[str, Any] = {}
    for name, each in group.items():
        if isinstance(each, dict) and each:
            found |= flat(each, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = None if isinstance(each, dict) else each
    return found


def cases(section: Section) -> Markup:
    """The first MAX_CASES rows, folded away; says how many there are."""
    rows = section.cases
    if not rows:
        return Markup()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = rows[:MAX_CASES]
    cut = f"the first {MAX_CASES} of {len(rows):,}" if len(rows) > MAX_CASES else f"{len(rows):,}"
    title = f"Cases: {cut}"
    head = tag("thead", tag("tr", *(tag("th", spoken(each), scope="col") for each in columns)))
    body = tag("tbody", *(_case(plain(row), columns) for row in shown))
    table = tag("table", tag("caption", f"{title}; all of them are in cases.csv"), head, body)
    folded = _scrolled(table, f"Cases of {spoken(section.name)}")
    return tag("details", tag("summary", f"{title} (all of them are in cases.csv)"), folded)


def _case(row: dict[str, Any], columns: list[str]) -> Markup:
    texts = [said(row.get(each), exact=False) for each in columns]
    cells = [tag("td", text) for text in texts[1:]]
    return tag("tr", tag("th", texts[0], scope="row"), *cells)


def _scrolled(table: Markup, label: str) -> Markup:
    """Wider than the screen, it is scrolled by itself; by the keyboard too."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)
