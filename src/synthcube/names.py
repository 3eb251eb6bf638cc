"""Classes by name: in any case, or a user's own; the nearest name for a misspelt one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationInfo

from synthcube import plugins, vocabulary
from synthcube.errors import ConfigError, SynthCubeError

T = TypeVar("T")

TRAINED = {"trained": True}
"""Context in which the config of a trained model is validated."""


def classes(module: Any, names: Iterable[str]) -> dict[str, Any]:
    """The classes of `module` with those names, which were looked at one by one; by name.

    Older versions of a library may lack some.
    """
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def find(name: str, known: Mapping[str, Any], what: str, unusable: Mapping[str, str]) -> Any:
    """What is called `name`, in any case, among `known`; or ``package.module:Name``.

    Raises:
        ValueError: there is none, or it is one of `unusable`, which maps names to reasons.
    """
    if is_own(name):
        return _own(name, what)
    folded = {each.lower(): each for each in known}
    if name.lower() in folded:
        return known[folded[name.lower()]]
    for each, reason in unusable.items():
        if each.lower() == name.lower():
            raise ValueError(f"{each} cannot be used by name: {reason}")
    near = get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean {folded[near[0]]}?" if near else ""
    raise ValueError(
        f"unknown {what} {name!r}{hint} Known: {', '.join(known)}; your own is named "
        "package.module:Name"
    )


def is_own(name: str) -> bool:
    """Whether `name` is that of a user's own code."""
    return ":" in name


def is_needless(info: ValidationInfo) -> bool:
    """Whether this is the config of a trained model, which does without what only trains.

    What a stranger's model names there is then not even looked up.
    """
    return info.context == TRAINED


def arguments(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of what is called `name`: of a library's class, data alone.

    Raises:
        ValueError: a text among them is none of the words that the argument is known to take.
    """
    found = dict(given or {})
    if not is_own(name) and (faults := list(vocabulary.faults(found))):
        raise ValueError("; ".join(faults))
    return found


def check_arguments(
    kind: Any,
    given: Iterable[str],
    *,
    first: int = 0,
    taken: Iterable[str] = (),
    filled: Iterable[str] = (),
) -> None:
    """See that `kind` takes the arguments `given`, and needs no others.

    The `first` ones and those `taken` are not the user's to give; those `filled` are given unless
    the user does.

    Raises:
        ValueError: it does not, or it does.
    """
    parameters = list(inspect.signature(kind).parameters.values())[first:]
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        return
    allowed = [each.name for each in parameters if each.name not in taken]
    unknown = [name for name in given if name not in allowed]
    if unknown:
        known = ", ".join(allowed) or "none"
        raise ValueError(f"{called(kind)} takes no argument {listed(unknown)}; it takes {known}")
    needed = [each.name for each in parameters if each.default is each.empty]
    missing = [name for name in needed if name not in (*given, *taken, *filled)]
    if missing:
        raise ValueError(f"{called(kind)} needs {listed(missing)}")


def attempt(build: Callable[[], Any], name: str) -> None:
    """See that `build` succeeds with the arguments of what is called `name`.

    Raises:
        ValueError: it does not.
    """
    try:
        build()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error


def checked(made: object, kind: type[T], name: str) -> T:
    """What `name` made, known to be a `kind`.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(made, kind):
        raise ConfigError(f"{name!r} makes a {type(made).__name__}, not a {called(kind)}.")
    return made


def called(kind: Any) -> str:
    """The name of a class or function."""
    return str(getattr(kind, "__name__", kind))


def listed(names: Iterable[str]) -> str:
    """Names as a message shows them."""
    return ", ".join(repr(name) for name in names)


def _own(name: str, what: str) -> Any:
    try:
        found = plugins.load(name)
    except SynthCubeError as error:
        raise ValueError(str(error)) from error
    if not callable(found):
        raise ValueError(f"{name!r} is no {what}: it must be a class, or a function that makes one")
    return found
