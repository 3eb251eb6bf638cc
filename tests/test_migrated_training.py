"""A migrated project trains as GaNDLF-Synth trained it: the same losses, epoch by epoch.

GaNDLF-Synth itself is not installed. Its training is written out here as it was seen to run: its
networks (tests/test_import_gandlf.py), from the same first weights; its optimizer with GaNDLF's
defaults; every image once an epoch; intensities scaled by its `rescale`; and its losses. What
is random, and could not be repeated there, is drawn as SynthCube does: the order of the images, the
noise and its steps. So the curves are equal but for rounding, and not only alike.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler
from PIL import Image
from torch import nn
from torch.nn import functional

from synthcube import config, reading
from synthcube.data.batches import EpochBatches
from synthcube.data.manifest import read_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.environment import derived_seed
from synthcube.schema import ImageSpec

NUM_IMAGES, BATCH = 64, 8
SIDES = {2: 16, 3: 8}
EPOCHS = 6
LR = 0.002
TOLERANCE = 2e-3  # rounding, which grows from step to step
Step = Callable[[nn.Module, torch.Tensor], torch.Tensor]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpm": {
        "num_channels": [8, 16], "num_res_blocks": [1, 1], "attention_levels": [False, True],
        "num_head_channels": 4, "norm_num_groups": 4,
    },
    "vqvae": {
        "num_channels_upsample_downsample_layers": [8, 16], "num_residual_layers": 2,
        "num_residual_channels": [8, 16], "num_embeddings": 8, "embedding_dim": 4,
        "downsample_conv_parameters": [[2, 4, 1, 1]] * 2,
        "upsample_conv_parameters": [[2, 4, 1, 1, 0]] * 2,
    },
}  # fmt: skip


RANGES = {  # transforms, and what they make of 0 and 255
    "signed": ({"rescale": {"in_min_max": [0, 255], "out_min_max": [-1, 1]}}, (-1, 1)),
    "unit": ({"rescale": {"in_min_max": [0, 255]}}, (0, 1)),
    "raw": ({"clip": {"min": 0, "max": 255}}, (0, 255)),
}


def old_yaml(
    path: Path, model: str, size: int = SIDES[2], values_seen: str = "signed", dims: int = 2,
    **changed: Any,
) -> Path:  # fmt: skip
    """The YAML of the measured baseline, for small images."""
    stage = {"resize": [size] * dims, **RANGES[values_seen][0]}
    stages = ("train", "val", "test", "inference")
    section = {
        "model_name": model, "labeling_paradigm": "unlabeled", "n_channels": 1,
        "n_dimensions": dims, "norm_type": "batch", "converter_type": "soft",
        "tensor_shape": [size] * dims,
        "architecture": ARCHITECTURES[model], "losses": {"name": "mse"},
        "optimizers": {"name": "adam", "lr": LR},
    } | changed  # fmt: skip
    values = {
        "modality": "rad", "num_epochs": EPOCHS, "batch_size": BATCH,
        "data_augmentation": {}, "data_postprocessing": {},
        "save_model_every_n_epochs": 1, "compute": {}, "model_config": section,
        "data_preprocessing": dict.fromkeys(stages, stage),
        "inference_parameters": {"batch_size": 16, "n_images_to_generate": 32},
    }  # fmt: skip
    path.write_text(reading.dump(values))
    return path


def denoising(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The loss of a DDPM: the noise at a random one of 1000 linear steps, drawn after it."""
    noise = torch.randn_like(images)
    step = torch.randint(0, 1000, (len(images),))
    noised = DDPMScheduler(1000).add_noise(images, noise, step)
    return functional.mse_loss(network(noised, step), noise)


