"""DeepSpeed's part of a config: the arguments, or the JSON file that is given in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from synthcube import reading
from synthcube.compute import ComputeConfig, devices_used
from synthcube.errors import ConfigError
from synthcube.training.config import TrainingConfig

_PRECISIONS = ("fp16", "bf16", "amp", "torch_autocast")


def arguments(compute: ComputeConfig, training: TrainingConfig, processes: int) -> dict[str, Any]:
    """Arguments of Lightning's DeepSpeedStrategy, the JSON file read where one is given."""
    given = dict(compute.strategy_config)
    if "config" not in given:
        return {"stage": 2, "logging_batch_size_per_gpu": training.batch_size // processes, **given}
    config, _ = _read(given["config"])
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)  # Lightning sets them, and they were found to be the same
    config["train_micro_batch_size_per_gpu"] = training.batch_size // processes
    config.setdefault("zero_allow_untested_optimizer", True)
    return {"config": config}


def own_optimizer(compute: ComputeConfig) -> str:
    """Name of the optimizer in the JSON file, which is used in place of the YAML's; or ""."""
    if compute.strategy != "deepspeed" or "config" not in compute.strategy_config:
        return ""
    config, _ = _read(compute.strategy_config["config"])
    return str(config.get("optimizer", {}).get("type", ""))


def stage(compute: ComputeConfig) -> Any:
    """0 to 3, as DeepSpeed counts what is cut; or whatever else the config says."""
    given = compute.strategy_config
    if "config" not in given:
        return given.get("stage", 2)
    return _read(given["config"])[0].get("zero_optimization", {}).get("stage", 0)


def faults(compute: ComputeConfig, training: TrainingConfig) -> Iterator[str]:
    """What is wrong with DeepSpeed's part of a config, one sentence each."""
    given = compute.strategy_config
    key = "compute.strategy_config.stage"
    if "config" in given:
        if others := sorted(set(given) - {"config"}):
            yield (
                f"compute.strategy_config.{', '.join(others)}: DeepSpeed's file (config) says all; "
                "write it there, or leave out config"
            )
        config, wrong = _read(given["config"])
        if wrong:
            yield f"compute.strategy_config.config {given['config']}: {wrong}"
            return
        key = f"{given['config']}: zero_optimization.stage"
        yield from _file_faults(config, compute, training)
    asked = stage(compute)
    if asked not in (0, 1, 2, 3) or isinstance(asked, bool):
        yield f"{key} is {asked!r}: it is 0, 1, 2 or 3"
    elif asked == 3 and training.ema:
        yield (
            "training.ema: the average needs whole weights, which stage 3 of deepspeed has "
            "nowhere: set training.ema to null, use stage 2, or strategy fsdp"
        )
    if compute.precision not in ("auto", "32", "32-true", "bf16", "bf16-mixed"):
        yield f"compute.precision is {compute.precision}: with deepspeed use auto, bf16 or 32"


def _file_faults(
    config: Mapping[str, Any], compute: ComputeConfig, training: TrainingConfig
) -> Iterator[str]:
    processes = compute.num_devices * compute.num_nodes if compute.num_devices else None
    clip = training.clip_norm(by_hand=False) or 0.0
    expected: dict[str, float | None] = {
        "train_batch_size": training.batch_size * training.accumulate,
        "gradient_accumulation_steps": training.accumulate,
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": training.batch_size // processes if processes else None,
    }
    path = compute.strategy_config["config"]
    for key, value in expected.items():
        if key in config and value is not None and config[key] != value:
            yield f"{path}: {key} is {config[key]!r}, the YAML makes it {value:g}: leave it out"
    for key in _PRECISIONS:
        if isinstance(config.get(key), dict) and config[key].get("enabled"):
            yield f"{path}: {key} is enabled: leave it out, and set compute.precision in the YAML"
    if "scheduler" in config and "optimizer" not in config:
        yield f"{path}: scheduler is not used without optimizer: give both, or neither"


def require_usable(compute: ComputeConfig, training: TrainingConfig, device: torch.device) -> None:
    """
    Raises:
        ConfigError: DeepSpeed is not installed, there is no GPU, or as many as its file is for.
    """
    if compute.strategy != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "compute.strategy is deepspeed, which is not installed: pip install "
            "'synthcube[deepspeed]', or use ddp or fsdp."
        )
    if device.type != "cuda":
        raise ConfigError(
            "compute.strategy is deepspeed, which Lightning runs on NVIDIA GPUs only, and this is "
            "a CPU: use ddp or fsdp."
        )
    known = compute.model_copy(update={"num_devices": devices_used(compute, device)})
    if found := list(faults(known, training)):
        raise ConfigError("; ".join(found))


def _read(path: Any) -> tuple[dict[str, Any], str]:
    """DeepSpeed's file, and what is wrong with it."""
    try:
        config = reading.read_json(Path(str(path)), ConfigError)
    except ConfigError as error:
        return {}, str(error)
    sections = ("zero_optimization", "optimizer", "scheduler")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(each, {}), dict) for each in sections
    ):
        return {}, f"this is not a JSON object with objects as {', '.join(sections)}"
    return config, ""
