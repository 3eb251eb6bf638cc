"""A trained model on a device: it computes and writes images for every way of asking for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import config, environment
from synthcube.data.cache import ImageCache, load_images
from synthcube.data.channels import class_values, decoded, encoded, files_of
from synthcube.data.conditions import draw_missing_conditions, requested_values
from synthcube.data.dicom_writing import Study, write_dicom
from synthcube.data.geometry import placed_like
from synthcube.data.images import read_image, write_image
from synthcube.data.inpainting import cut_holes, voided
from synthcube.data.manifest import Manifest
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.preprocessing import DataConfig, to_intensities, trained_data_config
from synthcube.errors import ConfigError, ImageError
from synthcube.models import inference
from synthcube.models.artifact import Artifact
from synthcube.models.family import SAMPLING_KEYS, FamilyConfig
from synthcube.schema import ConditionSpec, ImageSpec
from synthcube.sharing import runtimes
from synthcube.sharing.conversion import substitute
from synthcube.sharing.runtimes import RuntimeOrTorch

log = logging.getLogger("synthcube")

Pixels = npt.NDArray[np.float32]


def inference_settings(
    trained: Artifact, changes: Mapping[str, Any], runtime: str | None = None
) -> dict[str, Any]:
    """The settings of a training, with `changes` of seed, sampling and compute applied.

    Args:
        runtime: replaces sampling.runtime. Runtimes other than torch compute on
            their own device in 32 bits, as they were verified.

    Raises:
        ConfigError: another runtime than torch is to use a GPU.
    """
    settings = config.trained_settings(trained)
    settings["seed"] = changes.get("seed", settings["seed"])
    for section in ("sampling", "compute"):
        settings[section] = {**settings[section], **changes.get(section, {})}
    runtime = runtime or settings["sampling"].get("runtime", "torch")
    settings["sampling"]["runtime"] = runtime
    if runtime != "torch":
        device, accelerator = runtimes.get(runtime).device, settings["compute"]["accelerator"]
        if accelerator not in ("auto", device):
            raise ConfigError(
                f"--runtime {runtime} computes on the {device.upper()}, and compute.accelerator is "
                f"{accelerator}: use auto or {device}, or the runtime torch."
            )
        settings["compute"] |= {"accelerator": device, "precision": "32-true"}
    return settings


def seeded_conditions(
    specs: Sequence[ConditionSpec], requests: Sequence[Mapping[str, str]], seed: int
) -> tuple[list[int], Pixels]:
    """The seed of each image, and its conditions as the model sees them, (N, len(specs)).

    Conditions that a request does not name are drawn from the image's seed.
    """
    values = requested_values(specs, requests)
    seeds = inference.image_seeds(seed, len(requests))
    return seeds, draw_missing_conditions(
        values, specs, [dict(request) for request in requests], seeds
    )


class LoadedModel:
    """A trained model on a device, with the settings that its inference needs."""

    def __init__(
        self, trained: Artifact, settings: Mapping[str, Any], device: torch.device, precision: str
    ) -> None:
        """Build the model.

        Args:
            settings: see :func:`inference_settings`.
            precision: its full name, such as 32-true.
        """
        sampling = settings["sampling"]
        self.trained = trained
        self.image = trained.image
        self.data_config = trained_data_config(trained.config, trained.folder)
        self.family: Any = trained.build(device)
        self._trained_config: FamilyConfig = self.family.config
        self.sampling = {key: sampling.get(key) for key in SAMPLING_KEYS}
        self.sample_with({})
        self.precision = precision
        self.batch_size: int = sampling["batch_size"]
        self.postprocessing = Postprocessing(sampling.get("postprocessing", ()), trained.image)
        self.runtime: RuntimeOrTorch = sampling["runtime"]
        if self.runtime != "torch":
            substitute(self.family, trained.folder, self.runtime)

    def batches(self, num_images: int, batch_size: int | None = None) -> list[range]:
        """The indices of all images, in order, batch by batch."""
        size = batch_size or self.batch_size
        starts = range(0, num_images, size)
        return [range(start, min(start + size, num_images)) for start in starts]

    def sample_with(self, settings: Mapping[str, Any]) -> None:
        """Draw the next images with other settings; those that are None are the model's own.

        Args:
            settings: those of SAMPLING_KEYS.

        Raises:
            ConfigError: the model has no such setting, or not this value of it.
        """
        named = {key: value for key, value in settings.items() if value is not None}
        self.family.config = self._trained_config.with_sampling({**self.sampling, **named})

    def generate(
        self, seeds: Sequence[int], values: Pixels, source: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One batch of images, (B, C, *spatial) in [-1, 1] on the CPU, masks in whole classes.

        See :func:`synthcube.models.inference.generate`.
        """
        family = self.family
        source = None if source is None else self.sources(source, seeds)
        images = inference.generate(family, seeds, values, self.precision, family.device, source)
        return decoded(images, self.image.masks)

    def sources(self, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """What the model makes images out of, (B, S, *spatial) in [-1, 1].

        Of a model that fills holes: whole images get holes, one seed for each; and images with the
        mask of theirs are emptied there as in the training, whatever their file had in the holes.
        """
        if not self.data_config.inpainting:
            return images
        if images.shape[1] == self.image.channels:
            return cut_holes(images, self.data_config.inpainting, seeds)
        return voided(images[:, :-1], images[:, -1:] > 0)

    def reconstruct(self, originals: torch.Tensor) -> torch.Tensor:
        """One batch of reconstructions, (B, C, *spatial) in [-1, 1] on the CPU."""
        family, masks = self.family, self.image.masks
        is_whole = originals.shape[2:] == self.image.size
        images = inference.reconstruct(
            family, encoded(originals, masks), self.precision, family.device,
            None if is_whole else self.image.size, self.batch_size,
        )  # fmt: skip
        return decoded(images, masks)

    def require_size(self, size: Sequence[int], where: object) -> None:
        """Raise ImageError where the model can make nothing of images of that size.

        A model that was trained on patches takes images of any size; `where` begins the message.
        """
        name, trained = self.family.config.name, list(self.image.size)
        if list(size) == trained:
            return
        if not self.image.patches or len(size) != len(trained):
            raise ImageError(
                f"{where}: the images have size {list(size)}, the model was trained on "
                f"{'patches of ' if self.image.patches else ''}{trained}."
            )
        if self.image.source_channels and not self.family.translates_any_size:
            raise ImageError(
                f"{where}: the images have size {list(size)}. This {name} was trained on patches "
                f"of {trained}, and {name} cannot translate window by window without seams: give "
                "images of that size, or train ddpm or rectified_flow."
            )

    @property
    def source_config(self) -> DataConfig:
        """How images that have the source channels alone are preprocessed."""
        return self.data_config.of_sources(self.image.source_channels)

    @property
    def has_fixed_range(self) -> bool:
        """Whether the first channel that it makes has one range of intensities in all images."""
        target = self.data_config.targets(self.image)[0]
        return self.data_config.fixed_range(target)[1] is not None

    def load(self, manifest: Manifest) -> ImageCache:
        """The images of a manifest, preprocessed as those of the training."""
        data_config, sources = self.data_config, self.image.source_channels
        if (
            sources
            and (data_config.channels or data_config.inpainting)
            and len(read_image(manifest.rows[0].channels).tensor) == len(sources)
        ):
            data_config = self.source_config
        return load_images(manifest, data_config, environment.cache_folder())

    def reconstruction_spec(self, originals: ImageCache, index: int) -> ImageSpec:
        """The geometry and intensities of the reconstruction of an image: those of the original."""
        ranges = originals.intensity_ranges[index]
        size = originals.shapes[index][1:]
        return placed_like(self.image, originals.affines[index], size, ranges)

    def intensities(self, image: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
        """An image, (C, *spatial) in [-1, 1], in its own units and postprocessed.

        Voxels of masks are of their classes.
        """
        intensities = to_intensities(image, spec.intensity_range)
        for channel, classes in spec.masks.items():
            intensities[channel] = class_values(intensities[channel], classes)
        return self.postprocessing(intensities, spec.affine)

    def write(self, folder: Path, stem: str, image: torch.Tensor, spec: ImageSpec) -> list[Path]:
        """Write an image, (C, *spatial) in [-1, 1], as PNG or NIfTI; returns its files.

        Without masks it is one file. Else each channel is a file of its own, in their order; a
        colour picture stays one.
        """
        paths = []
        for ending, voxels, integer in self.files(image, spec):
            paths.append(folder / f"{stem}{ending}.{spec.file_format}")
            write_image(paths[-1], voxels, spec.affine, integer=integer)
        return paths

    def write_dicom(
        self, folder: Path, stem: str, image: torch.Tensor, spec: ImageSpec
    ) -> list[Path]:
        """Write an image, (C, *spatial) in [-1, 1], as DICOM; returns the folder of each volume.

        See :func:`synthcube.data.dicom_writing.write_dicom`.
        """
        affine = None if spec.file_format == "png" else spec.affine
        study = Study.of(self.trained.sha256, image)
        return [
            path
            for (channels, _), (ending, voxels, integer) in zip(
                files_of(spec), self.files(image, spec), strict=True
            )
            for path in write_dicom(
                folder / f"{stem}{ending}", voxels, affine, study, integer=integer,
                must_be_exact=channels[0] in spec.masks, number=channels[0] + 1,
            )
        ]  # fmt: skip

    def files(
        self, image: torch.Tensor, spec: ImageSpec
    ) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Of each file of an image: what its name ends in, its voxels, if they are whole numbers.

        Voxels are (C, *spatial) in their own units, postprocessed.
        """
        intensities = self.intensities(image, spec)
        integer = spec.integer and self.postprocessing.keeps_integers
        for channels, ending in files_of(spec):
            yield ending, intensities[channels], integer or channels[0] in spec.masks


def channels_to_translate(
    spec: ImageSpec, channels: int, where: object, *, fills_holes: bool = False
) -> list[int]:
    """Which of the channels of given images are the model's sources.

    Args:
        channels: those of the images: the sources alone, or all channels as in training.
        where: begins the ImageError about another number.
        fills_holes: whether whole images may be given too, into which holes are cut.
    """
    sources = list(spec.source_channels)
    if fills_holes and channels == spec.channels:
        return list(range(channels))
    if channels == len(sources):
        return list(range(channels))
    if channels != len(sources) + spec.channels:
        raise ImageError(
            f"{where}: the images have {channels} channel(s); the model makes {spec.channels} out "
            f"of {len(sources)}: give these, or all of them as in training."
        )
    return sources
