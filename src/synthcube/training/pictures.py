"""Sample pictures during a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback

from synthcube.data.channels import decoded
from synthcube.data.conditions import caption
from synthcube.data.pictures import grid, save_picture
from synthcube.environment import derived_seed
from synthcube.models.family import Reconstructs, Samples
from synthcube.schema import Batch, ImageSpec
from synthcube.storage import make_folder
from synthcube.training.loggers import Report
from synthcube.training.preemption import Preemption
from synthcube.training.strategies import is_sharded


@dataclass(eq=False, repr=False)
class SamplePictures(Callback):
    """Writes a picture of samples or reconstructions every N epochs, always with the same seeds.

    Args:
        examples: images to reconstruct, or whose conditions the samples follow.
        image: what the pictures show, with its masks.
        averaged: returns the model with averaged weights, or None if there is none.
    """

    folder: Path
    examples: Batch
    image: ImageSpec
    averaged: Callable[[], Any]
    every_n_epochs: int
    seed: int
    preemption: Preemption

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs or trainer.should_stop
        # Every process has a part of sharded weights, which the others need.
        takes_part = trainer.is_global_zero or is_sharded(trainer.strategy)
        if not (takes_part and self.every_n_epochs):
            return
        if epoch % self.every_n_epochs and not is_last:
            return
        # A signal interrupts the picture, unless other processes wait for this one.
        alone = not is_sharded(trainer.strategy)
        if alone and self.preemption.heard:
            return
        with self.preemption.immediate() if alone else nullcontext():
            self._write(trainer, self.averaged() or module, epoch)

    def _write(self, trainer: pl.Trainer, model: Any, epoch: int) -> None:
        was_training = model.training
        model.eval()
        # Not inference_mode: weights gathered in it could not be trained later.
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                columns = self._columns(model)
        finally:
            model.train(was_training)
        if columns and trainer.is_global_zero:
            path = make_folder(self.folder) / f"epoch_{epoch:04d}.png"
            picture = grid(
                [image for row in zip(*columns.values(), strict=True) for image in row],
                raster=self.image.file_format == "png",
                spacing_mm=self.image.spacing_mm,
                masks=self.image.masks,
                captions=self._captions(model, len(columns)),
                headings=list(columns) if len(columns) > 1 else (),
                title=f"Epoch {epoch}",
            )
            save_picture(path, picture)
            for logger in trainer.loggers:
                if isinstance(logger, Report):
                    logger.show_picture(path, trainer.global_step)

    def _columns(self, module: Any) -> dict[str, Sequence[torch.Tensor]]:
        """Images of each column, (C, *spatial), by its heading; none for a model that has none."""
        device = module.device
        masks, number = self.image.masks, len(self.examples["index"])
        images = decoded(self.examples["image"], masks)
        if isinstance(module, Samples):
            seeds = [derived_seed(self.seed, "picture", i) for i in range(number)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            condition = move_data_to_device(self.examples["condition"], device)
            samples = decoded(module.sample(generators, condition).float().cpu(), masks)
            source = self.examples["condition"]["source"]
            if not source.shape[1]:
                return {"Generated": list(samples)}
            several = source.shape[1] > 1
            sources = {
                f"Source {n}" if several else "Source": list(channel)
                for n, channel in enumerate(source.split(1, dim=1), start=1)
            }
            return {**sources, "Generated": list(samples), "Truth": list(images)}
        if isinstance(module, Reconstructs):
            outcome = module.reconstruct(self.examples["image"].to(device)).float().cpu()
            return {"Original": list(images), "Reconstructed": list(decoded(outcome, masks))}
        return {}

    def _captions(self, module: Any, num_columns: int) -> list[str]:
        """The conditions of each row, below the generated image."""
        values = self.examples["condition"]["values"]
        texts = [caption(module.image.conditions, row) for row in values.tolist()]
        place = max(0, num_columns - 2) if isinstance(module, Samples) else num_columns
        return [text if column == place else "" for text in texts for column in range(num_columns)]
