"""From folder to folder: train, infer, export, check, as a user does, through the command line."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as Pillow

from synthcube.models import artifact
from synthcube.storage import sha256


@pytest.fixture
def trained(cli, tiny_config, phantoms: Path, tmp_path: Path) -> Path:
    code, _, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run"


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_whole_way(cli, trained: Path, phantoms: Path, tmp_path: Path) -> None:
    before = hashes(phantoms)
    assert cli("infer", "-m", trained, "-o", tmp_path / "images", "-n", 5, "--seed", 3)[0] == 0
    assert cli("export", "-m", trained, "-o", tmp_path / "shared")[0] == 0
    assert (
        cli("infer", "-m", tmp_path / "shared", "-o", tmp_path / "again", "-n", 5, "--seed", 3)[0]
        == 0
    )
    assert hashes(tmp_path / "images" / "images") == hashes(tmp_path / "again" / "images")
    assert hashes(phantoms) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml", "image.json"])
def test_one_flipped_byte_is_found(cli, trained: Path, tmp_path: Path, name: str) -> None:
    path = trained / "artifact" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for command in ("infer", "export"):
        code, _, err = cli(command, "-m", trained, "-o", tmp_path / "out")
        assert code == 2
        assert f"{name} has changed since it was written" in err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_newer_schema_are_named(cli, trained: Path, tmp_path: Path) -> None:
    index = trained / "artifact" / "artifact.json"
    (trained / "artifact" / "image.json").unlink()
    assert "image.json is missing" in cli("infer", "-m", trained, "-o", tmp_path / "out")[2]
    newer = json.loads(index.read_text()) | {"schema_version": 99}
    index.write_text(json.dumps(newer))
    code, _, err = cli("infer", "-m", trained, "-o", tmp_path / "out")
    assert code == 2
    assert "is of artifact schema 99, this SynthCube" in err


def test_export_is_self_contained_and_verified(cli, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    assert cli("export", "-m", trained, "-o", out)[0] == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md", "artifact.json", "config.yaml", "image.json", "metadata.json", "metrics.json",
        "model.safetensors", "samples.png", "versions.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "For research only" in card
    assert card.startswith("---\nlibrary_name: synthcube\n")
    assert cli("export", "-m", trained, "-o", out)[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    code, _, err = cli("export", "-m", trained, "-o", tmp_path / "mine")
    assert code == 2
    assert "holds something that is no exported model" in err


def test_metrics_that_are_no_numbers_are_refused_at_export(
    cli, trained: Path, tmp_path: Path
) -> None:
    """Python writes and reads NaN in JSON, which no other reader of it does."""
    folder = trained / "artifact"
    metrics = json.loads((folder / "metrics.json").read_text())
    wrong = metrics | {"validation/loss": float("nan"), "train/loss": float("-inf")}
    (folder / "metrics.json").write_text(json.dumps(wrong))
    artifact.write_index(folder)
    code, _, err = cli("export", "-m", trained, "-o", tmp_path / "out")
    assert code == 2
    assert f"{folder / 'metrics.json'}" in err
    assert "is not a number" in err
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(cli, tiny_config, phantoms, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out, expected in (
        (file, "it is a file, a folder is needed"),
        (file / "below", "Cannot write"),
        (Path("/proc/nothing"), "Cannot write"),
    ):
        code, _, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", out)
        assert code == 2, err
        assert expected in err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("family", ["rectified_flow", "vqvae"])
def test_underscores_and_mlcubes_names_are_understood(
    cli, family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    code, _, err = cli(
        "train", f"--parameters_file={tiny_config(family)}", f"--data_path={phantoms}",
        f"--output_path={tmp_path / 'run'}", "--set", "training.max_epochs=1",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = cli(
        "export", f"--model_path={tmp_path / 'run'}", f"--output_path={tmp_path / 'out'}"
    )
    assert code == 0, err


def test_usage_errors_exit_with_2(cli) -> None:
    assert cli("train")[0] == 2
    assert cli("dance")[0] == 2
    assert cli("infer", "-m", "x", "-o", "y", "-n", "0")[0] == 2


@pytest.mark.slow
def test_a_bug_shows_its_traceback_and_exits_with_1(tmp_path: Path) -> None:
    script = (
        "import synthcube.tasks.describe as d, sys\n"
        "d.family_lines = lambda: 1 / 0\n"
        "from synthcube.cli import main\nsys.argv = ['synthcube', 'families']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, synthcube.cli\nsys.argv = ['synthcube', '--help']\n"
        "try:\n    synthcube.cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'lightning', 'monai', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "infer", "export", "prepare", "check", "init", "families", "schema"):
        assert f"\n\N{BOX DRAWINGS LIGHT VERTICAL} {command} " in done.stdout


@pytest.mark.slow
def test_garbage_is_collected_once_the_libraries_are_imported() -> None:
    script = """
import gc
usual = gc.get_threshold()
from synthcube.cli.app import setup_process
setup_process()
setup_process()
def searches():
    return sum(generation["collections"] for generation in gc.get_stats())
before = searches()
import synthcube.tasks.train
print(searches() - before, end=" ")
objects = [[] for _ in range(1_000_000)]
print(searches() > before, gc.get_threshold() == usual)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "0 True True\n", done.stderr


def test_help_says_that_a_finished_run_stands_for_its_held_out_images(cli) -> None:
    for command in ("infer", "evaluate"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert re.search(
            r"run: (those|the ones) that it held out",
            " ".join(out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()),
        )


def test_python_m_is_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "synthcube", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "0.1.0"


def test_prepare_prints_what_it_found_and_left_out(cli, phantoms: Path, tmp_path: Path) -> None:
    (phantoms / "notes.txt").write_text("not an image")
    code, out, _ = cli("prepare", "-d", phantoms, "-o", tmp_path / "m", "--validation", "0.25")
    assert code == 0
    assert "12 images of 12 subjects" in out
    assert "Splits: train 9, validation 3" in out
    assert "notes.txt" in out
    assert cli("families")[1].startswith("autoencoder_kl ")
    assert json.loads(cli("schema")[1])["title"] == "SynthCube run"


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_run_that_goes_on(
    tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    """SIGKILL while training; the same command again ends where an untouched run ends."""
    words = ["train", "-c", str(tiny_config()), "-d", str(phantoms), "--set",
             "training.max_epochs=30", "-o"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "synthcube", *words, str(tmp_path / "killed")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    for line in process.stderr:
        if line.startswith("epoch 4/"):
            process.kill()
            break
    process.communicate()
    assert not (tmp_path / "killed" / "artifact").exists()
    for name in ("killed", "straight"):
        done = forks.command(*words, tmp_path / name)
        assert done.returncode == 0, done.stderr
    digests = {
        hashlib.sha256((tmp_path / name / "artifact" / "weights.safetensors").read_bytes()).digest()
        for name in ("killed", "straight")
    }
    assert len(digests) == 1


def test_prepare_verifies_where_asked(cli, phantoms: Path, tmp_path: Path) -> None:
    """MedNIST's HeadCT holds 17 pictures of nothing."""
    Pillow.new("L", (16, 16), 25).save(phantoms / "blank.png")
    (phantoms / "text.png").write_text("no picture")
    assert "14 images" in cli("prepare", "-d", phantoms, "-o", tmp_path / "all")[1]
    out = cli("prepare", "-d", phantoms, "-o", tmp_path / "usable", "--verify")[1]
    assert "12 images" in out
    assert "blank.png: constant image: every voxel is 25" in out
    assert "text.png: is not a .png image, whatever its name says" in out
