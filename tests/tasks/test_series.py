"""Several configs in one call: one failure stops no other, and each outcome is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

KILLS_ITSELF = """
import os, torch
def Dying(weights, lr):
    os.kill(os.getpid(), 9)
def Buggy(weights, lr):
    raise ZeroDivisionError("a bug")
"""


@pytest.mark.slow
def test_a_failure_stops_no_other(cli, tiny_config, phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "fatal.py").write_text(KILLS_ITSELF)
    paths = {name: tiny_config(name=f"{name}.yaml") for name in ("bad", "dying", "good")}
    paths["bad"].write_text(paths["bad"].read_text() + "data: {size: [15, 15]}\n")
    dying = yaml.safe_load(paths["dying"].read_text())
    dying["model"]["optimizer"] = {"name": "fatal:Dying"}
    paths["dying"].write_text(yaml.safe_dump(dying))
    out = tmp_path / "out"
    words = [word for path in paths.values() for word in ("-c", path)]
    code, printed, _ = cli(
        "train", *words, "-d", phantoms, "-o", out, "--plugins", tmp_path / "own"
    )  # fmt: skip
    assert printed.splitlines()[-3:] == [
        f"{out / 'bad'}: failed", f"{out / 'dying'}: killed by SIGKILL", f"{out / 'good'}: done",
    ]  # fmt: skip
    assert code == 1, "one was killed"
    assert (out / "good" / "artifact" / "artifact.json").exists()
    words = ["-c", paths["bad"], "-c", paths["good"], "-d", phantoms, "-o", out]
    assert cli("train", *words)[0] == 2, "a user's fault alone"


def test_every_fault_is_said_before_the_first_starts(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    good, bad, worse = (tiny_config(name=f"{name}.yaml") for name in ("a", "b", "c"))
    bad.write_text("training: {max_epochs: 0}")
    worse.write_text("seed: -1")
    out = tmp_path / "out"
    code, _, err = cli("train", "-c", good, "-c", bad, "-c", worse, "-d", phantoms, "-o", out)
    assert code == 2
    assert "training.max_epochs (line 1)" in err
    assert "seed (line 1)" in err
    assert not out.exists()


def test_two_configs_of_one_name_are_refused(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    paths = tiny_config(name="a.yaml"), tiny_config(name="other/a.yml")
    out = tmp_path / "out"
    code, _, err = cli("train", "-c", paths[0], "-c", paths[1], "-d", phantoms, "-o", out)
    assert code == 2
    assert f"a: {paths[0]}, {paths[1]}" in err
    assert not out.exists()


def test_a_launcher_of_several_processes_is_refused(
    cli, tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["-c", tiny_config(name="a.yaml"), "-c", tiny_config(name="b.yaml")]
    code, _, err = cli("train", *words, "-d", phantoms, "-o", tmp_path / "out")
    assert code == 2
    assert "has started 2 processes" in err


@pytest.mark.slow
def test_a_signal_reaches_the_training_and_ends_the_series(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["-c", str(tiny_config(name="a.yaml")), "-c", str(tiny_config(name="b.yaml"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "synthcube", "train", *words, "-d", str(phantoms), "-o", str(out),
         "--set", "training.max_epochs=100000", "--set", "training.sample_every_n_epochs=0"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (out / "a" / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert (out / "a" / "checkpoints" / "last.ckpt").exists()
    assert process.returncode == 75, "to be put back into the queue"
    assert printed.splitlines()[-1] == f"{out / 'b'}: not started"
    assert f"{out / 'a'}: stopped by a signal" in printed
    assert not (out / "b").exists()
