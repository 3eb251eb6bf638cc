"""The commands of the how-to pages, in the order in which they are written there.

As they stand, but for what a test cannot have: trainings are cut to one epoch on the CPU, and the
options that ask for a GPU are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "how-to"
STAND_IN = """#!{python}
import os, sys
words = sys.argv[1:]
for pair in ("--gpus all", "--device nvidia.com/gpu=all"):
    name, value = pair.split()
    if name in words:
        del words[words.index(name) : words.index(name) + 2]
if {keep_no_id}:
    words = [word for word in words if word != "--userns=keep-id"]
if "train" in words:
    words += ["--set", "training.max_epochs=1", "--set", "compute.accelerator=cpu"]
os.execv({tool!r}, [{tool!r}, *words])
"""


def script(page: str) -> str:
    blocks = re.findall(r"```bash\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)
    assert blocks
    return "set -eu\n" + "\n".join(blocks)


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A clone of the project in which nothing was run, and a folder for stand-ins of tools."""
    for name in ("workspace", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def _stand_in(newcomer: Path, name: str, tool: str) -> None:
    path = newcomer / "bin" / name
    full = shutil.which(tool)
    assert full
    path.write_text(STAND_IN.format(python=sys.executable, tool=full, keep_no_id=os.getuid() == 0))
    path.chmod(0o755)


def _run(text: str, newcomer: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", text], cwd=newcomer, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PATH": f"{newcomer / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_docker(newcomer: Path, tool: str, image: str) -> None:
    _stand_in(newcomer, "docker", tool)
    _run(script("docker.md"), newcomer)
    assert (newcomer / "outputs" / "model" / "README.md").is_file()
    assert any((newcomer / "cache").iterdir())


def test_podman(newcomer: Path, tool: str, image: str) -> None:
    if tool != "podman":
        pytest.skip("the images of this machine are Docker's")
    _stand_in(newcomer, "podman", tool)
    _run(script("podman.md"), newcomer)
    assert len(list((newcomer / "outputs" / "images" / "images").iterdir())) == 16


@pytest.mark.slow
def test_singularity(newcomer: Path, sif: Path) -> None:
    if os.getuid():
        pytest.skip("singularity gives a network of its own to root alone")
    (newcomer / "synthcube.sif").symlink_to(sif)
    _stand_in(newcomer, "singularity", "singularity")
    _run(script("singularity.md"), newcomer)
    assert (newcomer / "sealed" / "run" / "artifact" / "artifact.json").is_file()


def test_slurm(newcomer: Path) -> None:
    """Submitted to a stand-in: the scripts themselves are run in test_slurm.py."""
    fake = newcomer / "bin" / "sbatch"
    fake.write_text('#!/bin/sh\nfor last; do :; done\ntest -f "$last" && echo "$last"\n')
    fake.chmod(0o755)
    submitted = _run(script("slurm.md"), newcomer).split()
    scripts = {str(path.relative_to(newcomer)) for path in newcomer.glob("examples/slurm/*")}
    assert set(submitted) == scripts
