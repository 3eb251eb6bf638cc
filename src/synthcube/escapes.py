"""Texts of others, made safe for where they are shown: a terminal, Markdown, a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

# Control characters, marks that turn the direction of text, halves of characters (of names that
# are not UTF-8), and the separators that some programs take for the end of a line.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_QUOTED_FORMULA = re.compile(r"'+[=+\-@\t\r]")


def visible(text: str) -> str:
    """`text` with what a terminal would obey, or not show, as backslash escapes.

    The ends of lines stay: a message has several.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def printable(text: str) -> str:
    """`text` on one line, with the replacement character for each that a page would not show."""
    line = re.sub(r"[\n\r\t]", " ", text)
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _is_hidden(character) else character for character in line
    )


def hidden_in(text: str) -> str:
    """The first character that :func:`visible` would escape, escaped; empty where there is none.

    Ends of lines and tabs are not among them.
    """
    return next((_escaped(c) for c in text if c != "\t" and _is_hidden(c)), "")


def is_utf8(text: str) -> bool:
    """Whether the name of a file can be written to a text file."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def markdown(text: str) -> str:
    """`text` on one line, of which Markdown takes nothing for markup, a link or HTML."""
    line = " ".join(visible(text).split())
    line = re.sub(r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])", "\0", line)  # within a word it is none
    line = re.sub(r"([\\`*_<>\[\]|#&~$!])", r"\\\1", line).replace("\0", "_")
    line = re.sub(r"://", r":\\/\\/", line)
    return re.sub(r"(?i)\bwww\.", lambda match: match[0][:-1] + "\\.", line)


def spreadsheet(text: str) -> str:
    """`text` as a cell that no spreadsheet computes: a formula begins with an apostrophe.

    Numbers stay what they are. :func:`from_spreadsheet` takes the apostrophe away.
    """
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def from_spreadsheet(cell: str) -> str:
    """What :func:`spreadsheet` was given."""
    return cell[1:] if _QUOTED_FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_hidden(character: str) -> bool:
    return character != "\n" and unicodedata.category(character) in _HIDDEN


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
