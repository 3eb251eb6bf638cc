"""From a name to a class: the closed tables of known names, and code that the user vouches for."""

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
"""By the argument's name, in lower case; they are taken in any."""

SECTIONS = ("affine_kwargs", "elastic_kwargs")
"""Arguments that hold arguments: those of RandomAffineElasticDeformation."""

_SHOWN = 12


def argument_faults(arguments: Mapping[str, Any]) -> Iterator[str]:
    """What is no data among the arguments of a library's class, one sentence each."""
    for name, value in arguments.items():
        if name in SECTIONS and isinstance(value, Mapping):
            yield from argument_faults(value)
        else:
            yield from _value_faults(name, value)


def _value_faults(name: str, value: Any) -> Iterator[str]:
    words = WORDS.get(name, ())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _value_faults(name, part)
    elif isinstance(value, str):
        if value.lower() not in words:
            yield f"{name} is {value!r}: it takes {_listed(words)}"
    elif not isinstance(value, bool | int | float | None):
        yield f"{name} holds a {type(value).__name__}: it takes {_listed(words)}"


def _listed(words: tuple[str, ...]) -> str:
    if not words:
        return "numbers, true, false and lists of them, and no text"
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")


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
    raise ValueError(
        f"unknown {what} {name!r}{did_you_mean(name, known, cutoff=0.5)} "
        f"Known: {', '.join(known)}; your own is named package.module:Name"
    )


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?` with the most similar name in any case, or an empty text."""
    folded = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), folded, n=1, cutoff=cutoff)
    return f"; did you mean {folded[near[0]]}?" if near else ""


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
    if not is_own(name) and (faults := list(argument_faults(found))):
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
        found = load(name)
    except SynthCubeError as error:
        raise ValueError(str(error)) from error
    if not callable(found):
        raise ValueError(f"{name!r} is no {what}: it must be a class, or a function that makes one")
    return found
