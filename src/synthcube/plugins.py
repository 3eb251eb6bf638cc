"""From a name in a config to a class: known names, and the user's own code where it is trusted.

A config is data. A name in it is looked up in a closed table; ``package.module:Name`` is imported
only after ``--trust PACKAGE`` or ``--plugins FOLDER``; an argument of a library's class is a
number, or one of the words below, so that it cannot name a file or a function.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationInfo

from synthcube.errors import ConfigError, SynthCubeError

T = TypeVar("T")

TRAINED = {"trained": True}
"""Validation context for the config of a trained model."""


def find(name: str, known: Mapping[str, Any], what: str, unusable: Mapping[str, str]) -> Any:
    """The entry of `known` with that name in any case, or the user's ``package.module:Name``.

    Args:
        what: the kind of thing, for messages: "loss".
        unusable: names that a message explains, with the reason.
    """
    if is_own(name):
        try:
            target = load(name)
        except SynthCubeError as error:
            raise ValueError(str(error)) from error
        if not callable(target):
            raise ValueError(f"{name!r} is no {what}: a class, or a function that returns one")
        return target
    spelling = {key.lower(): key for key in known}.get(name.lower())
    if spelling:
        return known[spelling]
    for key, reason in unusable.items():
        if key.lower() == name.lower():
            raise ValueError(f"{key} cannot be used by name: {reason}")
    raise ValueError(
        f"unknown {what} {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}; your own "
        "is named package.module:Name"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the most similar known name, or an empty text."""
    spellings = {key.lower(): key for key in known}
    similar = get_close_matches(name.lower(), spellings, n=1)
    return f"; did you mean {spellings[similar[0]]}?" if similar else ""


def classes(module: Any, names: Iterable[str]) -> dict[str, Any]:
    """The classes of a library by name; those that this version of it lacks are left out."""
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def is_own(name: str) -> bool:
    """Whether the name is one of the user's own code."""
    return ":" in name


def is_needless(info: ValidationInfo) -> bool:
    """Whether the config belongs to a trained model, so that what only trains is not looked up."""
    return info.context == TRAINED


def called(kind: Any) -> str:
    """The name of a class or function."""
    return str(getattr(kind, "__name__", kind))


def listed(names: Iterable[str]) -> str:
    """Names in quotes, separated by commas."""
    return ", ".join(repr(name) for name in names)


def arguments(name: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments for the class called `name`; those of a library's class are checked."""
    settings = dict(values or {})
    if not is_own(name) and (faults := list(argument_faults(settings))):
        raise ValueError("; ".join(faults))
    return settings


def check_arguments(
    kind: Any,
    names: Iterable[str],
    *,
    first: int = 0,
    taken: Iterable[str] = (),
    filled: Iterable[str] = (),
) -> None:
    """Raise where a class does not take arguments of those names, or needs others.

    Args:
        first: how many leading parameters are not the user's to set.
        taken: further parameters that are not.
        filled: parameters that get a value if the user sets none.
    """
    parameters = list(inspect.signature(kind).parameters.values())[first:]
    if any(item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD) for item in parameters):
        return
    allowed = [item.name for item in parameters if item.name not in taken]
    if unknown := [name for name in names if name not in allowed]:
        known = ", ".join(allowed) or "none"
        raise ValueError(f"{called(kind)} takes no argument {listed(unknown)}; it takes {known}")
    needed = [item.name for item in parameters if item.default is item.empty]
    if missing := [name for name in needed if name not in (*names, *taken, *filled)]:
        raise ValueError(f"{called(kind)} needs {listed(missing)}")


def attempt(build: Callable[[], Any], name: str) -> None:
    """Build something once and discard it, to find wrong arguments early. Raises ValueError."""
    try:
        build()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error


def checked(value: object, kind: type[T], name: str) -> T:
    """`value`, which `name` returned, after a check of its type. Raises ConfigError."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name!r} makes a {type(value).__name__}, not a {called(kind)}.")
    return value


@dataclass(frozen=True, slots=True)
class Vouched:
    """Folders and packages whose code the user trusts."""

    folders: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()


_vouched = Vouched()

_NEVER = sys.stdlib_module_names | {"synthcube", "__main__"}
"""Packages that hold no plugin: a name in one of them means something else."""
_OURS = "what belongs to Python or to SynthCube is not reached in this way."


def vouched() -> Vouched:
    """The trusted folders and packages, for processes that this one starts."""
    return _vouched


def vouch(folders: Iterable[Path | str] = (), packages: Iterable[str] = ()) -> None:
    """Trust the modules in `folders` and the installed `packages` from now on. Raises ConfigError.

    The folders go to the end of the path, so that nothing in them replaces another module.
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
    resolved = [str(path.resolve()) for path in paths]
    sys.path += [path for path in resolved if path not in sys.path]
    importlib.invalidate_caches()
    trusted = dict.fromkeys([*_vouched.folders, *resolved])
    _vouched = Vouched(tuple(trusted), _vouched.packages | packages)


