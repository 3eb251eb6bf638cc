"""Versions and machine, as a run records them: enough to tell why two runs differ."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_RECORDED = (
    "synthcube", "torch", "lightning", "monai", "monai-generative", "torchio", "SimpleITK",
    "nibabel", "diffusers", "numpy", "pydantic", "safetensors",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment_record(on: torch.device, precision_name: str) -> dict[str, Any]:
    """What `environment.json` holds: enough to tell why two runs differ."""
    import torch

    name = torch.cuda.get_device_name(on) if on.type == "cuda" else _cpu_name()
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": on.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": precision_name,
        "command": sys.argv,
    }


def _cpu_name() -> str:
    import torch

    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor())
