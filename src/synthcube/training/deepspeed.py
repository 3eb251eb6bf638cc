"""DeepSpeed's part of a config: the arguments, or the JSON file that is given in their place."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

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


_KEY = "zero"
# Plain values that DeepSpeed pickles: numbers by name, and no code that would run.
_PLAIN = (
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


class ZeRO(DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed, with weights in float32 and one file as a checkpoint.

    Args:
        mixed: compute in bfloat16 where autocast does.
        arguments: those of Lightning's DeepSpeedStrategy.
    """

    def __init__(self, *, mixed: bool, **arguments: Any) -> None:
        super().__init__(**arguments, precision_plugin=_MixedPrecision(mixed=mixed))
        config: Any = self.config
        # Its engine turns off the autocast of others. No module is listed, so that gradients are
        # added up over the processes in float32.
        config["torch_autocast"] = {
            "enabled": mixed, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip

    @property
    def stage(self) -> int:
        """0 to 3: what is cut, as DeepSpeed counts."""
        config: Any = self.config
        return int(config.get("zero_optimization", {}).get("stage", 0))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        if self.stage < 3:
            return state
        import deepspeed

        for name, weight in self.lightning_module.named_parameters():
            with deepspeed.zero.GatheredParameters([weight]):  # all processes together
                state[name] = weight.detach().cpu().clone() if self.is_global_zero else None
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}  # is in DeepSpeed's folder

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        tag = f"step_{checkpoint['global_step']}"
        self.deepspeed_engine.save_checkpoint(str(_folder(path)), tag=tag, save_latest=False)
        self.barrier()
        if self.is_global_zero:
            # The file names its folder: one that was left half written is never looked at.
            written = {"tag": tag, "stage": self.stage, "processes": self.world_size}
            writer: Any = self.checkpoint_io
            writer.save_checkpoint({**checkpoint, _KEY: written}, path)
            writer.finish()  # before the folder goes that the file before it names
            for other in _folder(path).iterdir():
                if other.is_dir() and other.name != tag:
                    shutil.rmtree(other)
                elif other.is_file():
                    other.unlink()  # scripts that run any code that the folder holds
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        path = Path(checkpoint_path)
        content = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        engine = self.deepspeed_engine
        engine.checkpoint_engine.load = _load  # DeepSpeed's own runs any code that a file holds
        engine.load_checkpoint(
            str(_folder(path)), tag=content[_KEY]["tag"], load_lr_scheduler_states=False
        )
        return content

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            shutil.rmtree(_folder(Path(filepath)), ignore_errors=True)
            self.checkpoint_io.remove_checkpoint(filepath)


class _MixedPrecision(DeepSpeedPrecision):
    """Weights in float32, as in every other strategy; DeepSpeed's bf16 would cut codebooks too."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__("32-true")
        self.mixed = mixed

    def forward_context(self) -> AbstractContextManager[Any]:
        if not self.mixed:
            return nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def misfit(content: Mapping[str, Any], compute: ComputeConfig, processes: int) -> str:
    """Why a checkpoint with that content cannot be continued by that many processes; or ""."""
    written = content.get(_KEY)
    if bool(written) != (compute.strategy == "deepspeed"):
        by = "by deepspeed" if written else "without deepspeed"
        return f"compute.strategy is {compute.strategy}, and the checkpoint was written {by}"
    if not written:
        return ""
    before = (written["stage"], written["processes"])
    if before != (now := (stage(compute), processes)):
        return (
            f"the checkpoint was written by deepspeed at stage {before[0]} with {before[1]} "
            f"process(es), and this is stage {now[0]} with {now[1]}"
        )
    return ""


def _folder(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".zero")


def _load(path: str, map_location: Any = None) -> Any:
    plain = [getattr(importlib.import_module(module), name) for module, name in _PLAIN]
    with torch.serialization.safe_globals(plain):
        return torch.load(path, map_location=map_location, weights_only=True)
