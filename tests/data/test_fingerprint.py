"""The fingerprint of a data set against numpy, and what it must not hold."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from synthcube.data import fingerprint as module
from synthcube.data.fingerprint import Fingerprint, fingerprint, measure
from synthcube.data.images import write_image
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ImageError


def volume(path: Path, shape, spacing, value=100.0, order=(0, 1, 2)) -> np.ndarray:
    """A volume of zeros with a bright block one voxel inside its border."""
    voxels = np.zeros(shape, np.float32)
    voxels[1:-1, 1:-1, 1:-1] = value + np.arange(voxels[1:-1, 1:-1, 1:-1].size).reshape(
        np.subtract(shape, 2)
    ) % 50  # fmt: skip
    affine = np.diag([*spacing, 1.0])
    affine = affine[:, [*order, 3]]
    write_image(path, torch.from_numpy(voxels.transpose(order))[None], affine)
    return voxels


def test_shapes_spacing_and_content_are_those_of_numpy(tmp_path: Path) -> None:
    shapes = [(8, 10, 6), (12, 10, 6), (10, 10, 8)]
    spacings = [(1, 1, 3), (1, 1, 3), (1, 1, 4)]
    for number, (shape, spacing) in enumerate(zip(shapes, spacings, strict=True)):
        volume(tmp_path / f"{number}.nii.gz", shape, spacing)
    measured = measure(read_manifest(tmp_path))
    assert measured.rank == 3
    assert measured.shape.median == (10, 10, 6)
    assert measured.shape.highest == (12, 10, 8)
    assert measured.content.median == (8, 8, 4)
    assert measured.spacing_mm.median == (1, 1, 3)
    assert measured.extent_mm.highest == (12, 10, 32)
    assert not measured.one_shape
    assert not measured.one_spacing
    assert measured.has_geometry


def test_axes_are_in_the_order_of_a_training(tmp_path: Path) -> None:
    """Volumes are read the same way round, whatever order their scanner stored them in."""
    volume(tmp_path / "0.nii.gz", (8, 10, 6), (1, 2, 3))
    volume(tmp_path / "1.nii.gz", (8, 10, 6), (1, 2, 3), order=(2, 0, 1))
    measured = measure(read_manifest(tmp_path))
    assert measured.one_shape
    assert measured.shape.median == (8, 10, 6)
    assert measured.spacing_mm.highest == pytest.approx((1, 2, 3))


def test_intensities_of_the_foreground_are_those_of_numpy(tmp_path: Path) -> None:
    written = [
        volume(tmp_path / f"{n}.nii.gz", (12, 12, 12), (1, 1, 1), 100 + 50 * n) for n in (0, 1)
    ]
    bright = np.concatenate([voxels[voxels > 10] for voxels in written])
    (channel,) = measure(read_manifest(tmp_path)).channels
    assert channel.kind == "image"
    assert channel.mean == pytest.approx(bright.mean())
    assert channel.std == pytest.approx(bright.std(), rel=1e-5)
    assert channel.percentiles == pytest.approx(np.percentile(bright, (0.5, 50, 99.5)))
    assert (channel.lowest, channel.highest) == (0, bright.max())
    assert channel.foreground == pytest.approx(1000 / 1728)


def test_masks_and_colours_are_told_from_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        image = torch.from_numpy(rng.uniform(1, 200, (1, 8, 8, 8)).astype(np.float32))
        mask = torch.from_numpy(rng.integers(0, 3, (1, 8, 8, 8)).astype(np.float32))
        write_image(tmp_path / f"{number}-t1.nii.gz", image, np.eye(4))
        write_image(tmp_path / f"{number}-seg.nii.gz", mask, np.eye(4), integer=True)
        rows.append({"Channel_0": f"{number}-t1.nii.gz", "Channel_1": f"{number}-seg.nii.gz"})
    write_manifest(tmp_path / "manifest.csv", rows)
    measured = measure(read_manifest(tmp_path))
    assert [channel.kind for channel in measured.channels] == ["image", "mask"]
    assert measured.masks == {1: (0, 1, 2)}

    colours = tmp_path / "colours"
    colours.mkdir()
    for number in range(3):
        picture = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Picture.fromarray(picture).save(colours / f"{number}.png")
    coloured = measure(read_manifest(colours))
    assert [channel.kind for channel in coloured.channels] == ["rgb"] * 3
    assert (coloured.rank, coloured.has_geometry, coloured.file_format) == (2, False, "png")


def test_rows_are_counted_and_nobody_is_named(tmp_path: Path) -> None:
    written = write_phantoms(tmp_path / "secret-folder", num=12, size=(16, 16))
    rows = [
        row.cells | {"SubjectID": f"Jane-Doe-{i % 4}", "Age": str(40 + i), "Site": "Rome"}
        for i, row in enumerate(read_manifest(written).rows)
    ]
    write_manifest(written, rows)
    measured = measure(read_manifest(written))
    assert (measured.num_images, measured.num_subjects) == (12, 4)
    assert measured.class_counts == (4, 4, 4)
    assert not measured.classes_of_subjects
    assert measured.numbers["Age"].low == 40
    assert "Site" not in measured.numbers
    text = json.dumps(measured.model_dump(mode="json"))
    for identifying in ("Jane", "secret", "disc", "Rome", str(tmp_path)):
        assert identifying not in text


def test_copies_are_found_and_similar_images_are_none(tmp_path: Path) -> None:
    written = write_phantoms(tmp_path, num=20, size=(32, 32))
    assert measure(read_manifest(written)).near_duplicates == 0
    rows = [dict(row.cells) for row in read_manifest(written).rows]
    first = Picture.open(rows[0]["Channel_0"])
    first.save(tmp_path / "again.jpg", quality=80)
    rows.append({**rows[1], "Channel_0": "again.jpg"})
    write_manifest(written, rows)
    measured = measure(read_manifest(written))
    assert measured.near_duplicates == 2
    assert measured.duplicates_across_subjects == 2


def test_equal_copies_are_counted_in_large_sets_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_COMPARED", 1)
    written = write_phantoms(tmp_path, num=6, size=(16, 16))
    rows = [dict(row.cells) for row in read_manifest(written).rows]
    write_manifest(written, [*rows, rows[0] | {"SubjectID": "other"}])
    assert measure(read_manifest(written)).near_duplicates == 2


def test_it_is_cached_by_content(tmp_path: Path, monkeypatch) -> None:
    written = write_phantoms(tmp_path / "data", num=4, size=(16, 16))
    cache = tmp_path / "cache"
    first = fingerprint(read_manifest(written), cache)
    (stored,) = (cache / "fingerprints").iterdir()
    assert Fingerprint.model_validate(json.loads(stored.read_text())) == first
    moved = written.parent.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", None)
        assert fingerprint(read_manifest(moved), cache) == first
    stored.write_text("{")  # a machine that was switched off
    assert fingerprint(read_manifest(moved), cache) == first


def test_unreadable_and_unlike_images_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", torch.rand(1, 8, 8, 8), np.eye(4))
    (tmp_path / "b.nii.gz").write_bytes(b"damaged")
    with pytest.raises(ImageError, match=r"1 of 2 images cannot be used:\n.*b\.nii\.gz"):
        measure(read_manifest(tmp_path))
    write_image(tmp_path / "b.nii.gz", torch.rand(1, 8, 8), np.eye(4))
    with pytest.raises(ImageError, match="spatial axes"):
        measure(read_manifest(tmp_path))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    written = write_phantoms(tmp_path, num=4, size=(64, 64, 64))
    rows = [dict(row.cells) for row in read_manifest(written).rows]
    measure(read_manifest(written))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_manifest(written, rows * 10)
    assert measure(read_manifest(written)).num_images == 40
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{grown} kB more, and an image has 1,024"
