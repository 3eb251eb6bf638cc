from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.module import DataModule, split_subjects
from synthcube.data.phantom import write_phantoms
from synthcube.data.preprocessing import DataConfig
from synthcube.data.transforms import TransformConfig
from synthcube.environment import quiet_lightning
from synthcube.errors import ImageError, ManifestError
from synthcube.schema import Batch

RANDOM = np.random.default_rng(0)
NOISE = {"name": "RandomNoise", "std": [0.1, 0.2]}
AFFINE = np.diag([1, 2, 3, 1.0])
AFFINE[:3, 3] = [-7, 8, 9]


def turned(degrees: float) -> np.ndarray:
    """2 mm in the plane, 5 mm between slices, turned about the third axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([2, 2, 5])
    return matrix


def picture(path: Path, *shape: int) -> Path:
    PIL.Image.fromarray(RANDOM.integers(0, 256, shape).astype(np.uint8)).save(path)
    return path


def nifti(path: Path, data: Any, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def volume(path: Path, *shape: int, affine: np.ndarray = AFFINE) -> Path:
    return nifti(path, RANDOM.normal(100, 20, shape).astype(np.float32), affine)


def module(csv: Path, cache: Path, *, batch_size: int = 4, seed: int = 0, **config: Any) -> Any:
    return DataModule(
        read_manifest(csv), DataConfig(**config), batch_size=batch_size, seed=seed, cache=cache
    )


def listed(folder: Path, paths: Sequence[Path], **columns: Sequence[str]) -> Path:
    rows = [
        {"Channel_0": str(path), **{name: cells[i] for name, cells in columns.items()}}
        for i, path in enumerate(paths)
    ]
    write_manifest(folder / "manifest.csv", rows)
    return folder / "manifest.csv"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """22 pictures of 8 x 9, three classes; 20 to train on, 2 for validation."""
    folder = tmp_path / "flat"
    write_phantoms(folder, num=22, size=(8, 9))
    paths = sorted(folder.glob("*.png"))
    splits = ["validation" if i in (3, 13) else "train" for i in range(22)]
    names = ["disc", "square", "ring"]
    labels = [str(i % 3) for i in range(22)]
    mapping = [names[i % 3] for i in range(22)]
    return listed(folder, paths, Split=splits, Label=labels, LabelMapping=mapping)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """6 volumes of 8 x 9 x 10."""
    return write_phantoms(tmp_path / "deep", num=6, size=(8, 9, 10), spacing_mm=(1, 2, 3))


def epoch_of(loader: DataLoader[Batch], epoch: int = 0) -> list[Batch]:
    batches: Any = loader.batch_sampler
    batches.set_epoch(epoch)
    return list(loader)


def order(loader: DataLoader[Batch], epoch: int = 0) -> list[int]:
    return [int(row) for batch in epoch_of(loader, epoch) for row in batch["index"]]


# -- splits ------------------------------------------------------------------------------------


def test_no_subject_is_on_both_sides(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 4, 4) for i in range(24)]
    subjects = [f"s{i // 3}" for i in range(24)]
    data = module(listed(tmp_path, paths, SubjectID=subjects), cache, validation_fraction=0.3)
    sides = [{subjects[row] for row in data.rows(name)} for name in ("train", "validation")]
    assert sides[0] | sides[1] == set(subjects)
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(0.3 * 8)
    assert len(data.rows("train")) + len(data.rows("validation")) == 24


def test_the_split_is_stratified_and_follows_the_seed(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 4, 4) for i in range(20)]
    labels = ["0"] * 12 + ["1"] * 8
    csv = listed(tmp_path, paths, SubjectID=[f"s{i}" for i in range(20)], Label=labels)
    splits = set()
    for seed in range(4):
        data = module(csv, cache, validation_fraction=0.25, seed=seed)
        validation = data.rows("validation")
        assert Counter(labels[row] for row in validation) == {"0": 3, "1": 2}
        assert data.splits == module(csv, cache, validation_fraction=0.25, seed=seed).splits
        splits.add(tuple(validation))
    assert len(splits) > 1


def test_a_split_column_is_kept(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 4, 4) for i in range(6)]
    splits = ["validation", "train", "test", "", "validation", "train"]
    data = module(listed(tmp_path, paths, Split=splits), cache, validation_fraction=0.5)
    assert data.splits == ["validation", "train", "test", "train", "validation", "train"]
    assert sorted(order(data.train_dataloader())) == [1, 3, 5]
    assert order(data.val_dataloader()) == [0, 4]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"Sex": "class"}, "names the column 'Sex', which is missing or empty; there are Age"),
        ({"Age": "number"}, "row 3, column Age: 'old' is not a number"),
    ],
)
def test_conditions_are_checked_before_an_image_is_read(
    tmp_path: Path, cache: Path, kinds: dict[str, str], message: str
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        path.write_text("no image")
    csv = listed(tmp_path, paths, Age=["61", "old"])
    with pytest.raises(ManifestError, match=message):
        module(csv, cache, conditions=kinds)
    assert not cache.exists()
    with pytest.raises(ImageError, match=r"2 images of .* cannot be used"):
        module(csv, cache, conditions={"Age": "class"}, validation_fraction=0)


def test_nothing_to_train_on(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 4, 4) for i in range(3)]
    csv = listed(tmp_path, paths, Split=["test", "validation", "test"])
    message = (
        rf"^{csv} leaves nothing to train on: its splits are \{{'test': 2, 'validation': 1\}}; "
        "at least one subject must be in train$"
    )
    with pytest.raises(ManifestError, match=message):
        module(csv, cache)


def test_without_validation_its_loader_is_empty(flat: Path, cache: Path) -> None:
    paths = sorted(flat.parent.glob("*.png"))
    data = module(listed(flat.parent, paths), cache, validation_fraction=0)
    assert len(data.val_dataloader()) == 0
    assert list(data.val_dataloader()) == []
    assert len(data.rows("train")) == 22


# -- what all images have in common ------------------------------------------------------------


def test_spec_of_pictures(flat: Path, cache: Path) -> None:
    spec = module(flat, cache).image
    assert (spec.size, spec.rank, spec.channels) == ((8, 9), 2, 1)
    assert spec.labels == ("disc", "square", "ring")
    assert (spec.file_format, spec.integer) == ("png", True)
    assert spec.intensity_range == ((0.0, 255.0),)
    assert spec.spacing_mm == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(spec.affine, np.diag([-1, -1, 1, 1]))


def test_spec_of_volumes(deep: Path, cache: Path) -> None:
    data = module(deep, cache)
    spec = data.image
    assert (spec.size, spec.rank, spec.channels) == ((8, 9, 10), 3, 1)
    assert (spec.file_format, spec.integer) == ("nii.gz", True)
    assert spec.spacing_mm == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(spec.affine, np.diag([1, 2, 3, 1]), atol=1e-6)
    ranges = data.cache.intensity_ranges[data.rows("train"), 0]
    np.testing.assert_allclose(spec.intensity_range[0], np.mean(ranges, axis=0), rtol=1e-6)
    assert 0 <= spec.intensity_range[0][0] < 60
    assert 150 < spec.intensity_range[0][1] <= 255


def test_spec_after_a_change_of_size(deep: Path, cache: Path) -> None:
    spec = module(deep, cache, size=[4, 9, 20]).image
    assert spec.size == (4, 9, 20)
    np.testing.assert_allclose(spec.spacing_mm, [2, 2, 1.5], rtol=1e-6)
    np.testing.assert_allclose(np.array(spec.affine)[:3, 3], [0.5, 0, -0.75], atol=1e-6)


def test_float_volumes_are_not_integer_and_colour_is_png(tmp_path: Path, cache: Path) -> None:
    spec = module(listed(tmp_path, [volume(tmp_path / "a.nii.gz", 4, 4, 4)]), cache).image
    assert (spec.file_format, spec.integer, spec.labels) == ("nii.gz", False, ())
    spec = module(listed(tmp_path, [picture(tmp_path / "a.png", 5, 4, 3)]), cache).image
    assert (spec.file_format, spec.channels, spec.size) == ("png", 3, (4, 5))
    two = [{"Channel_0": "a.png", "Channel_1": "b.png"}]
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, 4, 4)
    write_manifest(tmp_path / "two.csv", two)
    spec = module(tmp_path / "two.csv", cache).image
    assert (spec.file_format, spec.channels) == ("nii.gz", 2)


def test_a_common_affine_is_kept(tmp_path: Path, cache: Path) -> None:
    paths = [volume(tmp_path / f"{i}.nii.gz", 4, 5, 6, affine=turned(20)) for i in range(3)]
    spec = module(listed(tmp_path, paths), cache).image
    np.testing.assert_allclose(spec.affine, turned(20), atol=1e-5)
    np.testing.assert_allclose(spec.spacing_mm, [2, 2, 5], atol=1e-5)


def test_differing_affines_become_an_upright_one_around_the_origin(
    tmp_path: Path, cache: Path
) -> None:
    """The voxel size is that of the images, however each of them lies."""
    paths = [
        volume(tmp_path / f"{degrees}.nii.gz", 4, 5, 6, affine=turned(degrees))
        for degrees in (-40, 0, 40)
    ]
    spec = module(listed(tmp_path, paths), cache, validation_fraction=0).image
    np.testing.assert_allclose(spec.spacing_mm, [2, 2, 5], atol=1e-5)
    expected = np.diag([2, 2, 5, 1.0])
    expected[:3, 3] = [-3, -4, -12.5]
    np.testing.assert_allclose(spec.affine, expected, atol=1e-5)


def test_small_intensities_keep_their_range(tmp_path: Path, cache: Path) -> None:
    ramp = np.linspace(2e-8, 9e-8, 64, dtype=np.float32).reshape(4, 4, 4)
    csv = listed(tmp_path, [nifti(tmp_path / "a.nii.gz", ramp)])
    spec = module(csv, cache, percentiles=[0, 100]).image
    np.testing.assert_allclose(spec.intensity_range, [[2e-8, 9e-8]], rtol=1e-5)


# -- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["flat", "deep"])
def test_batches(source: str, cache: Path, request: pytest.FixtureRequest) -> None:
    csv: Path = request.getfixturevalue(source)
    data = module(csv, cache, batch_size=3, validation_fraction=0.2)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in epoch_of(loader):
            assert set(batch) == {"image", "label", "index", "augmented", "condition"}
            image, label, index = batch["image"], batch["label"], batch["index"]
            assert image.shape[1:] == (1, *data.image.size)
            assert image.dtype == torch.float32
            assert -1 <= float(image.min()) < float(image.max()) <= 1
            assert label.dtype == index.dtype == torch.int64
            assert label.tolist() == [data.manifest.rows[row].label for row in index.tolist()]
            np.testing.assert_array_equal(image.numpy(), data.cache.read(index.tolist()))


def test_images_without_a_class_have_label_minus_one(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 4, 4) for i in range(3)]
    data = module(listed(tmp_path, paths), cache, validation_fraction=0)
    assert epoch_of(data.train_dataloader())[0]["label"].tolist() == [-1, -1, -1]


def test_every_training_row_once_an_epoch(flat: Path, cache: Path) -> None:
    data = module(flat, cache, batch_size=4)
    rows = data.rows("train")
    assert len(rows) == 20
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert sorted(order(loader)) == rows
    dropping = module(flat, cache, batch_size=6).train_dataloader()
    batches = epoch_of(dropping)
    assert len(dropping) == len(batches) == 3
    assert [len(batch["index"]) for batch in batches] == [6, 6, 6]
    seen = [order(dropping, epoch) for epoch in range(20)]
    assert all(len(set(rows_seen)) == 18 for rows_seen in seen)
    assert set().union(*seen) == set(rows)  # other rows are left out each time


def test_a_batch_is_never_larger_than_the_data(flat: Path, cache: Path) -> None:
    batches = epoch_of(module(flat, cache, batch_size=100).train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [20]


def test_order_depends_on_seed_and_epoch_alone(flat: Path, cache: Path) -> None:
    first = order(module(flat, cache).train_dataloader())
    torch.manual_seed(99)
    loader = module(flat, cache).train_dataloader()
    later = order(loader, 5)
    torch.manual_seed(7)
    assert order(loader, 0) == first
    assert order(loader, 5) == later != first
    assert order(module(flat, cache, seed=1).train_dataloader()) != first
    assert first != sorted(first)


def test_loading_takes_nothing_from_the_global_generator(flat: Path, cache: Path) -> None:
    """The family's noise must not depend on whether there is augmentation."""
    loader = module(flat, cache, augmentation=[NOISE]).train_dataloader()
    loader.batch_sampler.set_epoch(0)
    batches = iter(loader)  # torch's loader itself draws one seed here
    torch.manual_seed(3)
    list(batches)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


