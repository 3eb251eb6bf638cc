"""Eight kinds of images to plan for: some real, some drawn by the scripts in examples/."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

_EXAMPLES = Path(__file__).parents[1] / "examples"


def _script(name: str) -> Any:
    """A script of examples/, as a module; a library has taken the name of that folder."""
    specification = spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class DataSet:
    """Images to train on and to judge by, and the config that somebody wrote for such images.

    Args:
        write: makes `train` and, unless there are too few images, `judge` in a folder; it gets the
            folders of real pictures and real volumes.
        written_by_hand: keys of a config.
    """

    name: str
    write: Callable[[Path, Path, Path], None]
    written_by_hand: Mapping[str, Any]


def _list(folder: Path, part: str, rows: Iterable[tuple[str, ...]], head: str) -> None:
    lines = [head, *(",".join(row) for row in rows)]
    (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")


def _real_pictures(classes: list[str] | None, most: int) -> Callable[[Path, Path, Path], None]:
    """Every fifth judges, and of the others at most `most` of each class are trained on."""

    def write(folder: Path, pictures: Path, _: Path) -> None:
        from synthcube.data.images import image_fault

        parts: dict[str, list[tuple[str, ...]]] = {"train": [], "judge": []}
        names = classes or sorted(path.name for path in pictures.iterdir() if path.is_dir())
        for name in names:
            paths = [p for p in sorted((pictures / name).iterdir()) if not image_fault(p)]
            rows = [(f"{name}-{path.stem}", str(path.resolve()), name) for path in paths]
            parts["judge"] += rows[4::5][: 300 // len(names)]
            parts["train"] += islice((row for n, row in enumerate(rows) if n % 5 != 4), most)
        for part, rows in parts.items():
            _list(folder, part, [row if len(names) > 1 else row[:2] for row in rows],
                  "SubjectID,Channel_0" + ",Label" * (len(names) > 1))  # fmt: skip

    return write


def _colour_patches(folder: Path, *_: Path) -> None:
    """Patches of drawn slides, 64x64, RGB; other slides judge."""
    he_like = _script("he_like")
    for part, numbers in (("train", range(12)), ("judge", range(100, 106))):
        (folder / part).mkdir()
        for number in numbers:
            pixels = he_like.slide(number, (768, 768))
            for place in range(64):
                top, left = 128 + 64 * (place // 8), 128 + 64 * (place % 8)
                patch = pixels[top : top + 64, left : left + 64]
                Image.fromarray(patch).save(folder / part / f"slide{number}_{place:02d}.png")


def _seven_volumes(folder: Path, _: Path, volumes: Path) -> None:
    shutil.copytree(volumes, folder / "train", ignore=shutil.ignore_patterns("*.md"))


def _thick_slices(folder: Path, *_: Path) -> None:
    """Drawn CT scans of heads, of which every fourth slice is left: 4 x 4 x 20 mm."""
    head_like = _script("head_like")
    matrix = head_like.affine() @ np.diag([1, 1, 4, 1])
    for part, numbers in (("train", range(40)), ("judge", range(100, 140))):
        (folder / part).mkdir()
        for number in numbers:
            random = np.random.default_rng(number)
            tissue = head_like.head(int(random.integers(20, 90)), random)
            scan = head_like.scan(tissue, "CT", random)[:, :, ::4].round().astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(scan, matrix), folder / part / f"{number:03d}.nii.gz")


def _image_and_mask(folder: Path, *_: Path) -> None:
    """Slices of drawn heads, 48x48, with the tumour's mask as a second channel."""
    brats_like = _script("brats_like")
    for part, numbers in (("train", range(120)), ("judge", range(200, 260))):
        (folder / part).mkdir()
        rows = []
        for number in numbers:
            t1, _, mask = brats_like.case("HGG", np.random.default_rng((0, number)))
            for place in (12, 15, 18):
                names = []
                for kind, scale, voxels in (("t1", 0.23, t1), ("seg", 1, mask)):
                    pixels = (voxels[:, ::-1, place].T * scale).clip(0, 255).astype(np.uint8)
                    path = folder / part / f"{number:03d}_{place}_{kind}.png"
                    Image.fromarray(pixels).save(path)
                    names.append(str(path.resolve()))
                rows.append((f"{number:03d}", *names))
        _list(folder, part, rows, "SubjectID,Channel_0,Channel_1")


def _four_channels(folder: Path, *_: Path) -> None:
    """Drawn heads in T1, FLAIR, their mean and their difference: volumes of 48x48x32."""
    brats_like = _script("brats_like")
    matrix = np.diag([brats_like.SPACING_MM] * 3 + [1.0])
    for part, numbers in (("train", range(40)), ("judge", range(100, 140))):
        (folder / part).mkdir()
        rows = []
        for number in numbers:
            t1, flair, _ = brats_like.case("LGG", np.random.default_rng((1, number)))
            names = []
            for channel, voxels in enumerate((t1, flair, (t1 + flair) / 2, t1 - flair)):
                path = folder / part / f"{number:03d}_{channel}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), matrix), path)
                names.append(str(path.resolve()))
            rows.append((f"{number:03d}", *names))
        _list(folder, part, rows, "SubjectID," + ",".join(f"Channel_{i}" for i in range(4)))


def _example(name: str, **changes: Any) -> Mapping[str, Any]:
    from synthcube import reading
    from synthcube.errors import ConfigError

    values = dict(reading.read_yaml(_EXAMPLES / name, ConfigError))
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def data_sets() -> list[DataSet]:
    """The eight sets, each with a config of examples/ or of the documentation."""
    hand = _example("mednist_hand_rectified_flow.yaml")
    mask = {"channels": {1: {"kind": "mask", "classes": [0, 1, 2, 4]}}}
    return [
        DataSet("one class", _real_pictures(["Hand"], 1200), hand),
        DataSet(
            "six classes", _real_pictures(None, 400),
            _example("mednist_classes_rectified_flow.yaml"),
        ),
        DataSet("40 pictures", _real_pictures(["Hand"], 40), hand),
        DataSet("colour patches", _colour_patches, hand),
        DataSet("seven volumes", _seven_volumes, _example("rectified_flow_3d.yaml")),
        DataSet(
            "thick slices", _thick_slices, _example("heads_3d.yaml", data={"size": [48, 56, 8]})
        ),
        DataSet(
            "image and mask", _image_and_mask,
            _example("mednist_hand_rectified_flow.yaml", data={"size": [48, 48], **mask}),
        ),
        DataSet(
            "four channels", _four_channels,
            _example("heads_3d.yaml", data={"size": [32, 32, 24]}),
        ),
    ]  # fmt: skip
