"""From a trained model to networks of another runtime, checked through the whole sampler."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from synthcube import storage
from synthcube.data.conditions import requested
from synthcube.data.wishes import complete
from synthcube.errors import ConfigError, FamilyError
from synthcube.export.config import Runtime, Weights
from synthcube.export.runtimes.formats import FORMATS, Converted, record_name
from synthcube.export.runtimes.networks import used_networks
from synthcube.export.runtimes.programs import program
from synthcube.export.runtimes.substitution import compute_with
from synthcube.models import inference
from synthcube.models.family import Family, Reconstructs, Samples

log = logging.getLogger("synthcube")

_PRECISION = "32-true"
_CHECKED = 2
_TOLERANCE = 1e-3


def check_request(runtime: Runtime, weights: Weights) -> None:
    """
    Raises:
        ConfigError: the runtime is not known or not installed, or does not store weights so.
    """
    if runtime not in FORMATS:
        raise ConfigError(f"--runtime {runtime}: it must be {' or '.join(FORMATS)}.")
    form = FORMATS[runtime]
    if weights not in form.WEIGHTS:
        raise ConfigError(
            f"--runtime_weights {weights}: {runtime} takes {', '.join(form.WEIGHTS)}."
        )
    form.version()


def convert(
    family: Family, folder: Path, runtime: Runtime, weights: Weights = "float32"
) -> Converted:
    """Write the networks that a model makes images with, and their record, to `folder`.

    The model is then computed with them, and stays so.

    Args:
        family: trained, on the CPU, in evaluation mode.
        weights: how they are stored: float32 gives the images of torch; float16 and int8 give
            smaller files and slightly other images.

    Raises:
        ConfigError: the runtime is not installed, or does not store weights so.
        FamilyError: a network cannot be converted, or would make other images.
    """
    check_request(runtime, weights)
    form = FORMATS[runtime]
    expected: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        expected.append(_images(family))
        return expected[-1]

    log.info("Making %d images with torch, to compare with.", _CHECKED)
    used = used_networks(family, make)
    if not used:
        raise FamilyError(f"{family.config.name} calls no network that could be converted.")
    for network in used:
        log.info("Converting %s for %s.", network.name, runtime)
        shapes = [each.shape for each in network.inputs if each.shape is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            # OpenVINO 2026.4 takes convolutions of kernel size 1 with weights in 8 bits for
            # something else.
            graph = program(network, rewritten=weights != "int8")
            form.save(graph, shapes, folder, f"{runtime}.{network.name}", weights)
    record = Converted(
        runtime=runtime, version=form.version(), weights=weights, largest_difference=0.0,
        mean_difference=0.0, networks={each.name: each.inputs for each in used},
    )  # fmt: skip
    compute_with(family, folder, record)
    differences = (_images(family) - expected[0]).abs() / 2
    difference = float(differences.max())
    if weights == "float32" and not difference <= _TOLERANCE:
        raise FamilyError(
            f"{family.config.name} makes other images with {runtime} than with torch: they differ "
            f"by {difference:.2g} of the range, more than {_TOLERANCE:g}. Nothing is exported."
        )
    found = {"largest_difference": difference, "mean_difference": float(differences.mean())}
    record = record.model_copy(update=found)
    storage.write_text(folder / record_name(runtime), record.model_dump_json(indent=2) + "\n")
    return record


def _images(family: Any) -> torch.Tensor:
    """A few images, by all that the model can do; always the same."""
    device = torch.device("cpu")
    image = family.image
    generator = torch.Generator().manual_seed(0)
    made = []
    if isinstance(family, Samples):
        seeds = inference.image_seeds(0, _CHECKED)
        wishes: list[dict[str, str]] = [{} for _ in seeds]
        asked = requested(image.conditions, wishes)
        values = complete(asked, image.conditions, wishes, seeds)
        shape = (_CHECKED, len(image.source_channels), *image.size)
        source = torch.rand(shape, generator=generator) * 2 - 1 if image.source_channels else None
        made.append(inference.generate(family, seeds, values, _PRECISION, device, source))
    if isinstance(family, Reconstructs):
        given = torch.rand((_CHECKED, image.channels, *image.size), generator=generator) * 2 - 1
        made.append(inference.reconstruct(family, given, _PRECISION, device))
    return torch.cat(made)