def test_validation_is_complete_in_order_and_not_augmented(flat: Path, cache: Path) -> None:
    names = ["train", "validation"] * 11
    csv = listed(flat.parent, sorted(flat.parent.glob("*.png")), Split=names)
    data = module(csv, cache, batch_size=4, augmentation=[NOISE])
    rows = data.rows("validation")
    assert rows == list(range(1, 22, 2))
    for epoch in (0, 3):
        batches = epoch_of(data.val_dataloader(), epoch)
        assert len(batches) == len(data.val_dataloader()) == 3
        assert torch.cat([batch["index"] for batch in batches]).tolist() == rows
        images = torch.cat([batch["image"] for batch in batches])
        np.testing.assert_array_equal(images.numpy(), data.cache.read(rows))


# -- augmentation ------------------------------------------------------------------------------


def by_row(loader: DataLoader[Batch], epoch: int) -> dict[int, torch.Tensor]:
    return {
        int(row): image
        for batch in epoch_of(loader, epoch)
        for row, image in zip(batch["index"], batch["image"], strict=True)
    }


@pytest.mark.parametrize("source", ["flat", "deep"])
def test_augmentation_is_new_in_every_epoch_and_repeatable(
    source: str, cache: Path, request: pytest.FixtureRequest
) -> None:
    csv: Path = request.getfixturevalue(source)
    settings: dict[str, Any] = {"augmentation": [NOISE], "validation_fraction": 0}
    loader = module(csv, cache, batch_size=2, **settings).train_dataloader()
    first, second = by_row(loader, 0), by_row(loader, 1)
    torch.manual_seed(123)
    again = by_row(module(csv, cache, batch_size=1, **settings).train_dataloader(), 0)
    other = by_row(module(csv, cache, batch_size=1, seed=1, **settings).train_dataloader(), 0)
    data = module(csv, cache, **settings)
    assert sorted(first) == sorted(second) == sorted(again) == sorted(other) == data.rows("train")
    noise: dict[int, torch.Tensor] = {}
    for row, image in first.items():
        assert torch.equal(image, again[row])
        assert not torch.equal(image, second[row])
        assert not torch.equal(image, other[row])
        assert image.abs().max() <= 1
        noise[row] = image - torch.from_numpy(data.cache.read([row])[0])
        noise[row][image.abs() == 1] = torch.nan  # clipped
        assert 0.05 < float(noise[row].nan_to_num().std()) < 0.3
    one, other_row = list(noise)[:2]
    apart = (noise[one] - noise[other_row]).abs().nan_to_num()
    assert float((apart > 0.01).float().mean()) > 0.3  # every image gets its own


