"""A trained model in Python: synthcube.from_pretrained, and what it gives."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image as Picture

from synthcube import compute, environment, storage
from synthcube.config import trained_settings
from synthcube.data.cache import load_images
from synthcube.data.conditions import complete, requested
from synthcube.data.images import write_image
from synthcube.data.manifest import read_manifest
from synthcube.data.pictures import grid
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.preprocessing import to_intensities, trained_data_config
from synthcube.errors import ConfigError, FamilyError, ImageError
from synthcube.models import artifact, inference
from synthcube.models.artifact import Artifact
from synthcube.models.family import Reconstructs, Samples
from synthcube.plugins import vouching as vouch_for_a_while
from synthcube.schema import MAX_IMAGES, ImageSpec
from synthcube.sharing.conversion import substitute
from synthcube.sharing.hub import located
from synthcube.sharing.runtimes import RuntimeOrTorch

_SHOWN = 64

Wish = Mapping[str, str | float]


def from_pretrained(
    model: str | Path,
    *,
    accelerator: str = "auto",
    runtime: RuntimeOrTorch = "torch",
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Generator:
    """Open a trained model.

    Args:
        model: a run, an artifact or an exported folder; or owner/name[@revision] of a Hub, with
            or without hf:// before it, where no such folder is here.
        accelerator: auto, cpu or gpu.
        runtime: what computes its networks; others than torch do so on the CPU, for a model that
            was exported for them.
        plugins: folders whose code this model, and no other, may run.
        trust: installed packages likewise.

    Raises:
        HubError: the Hub cannot be reached, or does not have it.
        ArtifactError: it is no trained model, or damaged.
    """
    text = str(model)
    is_name = text.partition("@")[0].count("/") == 1 and not text.startswith((".", "/", "~", "hf:"))
    if is_name and isinstance(model, str) and not Path(text).exists():
        text = f"hf://{text}"
    vouching = partial(vouch_for_a_while, tuple(plugins), tuple(trust))
    with vouching():
        trained = artifact.load(located(text))
        if runtime == "torch":
            return Generator(trained, compute.device(accelerator), vouching=vouching)
        opened = Generator(trained, torch.device("cpu"), precision="32-true", vouching=vouching)
    substitute(opened.family, trained.folder, runtime)
    return opened


@dataclass(frozen=True, slots=True)
class Images:
    """Images that a model made; a notebook shows them."""

    tensor: torch.Tensor
    """(N, C, *spatial), float32 in [-1, 1], on the CPU."""
    specs: tuple[ImageSpec, ...]
    """Of each image: what -1 and 1 stand for, where its voxels are."""
    after: Postprocessing

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        """One image, (C, *spatial) in the units of the images the model was trained on."""
        spec = self.specs[index]
        image = to_intensities(self.tensor[index], spec.intensity_range)
        made: npt.NDArray[np.float32] = self.after(image, spec.affine).numpy()
        return made

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self[index] for index in range(len(self)))

    def numpy(self) -> npt.NDArray[np.float32]:
        """All images, (N, C, *spatial) in the units of the images the model was trained on."""
        return np.stack(list(self))

    def save(self, folder: str | Path) -> list[Path]:
        """Write each as PNG or NIfTI, with its geometry; returns their paths.

        Raises:
            OutputError: `folder` cannot be written.
        """
        target = storage.make_folder(Path(folder))
        paths = []
        for index, spec in enumerate(self.specs):
            path = target / f"{index:05d}.{spec.file_format}"
            integer = spec.integer and self.after.keeps_integers
            write_image(path, torch.from_numpy(self[index]), spec.affine, integer=integer)
            paths.append(path)
        return paths

    def picture(self) -> Picture:
        """Up to 64 of them in one picture; a volume by its three middle planes."""
        spec = self.specs[0]
        return grid(
            list(self.tensor[:_SHOWN]),
            raster=spec.file_format == "png",
            spacing_mm=spec.spacing_mm,
        )

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
        self,
        trained: Artifact,
        device: torch.device,
        *,
        precision: str | None = None,
        vouching: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._vouching = vouching
        self.trained = trained
        self.device = device
        self.family: Any = trained.build(device)
        settings = trained_settings(trained)
        self._precision, _ = compute.precision(
            precision or settings["compute"]["precision"], device
        )
        self._batch_size = settings["sampling"]["batch_size"]
        self._after = Postprocessing(settings["sampling"]["postprocessing"], trained.image)

    @property
    def image(self) -> ImageSpec:
        """Size, channels, spacing, intensities and classes of what it makes."""
        return self.trained.image

    @property
    def conditions(self) -> dict[str, tuple[str, ...] | tuple[float, float]]:
        """What it can be told to follow: the classes of each name, or the range of a number."""
        return {
            each.name: each.classes if each.kind == "class" else (each.low, each.high)
            for each in self.image.conditions
        }

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        condition: Wish | Sequence[Wish] | None = None,
        batch_size: int | None = None,
    ) -> Images:
        """Make `n` images, the same as `synthcube infer -n N --seed SEED` makes.

        Args:
            seed: image i depends on it and on i alone.
            condition: what all of them follow, such as {"Label": "Hand"}, or one for each; what is
                left open is drawn from each image's seed.
            batch_size: images made at once; that of the config by default.

        Raises:
            ConfigError: the model knows no such condition, or their number is not `n`.
            FamilyError: it does not make images out of nothing.
        """
        if not 1 <= n <= MAX_IMAGES:
            raise ConfigError(f"n is {n}: 1 to {MAX_IMAGES} images are made at once.")
        if self.image.source_channels or not isinstance(self.family, Samples):
            raise FamilyError(
                f"{self.family.config.name} does not make images out of nothing here: use "
                "reconstruct, or synthcube infer -d for one that translates."
            )
        given = [condition or {}] * n if not isinstance(condition, Sequence) else list(condition)
        if len(given) != n:
            raise ConfigError(f"{len(given)} conditions for {n} images: give one for each.")
        wishes = [{name: str(value) for name, value in each.items()} for each in given]
        seeds = inference.image_seeds(seed, n)
        specs = self.image.conditions
        values = complete(requested(specs, wishes), specs, wishes, seeds)
        made = []
        for rows in self._batches(n, batch_size):
            made.append(
                inference.generate(
                    self.family, seeds[rows], values[rows], self._precision, self.device
                )
            )
        return Images(torch.cat(made), (self.image,) * n, self._after)

    def reconstruct(
        self, images: str | Path | torch.Tensor, *, batch_size: int | None = None
    ) -> Images:
        """Images through the model's bottleneck and back.

        Args:
            images: a folder or a CSV of images, or (N, C, *spatial) in [-1, 1].

        Raises:
            FamilyError: it does not reconstruct.
            ImageError, ManifestError: the images cannot be read, or are not of the model's shape.
        """
        if not isinstance(self.family, Reconstructs):
            raise FamilyError(f"{self.family.config.name} does not reconstruct images: use sample.")
        originals, specs = self._given(images)
        expected = (self.image.channels, *self.image.size)
        if tuple(originals.shape[1:]) != expected:
            raise ImageError(
                f"The images are {list(originals.shape[1:])}, the model was trained on "
                f"{list(expected)} (channels, then size)."
            )
        made = [
            inference.reconstruct(self.family, originals[rows], self._precision, self.device)
            for rows in self._batches(len(originals), batch_size)
        ]
        return Images(torch.cat(made), specs, self._after)

    def _given(
        self, images: str | Path | torch.Tensor
    ) -> tuple[torch.Tensor, tuple[ImageSpec, ...]]:
        if isinstance(images, torch.Tensor):
            return images.float(), (self.image,) * len(images)
        with self._vouching():
            config = trained_data_config(self.trained.config, self.trained.folder)
            cache = load_images(read_manifest(Path(images)), config, environment.cache_folder())
        specs = tuple(
            self.image.model_copy(
                update={
                    "affine": cache.affines[index].tolist(),
                    "intensity_range": cache.intensity_ranges[index].tolist(),
                }
            )
            for index in range(len(cache.affines))
        )
        return torch.from_numpy(cache.read(range(len(specs)))), specs

    def _batches(self, number: int, size: int | None) -> list[slice]:
        step = size or self._batch_size
        return [slice(start, start + step) for start in range(0, number, step)]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image.size))
        return f"Generator({self.family.config.name}, {size}, {self.image.channels} channel(s))"
