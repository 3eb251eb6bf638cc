"""From the shell, with nothing but the environment: what a user does, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from synthcube import environment as runtime

NAME = "alice/brains"


@pytest.fixture
def shell(hub, tmp_path: Path):
    """Runs a command of ours in a new process, whose Hub is the one on loopback."""
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    kept_values = {name: os.environ[name] for name in kept if name in os.environ}
    kept_values |= {"HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}

    def run(*words: object, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "synthcube", *map(str, words)],
            env={**kept_values, **environment}, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


def test_only_another_hub_goes_without_xet() -> None:
    public: dict[str, str] = {}
    assert runtime.ready_hub(public) == runtime.PUBLIC_HUB
    assert "HF_HUB_DISABLE_XET" not in public
    own = {"HF_ENDPOINT": "http://hub.example/"}
    assert runtime.ready_hub(own) == "http://hub.example"
    assert own["HF_HUB_DISABLE_XET"] == "1"
    chosen = {"HF_ENDPOINT": "http://hub.example", "HF_HUB_DISABLE_XET": "0"}
    runtime.ready_hub(chosen)
    assert runtime.uses_xet(chosen), "who has said so knows better"
    assert not runtime.uses_xet(own)


@pytest.mark.slow
def test_push_pull_and_offline(shell, hub, first_stage, leaks, tmp_path: Path) -> None:
    """The client is as it comes: that Xet is off, and where its cache is, is our own doing."""
    token = next(iter(hub.users))
    run, push = first_stage("rectified_flow"), ("--license", "mit", "--push-to", NAME)
    code, told = shell("export", "-m", run, "-o", "model", *push)
    assert code == 2
    assert "there is no token" in told
    code, told = shell("export", "-m", run, "-o", "model", *push, HF_TOKEN=token, HF_DEBUG="1")
    assert code == 0, told
    assert f"The Hub is {hub.endpoint}: its storage service Xet is not used." in told
    assert f"Published: hf://{NAME}@{hub.repos[NAME].branches['main']}" in told
    pull = ("infer", "-m", f"hf://{NAME}", "-n", 1, "-o")
    code, more = shell(*pull, "one", HF_TOKEN=token, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "is not in the cache of this machine" in more
    assert len(more.splitlines()) == 1
    code, last = shell(*pull, "two", HF_TOKEN=token)
    assert code == 0, last
    hub.asked.clear()
    assert shell(*pull, "three", HF_HUB_OFFLINE="1")[0] == 0
    assert hub.asked == []
    one, other = (tmp_path / name / "images" / "00000.png" for name in ("two", "three"))
    assert one.read_bytes() == other.read_bytes()
    assert leaks(told, more, last) == []
