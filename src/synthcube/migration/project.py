"""An old file as it is read, and the new one as it grows: values, comments, and what to say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from synthcube.migration.keys import CHANGED, CRASHES, NO_EFFECT, NONE_HERE, SAME, Key, keys_of
from synthcube.plugins import did_you_mean

Path = tuple[Any, ...]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Entry:
    """A line of the new file: its value, and the comment above it."""

    value: Any
    comment: str


@dataclass
class Project:
    """The values of an old file, the lines that they are on, and all that comes of them.

    ``is_modern``: what the old file does not say is left to our defaults.
    """

    values: dict[Any, Any]
    lines: Mapping[Path, int]
    is_modern: bool = False
    new: dict[str, Entry] = field(default_factory=dict)
    left: dict[str, Entry] = field(default_factory=dict)
    """Values of there that a modern config leaves out."""
    refused: dict[Path, list[str]] = field(default_factory=dict)
    notes: dict[Path, str] = field(default_factory=dict)
    dropped: dict[Path, str] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The name of the model; empty where there is none."""
        return str(self.get("model_config", "model_name", default=""))

    @property
    def is_gan(self) -> bool:
        return self.model in ("dcgan", "stylegan")

    def get(self, *path: Any, default: Any = None) -> Any:
        """The value at `path`; `default` where it, or a section on the way, is not there."""
        value: Any = self.values
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return value

    def section(self, *path: Any) -> dict[Any, Any]:
        """The mapping at `path`; empty where there is none, and a fault where it is no mapping."""
        value = self.get(*path)
        if isinstance(value, dict):
            return value
        if value is not None:
            self.refuse(path, f"a mapping of keys is needed, not {value!r}")
        return {}

    def architecture(self, name: str, default: Any = None) -> Any:
        return self.get("model_config", "architecture", name, default=default)

    def whole(self, path: Path, default: int) -> int:
        """The whole number at `path`, 1 or more; a fault, and `default`, where it is not."""
        value = self.get(*path, default=default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.refuse(path, f"a whole number of 1 or more is needed, not {value!r}")
        return default

    def state(self, target: str, value: Any, comment: str) -> None:
        """Write what the old file says."""
        self.new[target] = Entry(value, comment)

    def imply(self, target: str, value: Any, comment: str) -> None:
        """Write what was so there without being said, and would be otherwise here."""
        (self.left if self.is_modern else self.new)[target] = Entry(value, comment)

    def take(self, path: Path, target: str, default: Any) -> None:
        """Write the value at `path` as it is, or the default of there."""
        if self.get(*path) is None:
            self.imply(target, default, f"the default of {'.'.join(path)}")
        self.keep(path, target)

    def keep(self, path: Path, target: str) -> None:
        """Write the value at `path` as it is, if there is one."""
        value = self.get(*path)
        if value is not None:
            self.state(target, value, ".".join(path))

    def refuse(self, path: Path, text: str) -> None:
        self.refused.setdefault(path, []).append(text)

    def note(self, path: Path, text: str) -> None:
        """Say of a key in the report what its table cannot know."""
        self.notes[path] = "; ".join(filter(None, [self.notes.get(path, ""), text]))

    def drop(self, path: Path, text: str) -> None:
        """Say of a value that it changed nothing."""
        self.dropped[path] = text


@dataclass(frozen=True)
class Outcome:
    """What becomes of one key of the old file: `kind` is same, changed, no effect or refused."""

    key: str
    kind: str
    text: str


def outcomes(project: Project) -> list[Outcome]:
    """One for each key of the old file, and for each that is missing there."""
    table = keys_of(project.model)
    paths = list(_leaves(project.values, (), table))
    listed = dict.fromkeys([*paths, *project.refused, *project.dropped])
    told = [_outcome(project, path, table) for path in listed]
    kinds = ("same", "changed", "no effect", "refused")
    return sorted(told, key=lambda outcome: kinds.index(outcome.kind))


def _leaves(value: Any, path: Path, table: Mapping[Path, Key]) -> Iterator[Path]:
    """The paths of the keys, as deep as the table lists them."""
    if isinstance(value, Mapping) and value and (not path or _is_section(path, table)):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name), table)
    elif path:
        yield path


def _is_section(path: Path, table: Mapping[Path, Key]) -> bool:
    return any(len(known) > len(path) and _fits(path, known[: len(path)]) for known in table)


def _fits(path: Path, known: Path) -> bool:
    pairs = zip(path, known, strict=True) if len(path) == len(known) else [("", None)]
    return all(part in (name, "*") for name, part in pairs)


def _known(path: Path, table: Mapping[Path, Key]) -> Key | None:
    """The table's entry of a path: its own, or of a section around it that never counted."""
    exact = table.get(path) or next((table[name] for name in table if _fits(path, name)), None)
    if exact or len(path) == 1:
        return exact
    around = _known(path[:-1], table)
    return around if around and around.kind in (NO_EFFECT, CRASHES, NONE_HERE) else None


def _outcome(project: Project, path: Path, table: Mapping[Path, Key]) -> Outcome:
    name = ".".join(map(str, path))
    name += f" (line {project.lines[path]})" if path in project.lines else ""
    key = _known(path, table)
    if path in project.refused:
        return Outcome(name, "refused", "; ".join(project.refused[path]))
    if path in project.dropped:
        return Outcome(name, "no effect", project.dropped[path])
    if key is None:
        return Outcome(name, *_of_unknown(project, path, table))
    return Outcome(name, *_of_known(project, path, key))


def _of_unknown(project: Project, path: Path, table: Mapping[Path, Key]) -> tuple[str, str]:
    if _is_section(path, table):
        if project.get(*path) in (None, {}):
            return "same", "empty"
        return "changed", project.notes.get(path, "")
    beside = [known[-1] for known in table if known[:-1] == path[:-1]]
    return "no effect", f"GaNDLF-Synth never read it{did_you_mean(str(path[-1]), beside)}"


def _of_known(project: Project, path: Path, key: Key) -> tuple[str, str]:
    text = ": ".join(filter(None, [key.target, project.notes.get(path) or key.text]))
    if key.kind in (SAME, CHANGED):
        return ("same" if key.kind == SAME and path not in project.notes else "changed"), text
    if key.kind == NO_EFFECT:
        return "no effect", text
    value = project.get(*path)
    if key.harmless is None:
        return "changed", text
    if any(value == fine and type(value) is type(fine) for fine in key.harmless):
        return "no effect", "this value changes nothing"
    return "refused", text
