"""What turns an image into the numbers that sets of images are compared by, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from synthcube.errors import ConfigError
from synthcube.evaluation.config import ExtractorConfig, ExtractorName
from synthcube.evaluation.features.radiomic import radiomic_features
from synthcube.evaluation.features.random_network import RandomNetwork
from synthcube.evaluation.features.resnets import medicalnet, radimagenet
from synthcube.evaluation.features.trained import Trained, efficientnet, inception
from synthcube.models.nets.perceptual import require_efficientnet

_KEY = "evaluation.extractor"
_OWN = "numbers of this extractor compare with no one else's"


@dataclass(frozen=True, slots=True)
class Extractor:
    """Features of images, and what a reader must know about them."""

    name: ExtractorName
    what: str
    """In a sentence."""
    sha256: str
    """Of the file of its weights, of the tensors where they are generated; empty for none."""
    dimension: int
    """Numbers for each grey (or colour) image; several channels give as many times more."""
    comparable: bool
    """Whether others use the same features, so that numbers may stand beside theirs."""
    volumes: bool
    """Takes whole volumes, (N, 1, X, Y, Z), instead of slices."""
    colours: bool
    """Looks at RGB together; otherwise each channel is a grey image."""
    compute: Callable[[torch.Tensor], torch.Tensor]
    """(N, C, *spatial) in [0, 1], C 3 for a network of photographs and 1 else, to (N, dimension)"""

    def __call__(self, images: torch.Tensor, colour: bool) -> torch.Tensor:
        """(N, C, *spatial), float32 in [0, 1], pictures with rows down, to (N, D), float32.

        Args:
            colour: the three channels are red, green and blue. Otherwise every channel is a grey
                image and their features stand side by side, D = C * dimension, so that two
                channels that changed places are seen.
        """
        if colour and self.colours:
            return self.compute(images)
        grey = images.flatten(0, 1)[:, None]
        if self.colours:
            grey = grey.expand(-1, 3, *[-1] * (grey.ndim - 2))
        return self.compute(grey).reshape(len(images), -1)

    @property
    def record(self) -> dict[str, Any]:
        """For results.yaml."""
        return {
            "name": self.name, "what": self.what, "sha256": self.sha256 or None,
            "dimension": self.dimension, "comparable": self.comparable,
        }  # fmt: skip


def require_extractor(config: ExtractorConfig, rank: int) -> None:
    """Find out before any image is read whether the extractor can be had.

    Args:
        rank: number of spatial axes of the images.

    Raises:
        ConfigError: it judges volumes and these are pictures, or its weights are no file.
        FamilyError: a package is missing.
    """
    if config.name == "efficientnet-lite0":
        require_efficientnet(f"{_KEY} {config.name}", "choose another extractor, such as radiomic")
    if config.name == "inception" and not (find_spec("torch_fidelity")):
        raise ConfigError(
            f"{_KEY} inception needs the package torch-fidelity, which is not installed: "
            "pip install torch-fidelity, or choose another extractor."
        )
    if config.name == "medicalnet" and rank != 3:
        raise ConfigError(
            f"{_KEY} medicalnet judges volumes, and these images are 2D: choose another extractor, "
            "such as efficientnet-lite0 or radimagenet."
        )
    if config.weights is not None and not Path(config.weights).is_file():
        raise ConfigError(f"{_KEY}.weights: there is no file {config.weights}")


def load_extractor(
    config: ExtractorConfig, rank: int, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of that name, ready on `device`.

    Args:
        rank: number of spatial axes of the images.

    Raises:
        ConfigError: as :func:`require_extractor`.
        FamilyError: a package is missing.
        ArtifactError: the weights are damaged, or those of another network.
    """
    require_extractor(config, rank)
    if config.name == "radiomic":
        return Extractor(
            config.name,
            "Statistics of intensities, gradients and co-occurring grey levels: no weights; "
            f"{_OWN}.",
            "", radiomic_features.dimension, False, False, False, radiomic_features,
        )  # fmt: skip
    if config.name == "random-projection":
        network = RandomNetwork().to(device)
        return Extractor(
            config.name,
            f"Convolutions with fixed random weights, which were trained on nothing; {_OWN}.",
            network.sha256, network.dimension, False, False, False, network,
        )  # fmt: skip
    found = _trained(config)
    return Extractor(
        config.name, found.what, found.sha256, found.dimension, True,
        config.name == "medicalnet", config.name != "medicalnet", found.to(device),
    )  # fmt: skip


def _trained(config: ExtractorConfig) -> Trained:
    if config.name == "efficientnet-lite0":
        return efficientnet()
    path = Path(str(config.weights))
    if config.name == "inception":
        return inception(path)
    return radimagenet(path) if config.name == "radimagenet" else medicalnet(path)
