"""The SIF: sealed as MedPerf seals it, and as a cluster runs it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from synthcube import __version__

SEALED = ("-eC", "--net", "--network", "none")


@pytest.fixture
def as_root() -> None:
    if os.getuid():
        pytest.skip("singularity gives a network of its own to root alone")


def test_plain(run_tasks, singularity) -> None:
    run_tasks(singularity)


def test_sealed(run_tasks, singularity, as_root) -> None:
    run_tasks(singularity, flags=SEALED, read_only=True)


def test_a_pythonpath_of_the_host_does_not_get_in(
    singularity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('the library of the host')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = singularity(["families"], {tmp_path: str(tmp_path)})
    assert done.returncode == 0, done.stderr


def _caches(sif: Path, temporary: Path) -> Path:
    """Where the container keeps its caches with this /tmp, as the host sees it."""
    done = subprocess.run(
        ["singularity", "exec", "-eC", f"--bind={temporary}:/tmp", str(sif),
         "/bin/sh", "-c", 'echo "$SYNTHCUBE_CACHE"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    inside = Path(done.stdout.strip()).parent
    return temporary / inside.relative_to("/tmp")


@pytest.mark.parametrize("trap", ["a link", "another's", "open to others", "a file"])
def test_caches_in_tmp_are_never_what_somebody_else_put_there(
    trap: str, sif: Path, tmp_path: Path
) -> None:
    temporary, victim = tmp_path / "tmp", tmp_path / "victim"
    temporary.mkdir()
    victim.mkdir(mode=0o700)
    usual = temporary / f"synthcube-{os.getuid()}"
    if trap == "a link":
        usual.symlink_to("../victim")
    elif trap == "a file":
        usual.write_text("mine")
    else:
        usual.mkdir(mode=0o700)
        usual.chmod(0o777 if trap == "open to others" else 0o700)
    if trap == "another's":
        if os.getuid():
            pytest.skip("only root can hand a folder to another user")
        os.chown(usual, 12345, 12345)
    caches = _caches(sif, temporary)
    assert caches != usual
    status = caches.lstat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.getuid(), 0o700)
    assert stat.S_ISDIR(status.st_mode)


def test_caches_in_tmp_stay_for_the_next_time(sif: Path, tmp_path: Path) -> None:
    caches = _caches(sif, tmp_path)
    assert caches == tmp_path / f"synthcube-{os.getuid()}"
    assert stat.S_IMODE(caches.lstat().st_mode) == 0o700
    assert _caches(sif, tmp_path) == caches


@pytest.mark.slow
def test_it_tests_itself(sif: Path) -> None:
    done = subprocess.run(["singularity", "test", "-eC", str(sif)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_labels_help_and_size(sif: Path) -> None:
    shown = subprocess.run(
        ["singularity", "inspect", "--json", "--labels", "--helpfile", str(sif)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    attributes = json.loads(shown.stdout)["data"]["attributes"]
    assert attributes["labels"]["org.opencontainers.image.version"] == __version__
    assert "singularity run" in attributes["helpfile"]
    assert sif.stat().st_size <= 700_000_000


def test_the_size_on_the_page_is_that_of_the_file(sif: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "singularity.md"
    (told,) = re.findall(r"^make sif .*about (\d\.\d+) GB", page.read_text("utf-8"), re.MULTILINE)
    assert abs(float(told) - sif.stat().st_size / 1e9) <= 0.05
