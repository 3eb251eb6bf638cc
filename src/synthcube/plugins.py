"""Code that is not part of SynthCube, ``package.module:Name``: used where the user vouches for it.

Every such name goes through `load`, whoever wrote it down. It is refused, before anything is
imported, unless who runs the command has named its folder (``--plugins``) or its package
(``--trust``). Nothing in a YAML, in a trained model or in the environment can vouch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from synthcube.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Vouched:
    """What the user answers for."""

    folders: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()


_vouched = Vouched()

_NEVER = sys.stdlib_module_names | {"synthcube", "__main__"}
"""Nobody writes a model or a transform there: who names it wants something else."""
_OURS = "what belongs to Python or to SynthCube is not reached in this way."


def vouched() -> Vouched:
    """What the user of this command answers for; to be handed to processes that it starts."""
    return _vouched


def vouch(folders: Iterable[Path | str] = (), packages: Iterable[str] = ()) -> None:
    """Answer for modules in `folders`, and for installed `packages`, from now on.

    The folders come last on the path: nothing in them can take the place of another module.

    Raises:
        ConfigError: one is not a folder, or not the name of a package.
    """
    global _vouched
    packages = frozenset(packages)
    paths = [Path(folder) for folder in folders]
    faults = [f"--plugins {path}: there is no such folder." for path in paths if not path.is_dir()]
    faults += [
        f"--trust {name}: the name of a package is needed, without a module: --trust my_package."
        for name in sorted(packages)
        if not name.isidentifier()
    ]
    faults += [f"--trust {name}: {_OURS}" for name in sorted(packages & _NEVER)]
    if faults:
        raise ConfigError("\n".join(faults))
    found = tuple(str(path.resolve()) for path in paths)
    sys.path += [path for path in found if path not in sys.path]
    importlib.invalidate_caches()
    known = (*_vouched.folders, *found)
    _vouched = Vouched(tuple(dict.fromkeys(known)), _vouched.packages | packages)


@contextmanager
def vouching(folders: Iterable[Path | str] = (), packages: Iterable[str] = ()) -> Iterator[None]:
    """Answer for them, beside what is answered for anyway, for as long as this lasts.

    The folders stay on the path, for what their code imports later.

    Raises:
        ConfigError: as :func:`vouch`.
    """
    global _vouched
    before = _vouched
    try:
        vouch(folders, packages)
        yield
    finally:
        _vouched = before


def refusal(name: str) -> str:
    """Why ``package.module:Name`` is not used, and what would allow it; empty where it may be."""
    package = name.partition(":")[0].partition(".")[0]
    if package in _NEVER:
        return f"{name} cannot be used: {_OURS}"
    if package in _vouched.packages:
        return ""
    in_folder = any(_holds(folder, package) for folder in _vouched.folders)
    if in_folder and _is_first(package):
        return ""
    if in_folder:
        return (
            f"{name}: Python has another module {package} than the one in the folder of "
            "--plugins: give yours another name."
        )
    return (
        f"{name} is code that does not belong to SynthCube. If you trust it, name its package "
        f"with --trust {package or 'PACKAGE'}, or its folder with --plugins FOLDER."
    )


def load(name: str) -> object:
    """The class or function called ``package.module:Name``.

    Raises:
        ConfigError: the user does not vouch for it, or it does not exist.
    """
    if fault := refusal(name):
        raise ConfigError(fault)
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
    # What a vouched module has imported for itself is not what was vouched for.
    home = f"{getattr(found, '__module__', '')}:{getattr(found, '__qualname__', attribute)}"
    if fault := refusal(home):
        raise ConfigError(fault if home == name else f"{name} is {home}. {fault}")
    return found


def _holds(folder: str, package: str) -> bool:
    return package.isidentifier() and PathFinder.find_spec(package, [folder]) is not None


def _is_first(package: str) -> bool:
    """Whether Python finds the module in a vouched folder, and nowhere else."""
    try:
        spec = find_spec(package)
    except ValueError:  # it is that of a script
        return False
    return any(
        _places(spec) == _places(PathFinder.find_spec(package, [folder]))
        for folder in _vouched.folders
    )


def _places(spec: ModuleSpec | None) -> tuple[str | None, list[str]]:
    """Where a module is, and its submodules; of a package without a file, all its folders."""
    if spec is None:
        return None, []
    return spec.origin, list(spec.submodule_search_locations or ())
