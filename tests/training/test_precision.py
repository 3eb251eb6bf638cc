"""Weights in float64 and bfloat16: every family trains, its average does not lose digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube.models import registry
from synthcube.tasks.infer import infer
from synthcube.tasks.train import train
from synthcube.training import checkpoints

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", registry.names())
def test_every_family_trains_and_samples(
    family: str, precision: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_config(family), phantoms, run, overrides=[f"compute.precision={precision}"])
    content = checkpoints.load(run / "checkpoints" / "last.ckpt")
    # Of every network most weights are convolutions and linear layers, which are converted.
    current = [each.dtype for each in content["current_model_state"].values()]
    assert DTYPES[precision] in current
    moments = [state["exp_avg"].dtype for state in content["optimizer_states"][0]["state"].values()]
    assert DTYPES[precision] in moments
    averaged = {each.dtype for each in content["state_dict"].values() if each.is_floating_point()}
    assert torch.bfloat16 not in averaged
    shared = weights(run)
    assert {each.dtype for each in shared.values()} <= {torch.float32, torch.int64, torch.int32}
    assert all(torch.isfinite(each).all() for each in shared.values())
    of_images = family in ("vqvae", "autoencoder_kl")
    infer(run, tmp_path / "images", num_images=2, data_path=phantoms if of_images else None)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_run_is_the_same_to_the_bit(
    precision: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config = tiny_config("dcgan")
    asked = ["compute.precision=" + precision, "model.scheduler=null"]
    train(config, phantoms, tmp_path / "straight", overrides=asked)
    train(config, phantoms, tmp_path / "stopped", overrides=[*asked, "training.max_epochs=1"])
    train(config, phantoms, tmp_path / "stopped", overrides=asked)
    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


def test_float64_is_closer_to_itself_than_float32(tiny_config, phantoms, tmp_path) -> None:
    """The same training in both differs by the rounding of float32, and by no more."""
    config = tiny_config("vqvae")
    for precision in ("32", "64"):
        train(config, phantoms, tmp_path / precision, overrides=[f"compute.precision={precision}"])
    single, double = weights(tmp_path / "32"), weights(tmp_path / "64")
    for name, expected in double.items():
        torch.testing.assert_close(single[name], expected, rtol=1e-2, atol=1e-4, msg=name)
    assert any(not torch.equal(single[name], double[name]) for name in single)
