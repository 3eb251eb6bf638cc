"""Whole slides to patches: places, resolution, colours, what is left out, and what is kept out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch

from synthcube.data.images import read_image, write_image
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.preparation import Preparation, prepare
from synthcube.data.preprocessing import DataConfig, to_intensities
from synthcube.data.slide_patches import PatchOptions, patch_options, thumbnail_of
from synthcube.data.slides import is_slide
from synthcube.errors import ManifestError, OutputError

GLASS = (243, 242, 244)
SECRET = (255, 0, 255)
"""The colour of labels and macro images, which nothing else has."""


def picture(width: int = 640, height: int = 512, seed: int = 0) -> np.ndarray:
    """Glass, with tissue in three quarters of the width: from 1/8 to 7/8 both ways."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = GLASS
    inner = pixels[height // 8 : height * 7 // 8, width // 8 : width * 7 // 8]
    inner[:] = (205, 130, 175)
    inner -= np.random.default_rng(seed).integers(0, 60, inner.shape, dtype=np.uint8)
    return pixels


def halved(pixels: np.ndarray, times: int) -> np.ndarray:
    """Each pixel the mean of `times` x `times`."""
    return np.asarray(PIL.Image.fromarray(pixels).reduce(times)) if times > 1 else pixels


def write_slide(
    path: Path, pixels: np.ndarray, *, mpp: float | None = 0.5, levels: tuple[int, ...] = (1, 2, 4)
) -> Path:
    """A generic tiled pyramid."""
    stated: dict[str, Any] = {}
    if mpp is not None:
        stated = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for times in levels:
            file.write(
                halved(pixels, times), tile=(128, 128), photometric="rgb", compression="zlib",
                metadata=None, subfiletype=int(times > 1), **stated,
            )  # fmt: skip
    return path


def write_aperio(path: Path, pixels: np.ndarray, facts: str = "|AppMag = 20|MPP = 0.5") -> Path:
    """As scanners of Aperio write it: with a thumbnail, a label and a macro image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
    flat = {**common, "rowsperstrip": 16}
    label = np.full((64, 96, 3), SECRET, np.uint8)
    height, width = pixels.shape[:2]
    title = f"Aperio Image Library v12.0.15\r\n{width}x{height} [0,0 {width}x{height}] (128x128)"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(128, 128), description=f"{title} {facts}", **common)
        file.write(halved(pixels, 4), description="Aperio\r\nthumbnail", **flat)
        file.write(halved(pixels, 2), tile=(128, 128), description="Aperio\r\nlevel", **common)
        file.write(label, description="Aperio\r\nlabel 96x64", subfiletype=1, **flat)
        file.write(label, description="Aperio\r\nmacro 96x64", subfiletype=9, **flat)
    return path


def cut(data: Path, out: Path, size: str = "64", seed: int = 0, **options: Any) -> Preparation:
    arguments = {
        name: options.pop(name)
        for name in ("mpp", "magnification", "overlap", "max_patches", "min_tissue")
        if name in options
    }
    patches = patch_options(size, seed=seed, **arguments)
    return prepare(data, out, patches=patches, seed=seed, **options)


def rows(done: Preparation) -> list[dict[str, str]]:
    with done.manifest_path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(done: Preparation, row: dict[str, str]) -> np.ndarray:
    return np.asarray(PIL.Image.open(done.manifest_path.parent / row["Channel_0"]))


def corners(done: Preparation) -> list[tuple[int, int]]:
    return [(int(row["x"]), int(row["y"])) for row in rows(done)]


def reasons(done: Preparation) -> dict[str, str]:
    return {path.name: reason for path, reason in done.left_out}


def test_patches_are_the_slides_own_pixels_at_the_place_that_they_state(tmp_path: Path) -> None:
    pixels = picture()
    write_slide(tmp_path / "in" / "a.tif", pixels)
    done = cut(tmp_path / "in", tmp_path / "out")
    assert (done.subjects, done.columns) == (1, ("x", "y", "level", "mpp"))
    listed = rows(done)
    assert len(listed) == done.rows > 40
    for row in listed:
        x, y = int(row["x"]), int(row["y"])
        assert row["Channel_0"] == f"patches/a.tif/a_x{x}_y{y}.png"
        assert (row["SubjectID"], row["level"], row["mpp"]) == ("a", "0", "0.5")
        assert np.array_equal(pixels_of(done, row), pixels[y : y + 64, x : x + 64])
    manifest = read_manifest(done.manifest_path)
    assert manifest.rows[0].conditions["x"] == listed[0]["x"]


@pytest.mark.parametrize(
    ("size", "options", "side", "level", "mpp"),
    [
        ("64", {}, 64, "0", "0.5"),
        ("32", {"mpp": 1.0}, 64, "1", "1"),
        ("32", {"mpp": 1.5}, 96, "1", "1.5"),
        ("16", {"mpp": 2.2}, 70.4, "2", "2.2"),
        ("32um", {}, 64, "0", "0.5"),
        ("64 µm", {"mpp": 2.0}, 128, "2", "2"),
        ("32", {"magnification": 10}, 64, "1", "1"),
        ("64um", {"magnification": 10}, 128, "1", "1"),
        ("32", {"mpp": 0.4995}, 32, "0", "0.5"),  # so near that nothing is interpolated
    ],
)
def test_size_and_resolution(
    tmp_path: Path, size: str, options: dict[str, float], side: float, level: str, mpp: str
) -> None:
    """Against a reference: the same area of the whole picture, reduced by Pillow."""
    pixels = picture()
    write_slide(tmp_path / "in" / "a.tif", pixels)
    done = cut(tmp_path / "in", tmp_path / "out", size, **options)
    row = rows(done)[len(rows(done)) // 2]
    assert (row["level"], row["mpp"]) == (level, mpp)
    patch, x, y = pixels_of(done, row), int(row["x"]), int(row["y"])
    number = float(size.rstrip(" uµm"))
    expected = round(number / float(mpp)) if "m" in size else round(number)
    assert patch.shape == (expected, expected, 3)
    area = PIL.Image.fromarray(pixels).resize(
        (expected, expected), PIL.Image.Resampling.LANCZOS, (x, y, x + side, y + side)
    )
    difference = patch.astype(float) - np.asarray(area)
    assert np.abs(difference).mean() < 6
    assert np.abs(difference.mean((0, 1))).max() < 1, "the colours are the same"


def test_magnification_is_that_of_the_objective_where_the_slide_states_it(tmp_path: Path) -> None:
    write_aperio(tmp_path / "in" / "a.svs", picture(), "|AppMag = 40|MPP = 0.23")
    done = cut(tmp_path / "in", tmp_path / "out", "32", magnification=20)
    assert {row["mpp"] for row in rows(done)} == {"0.46"}
    done = cut(tmp_path / "in", tmp_path / "of size", "32um", magnification=20)
    assert {(row["mpp"], pixels_of(done, row).shape) for row in rows(done)} == {
        ("0.5", (64, 64, 3))
    }


def test_neighbours_overlap_as_asked(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture())
    apart = corners(cut(tmp_path / "in", tmp_path / "apart", "64"))
    overlapping = corners(cut(tmp_path / "in", tmp_path / "overlapping", "64", overlap=0.75))
    assert {x % 64 for x, _ in apart} == {0}
    assert sorted({x for x, _ in overlapping})[:3] == [48, 64, 80]
    assert {*apart} < {*overlapping}


def test_so_much_tissue_is_in_each_patch(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture(640, 640))
    counts = {
        share: cut(tmp_path / "in", tmp_path / str(share), "64", min_tissue=share).rows
        for share in (0.0, 0.1, 0.5, 0.95)
    }
    # Tissue is from 80 to 560, so the outer patches are three quarters full, their corners 9/16.
    assert counts == {0.0: 64, 0.1: 64, 0.5: 64, 0.95: 36}


def test_background_of_one_colour_is_no_image(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture(1024, 1024))
    done = cut(tmp_path / "in", tmp_path / "out", min_tissue=0)
    assert done.rows == 12 * 12, "training refuses constant images"


def test_the_most_patches_are_spread_over_the_tissue_and_follow_the_seed(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture(1024, 1024))
    every = corners(cut(tmp_path / "in", tmp_path / "all", "32"))
    some = [
        corners(cut(tmp_path / "in", tmp_path / name, "32", max_patches=64, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    assert some[0] == some[1]
    assert some[0] != some[2]
    for chosen in some:
        assert len({*chosen}) == 64
        assert {*chosen} < {*every}
        quadrants = [(x >= 512, y >= 512) for x, y in chosen]
        for quadrant in {*quadrants}:
            assert 13 <= quadrants.count(quadrant) <= 19
    assert corners(cut(tmp_path / "in", tmp_path / "more", "32", max_patches=10**6)) == every


def test_a_slide_is_a_subject_and_splits_are_by_slide(tmp_path: Path) -> None:
    for number in range(5):
        write_slide(tmp_path / "in" / f"s{number}.tif", picture(seed=number))
    done = cut(tmp_path / "in", tmp_path / "out", "128", validation=0.2, test=0.2)
    assert (done.subjects, {*done.splits}) == (5, {"train", "validation", "test"})
    splits: dict[str, set[str]] = {}
    for row in rows(done):
        splits.setdefault(row["SubjectID"], set()).add(row["Split"])
    assert all(len(names) == 1 for names in splits.values())


def test_folders_of_classes_and_of_patients(tmp_path: Path) -> None:
    for name in ("tumour/p1/a.tif", "tumour/p1/b.tif", "tumour/c.tif", "normal/c.tif"):
        write_slide(tmp_path / "in" / name, picture())
    done = cut(tmp_path / "in", tmp_path / "out", "128", paradigm="custom")
    assert {(row["LabelMapping"], row["SubjectID"]) for row in rows(done)} == {
        ("normal", "normal/c"), ("tumour", "p1"), ("tumour", "tumour/c"),
    }  # fmt: skip
    assert len({row["Channel_0"] for row in rows(done)}) == done.rows


def test_labels_macro_images_and_metadata_stay_in_the_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openslide

    facts = "|AppMag = 20|MPP = 0.5|Patient = DOE^JANE|User = 4711"
    path = write_aperio(tmp_path / "in" / "a.svs", picture(), facts)
    with openslide.OpenSlide(path) as slide:
        assert {"label", "macro"} <= {*slide.associated_images}
        assert slide.associated_images["label"].getpixel((0, 0))[:3] == SECRET

    def refused(self: openslide.OpenSlide) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refused))
    done = cut(tmp_path / "in", tmp_path / "out", min_tissue=0)
    for row in rows(done):
        assert not (pixels_of(done, row) == SECRET).all(-1).any()
    for file in (file for file in (tmp_path / "out").rglob("*") if file.is_file()):
        assert not any(text in file.read_bytes() for text in (b"DOE", b"JANE", b"4711"))
        if file.suffix == ".png":
            with PIL.Image.open(file) as patch:
                assert patch.info == {}, "no profile, text or date"


def test_what_was_not_scanned_is_white(tmp_path: Path) -> None:
    """A sparse pyramid: tiles that are not stored."""
    path = tmp_path / "in" / "a.tif"
    path.parent.mkdir()
    tile = np.full((128, 128, 3), (200, 120, 170), np.uint8)
    with tifffile.TiffWriter(path) as file:
        for side in (4, 2):
            tiles: Iterator[Any] = iter([tile, None] * (side * side // 2))
            file.write(
                tiles, shape=(128 * side, 128 * side, 3), dtype=np.uint8, tile=(128, 128),
                photometric="rgb", compression="zlib", metadata=None, subfiletype=int(side == 2),
            )  # fmt: skip
    done = cut(tmp_path / "in", tmp_path / "out", "200", min_tissue=0)
    for row in rows(done):
        assert {tuple(colour) for colour in pixels_of(done, row).reshape(-1, 3)} == {
            (200, 120, 170), (255, 255, 255),
        }  # fmt: skip


@pytest.mark.parametrize("size", [(96, 64), (640, 512)])
def test_a_thumbnail_is_read_in_blocks(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import openslide

    monkeypatch.setattr("synthcube.data.slide_patches._BLOCK", 100)
    pixels = picture(*size)
    with openslide.OpenSlide(write_slide(tmp_path / "a.tif", pixels, levels=(1,))) as slide:
        shown = np.asarray(thumbnail_of(slide, 64))
    expected = PIL.Image.fromarray(pixels).resize(shown.shape[1::-1], PIL.Image.Resampling.BOX)
    assert np.abs(shown.astype(int) - np.asarray(expected)).mean() < 1


def wrong_magic(path: Path) -> None:
    path.write_text("hello")


def truncated(path: Path) -> None:
    content = write_aperio(path, picture()).read_bytes()
    path.write_bytes(content[: len(content) // 3])


def truncated_pixels(path: Path) -> None:
    """Its directories are there, the pixels of its tiles are not."""
    content = bytearray(write_aperio(path, picture()).read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in (file.pages[0], file.pages[2]):
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                content[start : start + count] = bytes(count)
    path.write_bytes(content)


def unknown_compression(path: Path) -> None:
    content = bytearray(write_aperio(path, picture()).read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            place = page.tags["Compression"].valueoffset
            content[place : place + 2] = struct.pack("<H", 34925)  # LZMA
    path.write_bytes(content)


def no_tissue(path: Path) -> None:
    write_aperio(path, np.full((512, 640, 3), GLASS, np.uint8))


def little_tissue(path: Path) -> None:
    pixels = np.full((512, 640, 3), GLASS, np.uint8)
    pixels[40:80, 40:80] = (200, 120, 170)
    write_aperio(path, pixels)


def too_small(path: Path) -> None:
    write_aperio(path, picture(160, 100))


def zero_microns(path: Path) -> None:
    write_aperio(path, picture(), "|AppMag = 20|MPP = 0")


def absurd_microns(path: Path) -> None:
    write_aperio(path, picture(), "|AppMag = 20|MPP = 352.8")


def no_microns(path: Path) -> None:
    write_aperio(path, picture(), "|AppMag = 20")


def coarse(path: Path) -> None:
    write_aperio(path, picture(), "|AppMag = 10|MPP = 1")


FAULTS = {
    wrong_magic: "is not a slide (of TIFFs, a tiled pyramid) that OpenSlide can read, or is cut",
    truncated: "is not a slide (of TIFFs, a tiled pyramid) that OpenSlide can read, or is cut",
    truncated_pixels: "is damaged, or cannot be read by OpenSlide (",
    unknown_compression: "is damaged, or cannot be read by OpenSlide (Unsupported TIFF compression",
    no_tissue: "shows no tissue",
    little_tissue: "has no patch with so much tissue: 0.1",
    too_small: "has 160 x 100 pixels: a patch of 128 of them is larger",
    zero_microns: "states 0 microns per pixel, where 0.02 to 50 are possible; --mpp and sizes in",
    absurd_microns: "states 352.8",
    no_microns: "does not state its microns per pixel; --mpp and sizes in micrometres need them",
    coarse: "is too coarse: it would be enlarged 2 times",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_slide_that_cannot_be_cut_is_named_and_the_others_are_cut(
    tmp_path: Path, spoil: Any, cli
) -> None:
    data, out = tmp_path / "in", tmp_path / "out"
    write_aperio(data / "good.svs", picture())
    spoil(data / "bad.svs")
    words = ("prepare", "-d", data, "-o", out, "--patch_size", "128", "--mpp", "0.5")
    code, shown, errors = cli(*words)
    assert (code, errors) == (0, "")
    (line,) = (line for line in shown.splitlines() if line.startswith("Left out: "))
    assert line.startswith(f"Left out: {data / 'bad.svs'}: {FAULTS[spoil]}")
    assert [path.name for path in (out / "patches").iterdir()] == ["good.svs"]
    (data / "good.svs").unlink()
    code, _, errors = cli(*words[:4], tmp_path / "none", *words[5:])
    assert code == 2
    assert "holds no slide that can be used (layout: SUBJECT/images, or images)." in errors
    assert f"{data / 'bad.svs'}: {FAULTS[spoil]}" in errors
    assert not list(tmp_path.glob("none/**/*.png"))


def test_without_microns_pixels_are_enough(tmp_path: Path) -> None:
    no_microns(tmp_path / "in.svs")
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "in.svs", tmp_path / "in" / "a.svs")
    assert {row["mpp"] for row in rows(cut(tmp_path / "in", tmp_path / "out"))} == {""}
    done = cut(tmp_path / "in", tmp_path / "out 5x", magnification=10)
    assert {(row["mpp"], row["level"]) for row in rows(done)} == {("", "1")}


def test_slides_need_a_patch_size(tmp_path: Path, cli) -> None:
    write_aperio(tmp_path / "in" / "a.svs", picture())
    write_slide(tmp_path / "in" / "b.tif", picture())
    code, _, errors = cli("prepare", "-d", tmp_path / "in", "-o", tmp_path / "out")
    assert code == 2
    assert "holds whole slides (a.svs, b.tif), which are cut into patches" in errors
    assert f"synthcube prepare -d {tmp_path / 'in'} -o OUTPUT --patch_size 256 --mpp 0.5" in errors
    assert not (tmp_path / "out").exists()


def test_a_patch_size_needs_slides(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(picture(64, 64)).save(tmp_path / "in" / "a.png")
    with pytest.raises(ManifestError, match=r"--patch_size cuts slides, but .* holds none"):
        cut(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ManifestError, match=r"for folders of slides, but data_path .* is a file"):
        cut(tmp_path / "in" / "a.png", tmp_path / "out")


def test_a_plain_tiff_stays_an_image(tmp_path: Path) -> None:
    data = tmp_path / "in"
    data.mkdir()
    tifffile.imwrite(data / "plain.tif", picture(64, 64))
    write_slide(data / "tiled.tif", picture(256, 256), levels=(1,))
    assert prepare(data, tmp_path / "out").rows == 2
    assert not any(is_slide(data / name) for name in ("plain.tif", "tiled.tif"))
    write_slide(data / "pyramid.tif", picture())
    done = cut(data, tmp_path / "patches", "128")
    assert {row["SubjectID"] for row in rows(done)} == {"pyramid"}
    assert {*reasons(done)} == {"plain.tif", "tiled.tif"}


def test_files_of_a_slide_and_images_beside_it_are_no_images(tmp_path: Path) -> None:
    data = tmp_path / "in"
    write_slide(data / "a.tif", picture())
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0001.dat", "v.vms", "v_macro.jpg", "v(1,0).jpg",
                 "a_overview.png", "v.txt"):  # fmt: skip
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("x")
    done = cut(data, tmp_path / "out")
    assert {*reasons(done)} == {"m.mrxs", "v.vms", "a_overview.png"}
    assert reasons(done)["a_overview.png"] == "an image beside slides: only the slides are cut"


def test_names_that_no_manifest_can_hold_are_left_out(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", picture())
    for name in (b"\xff.dcm", b"\xff.svs", b"\xff.tif", b"b\x01.tif"):
        shutil.copyfile(tmp_path / "a.tif", os.fsencode(tmp_path) + b"/" + name)
    done = cut(tmp_path, tmp_path / "out")
    assert {row["SubjectID"] for row in rows(done)} == {"a"}
    assert len(done.left_out) == 4
    assert all("rename it" in reason for _, reason in done.left_out)


def test_without_openslide_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_aperio(tmp_path / "in" / "a.svs", picture())
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ManifestError, match=r"pip install 'synthcube\[histology\]'"):
        cut(tmp_path / "in", tmp_path / "out")
    assert not is_slide(write_slide(tmp_path / "b.tif", picture()))


@pytest.mark.parametrize(
    ("size", "options", "fault"),
    [
        (None, {"mpp": 0.5, "overlap": 0.1}, "--mpp and --overlap cannot be used without --patch_"),
        ("0um", {}, "--patch_size 0um: a size above 0 is needed"),
        ("-5um", {}, "--patch_size -5um: a size above 0 is needed"),
        ("nanum", {}, "--patch_size nanum: write 256 for pixels, or 100um for micrometres"),
        ("big", {}, "--patch_size big: write 256 for pixels, or 100um for micrometres"),
        ("100m", {}, "--patch_size 100m: write 256 for pixels, or 100um for micrometres"),
        ("12.5", {}, "--patch_size 12.5: a whole number of 8 to 4096 pixels is needed"),
        ("5000", {}, "--patch_size 5000: a whole number of 8 to 4096 pixels is needed"),
        ("64", {"mpp": 0.0}, "--mpp 0: 0.02 to 50 microns are possible"),
        ("64", {"mpp": float("nan")}, "--mpp nan: 0.02 to 50 microns are possible"),
        ("64", {"mpp": 1, "magnification": 10}, "--mpp and --magnification: only one of them"),
        ("64", {"magnification": 0}, "--magnification 0: 0.2 to 500 are possible"),
        ("64", {"overlap": 1.0}, "--overlap 1: a share of 0 to 0.9 is possible"),
        ("64", {"max_patches": 0}, "--max_patches 0: at least 1 is needed"),
        ("64", {"min_tissue": 1.5}, "--min_tissue 1.5: a share of 0 to 1 is possible"),
    ],
)
def test_settings_that_cannot_be_used(size: str | None, options: Any, fault: str) -> None:
    with pytest.raises(ManifestError) as error:
        patch_options(size, **options)
    assert fault in str(error.value)


def test_all_faults_of_the_settings_are_told_at_once() -> None:
    with pytest.raises(ManifestError) as error:
        patch_options("0um", overlap=2, max_patches=-1)
    assert len(error.value.faults) == 3
    assert patch_options(None) is None
    assert patch_options("256") == PatchOptions(256)


def test_the_same_command_again_cuts_nothing_and_lists_the_same(tmp_path: Path) -> None:
    data, out = tmp_path / "in", tmp_path / "out"
    path = write_aperio(data / "a.svs", picture())
    first = cut(data, out, max_patches=9)
    text, stat = first.manifest_path.read_bytes(), path.stat()
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    path.write_bytes(bytes(stat.st_size))  # it is not even opened
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cut(data, out, max_patches=9).manifest_path.read_bytes() == text
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.png")} == written


def test_a_lost_patch_is_cut_again(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture())
    done = cut(tmp_path / "in", tmp_path / "out")
    lost = tmp_path / "out" / rows(done)[3]["Channel_0"]
    content = lost.read_bytes()
    lost.unlink()
    cut(tmp_path / "in", tmp_path / "out")
    assert lost.read_bytes() == content


def test_a_slide_that_changed_is_cut_again_without_leftovers(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture(640, 640))
    cut(tmp_path / "in", tmp_path / "out")
    write_slide(tmp_path / "in" / "a.tif", picture(256, 256, seed=3))
    done = cut(tmp_path / "in", tmp_path / "out")
    listed = {row["Channel_0"].rpartition("/")[2] for row in rows(done)}
    assert listed == {path.name for path in (tmp_path / "out").rglob("*.png")}


def test_patches_of_other_settings_stay(tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture())
    done = cut(tmp_path / "in", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="cut with other settings"):
        cut(tmp_path / "in", tmp_path / "out", "32")
    assert {path: path.read_bytes() for path in before} == before
    cut(tmp_path / "in", tmp_path / "out", seed=7)  # which only matters to --max_patches
    shutil.rmtree(tmp_path / "out" / "patches" / "a.tif")
    (tmp_path / "out" / "patches" / "a.tif").mkdir()
    (tmp_path / "out" / "patches" / "a.tif" / "mine.png").write_text("x")
    with pytest.raises(OutputError, match="was not written by synthcube prepare"):
        cut(tmp_path / "in", tmp_path / "out")
    assert done.rows


@pytest.mark.parametrize("content", ["{}", "[", '{"corners": [[1]]}', '{"corners": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    write_slide(tmp_path / "in" / "a.tif", picture())
    cut(tmp_path / "in", tmp_path / "out")
    record = tmp_path / "out" / "patches" / "a.tif" / "patches.json"
    settings = json.loads(record.read_text())["settings"]
    text = content if content == "[" else json.dumps({**json.loads(content), "settings": settings})
    record.write_text(text)
    with pytest.raises(OutputError, match=r"patches\.json"):
        cut(tmp_path / "in", tmp_path / "out")


def test_a_kill_leaves_whole_slides_or_none(tmp_path: Path, kills) -> None:
    data, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.tif", "b.tif"):
        write_slide(data / name, picture(256, 256))
    whole = cut(data, tmp_path / "whole").rows // 2
    states = set()
    for number in range(0, 200, 7):
        shutil.rmtree(out, ignore_errors=True)
        done = kills.killed_before(number, tmp_path, lambda: cut(data, out))
        counts = [len([*folder.glob("*.png")]) for folder in sorted(out.glob("patches/[ab]*"))]
        assert {*counts} <= {whole}
        states.add(len(counts))
        again = cut(data, out)
        assert again.rows == 2 * whole
        assert not [*out.rglob(".synthcube-*")]
        if done:
            break
    assert states == {0, 1, 2}


def test_the_output_may_lie_in_the_folder_of_the_slides(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", picture())
    first = rows(cut(tmp_path, tmp_path))
    done = cut(tmp_path, tmp_path)
    assert rows(done) == first
    assert reasons(done) == {}


WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_dicom(path: Path, pixels: np.ndarray, mpp: float, series: str) -> None:
    """A level of a slide in DICOM."""
    pydicom = pytest.importorskip("pydicom")
    height, width = pixels.shape[:2]
    down, across = -(-height // 128), -(-width // 128)
    padded = np.zeros((down * 128, across * 128, 3), np.uint8)
    padded[:height, :width] = pixels
    frames = padded.reshape(down, 128, across, 128, 3).swapaxes(1, 2)
    measures, shared, optics = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared.PixelMeasuresSequence = [measures]
    optics.ObjectiveLensPower = 20
    level = pydicom.Dataset()
    level.file_meta = pydicom.dataset.FileMetaDataset()
    level.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    level.file_meta.MediaStorageSOPClassUID = level.SOPClassUID = WSI
    level.SOPInstanceUID = pydicom.uid.generate_uid()
    level.file_meta.MediaStorageSOPInstanceUID = level.SOPInstanceUID
    level.PatientName, level.Modality = "DOE^JANE", "SM"
    level.SeriesInstanceUID, level.StudyInstanceUID = series, pydicom.uid.generate_uid()
    level.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    level.Rows = level.Columns = 128
    level.NumberOfFrames = down * across
    level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows = width, height
    level.SamplesPerPixel, level.PhotometricInterpretation = 3, "RGB"
    level.PlanarConfiguration = level.PixelRepresentation = 0
    level.BitsAllocated = level.BitsStored = 8
    level.HighBit = 7
    level.DimensionOrganizationType = "TILED_FULL"
    level.SharedFunctionalGroupsSequence, level.OpticalPathSequence = [shared], [optics]
    level.PixelData = frames.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    level.save_as(path, enforce_file_format=True)


def test_a_dicom_series_of_several_levels_is_one_slide(tmp_path: Path) -> None:
    pixels = picture()
    for number, times in enumerate((1, 2)):
        write_dicom(tmp_path / f"in/s1/{number}.dcm", halved(pixels, times), 0.5 * times, "1.2.3")
    done = cut(tmp_path / "in", tmp_path / "out", "32", mpp=1)
    assert {(row["SubjectID"], row["level"], row["mpp"]) for row in rows(done)} == {
        ("s1", "1", "1")
    }
    assert len({row["Channel_0"] for row in rows(done)}) == done.rows == len({*corners(done)})
    assert b"DOE" not in done.manifest_path.read_bytes()


def test_colours_survive_reading_preprocessing_and_writing(tmp_path: Path) -> None:
    """Whatever the size of the data set, red stays red: the same bytes come back."""
    write_slide(tmp_path / "in" / "a.tif", picture())
    done = cut(tmp_path / "in", tmp_path / "out")
    manifest = read_manifest(done.manifest_path)
    config = DataConfig()
    assert config.augmentation == (), "none of which shifts colours unless asked"
    data = DataModule(manifest, config, batch_size=4, seed=0, cache=tmp_path / "cache")
    for index in (0, done.rows - 1):
        row = manifest.rows[index]
        ranges = tuple(map(tuple, data.cache.intensity_ranges[index].tolist()))
        assert ranges == ((0, 255),) * 3
        image = to_intensities(torch.from_numpy(data.cache.read([index])[0]), ranges)
        back = tmp_path / "back.png"
        write_image(back, image, data.cache.affines[index])
        assert np.array_equal(PIL.Image.open(row.channels[0]), PIL.Image.open(back))
        assert torch.equal(read_image([back]).tensor, read_image(row.channels).tensor)


PEAK = """
import resource, sys
from synthcube.cli import main
sys.argv = ["synthcube", *sys.argv[1:]]
try:
    main()
finally:
    print("KiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(*words: object) -> int:
    """The largest memory of a command, in a process of its own."""
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    return int(done.stdout.rpartition("KiB:")[2]) << 10


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(1, 4), (1,)], ids=str)
def test_the_memory_does_not_grow_with_the_slide(tmp_path: Path, levels: tuple[int, ...]) -> None:
    """A sparse pyramid of 20,480 x 20,480 pixels (1.3 GB in RGB) with tissue in its middle."""
    side, tile = 20_480, 512
    path = tmp_path / "large" / "a.tif"
    path.parent.mkdir()
    stained = np.full((tile, tile, 3), (200, 120, 170), np.uint8)
    stained -= np.random.default_rng(0).integers(0, 60, stained.shape, dtype=np.uint8)

    def tiles(count: int) -> Iterator[np.ndarray | None]:
        yield np.full_like(stained, 255)  # tifffile finds the type in the first one
        inner = range(count * 3 // 10, count * 7 // 10)  # the same on every level
        for place in range(1, count * count):
            yield stained if place // count in inner and place % count in inner else None

    with tifffile.TiffWriter(path) as file:
        for times in levels:
            length = side // times
            file.write(
                tiles(length // tile), shape=(length, length, 3), dtype=np.uint8, tile=(tile, tile),
                photometric="rgb", compression="zlib", metadata=None, subfiletype=int(times > 1),
                resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
            )  # fmt: skip
    write_slide(tmp_path / "small" / "a.tif", picture(2048, 2048))
    options = ("--patch_size", "256", "--mpp", "1", "--max_patches", "100")
    small, large = (
        peak_bytes("prepare", "-d", tmp_path / name, "-o", tmp_path / "out" / name, *options)
        for name in ("small", "large")
    )
    assert len(read_manifest(tmp_path / "out" / "large").rows) == 100
    assert large - small < 150 << 20, "22 MB were measured"


@pytest.mark.slow
def test_two_slides_become_generated_colour_patches(tmp_path: Path, tiny_config, cli) -> None:
    """One prepare, one train, one infer, one evaluate."""
    for number in range(2):
        write_slide(tmp_path / "in" / f"s{number}.tif", picture(640, 640, seed=number))
    data, run, images = tmp_path / "data", tmp_path / "run", tmp_path / "images"
    words = ("--patch_size", "16", "--mpp", "2", "--max_patches", "30", "--validation", "0.5")
    for command in (
        ("prepare", "-d", tmp_path / "in", "-o", data, *words),
        ("train", "-c", tiny_config(), "-d", data, "-o", run),
        ("infer", "-m", run, "-o", images, "-n", "4"),
        ("evaluate", "-p", images, "-l", data, "-o", tmp_path / "results.yaml"),
    ):
        code, _, errors = cli(*command)
        assert code == 0, errors
    generated = sorted((images / "images").iterdir())
    assert len(generated) == 4
    for path in generated:
        with PIL.Image.open(path) as picture_made:
            assert (picture_made.mode, picture_made.size) == ("RGB", (16, 16))