def test_augmentation_is_the_same_in_loader_processes(flat: Path, cache: Path) -> None:
    settings: dict[str, Any] = {"augmentation": [NOISE, {"name": "RandomFlip", "axes": [0]}]}
    here = epoch_of(module(flat, cache, **settings).train_dataloader(), 2)
    there = epoch_of(module(flat, cache, num_workers=2, **settings).train_dataloader(), 2)
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        for name in ("image", "label", "index"):
            assert torch.equal(one[name], other[name])  # type: ignore[literal-required]


def test_a_flip_flips(flat: Path, cache: Path) -> None:
    flip = {"name": "RandomFlip", "axes": [1], "flip_probability": 1}
    data = module(flat, cache, augmentation=[flip])
    for row, image in by_row(data.train_dataloader(), 0).items():
        np.testing.assert_array_equal(image.numpy(), data.cache.read([row])[0, :, :, ::-1])


def test_augmentation_that_changes_the_shape_is_refused(deep: Path, cache: Path) -> None:
    """The same number of voxels in another shape would be scrambled without a word."""
    message = (
        r"data\.augmentation makes \(1, 10, 9, 8\) of an image of the shape \(1, 8, 9, 10\): "
        r"what changes the shape belongs in data\.preprocessing"
    )
    data = module(deep, cache, augmentation=[{"name": "Transpose"}])
    with pytest.raises(ImageError, match=message):
        epoch_of(data.train_dataloader())


