"""Where a run computes: devices, processes, precision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from synthcube import environment
from synthcube.errors import ConfigError
from synthcube.schema import Schema

if TYPE_CHECKING:
    import torch

Precision = Literal[
    "auto", "64", "64-true", "32", "32-true", "16", "16-mixed", "16-true",
    "bf16", "bf16-mixed", "bf16-true", "transformer-engine", "transformer-engine-float16",
]  # fmt: skip

# What SynthCube sets itself, or what no YAML can say.
_OURS = {
    "self", "kwargs", "accelerator", "parallel_devices", "cluster_environment", "checkpoint_io",
    "precision_plugin", "ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper",
    "model_averaging_period", "module", "device_ids", "output_device", "dim", "process_group",
    "device_mesh", "delay_all_reduce_named_params", "param_to_hook_all_reduce", "mixed_precision",
}  # fmt: skip

# Its precision is compute.precision; what is saved is ours.
_OURS_OF_DEEPSPEED = {
    "timeout", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
    "min_loss_scale", "load_full_weights", "exclude_frozen_parameters", "remote_device",
    "logging_batch_size_per_gpu",
}  # fmt: skip


def _arguments(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _known_arguments(strategy: str) -> set[str]:
    if strategy == "fsdp":
        return {"reshard_after_forward", "process_group_backend"}
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
    from torch.nn.parallel import DistributedDataParallel

    if strategy == "deepspeed":
        return _arguments(DeepSpeedStrategy) - _OURS - _OURS_OF_DEEPSPEED
    return (_arguments(DDPStrategy) | _arguments(DistributedDataParallel)) - _OURS


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_settings(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


def _or_boolean(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "boolean"})


class CompileConfig(Schema):
    """Arguments of torch.compile."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        Field(default="default", description="What is optimised for; see torch.compile.")
    )
    dynamic: bool | None = Field(
        default=None, description="Compile for any size at once; null: only if sizes change."
    )
    backend: str = Field(default="inductor", description="Compiler; see torch.compiler.")

    @model_validator(mode="after")
    def _backend_known(self) -> Self:
        if self.backend != "inductor":
            import torch

            known = sorted({*torch.compiler.list_backends(), "eager", "aot_eager"})
            if self.backend not in known:
                raise ValueError(f"backend is {self.backend!r}; known: {', '.join(known)}")
        return self


class ComputeConfig(Schema):
    """Where and how exactly to compute. The keys are those of GaNDLF-Synth."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="Processor to use; auto takes a GPU where there is one."
    )
    num_devices: int | None = Field(
        default=None, ge=1, le=4096,
        description="Devices on each node, with a process for each; null: every GPU of the node, "
        "or one process on its CPU.",
    )  # fmt: skip
    num_nodes: int = Field(default=1, ge=1, le=65536, description="Machines that train together.")
    precision: Annotated[Precision, BeforeValidator(_as_text)] = Field(
        default="auto",
        description="Lightning's name of a precision; auto is bf16-mixed where the hardware "
        "computes in bfloat16, else 32-true.",
    )
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        default="auto",
        description="How several processes share the work: ddp keeps the whole model in each; fsdp "
        "and deepspeed cut weights, gradients and optimizer states into pieces; auto is ddp where "
        "there are several.",
    )
    strategy_config: dict[str, Any] = Field(
        default={},
        description="Arguments of the strategy: those of Lightning's DDPStrategy and of torch's "
        "DistributedDataParallel; reshard_after_forward and process_group_backend of fsdp; those "
        "of Lightning's DeepSpeedStrategy, or config, the path of DeepSpeed's JSON.",
    )
    compile: Annotated[CompileConfig | None, BeforeValidator(_as_settings)] = Field(
        default=None,
        description="true: compile the networks with torch.compile, in minutes, to train faster; "
        "a mapping gives its arguments.",
        json_schema_extra=_or_boolean,
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute what lies between the blocks of a network again in the backward "
        "pass instead of keeping it: less memory, about a quarter more time.",
    )
    deterministic: bool = Field(
        default=False,
        description="Take only algorithms that give the same bits every time, on a GPU too; "
        "slower, and an operation that has none ends the training.",
    )

    @model_validator(mode="after")
    def _arguments_known(self) -> Self:
        if not self.strategy_config:
            return self
        known = _known_arguments(self.strategy)
        unknown = [name for name in self.strategy_config if name not in known]
        if unknown:
            named = "ddp" if self.strategy == "auto" else self.strategy
            raise ValueError(
                f"strategy_config takes no argument {', '.join(map(repr, unknown))}; "
                f"{named} takes {', '.join(sorted(known))}"
            )
        return self


def device(accelerator: str) -> torch.device:
    """The device that `accelerator` ("auto", "cpu" or "gpu") stands for on this machine.

    Torch gets no more threads than this process has cores: it does not know the processor quota
    of a container or job, beyond which all of its threads would wait.
    """
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), environment.num_cores()))
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ConfigError(
            "compute.accelerator is gpu, but PyTorch sees no GPU on this machine: "
            "use auto or cpu, or start the container with its GPU option."
        )
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def resolve_precision(name: str, on: torch.device) -> tuple[str, str]:
    """Lightning's full name for `name` on that device, and the reason for the choice."""
    if name == "auto":
        if computes_in_bf16(on):
            return "bf16-mixed", f"this {on.type} computes in bfloat16"
        return "32-true", f"this {on.type} has no fast bfloat16"
    full = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(
        name, name
    )
    if full.startswith("transformer-engine"):
        raise ConfigError(
            f"compute.precision is {name}, which puts layers of its own in place of a model's: "
            "their weights could not be shared. Use auto, bf16, bf16-true or 32."
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


def devices_used(config: ComputeConfig, on: torch.device) -> int:
    """Devices of this node that a training under `config` uses, with one process for each."""
    import torch

    if on.type == "cpu":
        return config.num_devices or 1
    present = torch.cuda.device_count()
    if (config.num_devices or 0) > present:
        raise ConfigError(
            f"compute.num_devices is {config.num_devices}, but PyTorch sees {present} GPU(s) on "
            f"this machine: use at most {present}, or leave it out to use all."
        )
    return config.num_devices or present


def require_even_shares(config: ComputeConfig, num_devices: int, batch_size: int) -> None:
    """Raise a ConfigError unless all processes can share a batch evenly.

    `num_devices` is that of each node, `batch_size` that of all processes together.
    """
    processes = num_devices * config.num_nodes
    if batch_size % processes:
        less = batch_size - batch_size % processes
        sizes = f"{less} or {less + processes}" if less else f"{processes}"
        raise ConfigError(
            f"training.batch_size is {batch_size}, which {processes} processes "
            f"(compute.num_devices {num_devices} x num_nodes {config.num_nodes}) cannot share "
            f"evenly: use {sizes}."
        )


@contextmanager
def inference(precision_name: str, on: torch.device) -> Iterator[None]:
    """No gradients, and autocast where `precision_name` is one of 16 bits.

    A trained model has its weights in float32, whatever it was trained in.
    """
    import torch

    dtype = torch.float16 if precision_name.startswith("16") else torch.bfloat16
    mixed = precision_name.startswith(("16", "bf16"))
    with torch.inference_mode(), torch.autocast(on.type, dtype, enabled=mixed):
        yield
