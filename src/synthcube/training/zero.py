"""DeepSpeed's ZeRO: weights, gradients and optimizer states in pieces, on GPUs.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (SC
2020). A checkpoint is the one file of every strategy, with whole weights in float32, and beside it
a folder of DeepSpeed's own with the pieces of the optimizer, for resuming.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

from synthcube.compute import ComputeConfig
from synthcube.training import deepspeed_config

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
    if before != (now := (deepspeed_config.stage(compute), processes)):
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