def reconstruction(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The loss of a VQVAE: reconstruction and commitment."""
    assert isinstance(network.encoder, nn.Module)
    commitment, codes = network.quantizer(network.encoder(images))
    return functional.mse_loss(network.decoder(codes), images) + commitment


def old_curve(network: nn.Module, images: torch.Tensor, loss_of: Step) -> list[float]:
    """The mean loss of each epoch, with GaNDLF's Adam, which decays weights by 5e-5."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=5e-5)
    network.train()
    batches = EpochBatches(range(NUM_IMAGES), BATCH, 0, shuffle=True)
    means, step = [], 0
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        losses = []
        for batch in batches:
            torch.manual_seed(derived_seed(0, "step", step))
            loss = loss_of(network, images[[row for _, row in batch]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        means.append(float(np.mean(losses)))
    return means


def old_network(module: ModuleType, model: str, dims: int = 2) -> nn.Module:
    """With the first weights that torch gives its layers."""
    torch.manual_seed(1)
    if model == "vqvae":
        network: nn.Module = module.OldVQVAE(dims)
        network.quantizer.quantizer.decay = 0.5  # its default
        return network
    return module.plain(module.DiffusionModelUNet(
        spatial_dims=dims, in_channels=1, out_channels=1, num_channels=(8, 16),
        num_res_blocks=(1, 1), attention_levels=(False, True), norm_num_groups=4,
        num_head_channels=4,
    ))  # fmt: skip


def new_curve(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs: dict[str, float] = {}
    for row in rows:
        if row.get("train/loss"):
            epochs[row["epoch"]] = float(row["train/loss"])
    return [epochs[str(epoch)] for epoch in range(1, EPOCHS + 1)]


@pytest.fixture
def project(cli: Any, tmp_path: Path, gandlf_networks: ModuleType) -> Callable[..., list[float]]:
    """Trains a migrated project from an imported first checkpoint; returns the loss by epoch."""

    def train(
        model: str, values_seen: str, name: str, *overrides: str, dims: int = 2
    ) -> list[float]:
        yaml, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
        old_yaml(yaml, model, SIDES[dims], values_seen, dims)
        if not new.exists():
            network = old_network(gandlf_networks, model, dims)
            gandlf_networks.checkpoint(network, tmp_path / "old" / "checkpoints" / "last.ckpt")
            run(cli, "import", tmp_path / "old", "--family", model, "-c", yaml, "-o",
                tmp_path / "first")  # fmt: skip
            run(cli, "migrate", yaml, "-o", new)
        settings = (f"training.start_from={tmp_path / 'first'}", *overrides)
        words = [word for setting in settings for word in ("--set", setting)]
        run(cli, "train", "-c", new, "-d", tmp_path / "data", "-o", tmp_path / name, *words)
        return new_curve(tmp_path / name)

    return train


def run(cli: Any, *words: object) -> None:
    code, _, err = cli(*words)
    assert code == 0, err


def images(folder: Path, dims: int) -> torch.Tensor:
    """(N, 1, X, Y[, Z]) in [0, 1]: the images of the project, which are written to `folder`."""
    manifest = write_phantoms(folder, num=NUM_IMAGES, size=(SIDES[dims],) * dims)
    files = [row.channels[0] for row in read_manifest(manifest).rows]
    if dims == 3:
        values = np.stack([np.asarray(nibabel.load(file).dataobj, np.float32) for file in files])
    else:
        values = np.stack([np.asarray(Image.open(file), dtype=np.float32).T for file in files])
    return torch.from_numpy(np.ascontiguousarray(values))[:, None] / 255


LOSSES = {"ddpm": denoising, "vqvae": reconstruction}
OTHERS = {  # defaults of SynthCube, each of which would be another training
    "ddpm": ("model.schedule=cosine", "model.prediction=v"),
    "vqvae": ("model.codebook_decay=0.99", "model.revive_below=0.1", "model.losses=[{name: l1}]"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "values_seen", "dims"),
    [
        ("ddpm", "signed", 2), ("ddpm", "unit", 2), ("vqvae", "signed", 2), ("vqvae", "raw", 2),
        ("ddpm", "signed", 3), ("vqvae", "signed", 3),
    ],
)  # fmt: skip
def test_the_losses_are_those_of_the_old_training(
    project: Callable[..., list[float]],
    tmp_path: Path,
    gandlf_networks: ModuleType,
    model: str,
    values_seen: str,
    dims: int,
) -> None:
    low, high = RANGES[values_seen][1]
    seen = images(tmp_path / "data", dims) * (high - low) + low
    old = old_curve(old_network(gandlf_networks, model, dims), seen, LOSSES[model])
    assert old[-1] < 0.6 * old[0], "it learns"
    new = project(model, values_seen, "run", dims=dims)
    assert new == pytest.approx(old, rel=TOLERANCE)
    is_compared = values_seen == "signed" and dims == 2
    for number, default in enumerate(OTHERS[model] if is_compared else ()):
        other = project(model, values_seen, f"other-{number}", default)
        assert other != pytest.approx(old, rel=5 * TOLERANCE)


@pytest.mark.parametrize(
    ("model", "size", "num_weights"), [("ddpm", 64, 2_328_449), ("vqvae", 64, 7_088_449)]
)
def test_the_migrated_baseline_has_the_measured_number_of_weights(
    tmp_path: Path, cli: Any, model: str, size: int, num_weights: int
) -> None:
    """Counted in GaNDLF-Synth 7bf9bed, with its default architectures."""
    yaml = old_yaml(tmp_path / "old.yaml", model, size, architecture={})
    assert cli("migrate", yaml, "-o", tmp_path / "new.yaml")[0] == 0
    settings = config.load(tmp_path / "new.yaml")
    image = ImageSpec(
        size=(size, size), channels=1, spacing_mm=(1.0, 1.0, 1.0), file_format="png",
        affine=tuple(tuple(row) for row in torch.eye(4).tolist()), intensity_range=((0.0, 255.0),),
    )  # fmt: skip
    with torch.device("meta"):
        family = settings.model.build(image)
    assert sum(weight.numel() for weight in family.parameters()) == num_weights
