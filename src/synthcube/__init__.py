"""Train, sample, judge and share generative models of medical images."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from synthcube.generator import Generator

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained"]


def from_pretrained(
    model: str | Path,
    *,
    accelerator: str = "auto",
    runtime: str = "torch",
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Generator:
    """Open a trained model: a folder, or owner/name[@revision] of a Hub.

    Args:
        model: a run, an artifact or an exported folder, or the name of a model on a Hub.
        accelerator: auto, cpu or gpu.
        runtime: what computes its networks: torch; or onnx or openvino, on the CPU, for a model
            that was exported for it.
        plugins: folders whose code this model may run; see docs/how-to/own-code.md.
        trust: installed packages whose code it may run.

    Returns:
        An object with `sample(n, seed=..., condition=...)` and `reconstruct(images)`, whose
        images a notebook shows; see synthcube.generator.

    Raises:
        SynthCubeError: there is none, it cannot be had, or it is damaged.
    """
    # Not at the top: that would import PyTorch for `synthcube --help`.
    from synthcube.generator import from_pretrained as opened

    return opened(model, accelerator=accelerator, runtime=runtime, plugins=plugins, trust=trust)
