"""DeepSpeed: the checks of its arguments or JSON file, and Lightning's strategy adapted."""

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
_KEY = "zero"  # of the checkpoint
# Plain values that DeepSpeed pickles: named numbers, none of which runs code.
_PLAIN = (
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


def arguments(compute: ComputeConfig, training: TrainingConfig, processes: int) -> dict[str, Any]:
    """Arguments of Lightning's DeepSpeedStrategy, from the YAML or the JSON file that it names."""
    strategy_config = dict(compute.strategy_config)
    if "config" not in strategy_config:
        return {
            "stage": 2,
            "logging_batch_size_per_gpu": training.batch_size // processes,
            **strategy_config,
        }
    config, _ = _read(strategy_config["config"])
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)  # Lightning sets them; `faults` compared them
    config["train_micro_batch_size_per_gpu"] = training.batch_size // processes
    config.setdefault("zero_allow_untested_optimizer", True)
    return {"config": config}


def own_optimizer(compute: ComputeConfig) -> str:
    """Name of the optimizer in the JSON file, which replaces the YAML's; empty if none."""
    if compute.strategy != "deepspeed" or "config" not in compute.strategy_config:
        return ""
    config, _ = _read(compute.strategy_config["config"])
    return str(config.get("optimizer", {}).get("type", ""))


def stage(compute: ComputeConfig) -> Any:
    """The ZeRO stage that the config gives, unchecked; valid are 0 to 3."""
    strategy_config = compute.strategy_config
    if "config" not in strategy_config:
        return strategy_config.get("stage", 2)
    return _read(strategy_config["config"])[0].get("zero_optimization", {}).get("stage", 0)


def faults(compute: ComputeConfig, training: TrainingConfig) -> Iterator[str]:
    """Yield the faults of the DeepSpeed settings, one sentence each."""
    strategy_config = compute.strategy_config
    key = "compute.strategy_config.stage"
    if "config" in strategy_config:
        if others := sorted(set(strategy_config) - {"config"}):
            yield (
                f"compute.strategy_config.{', '.join(others)}: DeepSpeed's file (config) replaces "
                "all other arguments: write it there, or remove config"
            )
        config, wrong = _read(strategy_config["config"])
        if wrong:
            yield f"compute.strategy_config.config {strategy_config['config']}: {wrong}"
            return
        key = f"{strategy_config['config']}: zero_optimization.stage"
        yield from _file_faults(config, compute, training)
    stage_value = stage(compute)
    if stage_value not in (0, 1, 2, 3) or isinstance(stage_value, bool):
        yield f"{key} is {stage_value!r}: it is 0, 1, 2 or 3"
    elif stage_value == 3 and training.ema:
        yield (
            "training.ema: the average needs whole weights, which stage 3 of deepspeed does "
            "not have: set training.ema to null, use stage 2, or strategy fsdp"
        )
    if compute.precision not in ("auto", "32", "32-true", "bf16", "bf16-mixed"):
        yield f"compute.precision is {compute.precision}: with deepspeed use auto, bf16 or 32"


def _file_faults(
    config: Mapping[str, Any], compute: ComputeConfig, training: TrainingConfig
) -> Iterator[str]:
    processes = compute.num_devices * compute.num_nodes if compute.num_devices else None
    expected: dict[str, float | None] = {
        "train_batch_size": training.batch_size * training.accumulate,
        "gradient_accumulation_steps": training.accumulate,
        "gradient_clipping": training.clip_norm(by_hand=False) or 0.0,
        "train_micro_batch_size_per_gpu": training.batch_size // processes if processes else None,
    }
    path = compute.strategy_config["config"]
    for key, value in expected.items():
        if key in config and value is not None and config[key] != value:
            yield f"{path}: {key} is {config[key]!r}, the YAML gives {value:g}: remove it"
    for key in _PRECISIONS:
        if isinstance(config.get(key), dict) and config[key].get("enabled"):
            yield f"{path}: {key} is enabled: remove it, and set compute.precision in the YAML"
    if "scheduler" in config and "optimizer" not in config:
        yield f"{path}: scheduler is not used without optimizer: give both, or neither"