# -- with Lightning ----------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[list[int]] = []
        self.validated: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.trained[-1] += batch["index"].tolist()
        return (self.weight - batch["image"].mean()).square().sum()

    def validation_step(self, batch: Batch, _: int) -> None:
        self.validated[-1] += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # on a cluster
def test_lightning_tells_the_epoch(flat: Path, cache: Path, tmp_path: Path) -> None:
    data, recorder = module(flat, cache), Recorder()
    with quiet_lightning():
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(recorder, data)
    loader = data.train_dataloader()
    assert recorder.trained == [order(loader, epoch) for epoch in range(3)]
    assert recorder.trained[0] != recorder.trained[1]
    assert recorder.validated == [data.rows("validation")] * 3


def test_the_images_are_never_written_to(flat: Path, cache: Path) -> None:
    def fingerprint() -> dict[str, tuple[str, int]]:
        return {
            str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in sorted(flat.parent.rglob("*"))
            if path.is_file()
        }

    before = fingerprint()
    assert len(before) == 23
    data = module(flat, cache, size=[6, 6], augmentation=[NOISE])
    for batch in (*epoch_of(data.train_dataloader()), *epoch_of(data.val_dataloader())):
        batch["image"].zero_()
    assert fingerprint() == before
    assert np.abs(data.cache.read(range(22))).min(axis=(1, 2, 3)).max() < 1
    assert float(np.abs(data.cache.read(range(22))).max()) > 0.1


