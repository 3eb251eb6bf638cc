"""From a family's name to its config class.

A name is the module's name in ``synthcube.models.families``, an entry point in the group
``synthcube.families``, or ``package.module:MyConfig`` of code that the user vouches for.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

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
    return sorted({*built_in, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> type[FamilyConfig]:
    """The config class of the family called `name`.

    Raises:
        FamilyError: there is none, or what is there is no family.
    """
    if ":" in name:
        return _checked(plugins.load(name), name)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _checked(point.load(), name)
    if name not in names():
        hint = plugins.did_you_mean(name, names()) or "."
        raise FamilyError(
            f"There is no family {name!r}{hint} Families: {', '.join(names())}; "
            "your own is named package.module:MyConfig"
        )
    module = importlib.import_module(f"{_BUILT_IN}.{name}")
    for item in vars(module).values():
        if isinstance(item, type) and item.__module__ == module.__name__ and _is_family(item):
            return _checked(item, name)
    raise FamilyError(f"{module.__name__} defines no subclass of FamilyConfig.")


def _is_family(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, FamilyConfig)


def _checked(found: object, name: str) -> type[FamilyConfig]:
    if not (isinstance(found, type) and issubclass(found, FamilyConfig)):
        raise FamilyError(f"{name!r} is no family: it must be a subclass of FamilyConfig.")
    return found
