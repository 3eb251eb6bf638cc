"""From a family's name to its config class.

A name is the module's name in ``synthcube.models.families``, an entry point in the group
``synthcube.families``, or ``package.module:MyConfig`` of code that the user trusts.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeGuard

from synthcube import plugins
from synthcube.errors import FamilyError
from synthcube.models.family import FamilyConfig

GROUP = "synthcube.families"
_BUILT_IN = "synthcube.models.families"
DEFAULT = "rectified_flow"


def names() -> list[str]:
    """Every family that can be named without its module, sorted."""
    package = importlib.import_module(_BUILT_IN)
    built_in = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted({*built_in, *(point.name for point in _installed(tuple(sys.path)))})


def find(name: str) -> type[FamilyConfig]:
    """The config class of the family with that name; FamilyError if there is none."""
    if plugins.is_own(name):
        return _checked(plugins.load(name), name)
    for point in _installed(tuple(sys.path)):
        if point.name == name:
            return _checked(point.load(), name)
    if name not in (known := names()):
        raise FamilyError(
            f"There is no family {name!r}{plugins.did_you_mean(name, known) or '.'} "
            f"Families: {', '.join(known)}; your own is named package.module:MyConfig"
        )
    module = importlib.import_module(f"{_BUILT_IN}.{name}")
    for item in vars(module).values():
        if getattr(item, "__module__", "") == module.__name__ and _is_family(item):
            return item
    raise FamilyError(f"{module.__name__} defines no subclass of FamilyConfig.")


@lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The families of installed packages; reading them all from the disk takes 45 ms.

    `path` is the current sys.path, so that what is added to it later is found.
    """
    return tuple(entry_points(group=GROUP))


def _is_family(item: object) -> TypeGuard[type[FamilyConfig]]:
    return isinstance(item, type) and issubclass(item, FamilyConfig)


def _checked(item: object, name: str) -> type[FamilyConfig]:
    if not _is_family(item):
        raise FamilyError(f"{name!r} is no family: it must be a subclass of FamilyConfig.")
    return item
