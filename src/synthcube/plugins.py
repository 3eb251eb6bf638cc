"""A user's own code, named ``package.module:Name`` in the YAML."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from synthcube.errors import ConfigError


def add_folders(folders: Iterable[Path]) -> None:
    """Make modules in `folders` importable.

    Raises:
        ConfigError: one is not a folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--plugins {folder}: there is no such folder.")
        path = str(folder.resolve())
        if path not in sys.path:
            sys.path.insert(0, path)


def load(name: str) -> object:
    """The object called ``package.module:Name``.

    Raises:
        ConfigError: the module or the name in it does not exist.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{name!r} cannot be imported: {error}. Install its package, or give the folder it "
            "is in with --plugins"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{name!r} does not exist: {module_name} has no {attribute}.")
    found: object = getattr(module, attribute)
    return found
