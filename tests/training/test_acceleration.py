"""torch.compile, activation checkpointing, determinism, and weights in float64 and bfloat16."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models import registry
from synthcube.models.families import rectified_flow
from synthcube.models.family import Family
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train
from synthcube.training import checkpoints
from synthcube.training.acceleration import compile_networks, recompute_blocks

# Traced as for any compiler, and run as it was: what is compiled is tested, not how fast it is.
TRACED = "compute.compile={backend: eager}"
WITHOUT_BLOCKS = {"dcgan"}


EYE = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
SPEC = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=EYE,
    intensity_range=((0.0, 1.0),), file_format="png",
)  # fmt: skip


def batch_of(number: int) -> Batch:
    return Batch(
        image=torch.rand(number, 1, 16, 16) * 2 - 1,
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.arange(number),
        augmented=False,
        condition=Condition(values=torch.zeros(number, 0), source=torch.zeros(number, 0, 16, 16)),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def same(one: Path, other: Path, **tolerance: float) -> None:
    before, after = weights(one), weights(other)
    assert list(before) == list(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("family", sorted({*registry.names()} - WITHOUT_BLOCKS))
def test_activation_checkpointing_changes_no_bit(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    overrides = ["training.max_epochs=1"]
    train(tiny_config(family), phantoms, tmp_path / "plain", overrides=overrides)
    again = [*overrides, "compute.activation_checkpointing=true"]
    train(tiny_config(family), phantoms, tmp_path / "twice", overrides=again)
    same(tmp_path / "plain", tmp_path / "twice", rtol=0, atol=0)
    state = checkpoints.load(tmp_path / "twice" / "checkpoints" / "last.ckpt")
    assert not [name for name in state["current_model_state"] if "wrapped" in name]


def test_a_penalty_on_slopes_is_differentiated_through_blocks_computed_twice(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    overrides = [
        "training.max_epochs=1", "model.r1_weight=10.0", "model.path_length_weight=2.0",
        "model.r1_every=1", "model.path_length_every=1",
    ]  # fmt: skip
    train(tiny_config("stylegan"), phantoms, tmp_path / "plain", overrides=overrides)
    again = [*overrides, "compute.activation_checkpointing=true"]
    train(tiny_config("stylegan"), phantoms, tmp_path / "twice", overrides=again)
    same(tmp_path / "plain", tmp_path / "twice", rtol=0, atol=0)


def test_a_run_goes_on_with_either(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    common = ["model.scheduler=null", "training.max_epochs=2"]
    train(tiny_config(), phantoms, tmp_path / "straight", overrides=common)
    for number, key in enumerate(("activation_checkpointing=true", "deterministic=true"), start=1):
        overrides = [*common, f"compute.{key}", f"training.max_epochs={number}"]
        train(tiny_config(), phantoms, tmp_path / "mixed", overrides=overrides)
    same(tmp_path / "straight", tmp_path / "mixed", rtol=0, atol=0)


def kept_bytes(family: Family, batch: Batch) -> int:
    """What a forward pass keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = family.loss(batch)["loss"]
    loss.backward()
    return sum(sizes.values())


def test_activation_checkpointing_keeps_less() -> None:
    family = registry.find("ddpm").tiny().build(SPEC)
    batch = batch_of(4)
    plain = kept_bytes(family, batch)
    assert recompute_blocks(family) == 12
    assert kept_bytes(family, batch) < plain / 3


