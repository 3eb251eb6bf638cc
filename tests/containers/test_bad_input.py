"""What a user gets wrong: exit code 2 and a sentence that names the parameter, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

TRAIN = ["train", "--parameters_file=/in/config.yaml", "--data_path=/in/data"]

CASES = {
    "no mounts": ([*TRAIN, "--output_path=/out/run"], {}, "/in/config.yaml"),
    "no data": (
        [*TRAIN[:2], "--data_path=/nowhere", "--output_path=/out/run"],
        {"inputs": "/in:ro", "out": "/out"}, "/nowhere",
    ),
    "no model": (
        ["infer", "--model_path=/nowhere", "--output_path=/out/images"],
        {"out": "/out"}, "/nowhere",
    ),
    "a file for a folder": (
        [*TRAIN, "--output_path=/out"], {"inputs": "/in:ro", "file": "/out"}, "/out",
    ),
    "unwritable output": (
        [*TRAIN, "--output_path=/out/run"], {"inputs": "/in:ro", "out": "/out:ro"}, "/out/run",
    ),
    "missing parameter": (TRAIN, {"inputs": "/in:ro"}, "--output_path"),
    "unknown parameter": (
        [*TRAIN, "--output_path=/out/run", "--nonsense=1"], {"inputs": "/in:ro"}, "--nonsense",
    ),
    "unknown task": (["nonsense"], {}, "nonsense"),
    "no compiler": (
        [*TRAIN, "--output_path=/out/run", "--set", "compute.compile=true"],
        {"inputs": "/in:ro", "out": "/out"}, "needs a C++ compiler",
    ),
}  # fmt: skip


@pytest.fixture
def places(inputs: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    return {"inputs": inputs, "out": tmp_path / "out", "file": tmp_path / "file"}


def _explained(done, named: str) -> None:
    message = done.stderr.strip()
    assert done.returncode == 2, message
    assert "Traceback" not in message
    assert named in message.splitlines()[-1], message


@pytest.mark.parametrize("case", CASES)
def test_image(case: str, docker, places: dict[str, Path]) -> None:
    arguments, mounts, named = CASES[case]
    _explained(docker(arguments, {places[key]: to for key, to in mounts.items()}), named)


@pytest.mark.parametrize("case", ["no mounts", "unwritable output", "unknown task"])
def test_singularity(case: str, singularity, places: dict[str, Path]) -> None:
    arguments, mounts, named = CASES[case]
    binds = {places[key]: to for key, to in mounts.items()}
    _explained(singularity(arguments, binds, flags=("-eC",)), named)
