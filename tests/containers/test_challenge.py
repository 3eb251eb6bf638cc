"""A container for a challenge: built on the image, and run as the organisers run it.

What the host does is done in forks: threads of a training in this process would not be in the forks
of the tests after these, which would wait for them for ever.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from synthcube import reading
from synthcube.models import registry

NAMES = ["BraTS-GLI-00002-000", "BraTS-GLI-00003-000"]
SUBMISSION = f"synthcube-submission:{os.getpid()}"  # other processes test it at the same time
STRICT = ("--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=all",
          "--security-opt=no-new-privileges")  # fmt: skip


@pytest.fixture(scope="module")
def submission(
    tmp_path_factory, brats: ModuleType, forks: ModuleType, tool: str, image: str
) -> Iterator[Path]:
    """What export has written, of which the image SUBMISSION is built."""
    folder = tmp_path_factory.mktemp("submission")
    brats.inpainting_cases(folder / "heads", [f"h{i}" for i in range(4)], whole=True)
    data = brats.manifest(folder / "heads", ("t1n-voided", "mask", "t1n"))
    model = {**registry.find("rectified_flow").tiny().model_dump(mode="json"), "mode": "regression"}
    settings = {
        "model": model, "data": {"source_channels": [0, 1], "channels": {"1": {"kind": "mask"}}},
        "training": {"max_epochs": 1, "batch_size": 2, "num_sample_images": 1},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(reading.dump(settings))
    trained = forks.command(
        "train", "-c", folder / "config.yaml", "-d", data, "-o", folder / "run"
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    mask = os.umask(0o077)  # nobody else may read what it writes, and yet every user may run it
    try:
        exported = forks.command(
            "export", "-m", folder / "run", "-o", folder / "container",
            "--challenge", "brats-inpainting", "--base", image,
        )  # fmt: skip
    finally:
        os.umask(mask)
    assert exported.returncode == 0, exported.stderr
    built = subprocess.run(
        [tool, "build", "--tag", SUBMISSION, str(folder / "container")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    yield folder / "container"
    subprocess.run([tool, "rmi", SUBMISSION], capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "data", "predictions"),
    [
        ([], "/input:ro", "/output"),
        (["infer", "--data_path=/mlcube_io0", "--output_path=/mlcube_io2",
          "--weights=/mlcube_io1", "--parameters_file=/mlcube_io3/parameters.yml"],
         "/mlcube_io0", "/mlcube_io2"),
    ],
    ids=["2025", "2024"],
)  # fmt: skip
def test_it_runs_as_the_organisers_run_it(
    submission: Path, brats: ModuleType, forks: ModuleType, tool: str, known, tmp_path: Path,
    arguments: list[str], data: str, predictions: str,
) -> None:  # fmt: skip
    cases = brats.inpainting_cases(tmp_path / "cases", NAMES)
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, 12345, 12345)
    (tmp_path / "parameters").mkdir()
    (tmp_path / "parameters" / "parameters.yml").write_text("seed: 0\n")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    before = known.hashes(cases)
    mounts = [f"{cases}:{data}", f"{out}:{predictions}"]
    if arguments:
        mounts += [f"{submission}:/mlcube_io1", f"{tmp_path / 'parameters'}:/mlcube_io3"]
        subprocess.run(["chmod", "-R", "a+rX", str(submission)], check=True)
    own = ["--passwd=false"] if tool == "podman" else []
    done = subprocess.run(
        [tool, "run", "--user=12345:12345", *own, *STRICT,
         *(f"--volume={mount}" for mount in mounts), SUBMISSION, *arguments],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert known.hashes(cases) == before, "the input was changed"
    expected = tmp_path / "expected"
    on_host = forks.command("challenge", "-m", submission, "-d", cases, "-o", expected)
    assert on_host.returncode == 0, on_host.stderr
    assert known.hashes(out) == known.hashes(expected)
    assert len(known.hashes(out)) == 2
    assert {path.stat().st_uid for path in out.iterdir()} == {12345}


def test_without_a_user_it_may_write_for_root_and_a_fault_ends_it_with_2(
    submission: Path, brats: ModuleType, tool: str, known, tmp_path: Path
) -> None:
    cases = brats.inpainting_cases(tmp_path / "cases", NAMES)
    out = tmp_path / "out"
    out.mkdir(mode=0o755)
    command = [tool, "run", "--rm", "--network=none",
               f"--volume={cases}:/input:ro", f"--volume={out}:/output", SUBMISSION]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(known.hashes(out)) == 2
    (cases / NAMES[0] / f"{NAMES[0]}-mask.nii.gz").unlink()
    before = known.hashes(out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f"case {NAMES[0]}: t1n-inference is made out of" in done.stderr
    assert known.hashes(out) == before
