"""How fast batches come out of the data room, from the second epoch on."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.images import write_jpegs, write_volumes
from bench.process import apart
from bench.report import Options, Row


def measure(options: Options) -> list[Row]:
    num_jpegs, num_volumes, num_epochs = (32, 2, 2) if options.quick else (1500, 8, 20)
    pictures = apart(images_per_second, num_jpegs, 2, num_epochs)
    volumes = apart(images_per_second, num_volumes, 3, num_epochs)
    return [
        Row(
            "data: images per CPU-second, 64x64 JPEG, resize and rescale, batch 16, no workers",
            pictures,
            f"{pictures:,.0f}",
            at_least=10_000,
        ),
        Row(
            "data: volumes per CPU-second, 128x128x128 float .nii.gz to 64x64x64, batch 2",
            volumes,
            f"{volumes:,.0f}",
            at_least=300,
        ),
    ]


def images_per_second(num_images: int, rank: int, num_epochs: int) -> float:
    """The median epoch's images for each CPU-second, the first epoch left out."""
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import DataModule
    from synthcube.data.preprocessing import DataConfig

    write = write_jpegs if rank == 2 else write_volumes
    with TemporaryDirectory() as name:
        folder = Path(name)
        data = DataModule(
            read_manifest(write(folder / "images", num_images)),
            DataConfig(size=(64,) * rank, validation_fraction=0),
            batch_size=16 if rank == 2 else 2,
            seed=0,
            cache=folder / "cache",
        )
        loader = data.train_dataloader()
        speeds = []
        for epoch in range(1 + num_epochs):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            start = time.process_time()
            num_seen = sum(len(batch["image"]) for batch in loader)
            speeds.append(num_seen / (time.process_time() - start))
    return median(speeds[1:])
