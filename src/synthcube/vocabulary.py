"""What may be written as an argument of a class of PyTorch, MONAI or TorchIO.

Arguments are data. Libraries take a text for more than that: for the path of a file they open, or
for the name of code they import and call. Here every text is one of the words that were looked up
in the library's source, argument by argument; any other is refused before the library sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations, product
from typing import Any

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


def faults(arguments: Mapping[str, Any]) -> Iterator[str]:
    """What is no data among the arguments of a library's class, one sentence each."""
    for name, value in arguments.items():
        if name in SECTIONS and isinstance(value, Mapping):
            yield from faults(value)
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
