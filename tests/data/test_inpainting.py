"""Holes in whole images: where they are, what they depend on, and what a model makes of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

import synthcube
from synthcube import reading
from synthcube.data.inpainting import InpaintingConfig, cut_holes, voided
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.phantom import write_phantoms
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ConfigError, ImageError
from synthcube.models import registry
from synthcube.sharing.config import ExportRequest
from synthcube.tasks.challenge import run_challenge
from synthcube.tasks.challenge_container import export_container
from synthcube.tasks.train import train

SIZES = [(32, 24), (20, 24, 16)]


def ball(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """(1, 2, *size): two channels in [-1, 1], whose outer part is background."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.5
    noise = torch.rand((2, *size), generator=torch.Generator().manual_seed(seed))
    return torch.where(inside, noise, -1.0)[None]


@pytest.mark.parametrize("size", SIZES)
def test_a_hole_is_the_lowest_intensity_and_its_mask_the_last_channel(size) -> None:
    images = ball(size)
    holes = cut_holes(images, InpaintingConfig(), [7])
    assert holes.shape == (1, 3, *size)
    mask = holes[:, 2:] == 1
    assert (holes[:, 2:] == -1)[~mask].all()
    for channel in (0, 1):
        assert (holes[:, channel][mask[:, 0]] == -1).all()
        assert torch.equal(holes[:, channel][~mask[:, 0]], images[:, channel][~mask[:, 0]])
    assert (images[:, 0][mask[:, 0]] > -1).any(), "its centre is not in the background"
    assert torch.equal(voided(images, mask), holes)


