from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from synthcube.data.cache import load_images, shape_faults
from synthcube.data.geometry import as_rows
from synthcube.data.images import read_image
from synthcube.data.manifest import Manifest, read_manifest, write_manifest
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.errors import ImageError, OutputError
from synthcube.models import registry
from synthcube.schema import ImageSpec

RANDOM = np.random.default_rng(0)


def nifti(path: Path, data: Any) -> Path:
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), np.diag([1, 2, 3, 1.0])), path)
    return path


def volume(path: Path, *shape: int) -> Path:
    return nifti(path, RANDOM.normal(0, 100, shape))


def picture(path: Path, *shape: int) -> Path:
    PIL.Image.fromarray(RANDOM.integers(0, 256, shape).astype(np.uint8)).save(path)
    return path


def listed(folder: Path, *rows: Sequence[Path]) -> Manifest:
    write_manifest(
        folder / "manifest.csv",
        [{f"Channel_{i}": str(path) for i, path in enumerate(row)} for row in rows],
    )
    return read_manifest(folder / "manifest.csv")


def faults(manifest: Manifest, cache: Path, **settings: Any) -> tuple[str, tuple[str, ...]]:
    with pytest.raises(ImageError, match="cannot be used") as caught:
        load_images(manifest, DataConfig(**settings), cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]  # nothing is kept of it
    return caught.value.headline, caught.value.faults


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_images_are_kept_in_the_order_of_the_manifest(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [picture(tmp_path / f"{i}.png", 6, 5) for i in (2, 0, 1)]
    manifest = listed(tmp_path, *[[path] for path in paths])
    config = DataConfig(size=[4, 4])
    with caplog.at_level(logging.INFO, "synthcube"):
        images = load_images(manifest, config, cache)
        again = load_images(manifest, config, cache)
    assert caplog.messages == ["Preprocessing 3 images (cached for next time) ..."]
    expected = np.stack([Preprocessing(config)(read_image([path])).tensor for path in paths])
    np.testing.assert_array_equal(images.read(range(3)), expected)
    np.testing.assert_array_equal(again.read(range(3)), expected)


def test_channels_are_stacked(tmp_path: Path, cache: Path) -> None:
    pair = [volume(tmp_path / f"{name}.nii.gz", 4, 5, 6) for name in ("t1", "t2")]
    images = load_images(listed(tmp_path, pair), DataConfig(), cache)
    assert images.shape == (1, 2, 4, 5, 6)
    assert images.intensity_ranges.shape[1] == 2


def test_all_faults_at_once(tmp_path: Path, cache: Path) -> None:
    """Sound, cut short, not an image, NaN, constant, empty, vanished: one report."""
    good = volume(tmp_path / "good.nii.gz", 8, 8, 8)
    cut = volume(tmp_path / "cut.nii.gz", 8, 8, 8)
    cut.write_bytes(cut.read_bytes()[:-200])
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    undefined = RANDOM.normal(0, 1, (8, 8, 8))
    undefined[:2, 0, 0] = np.nan
    nan = nifti(tmp_path / "nan.nii.gz", undefined)
    constant = nifti(tmp_path / "constant.nii.gz", np.full((8, 8, 8), 3.5))
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    gone = volume(tmp_path / "gone.nii.gz", 8, 8, 8)
    paths = [good, cut, text, nan, constant, empty, gone, good]
    manifest = listed(tmp_path, *[[path] for path in paths])
    gone.unlink()
    headline, lines = faults(manifest, cache)
    assert headline.startswith(f"6 images of {tmp_path / 'manifest.csv'} cannot be used (synth")
    expected = [
        f"{cut} is cut short or damaged.*copy or export it again",
        f"{text} is not a .png image, whatever its name says",
        f"{nan} holds 2 NaN and 0 infinite voxels of 512",
        f"{constant}: constant image: every voxel is 3.5; leave it out of the manifest$",
        f"{empty} is empty .0 bytes.; copy or export it again",
        f"{gone} is missing",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


def test_one_fault_is_one_image(tmp_path: Path, cache: Path) -> None:
    good, empty = picture(tmp_path / "good.png", 4, 4), tmp_path / "empty.png"
    empty.touch()
    headline, lines = faults(listed(tmp_path, [empty], [good]), cache)
    assert headline.startswith(f"1 image of {tmp_path / 'manifest.csv'} cannot be used (synth")
    assert lines == (f"{empty} is empty (0 bytes); copy or export it again.",)


def test_the_faulty_channel_is_the_one_that_is_named(tmp_path: Path, cache: Path) -> None:
    first, second = (volume(tmp_path / f"{name}.nii.gz", 4, 4, 4) for name in ("t1", "t2"))
    second.write_bytes(second.read_bytes()[:60])
    _, lines = faults(listed(tmp_path, [first, second]), cache)
    assert len(lines) == 1
    assert lines[0].startswith(f"{second} is cut short or damaged")


def test_a_transform_that_leaves_nothing_is_a_fault_of_its_image(
    tmp_path: Path, cache: Path
) -> None:
    code = {"name": "Crop", "cropping": 3}
    image = volume(tmp_path / "1.nii.gz", 4, 4, 4)
    _, lines = faults(listed(tmp_path, [image]), cache, preprocessing=[code])
    assert lines[0].startswith(f"{image}: Crop cannot be applied: it leaves no voxels")


def test_a_name_that_is_part_of_another_is_still_told(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault's text about no/1.nii.gz must not pass for one that names the file itself."""
    image = volume(tmp_path / "1.nii.gz", 4, 4, 4)

    def fails(*_: object) -> None:
        raise ImageError(f"Mine cannot be applied: {tmp_path / 'no' / '1.nii.gz'} is missing")

    monkeypatch.setattr(Preprocessing, "__call__", fails)
    _, lines = faults(listed(tmp_path, [image]), cache)
    assert lines[0].startswith(f"{image}: Mine cannot be applied: ")


def test_mixed_shapes_name_every_file_and_the_cure(tmp_path: Path, cache: Path) -> None:
    usual = [volume(tmp_path / f"usual{i}.nii.gz", 6, 7, 8) for i in range(3)]
    wide, long = volume(tmp_path / "wide.nii.gz", 9, 7, 8), volume(tmp_path / "l.nii.gz", 6, 7, 9)
    rows = [[path] for path in (wide, *usual, long)]
    headline, lines = faults(listed(tmp_path, *rows), cache)
    assert headline.startswith("2 images of ")
    assert "--verify" not in headline  # it would not leave them out
    cure = (
        "the others (6, 7, 8); data.size: [32, 32, 32] brings all to one, and data.patches takes "
    )
    cure += "parts of all"
    assert lines == (f"{wide}: shape (9, 7, 8), {cure}", f"{long}: shape (6, 7, 9), {cure}")
    cured = load_images(listed(tmp_path, *rows), DataConfig(size=[32, 32, 32]), cache)
    assert cured.shape == (5, 1, 32, 32, 32)


@pytest.mark.parametrize(
    ("shape", "size"), [((95, 68), [96, 64]), ((28, 28), [32, 32]), ((5, 240), [32, 256])]
)
def test_the_size_that_is_suggested_suits_the_families(
    shape: tuple[int, int], size: list[int]
) -> None:
    lines = shape_faults({"a": (1, *shape), "b": (1, *shape), "c": (1, 7, 7)})
    cure = f"data.size: {size} brings all to one, and data.patches takes parts of all"
    assert lines == [f"c: shape (7, 7), the others {shape}; {cure}"]
    for name in ("ddpm", "dcgan", "stylegan", "vqvae", "autoencoder_kl", "rectified_flow"):
        image = ImageSpec(
            size=size, channels=1, spacing_mm=(1, 1, 1), affine=as_rows(np.eye(4)),
            intensity_range=[(0, 1)], file_format="nii.gz",
        )  # fmt: skip
        assert registry.find(name)().faults(image) == []


def test_mixed_channels_and_ranks(tmp_path: Path, cache: Path) -> None:
    grey = [picture(tmp_path / f"grey{i}.png", 6, 6) for i in range(3)]
    colour = picture(tmp_path / "colour.png", 6, 6, 3)
    deep = volume(tmp_path / "deep.nii.gz", 6, 6, 6)
    _, lines = faults(listed(tmp_path, *[[path] for path in (*grey, colour, deep)]), cache)
    assert lines == (
        f"{colour}: 3 channels, the others have 1; convert it, or leave it out",
        f"{deep}: 3 spatial axes, the others have 2; leave it out",
    )


def test_damage_and_shapes_are_told_together(tmp_path: Path, cache: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 6, 6) for i in range(3)]
    paths[0].write_bytes(b"")
    other = picture(tmp_path / "other.png", 6, 8)
    headline, lines = faults(listed(tmp_path, *[[path] for path in (*paths, other)]), cache)
    assert headline.startswith("2 images of ")
    assert lines[0].startswith(f"{paths[0]} is empty")
    assert lines[1].startswith(f"{other}: shape (8, 6), the others (6, 6)")


def test_many_faults_fit_a_screen(tmp_path: Path, cache: Path) -> None:
    paths = [tmp_path / f"{i:02d}.png" for i in range(25)]
    for path in paths:
        path.touch()
    headline, lines = faults(listed(tmp_path, *[[path] for path in paths]), cache)
    assert headline.startswith("25 images of ")
    assert len(lines) == 21
    assert lines[-1] == "and 5 more"
    assert all(str(path) in line for path, line in zip(paths[:20], lines, strict=False))


def test_a_repaired_image_is_read_again(tmp_path: Path, cache: Path) -> None:
    good, bad = picture(tmp_path / "good.png", 4, 4), tmp_path / "bad.png"
    bad.write_text("not yet")
    manifest = listed(tmp_path, [good], [bad])
    faults(manifest, cache)
    picture(bad, 4, 4)
    assert load_images(manifest, DataConfig(), cache).shape == (2, 1, 4, 4)


def test_the_limit_of_the_config_is_kept(tmp_path: Path, cache: Path) -> None:
    manifest = listed(tmp_path, [picture(tmp_path / "a.png", 64, 64)])
    with pytest.raises(OutputError, match=r"take 0\.00 GB, data\.cache_gb allows 1e-05: raise"):
        load_images(manifest, DataConfig(cache_gb=1e-5), cache)
    assert load_images(manifest, DataConfig(cache_gb=1e-4), cache).shape == (1, 1, 64, 64)
