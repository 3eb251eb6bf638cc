"""Where and in what to compute: names of precisions, and what is refused."""

from __future__ import annotations

import pytest
import torch

from synthcube import compute
from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "full"), [("32", "32-true"), ("bf16", "bf16-mixed"), ("32-true", "32-true")]
)
def test_names_of_precisions(name: str, full: str) -> None:
    assert compute.precision(name, CPU) == (full, "asked for")


@pytest.mark.parametrize("name", ["64", "64-true", "bf16-true", "16-true"])
def test_weights_in_another_precision_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"compute.precision is {name}: averages"):
        compute.precision(name, CPU)


def test_a_cpu_does_not_train_in_half_precision() -> None:
    with pytest.raises(ConfigError, match=r"compute\.precision is 16, which a CPU cannot train in"):
        compute.precision("16", CPU)


def test_devices_of_a_cpu_are_one_unless_asked() -> None:
    assert compute.devices_used(ComputeConfig(), CPU) == 1
    assert compute.devices_used(ComputeConfig(num_devices=3), CPU) == 3


def test_arguments_of_the_strategy_are_checked() -> None:
    with pytest.raises(ValueError, match=r"takes no argument 'bucket'; ddp takes .*bucket_cap_mb"):
        ComputeConfig(strategy_config={"bucket": 3})
    config = ComputeConfig(num_devices=2, strategy_config={"bucket_cap_mb": 5})
    strategy = compute.strategy(config, 2, unused_parameters=True)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "bucket_cap_mb": 5}


def test_one_process_needs_no_strategy() -> None:
    assert compute.strategy(ComputeConfig(), 1, unused_parameters=False) == "auto"


def test_a_refused_precision_leaves_no_run(cli, tiny_config, phantoms, tmp_path) -> None:
    code, _, text = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run",
        "--set", "compute.precision=64",
    )  # fmt: skip
    assert code == 2
    assert "compute.precision is 64" in text
    assert not (tmp_path / "run").exists()
