"""The image under every hardening, alone and together: same images, and they are the caller's."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

STRANGER = 12345  # has no entry in the image's passwd
WITHOUT_HOME = ("/usr/bin/env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "/app/bin/synthcube")
SMALL_MEMORY = ("--shm-size=64m",)
WORKERS = ("--set", "data.num_workers=1")


@pytest.fixture(scope="session")
def sealed(tool: str) -> tuple[str, ...]:
    """Nothing but /tmp is writable; podman would leave more."""
    strict = ("--read-only-tmpfs=false",) if tool == "podman" else ()
    return ("--read-only", "--tmpfs=/tmp", *strict)


@pytest.fixture
def as_root() -> None:
    if os.getuid():
        pytest.skip("only root can hand a folder to another user")


def test_plain(run_tasks, docker) -> None:
    run_tasks(docker)


def test_user_without_a_passwd_entry(run_tasks, docker, as_root) -> None:
    run_tasks(docker, owner=STRANGER, user=STRANGER)


def test_no_network(run_tasks, docker) -> None:
    run_tasks(docker, flags=("--rm", "--network=none"))


def test_read_only_root(run_tasks, docker, sealed) -> None:
    run_tasks(docker, flags=("--rm", *sealed))


def test_no_home(run_tasks, docker) -> None:
    run_tasks(docker, by=WITHOUT_HOME)


def test_inputs_read_only(run_tasks, docker) -> None:
    run_tasks(docker, read_only=True)


def test_little_shared_memory_with_workers(run_tasks, docker) -> None:
    """Docker's 64 MB are enough for small batches: the worker stays."""
    log = run_tasks(docker, flags=("--rm", *SMALL_MEMORY), extra=WORKERS)
    assert "Loading data with" not in log


def test_too_little_shared_memory_for_the_workers(run_tasks, docker) -> None:
    log = run_tasks(docker, flags=("--rm", "--shm-size=20k"), extra=WORKERS)
    assert "Loading data with 0 instead of 1 workers" in log


def test_all_in_one(run_tasks, docker, sealed, as_root) -> None:
    flags = (
        "--rm", "--network=none", "--cap-drop=all", "--security-opt=no-new-privileges",
        *SMALL_MEMORY, *sealed,
    )  # fmt: skip
    run_tasks(
        docker, owner=STRANGER, user=STRANGER, read_only=True, flags=flags, by=WITHOUT_HOME,
        extra=WORKERS,
    )  # fmt: skip


def test_nothing_is_written_but_outputs_and_tmp(run_tasks, docker, tool: str) -> None:
    """Each task in a container with a writable root, which is looked through afterwards."""
    ours = ("/tmp", "/in", "/out")
    # what the container tool itself puts into each container
    theirs = ("/run", "/etc", "/proc", "/sys", "/dev", "/var/tmp")
    names = []

    def launch(arguments, mounts):
        names.append(f"synthcube-test-{os.getpid()}-{len(names)}")
        return docker(arguments, mounts, flags=(f"--name={names[-1]}",))

    try:
        run_tasks(launch)
        for name in names:
            changed = subprocess.run([tool, "diff", name], capture_output=True, text=True)
            assert changed.returncode == 0, changed.stderr
            paths = [line.split(" ", 1)[1] for line in changed.stdout.splitlines()]
            others = [path for path in paths if not path.startswith((*ours, *theirs))]
            assert [path for path in others if path not in ("/", "/var")] == []
    finally:
        subprocess.run([tool, "rm", "--force", *names], capture_output=True)


def test_killed_training_resumes(
    docker, tool: str, inputs: Path, tmp_path: Path, known, forks
) -> None:
    """SIGKILL in the middle; the same command again ends where an undisturbed training ends."""
    out, undisturbed = tmp_path / "outputs", tmp_path / "undisturbed"
    out.mkdir()
    longer = ("--set", "training.max_epochs=40", "--set", "training.sample_every_n_epochs=0")
    train, infer, _ = known.tasks("/in", "/out", longer)
    mounts = {inputs: "/in:ro", out: "/out"}
    name = f"synthcube-killed-{os.getpid()}"
    try:
        started = docker(train, mounts, flags=(f"--name={name}", "--detach"))
        assert started.returncode == 0, started.stderr
        _wait_for(lambda: list((out / "run" / "checkpoints").glob("last*")))
        killed = subprocess.run([tool, "kill", "--signal=KILL", name], capture_output=True)
        assert killed.returncode == 0, "the training was over before it could be killed"
    finally:
        subprocess.run([tool, "rm", "--force", name], capture_output=True)
    assert not (out / "run" / "artifact").exists()
    again = docker(train, mounts)
    assert again.returncode == 0, again.stderr
    assert "Continuing after epoch" in again.stderr
    assert docker(infer, mounts).returncode == 0
    for arguments in known.tasks(str(inputs), str(undisturbed), longer)[:2]:
        done = forks.command(*arguments)
        assert done.returncode == 0, done.stderr
    assert known.hashes(out / "images/images") == known.hashes(undisturbed / "images/images")


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_processes_train_and_agree(docker, sealed, inputs: Path, tmp_path: Path) -> None:
    """The launcher starts the second process from the entrypoint; gloo finds it without network."""
    out = tmp_path / "outputs"
    out.mkdir()
    spy = Path(__file__).parents[1] / "each_rank.py"
    mounts = {inputs: "/in:ro", out: "/out", spy: "/each_rank.py:ro"}
    flags = ("--rm", "--network=none", *sealed, *SMALL_MEMORY)
    two = ("--set", "compute.num_devices=2", *WORKERS)
    train = ("train", "-c", "/in/config.yaml", "-d", "/in/data", "-o", "/out/run", *two)
    done = docker(train, mounts, flags=flags)
    assert done.returncode == 0, done.stderr
    spied = ("/each_rank.py", "/in/config.yaml", "/in/data", "/out/spied", "compute.num_devices=2")
    done = docker(spied, mounts, flags=flags, by=("/app/bin/python",))
    assert done.returncode == 0, done.stderr
    first, second = ((out / f"spied/rank_{rank}.safetensors").read_bytes() for rank in (0, 1))
    assert first == second
    artifact = "artifact/weights.safetensors"
    assert (out / "run" / artifact).read_bytes() == (out / "spied" / artifact).read_bytes()
