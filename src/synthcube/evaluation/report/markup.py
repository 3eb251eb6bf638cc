"""HTML and SVG in which every text is escaped unless it was made here."""

from __future__ import annotations

import html

from synthcube.evaluation.report.words import clean

_VOID = frozenset({"img", "link", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element. Children that are not :class:`Markup` are escaped; so are all attributes.

    Args:
        attributes: `class_` is class, `aria_label` aria-label; None leaves one out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = joined(*children)
    return Markup(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{inside}</{name}>")


def joined(*children: str) -> Markup:
    """The children one after the other, escaped where they are not :class:`Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else _text(c) for c in children))


def _text(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")  # hundredths of a pixel
    return html.escape(clean(str(value)), quote=True)
