"""`synthcube evaluate` as its users call it: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from synthcube import storage
from synthcube.data.images import read_image, write_image
from synthcube.data.manifest import FILE_NAME
from synthcube.data.phantom import write_phantoms
from synthcube.errors import OutputError
from synthcube.evaluation.report.text import number

LIGHT = "evaluation: {extractor: {name: radiomic}, num_repeats: 2}\n"


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A config whose extractor needs neither weights nor time."""
    path = tmp_path / "light.yaml"
    path.write_text(LIGHT, encoding="utf-8")
    return path


def phantoms(folder: Path, num: int = 12, **settings: Any) -> Path:
    return write_phantoms(folder, num=num, **{"size": (16, 16), **settings}).parent


def renamed(folder: Path, subject: str) -> Path:
    """The same images, of other subjects: subject-00000 and so on."""
    path = folder / FILE_NAME
    path.write_text(path.read_text().replace(",phantom-", f",{subject}-"))
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, Path]:
    return {
        "-p": phantoms(tmp_path / "made", seed=1),
        "-l": phantoms(tmp_path / "real", seed=2),
        "-t": renamed(phantoms(tmp_path / "trained", seed=3), "trained"),
    }


@pytest.fixture
def judge(cli, light: Path, tmp_path: Path):
    def run(sides: dict[str, Path], *more: object) -> tuple[int, str, dict[str, Any]]:
        output = tmp_path / "out" / "results.yaml"
        words = [word for pair in sides.items() for word in pair]
        code, _, err = cli("evaluate", *words, "-o", output, "-c", light, *more)
        return code, err, yaml.safe_load(output.read_text()) if output.exists() else {}

    return run


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


