"""The words of a command line, looked at before any command: what no path and no text may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from synthcube.errors import ConfigError
from synthcube.escapes import hidden_in, visible


def check_words(words: Sequence[str], app: typer.Typer) -> None:
    """Refuse what a terminal would obey, what is not UTF-8 and could be written to no record, and
    an empty path, which would be the folder that one is in.

    Raises:
        ConfigError: all such words.
    """
    faults = [
        f"{visible(word)[:120]}: it holds {hidden}; rename the file or folder"
        for word in words
        if (hidden := hidden_in(word))
    ]
    if "" in words or any(word.endswith("=") for word in words):
        faults += [f"{name}: the path is empty" for name in _empty(words, {*_path_options(app)})]
    if faults:
        raise ConfigError("The command line holds what cannot be used:", faults)


def _empty(words: Sequence[str], path_options: set[str]) -> Iterator[str]:
    """What has an empty path: an option, or an argument, by the word before it."""
    for before, word in zip(["", *words], words, strict=False):
        option = before if word == "" else word.removesuffix("=") if word.endswith("=") else None
        if option is None:
            continue
        name = "--" + option[2:].replace("-", "_") if option.startswith("--") else option
        if name in path_options or (word == "" and not option.startswith("-")):
            yield option


def _path_options(app: typer.Typer) -> Iterator[str]:
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and _holds_path(get_args(hint)[0]):
                yield from getattr(get_args(hint)[1], "param_decls", None) or (f"--{name}",)
    for group in app.registered_groups:
        if group.typer_instance:
            yield from _path_options(group.typer_instance)


def _holds_path(kind: Any) -> bool:
    return kind is Path or any(_holds_path(part) for part in get_args(kind))