def require_usable(compute: ComputeConfig, training: TrainingConfig, device: torch.device) -> None:
    """Raise ConfigError if DeepSpeed is not installed, or the device or its file does not fit."""
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
    if reasons := list(faults(known, training)):
        raise ConfigError("; ".join(reasons))


def _read(path: Any) -> tuple[dict[str, Any], str]:
    """DeepSpeed's file and its fault; one of them is empty."""
    try:
        config = reading.read_json(Path(str(path)), ConfigError)
    except ConfigError as error:
        return {}, str(error)
    sections = ("zero_optimization", "optimizer", "scheduler")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(section, {}), dict) for section in sections
    ):
        return {}, f"this is not a JSON object with objects as {', '.join(sections)}"
    return config, ""


class ZeRO(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy with float32 weights, and a folder beside each checkpoint.

    Args:
        mixed: use autocast in bfloat16.
        arguments: those of Lightning's DeepSpeedStrategy.
    """

    def __init__(self, *, mixed: bool, **arguments: Any) -> None:
        super().__init__(**arguments, precision_plugin=_MixedPrecision(mixed=mixed))
        config: Any = self.config
        # The engine disables any other autocast. Without listed modules, gradients are summed over
        # the processes in float32.
        config["torch_autocast"] = {
            "enabled": mixed, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        config: Any = self.config
        return int(config.get("zero_optimization", {}).get("stage", 0))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        if self.stage < 3:
            return state
        import deepspeed

        for name, weight in self.lightning_module.named_parameters():
            with deepspeed.zero.GatheredParameters([weight]):  # needs all processes
                state[name] = weight.detach().cpu().clone() if self.is_global_zero else None
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}  # DeepSpeed's folder holds it

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        folder = path.with_suffix(".zero")
        tag = f"step_{checkpoint['global_step']}"
        self.deepspeed_engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        self.barrier()
        if self.is_global_zero:
            # The file names its subfolder: one that is incomplete is never read.
            content = {"tag": tag, "stage": self.stage, "processes": self.world_size}
            writer: Any = self.checkpoint_io
            writer.save_checkpoint({**checkpoint, _KEY: content}, path)
            writer.finish()  # before the earlier subfolder is removed
            for other in folder.iterdir():
                if other.is_dir() and other.name != tag:
                    shutil.rmtree(other)
                elif other.is_file():
                    other.unlink()  # DeepSpeed's scripts, which unpickle any code
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        path = Path(checkpoint_path)
        content = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        engine = self.deepspeed_engine
        engine.checkpoint_engine.load = _load  # DeepSpeed's own unpickles any code
        engine.load_checkpoint(
            str(path.with_suffix(".zero")), tag=content[_KEY]["tag"], load_lr_scheduler_states=False
        )
        return content

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            shutil.rmtree(Path(filepath).with_suffix(".zero"), ignore_errors=True)
            self.checkpoint_io.remove_checkpoint(filepath)


class _MixedPrecision(DeepSpeedPrecision):
    """Keeps float32 weights, as other strategies do; DeepSpeed's bf16 would convert codebooks."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__("32-true")
        self.mixed = mixed

    def forward_context(self) -> AbstractContextManager[Any]:
        if not self.mixed:
            return nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def misfit(content: Mapping[str, Any], compute: ComputeConfig, processes: int) -> str:
    """Why `processes` processes cannot resume from a checkpoint with that content; or ""."""
    saved = content.get(_KEY)
    if bool(saved) != (compute.strategy == "deepspeed"):
        by = "by deepspeed" if saved else "without deepspeed"
        return f"compute.strategy is {compute.strategy}, and the checkpoint was written {by}"
    if not saved:
        return ""
    before = (saved["stage"], saved["processes"])
    if before != (now := (stage(compute), processes)):
        return (
            f"the checkpoint was written by deepspeed at stage {before[0]} with {before[1]} "
            f"process(es), and this is stage {now[0]} with {now[1]}"
        )
    return ""


def _load(path: str, map_location: Any = None) -> Any:
    plain = [getattr(importlib.import_module(module), name) for module, name in _PLAIN]
    with torch.serialization.safe_globals(plain):
        return torch.load(path, map_location=map_location, weights_only=True)
