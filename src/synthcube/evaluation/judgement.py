"""All that is asked about sets of images, one question after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube.artifact import Artifact
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.copies.membership import membership
from synthcube.evaluation.copies.memorisation import memorisation
from synthcube.evaluation.features.extractors import Extractor, load_extractor
from synthcube.evaluation.features.tables import Features, extract
from synthcube.evaluation.fidelity.diversity import diversity
from synthcube.evaluation.fidelity.findings import fidelity
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.pairs.findings import compare
from synthcube.evaluation.pairs.pairing import paired
from synthcube.evaluation.results import Section, missing
from synthcube.evaluation.usefulness.findings import usefulness

NO_TRAIN_DATA = "the training images were not given (train_data)"


class Judgement:
    """Sets of images that agree, and how they are to be compared.

    Args:
        sets: `predictions`, `labels` and, to look for copies, `train_data`.
        folder: for tables that are too large for memory; it must outlive this.
        trained: the model that made the predictions.

    Raises:
        SynthCubeError: the extractor cannot be had, or predictions and labels that belong
            together do not match.
    """

    def __init__(
        self,
        sets: Mapping[str, ImageSet],
        config: EvaluationConfig,
        seed: int,
        folder: Path,
        device: torch.device,
        trained: Artifact | None = None,
    ) -> None:
        self.predictions, self.labels = sets["predictions"], sets["labels"]
        self.train_data = sets.get("train_data")
        self.config, self.seed, self.folder = config, seed, folder
        self.device, self.trained = device, trained
        self.pairs = paired(self.predictions, self.labels, config.pairs)
        self.extractor: Extractor = load_extractor(config.extractor, self.labels.rank, device)

    def sections(self) -> Iterator[Section]:
        """What is found, question by question."""
        made, real, config, seed = self.predictions, self.labels, self.config, self.seed
        features = self._features
        yield fidelity(made, real, features["predictions"], features["labels"], config, seed)
        yield diversity(made, real, config, seed)
        if self.pairs:
            yield compare(made, real, self.pairs, config, seed)
        if self.train_data:
            tables = {name: _of_images(each) for name, each in features.items()}
            yield memorisation(made, real, self.train_data, tables, config, seed)
            yield membership(
                made, real, self.train_data, config, seed, self.trained, device=self.device
            )
        else:
            yield Section("memorisation", {"near_copies_pixels": missing(NO_TRAIN_DATA)})
        if config.usefulness:
            found = usefulness(made, real, self.train_data, config, seed)
            asked = Section("usefulness", {"accuracy_synthetic": missing(str(found))})
            yield asked if isinstance(found, str) else found

    @cached_property
    def _features(self) -> dict[str, Features]:
        sets = (self.predictions, self.labels, *((self.train_data,) if self.train_data else ()))
        return {
            each.name: extract(
                each, self.extractor, self.labels.bounds, self.config, self.folder, self.device
            )
            for each in sets
        }


def _of_images(features: Features) -> npt.NDArray[np.float32]:
    """(N, D): one row for each image, the mean over its slices, planes side by side."""
    planes = []
    for table in features.planes.values():
        rows = table.rows()
        if table.slices > 1:
            rows = rows.reshape(table.images, table.slices, table.dimension).mean(axis=1)
        planes.append(rows)
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=1)
