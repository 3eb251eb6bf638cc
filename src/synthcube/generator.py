"""The Python interface: synthcube.from_pretrained, the Generator it returns, and its Images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from PIL.Image import Image as Picture

from synthcube import compute, storage, terminal
from synthcube.data.conditions import caption, cell, requested_values
from synthcube.data.geometry import placed_like
from synthcube.data.manifest import read_manifest
from synthcube.data.nifti import nifti_of
from synthcube.data.pictures import grid, plane_of, tile
from synthcube.data.raster import picture_of
from synthcube.errors import ConfigError, FamilyError, ImageError
from synthcube.models import artifact, inference
from synthcube.models.family import Reconstructs, Samples
from synthcube.plugins import vouching as vouch_for_a_while
from synthcube.schema import MAX_IMAGES, ImageSpec
from synthcube.sharing.hub import located
from synthcube.sharing.runtimes import RuntimeOrTorch
from synthcube.tasks.inference_jobs import GRID_IMAGES
from synthcube.tasks.loaded_model import (
    LoadedModel,
    channels_to_translate,
    inference_settings,
    seeded_conditions,
)

ConditionRequest = Mapping[str, str | float]
Conditions = ConditionRequest | Sequence[ConditionRequest] | None

_BAR_AFTER_S = 2.0
"""Seconds after which a progress bar is worth its place."""


def from_pretrained(
    model: str | Path,
    *,
    accelerator: str = "auto",
    runtime: RuntimeOrTorch = "torch",
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Generator:
    """Open a trained model; see :func:`synthcube.from_pretrained`.

    An owner/name[@revision] without hf:// means a Hub, unless there is such a folder.

    Raises:
        HubError, ArtifactError: there is no such model, or it is damaged.
    """
    text = str(model)
    is_name = text.partition("@")[0].count("/") == 1 and not text.startswith((".", "/", "~", "hf:"))
    if is_name and isinstance(model, str) and not Path(text).exists():
        text = f"hf://{text}"
    vouching = partial(vouch_for_a_while, tuple(plugins), tuple(trust))
    with vouching():
        trained = artifact.load(located(text))
        changes = {"compute": {"accelerator": accelerator if runtime == "torch" else "auto"}}
        settings = inference_settings(trained, changes, runtime)
        device = compute.device(settings["compute"]["accelerator"])
        precision, _ = compute.resolve_precision(settings["compute"]["precision"], device)
        return Generator(LoadedModel(trained, settings, device, precision), vouching)


@dataclass(frozen=True, slots=True)
class Images:
    """Images that a model made; a notebook shows them."""

    tensor: torch.Tensor
    """(N, C, *spatial), float32 in [-1, 1], on the CPU."""
    specs: tuple[ImageSpec, ...]
    """Of each image: the intensities that -1 and 1 stand for, and the place of its voxels."""
    model: LoadedModel
    captions: tuple[str, ...] = ()
    """What :meth:`picture` writes below each: its conditions and its seed."""

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        """One image, (C, *spatial) in the units of the images the model was trained on."""
        image: npt.NDArray[np.float32] = self.model.intensities(
            self.tensor[index], self.specs[index]
        ).numpy()
        return image

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self[index] for index in range(len(self)))

    def numpy(self) -> npt.NDArray[np.float32]:
        """All images, (N, C, *spatial) in the units of the images the model was trained on."""
        return np.stack(list(self))

    def save(self, folder: str | Path) -> list[Path]:
        """Write each as PNG or NIfTI, with its geometry; returns the paths of all files.

        An image with masks has several files.

        Raises:
            OutputError: `folder` cannot be written.
        """
        target = storage.make_folder(Path(folder))
        return [
            path
            for index, (image, spec) in enumerate(zip(self.tensor, self.specs, strict=True))
            for path in self.model.write(target, f"{index:05d}", image, spec)
        ]

    def picture(self) -> Picture:
        """Up to 64 of them in one picture; a volume by its three middle planes."""
        spec = self.specs[0]
        return grid(
            list(self.tensor[:GRID_IMAGES]),
            raster=spec.file_format == "png",
            spacing_mm=spec.spacing_mm,
            captions=self.captions[:GRID_IMAGES],
            masks=spec.masks,
        )

    def to_pil(self, plane: str = "axial") -> list[Picture]:
        """Each image as a PIL image of its own size.

        Pictures have the pixels that :meth:`save` writes. Of volumes, and other images of NIfTI
        files, the model's range becomes black to white, and voxels are as wide as they are high.
        Masks stand beside the image, from black to white.

        Args:
            plane: the middle plane of a volume to show: axial, coronal or sagittal.

        Raises:
            ImageError: there is no such plane.
        """
        pairs = list(zip(self.tensor, self.specs, strict=True))
        if self.specs[0].file_format == "png" and self.specs[0].masks:
            tiles = [tile(image, least=1, masks=spec.masks) for image, spec in pairs]
            return [PIL.Image.fromarray(shown.pixels) for shown in tiles]
        if self.specs[0].file_format == "png":
            return [picture_of(self.model.intensities(image, spec)) for image, spec in pairs]
        return [plane_of(image, plane, spacing_mm=spec.spacing_mm) for image, spec in pairs]

    def to_nifti(self) -> list[nib.Nifti1Image]:
        """Each image as a nibabel image: its intensities, its affine, as :meth:`save` writes it.

        Voxels are (X, Y, Z), where Z is 1 for a 2D image; several channels (X, Y, Z, 1, C). An
        image with masks is several, one after the other, as its files are.
        """
        return [
            nifti_of(voxels, spec.affine, integer=integer)
            for image, spec in zip(self.tensor, self.specs, strict=True)
            for _, voxels, integer in self.model.files(image, spec)
        ]

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.picture().save(buffer, "PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"Images({len(self)} of {' x '.join(map(str, self.tensor.shape[1:]))})"


class Generator:
    """A trained model that makes images; see :func:`from_pretrained`.

    >>> model = synthcube.from_pretrained("owner/name")  # doctest: +SKIP
    >>> model.sample(4, seed=1, condition={"Label": "Hand"}).save("images")  # doctest: +SKIP
    """

    def __init__(
        self, model: LoadedModel, vouching: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._model = model
        self._vouching = vouching
        self.trained, self.family, self.device = model.trained, model.family, model.family.device

    @property
    def image(self) -> ImageSpec:
        """Size, channels, spacing, intensities and classes of the images it makes."""
        return self._model.image

    @property
    def conditions(self) -> dict[str, tuple[str, ...] | tuple[float, float]]:
        """The conditions it can follow: the classes of each name, or the range of a number."""
        return {
            spec.name: spec.classes if spec.kind == "class" else (spec.low, spec.high)
            for spec in self.image.conditions
        }

    def sample(
        self,
        what: int | str | None = None,
        /,
        *,
        n: int | None = None,
        seed: int = 0,
        condition: Conditions = None,
        batch_size: int | None = None,
        guidance: float | None = None,
        autoguidance: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        truncation: float | None = None,
    ) -> Images:
        """Make images, the same as `synthcube infer -n N --seed SEED` makes.

        >>> model.sample(4)  # doctest: +SKIP
        >>> model.sample("Hand", n=4, guidance=3)  # doctest: +SKIP

        Args:
            what: how many; or a class, if the model has one condition with classes.
            n: how many, 1 by default.
            seed: image i depends on it and on i alone.
            condition: the conditions of all images, such as {"Label": "Hand"}, or a list with those
                of each; conditions that are left out are drawn from each image's seed.
            batch_size: images made at once; that of the config by default.
            guidance: how strictly conditions are followed; 1: as learned.
            autoguidance: how far images are driven away from what earlier weights would make.
            sampler, steps: how images are drawn, such as "heun" in 10.
            truncation: spread of stylegan's styles, 0 to 1.

        Raises:
            ConfigError: the model knows no such condition or class, or their number is not `n`.
            FamilyError: the model does not generate images.
        """
        if isinstance(what, str):
            condition = self._with_class(what, condition)
        elif what is not None:
            if n is not None:
                raise ConfigError(f"sample({what}, n={n}): the number is given twice.")
            n = what
        n = 1 if n is None else n
        if not 1 <= n <= MAX_IMAGES:
            raise ConfigError(f"n is {n}: 1 to {MAX_IMAGES} images are made at once.")
        if self.image.source_channels or not isinstance(self.family, Samples):
            raise FamilyError(
                f"{self.family.config.name} does not make images out of nothing here: use "
                "reconstruct, or translate for one that makes images out of others."
            )
        self._model.sample_with({
            "guidance": guidance, "autoguidance": autoguidance, "sampler": sampler,
            "steps": steps, "truncation": truncation,
        })  # fmt: skip
        texts = _texts(condition, n)
        seeds, values = seeded_conditions(self.image.conditions, texts, seed)
        spans = _with_progress(self._model.batches(n, batch_size), "Generating")
        batches = [self._model.generate(seeds[span], values[span]) for span in spans]
        captions = [
            caption(self.image.conditions, *of_image)
            for of_image in zip(values, seeds, strict=True)
        ]
        return Images(torch.cat(batches), (self.image,) * n, self._model, tuple(captions))

    def translate(
        self,
        images: str | Path | torch.Tensor,
        *,
        seed: int = 0,
        condition: Conditions = None,
        batch_size: int | None = None,
        guidance: float | None = None,
        autoguidance: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        truncation: float | None = None,
    ) -> Images:
        """Make an image out of each, the same as `synthcube infer -d IMAGES --seed SEED` makes.

        Args:
            images: a folder or a CSV of images, or (N, C, *spatial) in [-1, 1]; of the model's
                source channels alone, or of all channels as in its training.
            seed, batch_size, guidance, autoguidance, sampler, steps, truncation: as of
                :meth:`sample`.
            condition: the conditions of all images, or a list with those of each, over those in
                the columns of a CSV; what is in neither is left open.

        Raises:
            ConfigError: the model knows no such condition, or their number is another.
            FamilyError: the model does not make images out of others.
            ImageError, ManifestError: the images cannot be read, or do not fit the model.
        """
        if not self.image.source_channels:
            raise FamilyError(
                f"This {self.family.config.name} does not translate images (it was trained without "
                "data.source_channels): use sample or reconstruct."
            )
        self._model.sample_with({
            "guidance": guidance, "autoguidance": autoguidance, "sampler": sampler,
            "steps": steps, "truncation": truncation,
        })  # fmt: skip
        if isinstance(images, torch.Tensor):
            originals, specs = images.float(), (self.image,) * len(images)
            texts = _texts(condition, len(images))
        else:
            with self._vouching():
                manifest = read_manifest(Path(images))
                cache = self._model.load(manifest)
                manifest = cache.rows_of(manifest)
            originals = torch.from_numpy(cache.read(range(len(cache.affines))))
            size = cache.shape[2:]
            specs = tuple(placed_like(self.image, affine, size) for affine in cache.affines)
            names = [spec.name for spec in self.image.conditions]
            texts = [
                {name: cell(row, name) for name in names} | changed
                for row, changed in zip(
                    manifest.rows, _texts(condition, len(originals)), strict=True
                )
            ]
        fills_holes = self._model.data_config.inpainting is not None
        channels = channels_to_translate(
            self.image, originals.shape[1], "translate", fills_holes=fills_holes
        )
        self._require_shape(originals, originals.shape[1])
        values = requested_values(self.image.conditions, texts)
        seeds = inference.image_seeds(seed, len(originals))
        batches = [
            self._model.generate(seeds[span], values[span], originals[span][:, channels])
            for span in _with_progress(
                self._model.batches(len(originals), batch_size), "Translating"
            )
        ]
        return Images(torch.cat(batches), specs, self._model)

    def reconstruct(
        self, images: str | Path | torch.Tensor, *, batch_size: int | None = None
    ) -> Images:
        """Images through the model's bottleneck and back.

        Args:
            images: a folder or a CSV of images, or (N, C, *spatial) in [-1, 1].

        Raises:
            FamilyError: the model does not reconstruct.
            ImageError, ManifestError: the images cannot be read, or are not of the model's shape.
        """
        if not isinstance(self.family, Reconstructs):
            raise FamilyError(f"{self.family.config.name} does not reconstruct images: use sample.")
        if isinstance(images, torch.Tensor):
            originals, specs = images.float(), (self.image,) * len(images)
        else:
            with self._vouching():
                cache = self._model.load(read_manifest(Path(images)))
            indices = range(len(cache.affines))
            originals = torch.from_numpy(cache.read(indices))
            specs = tuple(self._model.reconstruction_spec(cache, index) for index in indices)
        self._require_shape(originals, self.image.channels)
        spans = _with_progress(self._model.batches(len(originals), batch_size), "Reconstructing")
        batches = [self._model.reconstruct(originals[span]) for span in spans]
        return Images(torch.cat(batches), specs, self._model)

    def _require_shape(self, originals: torch.Tensor, channels: int) -> None:
        expected = (channels, *self.image.size)
        if self.image.patches and originals.shape[1] == channels:
            self._model.require_size(originals.shape[2:], "The images")
        elif tuple(originals.shape[1:]) != expected:
            raise ImageError(
                f"The images are {list(originals.shape[1:])}, the model was trained on "
                f"{list(expected)} (channels, then size)."
            )

    def _with_class(self, name: str, condition: Conditions) -> Conditions:
        """The conditions, and that of the only condition with classes.

        Raises:
            ConfigError: there is none, there are several, or it is in `condition` too.
        """
        columns = [spec.name for spec in self.image.conditions if spec.kind == "class"]
        if not columns:
            raise ConfigError(
                f"sample({name!r}): this model was trained without classes; leave {name!r} out."
            )
        if len(columns) > 1:
            raise ConfigError(
                f"sample({name!r}): this model has several conditions with classes, "
                f"{', '.join(columns)}: say which, as in condition={{{columns[0]!r}: {name!r}}}."
            )
        requests = condition if isinstance(condition, Sequence) else [condition or {}]
        if any(key.casefold() == columns[0].casefold() for request in requests for key in request):
            raise ConfigError(
                f"sample({name!r}): {columns[0]} is also in `condition`; give it once."
            )
        joined = [{**request, columns[0]: name} for request in requests]
        return joined if isinstance(condition, Sequence) else joined[0]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image.size))
        return f"Generator({self.family.config.name}, {size}, {self.image.channels} channel(s))"


def _texts(condition: Conditions, n: int) -> list[dict[str, str]]:
    """The conditions of each of `n` images, as a CSV would have them."""
    requests = list(condition) if isinstance(condition, Sequence) else [condition or {}] * n
    if len(requests) != n:
        raise ConfigError(f"{len(requests)} conditions for {n} images: give one for each.")
    return [{name: str(value) for name, value in request.items()} for request in requests]


def _with_progress(batches: Sequence[range], title: str) -> Iterator[slice]:
    """The span of each batch; a bar follows them in a terminal or a notebook, not in a log."""
    with terminal.Progress(
        title, sum(map(len, batches)),
        bar_after_s=_BAR_AFTER_S, has_lines=False, in_notebook=True,
    ) as bar:  # fmt: skip
        for batch in batches:
            yield slice(batch.start, batch.stop)
            bar.advance(len(batch))