def test_a_family_without_blocks_is_refused(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    overrides = ["compute.activation_checkpointing=true"]
    with pytest.raises(ConfigError, match="dcgan has no blocks"):
        train(tiny_config("dcgan"), phantoms, tmp_path / "run", overrides=overrides)


@pytest.mark.parametrize(
    "family", [pytest.param("rectified_flow", marks=pytest.mark.slow), "vqvae", "dcgan"]
)
def test_compiled_networks_train_the_same_model(
    family: str, tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    overrides = ["training.max_epochs=1"]
    train(tiny_config(family), phantoms, tmp_path / "plain", overrides=overrides)
    train(tiny_config(family), phantoms, tmp_path / "traced", overrides=[*overrides, TRACED])
    same(tmp_path / "plain", tmp_path / "traced", rtol=1e-4, atol=1e-5)
    state = checkpoints.load(tmp_path / "traced" / "checkpoints" / "last.ckpt")
    assert not [name for name in state["state_dict"] if "_orig_mod" in name]
    assert (tmp_path / "traced" / "samples" / "epoch_0001.png").is_file()
    config = ["compute.activation_checkpointing=true", TRACED, *overrides]
    if family != "dcgan":
        train(tiny_config(family), phantoms, tmp_path / "both", overrides=config)
        same(tmp_path / "plain", tmp_path / "both", rtol=1e-4, atol=1e-5)


def test_the_networks_are_what_is_compiled() -> None:
    compute = ComputeConfig.model_validate({"compile": {"backend": "eager"}})
    expected = {
        "rectified_flow": ["network"],
        "vqvae": ["network.encoder", "network.decoder"],
        "dcgan": ["generator", "discriminator"],
    }
    for name, networks in expected.items():
        family = registry.find(name).tiny().build(SPEC)
        assert compile_networks(family, batch_of(2), compute) == networks
        assert all(family.get_submodule(name)._compiled_call_impl for name in networks)
        assert not [name for name in family.state_dict() if "_orig_mod" in name]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
@pytest.mark.slow
def test_a_really_compiled_model_is_used_where_there_is_no_compiler(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    overrides = ["training.max_epochs=1"]
    train(tiny_config("vqvae"), phantoms, tmp_path / "plain", overrides=overrides)
    # In a process of its own: the compiler's imports warn, which is an error here.
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(tiny_config("vqvae")),
         "-d", str(phantoms),
         "-o", str(tmp_path / "compiled"), "--set", "compute.compile=true",
         "--set", "training.max_epochs=1"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    same(tmp_path / "plain", tmp_path / "compiled", rtol=1e-3, atol=1e-4)
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "infer", "-m", str(tmp_path / "compiled"),
         "-o", str(tmp_path / "images"), "-d", str(phantoms)],
        env=os.environ | {"PATH": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_without_a_compiler_it_is_refused_at_start(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(tiny_config()), "-d", str(phantoms),
         "-o", str(tmp_path / "run"), "--set", "compute.compile=true"],
        env={**os.environ, "PATH": "", "CXX": "no-such-compiler"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "torch.compile does not work on this machine" in ended.stderr
    assert "needs a C++ compiler (g++)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_penalties_are_not_compiled(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stylegan, whose loss contains gradients"):
        train(tiny_config("stylegan"), phantoms, tmp_path / "run", overrides=[TRACED])


def test_an_unknown_backend_is_refused(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    overrides = ["compute.compile={backend: quick}"]
    with pytest.raises(ConfigError, match=r"backend is 'quick'; known: .*inductor"):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=overrides)


def test_deterministic_is_set_for_the_training_alone(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = Family.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Family, "training_step", step)
    train(tiny_config(), phantoms, tmp_path / "run", overrides=["compute.deterministic=true"])
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_algorithm_is_named(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rectified_flow.RectifiedFlow.loss

    def loss(self: Any, batch: Any) -> Any:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return plain(self, batch)

    monkeypatch.setattr(rectified_flow.RectifiedFlow, "loss", loss)
    train(tiny_config(), phantoms, tmp_path / "fast", overrides=["training.max_epochs=1"])
    with pytest.raises(ConfigError, match="put_ has no deterministic algorithm"):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=["compute.deterministic=true"])
    assert not torch.are_deterministic_algorithms_enabled()


DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", registry.names())
def test_every_family_trains_and_samples(
    family: str, precision: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_config(family), phantoms, run, overrides=[f"compute.precision={precision}"])
    content = checkpoints.load(run / "checkpoints" / "last.ckpt")
    # Of every network most weights are convolutions and linear layers, which are converted.
    current = [tensor.dtype for tensor in content["current_model_state"].values()]
    assert DTYPES[precision] in current
    moments = [state["exp_avg"].dtype for state in content["optimizer_states"][0]["state"].values()]
    assert DTYPES[precision] in moments
    averaged = {
        tensor.dtype for tensor in content["state_dict"].values() if tensor.is_floating_point()
    }
    assert torch.bfloat16 not in averaged
    shared = weights(run)
    assert {tensor.dtype for tensor in shared.values()} <= {torch.float32, torch.int64, torch.int32}
    assert all(torch.isfinite(tensor).all() for tensor in shared.values())
    of_images = family in ("vqvae", "autoencoder_kl")
    data = phantoms if of_images else None
    infer(InferRequest(run, tmp_path / "images", num_images=2, data=data))


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