def measures(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "value" in value:
            yield value
        for inner in value.values():
            yield from measures(inner)


def test_results_are_plain_numbers_each_with_a_value_or_a_reason(judge, sides, tmp_path) -> None:
    code, err, results = judge(sides, "--report", tmp_path / "report")
    assert code == 0, err
    assert {"fidelity", "diversity", "memorisation", "membership", "usefulness"} <= results.keys()
    assert all(math.isfinite(number) for number in numbers(results))
    told = list(measures(results))
    assert len(told) > 8
    assert all(entry["value"] is not None or entry["reason"] for entry in told)
    assert results["images"]["predictions"]["count"] == 12
    assert results["extractor"]["name"] == "radiomic"
    assert results["extractor"]["comparable"] is False
    assert results["extractor"]["sha256"] is None, "it has no weights"
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000
    assert (tmp_path / "report" / "cases.csv").exists()


def test_the_main_numbers_and_the_verdict_are_printed(cli, light, sides, tmp_path) -> None:
    real, generated = (
        phantoms(tmp_path / name, 40, seed=seed) for seed, name in enumerate(("r", "m"))
    )
    output = tmp_path / "results.yaml"
    words = ("-p", generated, "-l", real, "-t", sides["-t"], "-o", output, "-c", light)
    code, out, err = cli("evaluate", *words, "--report", tmp_path / "report")
    assert code == 0, err
    lines = out.splitlines()
    results = yaml.safe_load(output.read_text())
    kernel = results["fidelity"]["kernel_distance"]
    (line,) = [line for line in lines if line.startswith("Distance to real images (kernel)")]
    assert f"{number(kernel['value'])} (" in line
    assert f"  {number(kernel['real_baseline'])}  " in line
    assert line.endswith("↓ lower")
    assert [line for line in lines if line.startswith("What is ")] == results["verdict"]
    assert lines[-2:] == [f"Results: {output}", f"Report: {tmp_path / 'report' / 'report.html'}"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "disc: generated" in page
    assert {name.rpartition("_")[2] for name in results["fidelity_by_class"] if "precision" in name}


def test_nothing_of_the_site_is_in_the_results(judge, sides, tmp_path: Path) -> None:
    _, _, results = judge(sides)
    text = yaml.safe_dump(results)
    assert str(tmp_path) not in text
    assert "phantom-0" not in text, "a subject, or the name of a file"


def test_the_same_input_gives_the_same_file(judge, sides, tmp_path: Path) -> None:
    judge(sides)
    before = (tmp_path / "out" / "results.yaml").read_bytes()
    judge(sides)
    assert (tmp_path / "out" / "results.yaml").read_bytes() == before


def test_held_out_rows_are_those_of_test_and_training_rows_those_of_train(
    judge, sides, tmp_path: Path
) -> None:
    folder = phantoms(tmp_path / "all", num=20)
    path = folder / FILE_NAME
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    splits = ["train"] * 10 + ["validation"] * 4 + ["test"] * 6
    for row, split in zip(rows, splits, strict=True):
        row["Split"] = split
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    code, err, results = judge({**sides, "-l": folder, "-t": folder})
    assert code == 0, err
    assert results["images"]["labels"]["count"] == 6
    assert results["images"]["train_data"]["count"] == 10


def test_volumes_are_compared_too(judge, tmp_path: Path) -> None:
    sides = {
        flag: renamed(phantoms(tmp_path / flag, num=6, size=(16, 16, 16), seed=seed), f"of{seed}")
        for seed, flag in enumerate(("-p", "-l", "-t"))
    }
    code, err, results = judge(sides)
    assert code == 0, err
    assert results["images"]["labels"]["shape"] == [1, 16, 16, 16]


def test_real_images_are_brought_to_the_grid_of_the_training(
    cli, judge, sides, light: Path, tmp_path: Path
) -> None:
    sides["-l"] = phantoms(tmp_path / "larger", size=(24, 24), seed=2)
    code, err, _ = judge(sides)
    assert code == 2
    assert "predictions have the shape [1, 16, 16], labels [1, 24, 24]" in err
    assert "give the config of the training as -c" in err
    light.write_text(LIGHT + "data: {size: [16, 16]}\n")
    code, err, results = judge(sides)
    assert code == 0, err
    assert results["images"]["labels"]["shape"] == [1, 16, 16]


def spoiled(folder: Path, name: str, change) -> Path:
    path = folder / name
    image = read_image([path])
    write_image(path, change(image.tensor), image.affine)
    return path


def one_image(sides, tmp_path: Path) -> list[str]:
    sides["-p"] = phantoms(tmp_path / "one", num=1)
    return ["predictions: 1 image; at least 2 are needed"]


def identical(sides, tmp_path: Path) -> list[str]:
    source = (sides["-p"] / "phantom-00000.png").read_bytes()
    for path in sides["-p"].glob("*.png"):
        path.write_bytes(source)
    return ["predictions: all 12 images are identical"]


def other_range(sides, tmp_path: Path) -> list[str]:
    folder = phantoms(tmp_path / "volumes", size=(16, 16, 16), num=4)
    sides["-l"] = folder
    del sides["-t"]
    sides["-p"] = phantoms(tmp_path / "scaled", size=(16, 16, 16), num=4, seed=1)
    for path in sides["-p"].glob("*.nii.gz"):
        spoiled(sides["-p"], path.name, lambda x: x / 127.5 - 1)
    return ["predictions lie in [-0.96", "they are not in the same units"]


def not_a_number(sides, tmp_path: Path) -> list[str]:
    import nibabel as nib

    folder = phantoms(tmp_path / "volumes", size=(16, 16, 16), num=4)
    sides["-l"] = sides["-p"] = folder
    del sides["-t"]
    path = folder / "phantom-00002.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj, np.float32)
    voxels[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return ["predictions: ", "phantom-00002.nii.gz holds 1 NaN"]


def unreadable(sides, tmp_path: Path) -> list[str]:
    whole = (sides["-l"] / "phantom-00003.png").read_bytes()
    (sides["-l"] / "phantom-00003.png").write_bytes(whole[: len(whole) // 2])
    (sides["-p"] / "phantom-00001.png").write_bytes(b"")
    return ["phantom-00003.png is cut short", "phantom-00001.png is empty"]


def absent(sides, tmp_path: Path) -> list[str]:
    (sides["-p"] / "phantom-00004.png").unlink()
    return ["predictions: row 6, column Channel_0: ", "phantom-00004.png is missing"]


def nothing(sides, tmp_path: Path) -> list[str]:
    sides["-l"] = tmp_path / "nowhere"
    return ["labels: ", "nowhere does not exist"]


def another_channel_count(sides, tmp_path: Path) -> list[str]:
    sides["-l"] = phantoms(tmp_path / "two", channels=2)
    return ["predictions have the shape [1, 16, 16], labels [2, 16, 16]"]


@pytest.mark.parametrize(
    "spoil",
    [one_image, identical, other_range, not_a_number, unreadable, absent, nothing,
     another_channel_count],
)  # fmt: skip
def test_what_cannot_be_compared_is_named_and_nothing_is_written(
    spoil, judge, sides, tmp_path: Path
) -> None:
    expected = spoil(sides, tmp_path)
    code, err, results = judge(sides, "--report", tmp_path / "report")
    assert code == 2, err
    assert "Traceback" not in err
    for text in expected:
        assert text in err
    assert results == {}
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "report").glob("*"))


def test_grey_images_of_a_poor_model_are_judged_and_told_of(judge, sides) -> None:
    for path in sides["-p"].glob("*.png"):
        spoiled(sides["-p"], path.name, lambda x: 120 + (x - 120) / 30)
    code, err, results = judge(sides)
    assert code == 0, err
    assert any(note.startswith("Predictions lie in [1") for note in results["notes"])


def test_faults_of_all_sets_are_told_together(judge, sides, tmp_path: Path) -> None:
    unreadable(sides, tmp_path)
    sides["-t"] = tmp_path / "nowhere"
    code, err, _ = judge(sides)
    assert code == 2
    assert "nowhere" in err


def test_earlier_results_outlive_a_refusal(judge, sides, tmp_path: Path) -> None:
    judge(sides)
    before = (tmp_path / "out" / "results.yaml").read_bytes()
    unreadable(sides, tmp_path)
    assert judge(sides)[0] == 2
    assert (tmp_path / "out" / "results.yaml").read_bytes() == before


def test_an_output_that_cannot_be_written_is_found_first(cli, sides, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code, _, err = cli("evaluate", "-p", sides["-p"], "-l", sides["-l"], "-o", folder)
    assert code == 2
    assert f"output_path {folder} is a folder; a file is needed: results.yaml." in err
    (tmp_path / "file").write_text("mine")
    code, _, err = cli(
        "evaluate", "-p", sides["-p"], "-l", sides["-l"], "-o", tmp_path / "file" / "r.yaml"
    )
    assert code == 2
    assert "it is a file, a folder is needed" in err


def test_a_mounted_file_is_written_in_place(tmp_path: Path, monkeypatch) -> None:
    """As a bind mount answers: the file may be written, not replaced."""
    path = tmp_path / "results.yaml"
    path.write_text("")
    inode = path.stat().st_ino

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    storage.write_mounted(path, "value: 1\n")
    assert path.read_text() == "value: 1\n"
    assert path.stat().st_ino == inode
    with pytest.raises(OutputError, match="busy"):
        storage.write_mounted(tmp_path / "other", "")
    assert [path.name for path in tmp_path.iterdir()] == ["results.yaml"]


def test_the_run_of_a_training_stands_for_what_it_held_out(
    cli, tiny_config, tmp_path: Path
) -> None:
    data, run, images = phantoms(tmp_path / "data", num=16), tmp_path / "run", tmp_path / "images"
    config, output = tiny_config("vqvae"), tmp_path / "results.yaml"
    config.write_text(config.read_text() + LIGHT)
    assert cli("train", "-c", config, "-d", data, "-o", run)[0] == 0
    text = (run / "split.csv").read_text()
    kept = [row for row in csv.DictReader(io.StringIO(text)) if row["Split"] == "validation"]
    lines = [line for line in text.splitlines() if ",train," not in line]
    (tmp_path / "held-out.csv").write_text("\n".join(lines))
    words = ["evaluate", "-p", images, "-l", run, "-t", run, "-m", run, "-o", output]
    assert cli("infer", "-m", run, "-o", images, "-d", tmp_path / "held-out.csv")[0] == 0
    code, _, err = cli(*words)
    assert code == 0, err
    results = yaml.safe_load(output.read_text())
    assert results["images"]["labels"]["count"] == len(kept) == 3
    assert results["images"]["train_data"]["count"] == 13
    assert results["paired"]["num_pairs"] == 3
    assert results["extractor"]["name"] == "radiomic", "the run's own config"
    for path in (images / "images").iterdir():
        path.unlink()
        break
    rows = (images / "manifest.csv").read_text().splitlines()
    (images / "manifest.csv").write_text("\n".join([rows[0], *rows[2:]]))
    before = output.read_bytes()
    code, _, err = cli(*words)
    assert code == 2, "a reconstruction is missing"
    assert rows[1].split(",")[1] in err
    assert output.read_bytes() == before


def test_what_the_model_was_trained_on_is_left_out(
    cli, first_stage, light: Path, tmp_path: Path
) -> None:
    """PSNR over training images looked like a result."""
    run, output, images = first_stage("vqvae"), tmp_path / "results.yaml", tmp_path / "images"
    data = run.parent / "data"
    rows = list(csv.DictReader(io.StringIO((run / "split.csv").read_text())))
    trained = [row for row in rows if row["Split"] == "train"]
    assert (len(rows), len(trained)) == (12, 9)
    assert cli("infer", "-m", run, "-o", images, "-d", data)[0] == 0
    with (tmp_path / "trained.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Channel_0", "SubjectID"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(trained)
    words = ["evaluate", "-p", images, "-l", data, "-o", output, "-c", light]
    note = "9 of the 12 labels and 9 of the 12 predictions were left out, because the model"
    for known in (["-m", run], ["-m", run / "artifact"], ["-t", run],
                  ["-t", tmp_path / "trained.csv"]):  # fmt: skip
        code, _, err = cli(*words, *known)
        assert code == 0, err
        results = yaml.safe_load(output.read_text())
        assert results["images"]["labels"]["count"] == results["paired"]["num_pairs"] == 3
        assert results["notes"][0].startswith(note)
        assert f"NOT HELD OUT: {note}" in err
    assert cli(*words)[0] == 0
    assert yaml.safe_load(output.read_text())["paired"]["num_pairs"] == 12, "nothing is known"
    before = output.read_bytes()
    words[words.index("-l") + 1] = tmp_path / "trained.csv"
    code, _, err = cli(*words, "-m", run)
    assert code == 2
    assert "Nothing is left to evaluate: 9 of the 9 labels" in err
    assert output.read_bytes() == before