@pytest.mark.parametrize("size", SIZES)
def test_sides_and_numbers_are_within_the_bounds(size) -> None:
    config = InpaintingConfig(min_size=0.2, max_size=0.4)
    volumes = []
    for seed in range(60):
        mask = cut_holes(torch.ones(1, 1, *size), config, [seed])[0, 1] == 1
        for axis, side in enumerate(size):
            others = [other for other in range(len(size)) if other != axis]
            length = int(mask.amax(dim=others).sum())
            assert 1 <= length <= 0.4 * side + 1
        volumes.append(int(mask.sum()))
    assert len({*volumes}) > 10
    tiny = InpaintingConfig(min_size=0.001, max_size=0.001)
    assert cut_holes(torch.ones(1, 1, *size), tiny, [0])[0, 1].eq(1).sum() == 1
    many = InpaintingConfig(min_size=0.001, max_size=0.001, max_holes=8)
    counts = [
        int(cut_holes(torch.ones(1, 1, *size), many, [s])[0, 1].eq(1).sum()) for s in range(40)
    ]
    assert (min(counts), max(counts)) == (1, 8)
    assert cut_holes(-torch.ones(1, 1, *size), tiny, [0])[0, 1].eq(1).sum() == 1, "all background"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"inpainting": {}, "source_channels": [0]}, r"inpainting and source_channels \[0\]: only"),
        (
            {"inpainting": {}, "channels": {"0": {"kind": "mask"}}},
            "inpainting: channel 0 is a mask",
        ),
        ({"inpainting": {"min_size": 0.5}}, "min_size 0.5 is above max_size 0.35"),
        ({"inpainting": {"max_size": 1.5}}, "less than or equal to 1"),
    ],
)
def test_holes_that_cannot_be_are_refused(keys, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(keys)


def data_of(folder: Path, size: tuple[int, ...], seed: int = 0, **keys) -> DataModule:
    if not folder.exists():
        write_phantoms(folder, num=8, size=size)
    config = DataConfig(inpainting=InpaintingConfig(), **keys)
    return DataModule(
        read_manifest(folder), config, batch_size=2, seed=seed, cache=folder.parent / "cache"
    )


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_every_epoch_has_other_holes_the_same_under_a_seed_and_validation_always_the_same(
    tmp_path: Path, size: tuple[int, ...]
) -> None:
    data = data_of(tmp_path / "data", size)
    assert data.image.channels == 1
    assert data.image.source_channels == (0, 1)

    def sources(module: DataModule, epoch: int, split: str) -> dict[int, torch.Tensor]:
        loader = module.train_dataloader() if split == "train" else module.val_dataloader()
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        by_row = {}
        for batch in loader:
            for row, image, source in zip(
                batch["index"].tolist(), batch["image"], batch["condition"]["source"], strict=True
            ):
                mask = source[1:] == 1
                assert torch.equal(image[~mask], source[:1][~mask])
                assert (source[:1][mask] == -1).all()
                by_row[row] = source
        return by_row

    first, second = sources(data, 0, "train"), sources(data, 1, "train")
    same = sources(data_of(tmp_path / "data", size), 1, "train")
    other = sources(data_of(tmp_path / "data", size, seed=1), 1, "train")
    for row in first.keys() & second.keys():
        assert not torch.equal(first[row], second[row])
    assert all(torch.equal(second[row], same[row]) for row in second)
    assert not all(torch.equal(second[row], other[row]) for row in second.keys() & other.keys())
    held_out = [sources(data, epoch, "validation") for epoch in (0, 3)]
    assert all(torch.equal(held_out[0][row], held_out[1][row]) for row in held_out[0])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, brats: ModuleType) -> Path:
    """A run that saw whole T1 images only."""
    folder = tmp_path_factory.mktemp("healthy")
    brats.inpainting_cases(folder / "data", [f"h{i}" for i in range(5)], whole=True)
    table = brats.manifest(folder / "data", ("t1n",))
    model = {**registry.find("rectified_flow").tiny().model_dump(mode="json"), "mode": "regression"}
    settings = {
        "model": model, "data": {"inpainting": {}, "validation_fraction": 0.4},
        "training": {"max_epochs": 1, "batch_size": 2, "num_sample_images": 1},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(reading.dump(settings))
    train(folder / "config.yaml", table, folder / "run")
    return folder / "run"


def test_a_hospital_with_whole_images_only_enters_the_inpainting_challenge(
    healthy: Path, brats: ModuleType, tmp_path: Path
) -> None:
    folder = export_container(
        healthy, tmp_path / "container", ExportRequest(), challenge="brats-inpainting"
    )
    data = brats.inpainting_cases(tmp_path / "input", ["case"])
    (path,) = run_challenge(folder, data, tmp_path / "out")
    mask = np.asarray(nib.load(data / "case" / "case-mask.nii.gz").dataobj) > 0
    voided_file = np.asarray(nib.load(data / "case" / "case-t1n-voided.nii.gz").dataobj)
    filled = np.asarray(nib.load(path).dataobj)
    np.testing.assert_array_equal(filled[~mask], voided_file[~mask])
    assert filled[mask].std() > 0
    # Whatever the file has in the holes, the model sees what it saw in the training.
    other = np.where(mask, 300, voided_file)
    brats.write(data / "case" / "case-t1n-voided.nii.gz", other)
    (again,) = run_challenge(folder, data, tmp_path / "again")
    np.testing.assert_allclose(np.asarray(nib.load(again).dataobj)[mask], filled[mask], rtol=0.02)


def test_held_out_images_get_holes_and_have_their_truth(cli, healthy: Path, tmp_path: Path) -> None:
    code, _, err = cli("infer", "-m", healthy, "-d", healthy, "-o", tmp_path / "out")
    assert code == 0, err
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    results = tmp_path / "results.yaml"
    code, _, err = cli(
        "evaluate", "-p", tmp_path / "out", "-l", healthy, "-o", results,
        "--set", "evaluation.extractor={name: radiomic}", "--set", "evaluation.num_repeats=2",
    )  # fmt: skip
    assert code == 0, err
    assert "psnr_db" in results.read_text()
    model = synthcube.from_pretrained(healthy, accelerator="cpu")
    whole = torch.zeros(2, 1, 24, 24, 20)
    assert model.translate(whole, seed=3).tensor.shape == (2, 1, 24, 24, 20)
    with pytest.raises(ImageError, match="4 channel"):
        model.translate(torch.zeros(1, 4, 24, 24, 20))


def test_a_yaml_that_sets_other_holes_after_the_training_is_refused(
    healthy: Path, tmp_path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.inpainting\.max_size is 0\.5, the model was"):
        synthcube.infer(healthy, tmp_path / "out", data=healthy,
                        overrides=["data.inpainting={max_size: 0.5}"])  # fmt: skip
