"""The evaluation of a set of predictions: one question after the other, each with its section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from synthcube.data.preprocessing import DataConfig
from synthcube.evaluation.class_fidelity import class_fidelity
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.extractors import load_extractor
from synthcube.evaluation.features import Features, extract
from synthcube.evaluation.fidelity import diversity, fidelity
from synthcube.evaluation.gallery import gallery
from synthcube.evaluation.inside_mask import add_inside_mask
from synthcube.evaluation.masks import compare_masks
from synthcube.evaluation.membership import membership
from synthcube.evaluation.memorisation import memorisation
from synthcube.evaluation.pairs import compare_pairs, match_pairs
from synthcube.evaluation.results import Picture, Section, missing
from synthcube.evaluation.sets import ImageSet
from synthcube.evaluation.usefulness import class_column, usefulness
from synthcube.models.artifact import Artifact


class Evaluation:
    """Comparable sets of images, and the questions to ask about them.

    Args:
        sets: `predictions`, `labels` and, to look for copies, `train_data`.
        folder: for tables that are too large for memory; it must stay until the end.
        trained: the model that made the predictions.
        data: how the real images were placed on their grid.
    """

    def __init__(
        self,
        sets: Mapping[str, ImageSet],
        config: EvaluationConfig,
        seed: int,
        folder: Path,
        device: torch.device,
        trained: Artifact | None = None,
        data: DataConfig | None = None,
    ) -> None:
        # masks are judged apart, by their classes
        self.sets = {name: images.without_masks() for name, images in sets.items()}
        self.whole_sets = dict(sets)
        self.config, self.seed, self.folder = config, seed, folder
        self.device, self.trained, self.data = device, trained, data or DataConfig()
        labels = sets["labels"]
        self.pairs = match_pairs(sets["predictions"], labels, config.pairs)
        self.extractor = load_extractor(config.extractor, labels.rank, device)

    def sections(self) -> Iterator[Section]:
        """The answers, question by question."""
        predictions, labels = self.sets["predictions"], self.sets["labels"]
        train_data, features = self.sets.get("train_data"), self._features
        config, seed = self.config, self.seed
        yield fidelity(
            predictions, labels, features["predictions"], features["labels"], config, seed
        )
        if column := class_column(predictions, labels):
            tables_of_both = features["predictions"], features["labels"]
            yield class_fidelity(predictions, labels, tables_of_both, column, config, seed)
        yield diversity(predictions, labels, seed)
        if self.pairs:
            section = compare_pairs(predictions, labels, self.pairs, seed)
            if config.mask_channel is not None:
                add_inside_mask(
                    section, predictions, labels, self.pairs, self.data, config.mask_channel, seed
                )
            yield section
        whole = self.whole_sets["predictions"], self.whole_sets["labels"]
        if whole[1].masks:
            yield compare_masks(*whole, self.pairs, seed)
        if train_data:
            tables = {name: table.of_images() for name, table in features.items()}
            yield memorisation(predictions, labels, train_data, tables, config, seed)
            yield membership(
                predictions, labels, train_data, seed, self.trained, device=self.device
            )
        else:
            reason = "the training images were not given (train_data)"
            yield Section("memorisation", {"near_copies_pixels": missing(reason)})
        if config.usefulness:
            answer = usefulness(predictions, labels, train_data, seed)
            if isinstance(answer, str):
                answer = Section("usefulness", {"accuracy_synthetic": missing(answer)})
            yield answer

    @property
    def num_sections(self) -> int:
        """How many answers :meth:`sections` gives."""
        predictions, labels = self.sets["predictions"], self.sets["labels"]
        optional = (
            class_column(predictions, labels), self.pairs, self.sets.get("train_data"),
            self.config.usefulness, self.whole_sets["labels"].masks,
        )  # fmt: skip
        return 3 + sum(map(bool, optional))

    def gallery(self) -> Picture:
        """Generated images beside real ones."""
        predictions, labels = self.whole_sets["predictions"], self.whole_sets["labels"]
        return gallery(predictions, labels, class_column(predictions, labels), self.seed)

    @cached_property
    def _features(self) -> dict[str, Features]:
        bounds = self.sets["labels"].bounds
        return {
            name: extract(images, self.extractor, bounds, self.config, self.folder, self.device)
            for name, images in self.sets.items()
        }
