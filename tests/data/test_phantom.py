from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthcube.data.images import read_image
from synthcube.data.manifest import read_manifest
from synthcube.data.phantom import KINDS, phantom, write_phantoms
from synthcube.errors import ConfigError


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (24, 24, 24), (16, 24, 20), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_range_and_truth(size: tuple[int, ...], channels: int) -> None:
    for index in range(6):
        item = phantom(index, size=size, channels=channels)
        assert tuple(item.image.shape) == (channels, *size)
        assert item.image.dtype == torch.float32
        assert item.image.min() >= 0
        assert item.image.max() <= 255
        assert tuple(item.mask.shape) == size
        assert item.mask.dtype == torch.bool
        assert item.label_name == KINDS[len(size)][item.label]
        assert 6 / 32 * min(size) <= item.truth["radius"] <= 11 / 32 * min(size)
        places = torch.nonzero(item.mask).double()
        centre = [item.truth[f"centre_{axis}"] for axis in "xyz"[: len(size)]]
        assert torch.allclose(places.mean(0), torch.tensor(centre).double(), atol=0.75)
        extent = (places.max(0).values - places.min(0).values) / 2
        assert (abs(extent - item.truth["radius"]) <= 1).all()


def test_shapes_take_turns_and_can_be_chosen() -> None:
    assert [phantom(i, size=(16, 16)).label for i in range(4)] == [0, 1, 2, 0]
    assert phantom(0, size=(16, 16), kind="ring").label == 2
    assert phantom(0, size=(16, 16, 16), kind="cube").label_name == "cube"


def test_shapes_are_what_they_are_called() -> None:
    disc, square, ring = (phantom(3, size=(64, 64), kind=kind) for kind in KINDS[2])
    radius = disc.truth["radius"]
    area = torch.pi * radius**2
    assert disc.mask.sum() == pytest.approx(area, rel=0.1)
    assert square.mask.sum() == pytest.approx(4 * radius**2, rel=0.15)
    assert ring.mask.sum() == pytest.approx(0.75 * area, rel=0.1)
    x, y = (round(ring.truth[f"centre_{axis}"]) for axis in "xy")
    assert not ring.mask[x, y]
    assert disc.mask[x, y]


def test_contrast() -> None:
    item = phantom(0, size=(32, 32), channels=2)
    inside, outside = item.image[:, item.mask], item.image[:, ~item.mask]
    assert inside[0].mean() == pytest.approx(item.truth["brightness"], abs=1)
    assert inside[0].min() > outside[0].max() + 50
    assert inside[1].max() < outside[1].min() - 50
    assert 0 < outside[0].std() < 15


def test_index_and_seed_decide() -> None:
    first = phantom(5, size=(16, 16), seed=1)
    assert torch.equal(first.image, phantom(5, size=(16, 16), seed=1).image)
    assert not torch.equal(first.image, phantom(5, size=(16, 16), seed=2).image)
    assert not torch.equal(first.image, phantom(8, size=(16, 16), seed=1).image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (16,)}, r"the size \[16\]; two or three sides of at least 8"),
        ({"size": (16, 4)}, r"the size \[16, 4\]"),
        ({"size": (16, 16), "channels": 0}, "0 channels; at least 1"),
        ({"size": (16, 16), "kind": "ball"}, "no phantom 'ball' of 2 axes; use disc, square, ring"),
    ],
)
def test_what_cannot_be_drawn(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phantom(0, **arguments)  # type: ignore[arg-type]


def test_2d_data_set(tmp_path: Path) -> None:
    path = write_phantoms(tmp_path / "set", num=4, size=(20, 16), channels=2)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.path == path
    assert manifest.labels == KINDS[2]
    assert [row.label for row in manifest.rows] == [0, 1, 2, 0]
    assert len({row.subject for row in manifest.rows}) == 4
    assert "/" not in path.read_text()
    for index, row in enumerate(manifest.rows):
        drawn = phantom(index, size=(20, 16), channels=2)
        image = read_image(row.channels)
        assert image.file_format == "png"
        assert torch.equal(image.tensor[..., 0], drawn.image.round())
        assert float(row.conditions["Radius"]) == pytest.approx(drawn.truth["radius"], abs=1e-3)
        assert float(row.conditions["Brightness"]) == pytest.approx(
            drawn.truth["brightness"], abs=1e-3
        )


def test_3d_data_set(tmp_path: Path) -> None:
    write_phantoms(tmp_path, num=1, size=(8, 9, 10), spacing_mm=(1, 2, 3.5), seed=4)
    (row,) = read_manifest(tmp_path).rows
    stored = nib.load(row.channels[0])
    np.testing.assert_allclose(stored.affine, np.diag([1, 2, 3.5, 1]))
    drawn = phantom(0, size=(8, 9, 10), seed=4)
    np.testing.assert_array_equal(stored.get_fdata(), drawn.image[0].round())
    assert stored.get_data_dtype() == np.uint8


@pytest.mark.parametrize("size", [(12, 12), (8, 8, 8)])
def test_same_bytes(tmp_path: Path, size: tuple[int, ...]) -> None:
    for name in ("a", "b"):
        write_phantoms(tmp_path / name, num=2, size=size)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num is 0; at least 1"):
        write_phantoms(tmp_path / "a", num=0, size=(8, 8))
    with pytest.raises(ConfigError, match=r"spacing_mm is \[1, 0\]; positive"):
        write_phantoms(tmp_path / "a", num=1, size=(8, 8), spacing_mm=(1, 0))
    with pytest.raises(ConfigError, match="the size"):
        write_phantoms(tmp_path / "a", num=1, size=(2, 2))
    assert not (tmp_path / "a").exists()
