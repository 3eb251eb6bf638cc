"""The machine a run happens on: device, precision, seeds, caches, logging.

The only room that reads the environment.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from synthcube.errors import ConfigError
from synthcube.schema import Schema

if TYPE_CHECKING:
    import torch

log = logging.getLogger("synthcube")

Precision = Literal[
    "auto", "64", "64-true", "32", "32-true", "16", "16-mixed", "16-true",
    "bf16", "bf16-mixed", "bf16-true",
]  # fmt: skip

_RECORDED = (
    "synthcube", "torch", "lightning", "monai", "monai-generative", "torchio", "SimpleITK",
    "nibabel", "diffusers", "numpy", "pydantic", "safetensors",
)  # fmt: skip

_LIGHTNING_CHATTER = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '.*_dataloader' does not have many workers",
    r"The number of training batches .* is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r"GPU available but not used",
    r"The dirpath has changed from",
    r"The `srun` command is available on your system but is not used",
    r"The `srun` command is available on your system",
)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class ComputeConfig(Schema):
    """Where and how exactly to compute. The keys are those of GaNDLF-Synth."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="Processor to use; auto takes a GPU where there is one."
    )
    num_devices: Literal[1] = Field(default=1, description="Devices on each node; one for now.")
    num_nodes: Literal[1] = Field(default=1, description="Machines; one for now.")
    precision: Annotated[Precision, BeforeValidator(_as_text)] = Field(
        default="auto",
        description="Lightning's name of a precision; auto is bf16-mixed where the hardware "
        "computes in bfloat16, else 32-true.",
    )
    strategy: Literal["auto"] = Field(
        default="auto", description="Lightning's strategy; auto for now."
    )
    strategy_config: dict[str, Any] = Field(
        default={}, max_length=0, description="Arguments of the strategy; none for now."
    )


def device(accelerator: str) -> torch.device:
    """The device that `accelerator` ("auto", "cpu" or "gpu") stands for on this machine.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ConfigError(
            "compute.accelerator is gpu, but PyTorch sees no GPU on this machine: "
            "use auto or cpu, or start the container with its GPU option."
        )
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def precision(name: str, on: torch.device) -> tuple[str, str]:
    """Lightning's full name for `name` on that device, and the reason for the choice.

    Raises:
        ConfigError: half precision is asked for on a CPU.
    """
    if name == "auto":
        if computes_in_bf16(on):
            return "bf16-mixed", f"this {on.type} computes in bfloat16"
        return "32-true", f"this {on.type} has no fast bfloat16"
    full = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(
        name, name
    )
    if on.type == "cpu" and full.startswith("16"):
        raise ConfigError(
            f"compute.precision is {name}, which a CPU cannot train in: use auto, bf16 or 32."
        )
    return full, "asked for"


def computes_in_bf16(on: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively (on a CPU: avx512_bf16 or AMX)."""
    import torch

    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def inference(precision_name: str, on: torch.device) -> Iterator[None]:
    """No gradients, and autocast where `precision_name` is a mixed one."""
    import torch

    dtype = torch.float16 if precision_name.startswith("16") else torch.bfloat16
    mixed = precision_name.endswith("-mixed")
    with torch.inference_mode(), torch.autocast(on.type, dtype, enabled=mixed):
        yield


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where caches may be kept: SYNTHCUBE_CACHE, the user's cache folder, or a temporary one."""
    if chosen := environment.get("SYNTHCUBE_CACHE"):
        return Path(chosen)
    if base := environment.get("XDG_CACHE_HOME"):
        return Path(base) / "synthcube"
    home = environment.get("HOME", "")
    if home and os.access(home, os.W_OK):
        return Path(home) / ".cache" / "synthcube"
    return Path(tempfile.gettempdir()) / "synthcube-cache"


def workers_that_fit(
    num_workers: int, batch_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> int:
    """As many of `num_workers` as shared memory has room for; says so where these are fewer.

    Every worker keeps two batches there and the training holds a third; a container has 64 MB
    unless told otherwise. Another sharing strategy of PyTorch would not help: each of them takes
    the same memory. The batches are the same with any number of workers.
    """
    if not num_workers or not shared_memory.is_dir():
        return num_workers
    free = shutil.disk_usage(shared_memory).free
    fitting = min(num_workers, max(0, free // batch_bytes - 1) // 2)
    if fitting < num_workers:
        log.info(
            "Loading data with %d instead of %d workers: %s has %.1f MB free, they need %.1f MB. "
            "Give the container more with --shm-size.",
            fitting, num_workers, shared_memory, free / 1e6,
            (2 * num_workers + 1) * batch_bytes / 1e6,
        )  # fmt: skip
    return fitting


def calm_threads() -> None:
    """Let waiting threads sleep; to be called before torch is imported.

    GNU OpenMP's threads spin while they wait. On a machine that is busy with something else this
    made sampling nine times slower; see docs/benchmarks.md.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def name_user() -> None:
    """Give a nameless user a name; to be called before MONAI is imported, which fails without.

    A container may run under any number, also one that its list of users does not have.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["USER"] = "synthcube"


def is_terminal() -> bool:
    """Whether a person watches: progress bars are for people, lines are for logs."""
    return sys.stderr.isatty()


def open_log(*, debug: bool = False) -> None:
    """Send the package's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep out what Lightning tells its developers: its advertisements, and what users know."""

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _LIGHTNING_CHATTER:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
