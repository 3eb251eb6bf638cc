"""Check: faults that are found before a training."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthcube.data.phantom import write_phantoms
from synthcube.tasks.check import check


def test_check_reports_data_and_needs(cli, tiny_config, phantoms: Path) -> None:
    split = ["--set", "data.validation_fraction=0.25"]
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms, *split)
    assert code == 0, err
    assert "images: 12 of 12 subjects, all readable and of one shape" in out
    assert "size: 16 x 16, 1 channel(s)" in out
    assert "classes: {'disc': 4, 'square': 4, 'ring': 4}" in out
    for word in (
        "memory: about",
        "disk: about",
        "length: 4 steps in 2 epochs",
        "Ready to train.\n",
    ):
        assert word in out
    assert out.endswith("Ready to train.\n")
    assert "Warning" not in out


def test_check_finds_faults_of_config_and_data_together(cli, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("training: {batch: 1}")
    manifest = tmp_path / "bad.csv"
    manifest.write_text("Channel_0\nnowhere.png\n")
    code, _, err = cli("check", "-c", config, "-d", manifest)
    assert code == 2
    assert "training.batch" in err
    assert "nowhere.png" in err


def test_a_batch_that_cannot_be_shared_is_found(cli, tiny_config, phantoms, tmp_path) -> None:
    asked = ["--set", "compute.num_devices=3"]
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        code, _, text = cli(*command, "-c", tiny_config(), "-d", phantoms, *asked)
        assert code == 2
        assert "training.batch_size is 4, which 3 processes" in text
        assert "cannot share evenly: use 3 or 6." in text


def test_sizes_that_do_not_fit_the_model_stop_before_training(
    cli, tiny_config, tmp_path: Path
) -> None:
    data = write_phantoms(tmp_path / "odd", num=4, size=(17, 16))
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        code, _, err = cli(*command, "-c", tiny_config(), "-d", data)
        assert code == 2
        assert "data.size [17, 16]: every side must be a multiple of 4" in err
        assert "  - data.size: [16, 16] fits" in err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_a_condition_that_is_missing_is_told_before_images_are_read(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    table = (phantoms / "manifest.csv").read_text().replace(",", ";")
    (phantoms / "list.csv.gz").write_bytes(gzip.compress(table.encode()))
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        code, _, err = cli(
            *command, "-c", tiny_config(), "-d", phantoms / "list.csv.gz",
            "--set", "data.conditions={Age: number}",
        )  # fmt: skip
        assert code == 2
        assert "data.conditions names the column 'Age', which is missing or empty" in err
        assert "Preprocessing" not in err
    assert cli("check", "-c", tiny_config(), "-d", phantoms / "list.csv.gz")[0] == 0


def pictures(folder: Path, *names: str, largest: int = 255) -> Path:
    """16 x 16 pictures of random intensities from 0 to `largest`."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for name in names:
        values = random.integers(0, largest + 1, (16, 16), np.uint8)
        Image.fromarray(values).save(folder / name)
    return folder


def warnings_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("Warning: ")]


def test_a_channel_that_the_range_would_flatten_is_named(cli, tiny_config, tmp_path: Path) -> None:
    people = [f"{letter}.png" for letter in "abcd"]
    masks = pictures(tmp_path / "masks", *people, largest=40)
    images = pictures(tmp_path / "images", *people)
    table = tmp_path / "both.csv"
    lines = [f"{images / name},{masks / name}" for name in people]
    table.write_text("\n".join(["Channel_0,Channel_1", *lines]))
    split = ["--set", "data.validation_fraction=0.25"]
    wide = ["--set", "data.intensity_range=[-1000, 1000]"]
    code, out, err = cli("check", "-c", tiny_config(), "-d", table, *split, *wide)
    assert code == 0, err
    assert warnings_of(out) == [
        "Warning: channel 1 is nearly flat under data.intensity_range [-1000, 1000]: its "
        "intensities are 0 to 40, 2.0% of the range at most. Give a range that fits, or null for "
        "percentiles of each image."
    ]
    assert out.endswith("Ready to train, with 1 warning above.\n")
    pictures(tmp_path / "binary", *people, largest=1)
    table.write_text(table.read_text().replace(str(masks), str(tmp_path / "binary")))
    code, out, err = cli("check", "-c", tiny_config(), "-d", table, *split, *wide)
    assert code == 2
    assert "The range of intensities leaves no contrast in any image of" in err
    assert "0 to 1, and data.intensity_range is [-1000.0, 1000.0]" in err
    assert "channel 1: its intensities are 0 to 1" in err
    assert "Ready to train" not in out


@pytest.mark.parametrize(
    ("names", "people"),
    [
        (["p01_t1.png", "p01_seg.png", "p02_t1.png", "p02_seg.png"], "2 people (p01, p02)"),
        (
            [f"case_000{person}_slice_{i}.png" for person in (1, 2, 3, 4) for i in (0, 1)],
            "4 people (case_0001, case_0002, case_0003, ...)",
        ),
    ],
)
def test_one_person_who_counts_as_several_subjects_is_seen(
    names: list[str], people: str, cli, tiny_config, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "plain", *names)
    split = ["--set", "data.validation_fraction=0.25"]
    code, out, err = cli("check", "-c", tiny_config(), "-d", folder, *split)
    assert code == 0, err
    (warning,) = warnings_of(out)
    assert f"the file names look like {people}, but they count as {len(names)} subjects" in warning
    assert "column SubjectID" in warning
    assert "synthcube prepare" in warning


def test_names_of_one_image_each_are_no_warning(cli, tiny_config, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "plain", *[f"AbdomenCT_00{number}.png" for number in range(8)])
    split = ["--set", "data.validation_fraction=0.25"]
    code, out, err = cli("check", "-c", tiny_config(), "-d", folder, *split)
    assert code == 0, err
    assert not warnings_of(out)


def test_a_held_out_share_far_from_the_fraction_is_a_warning(
    cli, tiny_config, phantoms: Path
) -> None:
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms)
    assert code == 0, err
    (warning,) = warnings_of(out)
    assert "3 of 12 subjects (25%) are held out for validation" in warning
    assert "data.validation_fraction is 0.1" in warning


@pytest.mark.slow
def test_too_little_memory_is_not_ready(cli, tiny_config, phantoms: Path) -> None:
    large = ["--set", "training.batch_size=1000000"]
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms, *large)
    assert code == 2, out
    assert "memory: about" in out
    assert "Ready" not in out
    assert "it may run out of memory. These help most: " in err


def test_a_manifest_may_mix_absolute_and_relative_names(
    tiny_config, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = phantoms / "manifest.csv"
    header, first, *others = path.read_text().splitlines()
    moved = first.replace(first.split(",")[0], str(phantoms / first.split(",")[0]), 1)
    path.write_text("\n".join([header, moved, *others, ""]))
    monkeypatch.chdir(phantoms.parent)
    assert check(tiny_config(), Path(phantoms.name)).lines