def test_pictures_whose_intensities_are_changed_are_not_pictures_any_more(tmp_path: Path) -> None:
    """RescaleIntensity to 0..1 used to be mapped by 0..255: a black image without a word."""
    path = write_phantoms(tmp_path / "data", num=4, size=(16, 16))
    changed = DataConfig(
        preprocessing=(TransformConfig(name="RescaleIntensity", out_min_max=(0, 1)),)
    )
    data = DataModule(read_manifest(path), changed, batch_size=2, seed=0, cache=tmp_path / "cache")
    low, high = data.cache.read([0]).min(), data.cache.read([0]).max()
    assert (low, high) == (-1, 1)
    assert data.image.file_format == "nii.gz"
    assert data.image.integer is False
    assert 0 <= data.image.intensity_range[0][0] < data.image.intensity_range[0][1] <= 1


BOTH = {"validation": 0.1, "test": 0.2}


def names(num: int) -> list[str]:
    return [f"s{i}" for i in range(num)]


def test_proportions() -> None:
    splits = split_subjects(names(100), [-1] * 100, BOTH, 0)
    assert Counter(splits.values()) == {"train": 70, "validation": 10, "test": 20}


def test_same_split_on_every_machine() -> None:
    splits = split_subjects(names(6), [0] * 6, {"test": 0.5}, 3)
    # the order that `printf 3:s0 | sha256sum` and so on gives: s2 s0 s3 | s4 s5 s1
    assert {name for name, split in splits.items() if split == "train"} == {"s0", "s2", "s3"}


def test_does_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    rows = [(f"s{i % 30}", i % 30 % 3) for i in range(90)]
    first = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 1)  # type: ignore[arg-type]
    random.Random(0).shuffle(rows)
    again = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 1)  # type: ignore[arg-type]
    other = split_subjects(*map(list, zip(*rows, strict=True)), BOTH, 2)  # type: ignore[arg-type]
    assert first == again != other
    assert len(first) == 30


@pytest.mark.parametrize("sizes", [(3, 3, 3), (50, 3, 7), (4,) * 10])
def test_every_class_is_in_every_split(sizes: tuple[int, ...]) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    splits = split_subjects(names(len(labels)), labels, BOTH, 0)
    strata = {(splits[f"s{i}"], label) for i, label in enumerate(labels)}
    assert len(strata) == 3 * len(sizes)


def test_small_classes_are_in_train_first() -> None:
    labels = [0] * 20 + [1] * 2
    splits = split_subjects(names(22), labels, BOTH, 0)
    assert "train" in {splits["s20"], splits["s21"]}


def test_classes_of_one_subject_are_split_in_proportion() -> None:
    splits = split_subjects(names(50), list(range(50)), BOTH, 0)
    assert Counter(splits.values()) == {"train": 35, "validation": 5, "test": 10}


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
def test_small_fractions_still_get_a_subject(labels: list[int]) -> None:
    splits = split_subjects(names(5), labels, {"validation": 0.01, "test": 0.01}, 0)
    assert Counter(splits.values()) == {"train": 3, "validation": 1, "test": 1}


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_two_subjects(labels: list[int]) -> None:
    splits = split_subjects(["a", "b"], labels, {"validation": 0.1}, 0)
    assert sorted(splits.values()) == ["train", "validation"]
    assert "train" in split_subjects(["a", "b"], labels, BOTH, 0).values()


def test_extremes() -> None:
    assert split_subjects([], [], BOTH, 0) == {}
    assert split_subjects(["a"], [0], BOTH, 0) == {"a": "train"}
    assert set(split_subjects(names(9), [0] * 9, {"test": 0.0}, 0).values()) == {"train"}
    assert set(split_subjects(names(9), [0] * 9, {"test": 1.0}, 0).values()) == {"test"}
    explicit = split_subjects(names(10), [0] * 10, {"train": 0.8, "test": 0.2}, 0)
    assert Counter(explicit.values()) == {"train": 8, "test": 2}


def test_a_subject_of_two_classes_is_in_one_split() -> None:
    splits = split_subjects(["a", "a", "b", "c"], [0, 1, 0, 1], {"test": 0.3}, 0)
    assert set(splits) == {"a", "b", "c"}


@pytest.mark.parametrize("fractions", [{"test": -0.1}, {"a": 0.6, "b": 0.6}, {"a": float("nan")}])
def test_impossible_fractions(fractions: dict[str, float]) -> None:
    with pytest.raises(ManifestError, match="cannot be split off"):
        split_subjects(["a"], [0], fractions, 0)
