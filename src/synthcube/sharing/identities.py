"""What may identify people and machines, kept out of everything that is exported."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthcube import environment, reading
from synthcube.errors import ArtifactError, HubError
from synthcube.models import artifact
from synthcube.schema import ImageSpec
from synthcube.sharing.config import TOKEN

REMOVED = "removed-by-export"
SPLIT = "split.csv"

# Begins as a path or an address does, or is of several folders, or of a person.
_PLACE = re.compile(r"^(/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\|\w+:/)|[\\/].*[\\/]|\S@\S")
_ORDINARY = {
    "admin", "data", "docker", "home", "images", "jovyan", "localhost", "model", "nobody", "root",
    "synthcube", "train", "ubuntu", "user", "users", "work",
}  # fmt: skip
_SHORTEST, _SHORTEST_NUMBER = 4, 6


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without paths, addresses of servers, names of projects and accounts.

    What a model was made of stays, where it is a published one: hf://owner/name@commit.
    """
    public: dict[str, Any] = _without_places(config)
    training = public.get("training")
    if isinstance(training, dict) and training.get("loggers"):
        training["loggers"] = []
    model = public.get("model")
    if isinstance(model, dict) and model.get("first_stage") == REMOVED:
        model["first_stage"] = ""
    # How others are judged, and where its weights lie; where its owner publishes.
    for section in ("evaluation", "export"):
        public.pop(section, None)
    return public


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_places(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    local = key in ("first_stage", "start_from") and not _is_published(value)
    return REMOVED if local or (_PLACE.search(value) and not _is_published(value)) else value


def _is_published(text: str) -> bool:
    try:
        return artifact.parse(text) is not None
    except HubError:
        return False


def subjects_of(folder: Path) -> list[dict[str, str]]:
    """The rows of split.csv of the run that an artifact folder belongs to; none where it is none.

    Args:
        folder: of the artifact, or of the run.
    """
    for path in (folder / SPLIT, folder.parent / SPLIT):
        if path.is_file():
            return reading.read_rows(path, ("SubjectID", "Split"), ArtifactError)
    return []


def public_image(image: ImageSpec, subjects: Iterable[str]) -> ImageSpec:
    """The same without class names that are the subjects' own, where the model can do without.

    Raises:
        ArtifactError: the model was trained to make images of single subjects.
    """
    known = set(subjects)
    for spec in image.conditions:
        if _names_subjects(spec.classes, known):
            raise ArtifactError(
                f"The classes of the condition {spec.name} are subjects ({len(spec.classes)} of "
                "them): this model makes images of single people, and is not exported. Train on "
                "classes that are not people."
            )
    if _names_subjects(image.labels, known):
        return image.model_copy(update={"labels": ()})
    return image


def _names_subjects(classes: Sequence[str], subjects: set[str]) -> bool:
    telling = {name for name in classes if _is_telling(name)}
    return bool(classes) and (set(classes) == subjects or bool(telling & subjects))


def _is_telling(subject: str) -> bool:
    """Whether an id can be told from ordinary words and numbers, as 0001 in a rate of 0.0001."""
    if subject.isdigit():
        return len(subject) >= _SHORTEST_NUMBER
    return len(subject) >= _SHORTEST and bool(re.search(r"\d", subject))


def traces(texts: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What is left in texts of this machine, its user, or the subjects: one line for each.

    Args:
        texts: by name of their files.
        rows: of split.csv.
    """
    sought = dict.fromkeys(_own_names(), "the name of this user or machine")
    with contextlib.suppress(RuntimeError):  # a user without a home
        home = str(Path.home())
        sought |= {home: "this user's folder"} if len(home) > _SHORTEST else {}
    for row in rows:
        subject = row.get("SubjectID", "")
        if _is_telling(subject):
            sought[subject] = "a subject's id"
        for column, cell in row.items():
            if column.startswith("Channel_") and cell:
                sought[str(Path(cell).parent)] = "a folder of the training images"
    # What every export names: a package is no account, machine or folder of anybody.
    for word in ("/", ".", *environment.RECORDED_PACKAGES):
        sought.pop(word, None)
    tokens = [f"{name} holds a token: make a new one" for name, text in texts.items()
              if TOKEN.search(text)]  # fmt: skip
    return tokens + [
        f"{name} holds {what} ({word})"
        for name, text in texts.items()
        for word, what in sought.items()
        if word in text and _stands_alone(word, text)
    ]


def _stands_alone(word: str, text: str) -> bool:
    before = "A-Za-z0-9." if word.isdigit() else "A-Za-z0-9"  # not the rest of a number
    return bool(re.search(rf"(?<![{before}]){re.escape(word)}(?![A-Za-z0-9])", text))


def _own_names() -> set[str]:
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(KeyError, OSError):
        names.add(getpass.getuser())
    return {name for name in names if len(name) >= _SHORTEST and name not in _ORDINARY}
