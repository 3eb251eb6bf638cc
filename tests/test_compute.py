"""Where and in what to compute: names of precisions, and what is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from lightning.fabric.connector import _PRECISION_INPUT

from synthcube import compute
from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError
from synthcube.training.config import TrainingConfig
from synthcube.training.strategies import strategy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "full"), [("32", "32-true"), ("bf16", "bf16-mixed"), ("32-true", "32-true")]
)
def test_names_of_precisions(name: str, full: str) -> None:
    assert compute.resolve_precision(name, CPU) == (full, "asked for")


@pytest.mark.parametrize("name", ["transformer-engine", "transformer-engine-float16"])
def test_layers_of_another_library_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"compute.precision is {name}, which puts layers of its"):
        compute.resolve_precision(name, CPU)


def test_every_name_of_lightning_is_known() -> None:
    names = {str(name) for kind in get_args(_PRECISION_INPUT) for name in get_args(kind)}
    assert {"64", "bf16-true", "transformer-engine"} <= names
    assert all(ComputeConfig(precision=name).precision == name for name in names)


@pytest.mark.parametrize("name", ["16", "16-mixed", "16-true"])
def test_a_cpu_does_not_train_in_half_precision(name: str) -> None:
    with pytest.raises(ConfigError, match=f"compute.precision is {name}, which a CPU cannot train"):
        compute.resolve_precision(name, CPU)


def test_devices_of_a_cpu_are_one_unless_asked() -> None:
    assert compute.devices_used(ComputeConfig(), CPU) == 1
    assert compute.devices_used(ComputeConfig(num_devices=3), CPU) == 3


def test_arguments_of_the_strategy_are_checked() -> None:
    with pytest.raises(ValueError, match=r"takes no argument 'bucket'; ddp takes .*bucket_cap_mb"):
        ComputeConfig(strategy_config={"bucket": 3})
    config = ComputeConfig(num_devices=2, strategy_config={"bucket_cap_mb": 5})
    built = strategy(config, TrainingConfig(), 2, by_hand=True, mixed=False)
    assert built._ddp_kwargs == {
        "find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 5,
    }  # fmt: skip


def test_one_process_needs_no_strategy() -> None:
    alone = strategy(ComputeConfig(), TrainingConfig(), 1, by_hand=False, mixed=False)
    assert alone == "auto"


def test_a_refused_precision_leaves_no_run(cli, tiny_config, phantoms, tmp_path) -> None:
    code, _, text = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run",
        "--set", "compute.precision=16",
    )  # fmt: skip
    assert code == 2
    assert "compute.precision is 16" in text
    assert not (tmp_path / "run").exists()