@contextmanager
def vouching(folders: Iterable[Path | str] = (), packages: Iterable[str] = ()) -> Iterator[None]:
    """Trust further folders and packages within this context, as :func:`vouch` does.

    The folders stay on the path, for what their code imports later.
    """
    global _vouched
    before = _vouched
    try:
        vouch(folders, packages)
        yield
    finally:
        _vouched = before


def refusal(name: str) -> str:
    """Why ``package.module:Name`` is not imported, with the option that allows it; else empty."""
    package = name.partition(":")[0].partition(".")[0]
    if package in _NEVER:
        return f"{name} cannot be used: {_OURS}"
    if package in _vouched.packages:
        return ""
    folders = _vouched.folders if package.isidentifier() else ()
    specs = [spec for folder in folders if (spec := PathFinder.find_spec(package, [folder]))]
    if not specs:
        return (
            f"{name} is code that does not belong to SynthCube. If you trust it, name its package "
            f"with --trust {package or 'PACKAGE'}, or its folder with --plugins FOLDER."
        )
    try:
        imported = find_spec(package)
    except ValueError:  # the module of a script
        imported = None
    if imported and _locations(imported) in map(_locations, specs):
        return ""
    return (
        f"{name}: Python has another module {package} than the one in the folder of "
        "--plugins: give yours another name."
    )


def load(name: str) -> object:
    """The class or function called ``package.module:Name``. Raises ConfigError."""
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
    target: object = getattr(module, attribute)
    # What a trusted module has imported from elsewhere is not trusted with it.
    home = f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', attribute)}"
    if fault := refusal(home):
        raise ConfigError(fault if home == name else f"{name} is {home}. {fault}")
    return target


def _locations(spec: ModuleSpec) -> tuple[str | None, list[str]]:
    """The file and the folders of a module; a namespace package has folders only."""
    return spec.origin, list(spec.submodule_search_locations or ())


_SIDES = ("left", "right", "posterior", "anterior", "inferior", "superior")
_DTYPES = ("float16", "float32", "float64", "uint8", "int16", "int32")
_INTERPOLATIONS = (
    "nearest", "linear", "bspline", "gaussian", "label_gaussian", "hamming", "cosine", "welch",
    "lanczos", "blackman",
)  # fmt: skip
_PADDINGS = (
    "empty", "edge", "wrap", "constant", "linear_ramp", "maximum", "mean", "median", "minimum",
    "reflect", "symmetric",
)  # fmt: skip
_ORIENTATIONS = tuple(
    "".join(letters)
    for axes in permutations(("rl", "ap", "is"))
    for letters in product(*axes)
)  # fmt: skip

WORDS: dict[str, tuple[str, ...]] = {
    # torch.nn and monai.losses
    "reduction": ("mean", "sum", "none", "batchmean"),
    "w_type": ("square", "simple", "uniform"),
    "weighting_mode": ("default", "gdl"),
    "kernel_type": ("gaussian", "uniform", "rectangular", "triangular", "b-spline"),
    "kernel_ops": ("mean", "gaussian"),
    "distance_type": ("l1", "l2"),
    "fft_norm": ("ortho", "forward", "backward"),
    # torch.optim.lr_scheduler; the last ones of monai.transforms
    "mode": (
        "min", "max", "triangular", "triangular2", "exp_range",
        "zeros", "reflect", "replicate", "circular", "b", "rf",
    ),
    "scale_mode": ("cycle", "iterations"),
    "anneal_strategy": ("cos", "linear"),
    "threshold_mode": ("rel", "abs"),
    # monai.transforms
    "dtype": _DTYPES,
    "approx": ("erf", "sampled", "scalespace"),
    "sink_mode": ("all", "mid", "min"),
    # torchio
    "axes": _SIDES,
    "center": ("image", "origin"),
    "default_pad_value": ("minimum", "mean", "otsu"),
    "image_interpolation": _INTERPOLATIONS,
    "label_interpolation": _INTERPOLATIONS,
    "location": ("center", "random"),
    "masking_method": _SIDES,
    "method": ("crop", "pad"),
    "orientation": _ORIENTATIONS,
    "padding_mode": _PADDINGS,
    "units": ("voxels", "mm", "cm"),
}  # fmt: skip
"""Words that an argument of that name takes, in any case."""

SECTIONS = ("affine_kwargs", "elastic_kwargs")
"""Arguments that hold arguments: those of RandomAffineElasticDeformation."""

_WORDS_SHOWN = 12


def argument_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every argument of a library's class that is no plain data."""
    for name, value in values.items():
        if name in SECTIONS and isinstance(value, Mapping):
            yield from argument_faults(value)
        else:
            yield from _value_faults(name, value)


def _value_faults(name: str, value: Any) -> Iterator[str]:
    words = WORDS.get(name, ())
    shown = ", ".join(words[:_WORDS_SHOWN]) + (", ..." if len(words) > _WORDS_SHOWN else "")
    shown = shown or "numbers, true, false and lists of them, and no text"
    if isinstance(value, list | tuple):
        for item in value:
            yield from _value_faults(name, item)
    elif isinstance(value, str):
        if value.lower() not in words:
            yield f"{name} is {value!r}: it takes {shown}"
    elif not isinstance(value, bool | int | float | None):
        yield f"{name} holds a {type(value).__name__}: it takes {shown}"
