"""The self-check that containers carry: it passes here, and says which step does not."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from synthcube.models import registry
from synthcube.tasks import self_check as module
from synthcube.tasks.self_check import SelfCheckError, self_check

STEPS = ("phantoms", "train", "infer", "evaluate", "export", "verify", "open in Python")


@pytest.mark.slow
def test_every_family_goes_the_whole_way_in_2d_and_3d(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines = [re.sub(r": \d+\.\d s$", "", line) for line in self_check()]
    assert lines == [
        f"{family} in {rank}D, {step}"
        for family in registry.names()
        for rank in (2, 3)
        for step in STEPS
    ] + ["autoencoder_kl with onnx", "autoencoder_kl with openvino"]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_convolution_that_is_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is checked before all else: some versions of cuDNN computed it wrongly."""
    cpu, what = torch.device("cpu"), "convolution of volumes in bfloat16"
    assert module._bf16_convolution(cpu) == f"{what}: right"
    plain = torch.nn.functional.conv3d

    def wrong(x: torch.Tensor, *rest: torch.Tensor, padding: int) -> torch.Tensor:
        return plain(x, *rest, padding=padding) * (1.1 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch.nn.functional, "conv3d", wrong)
    with pytest.raises(SelfCheckError, match=rf"{what}: torch.bfloat16 is off by \d+\.\d%"):
        module._bf16_convolution(cpu)


@pytest.mark.parametrize("cache", [pytest.param("good", marks=pytest.mark.slow), "/proc/nowhere"])
def test_the_command_says_so_and_exits_accordingly(cache: str, tmp_path: Path) -> None:
    """As in a container: from anywhere, without HOME, and with nothing else in the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "synthcube", "self-check"], capture_output=True, text=True,
        cwd="/", env={"SYNTHCUBE_CACHE": str(tmp_path / cache), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    if cache == "good":
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("self-check passed\n")
    else:
        assert done.returncode == 1
        assert " in 2D, train: Cannot write /proc/nowhere" in done.stderr
        assert "passed" not in done.stdout
