"""The progress lines of a training, its speed, and a report of where its time went."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from pydantic import ConfigDict, Field

from synthcube import environment, reading, terminal
from synthcube.data.module import DataModule
from synthcube.environment import resident_bytes
from synthcube.errors import OutputError
from synthcube.models.family import Family
from synthcube.schema import MAX_COUNT, Batch, Schema
from synthcube.storage import write_json
from synthcube.training.config import TrainingConfig
from synthcube.training.loggers import log_row

log = logging.getLogger("synthcube")

REPORT = "throughput.json"
_NAMES = {
    "step": "step", "data_wait": "data wait", "data_start": "loader start",
    "validation": "validation", "pictures": "pictures", "saving": "saving",
    "rest": "start and rest",
}  # fmt: skip
# Shares of the time above which advice is given, and the share to aim at.
_DATA_LIMIT, _WRITING_LIMIT, _AIM = 0.05, 0.10, 0.05


class LogLines(Callback):
    """Logs losses, learning rates and speed every N steps, to the loggers and as a line.

    On a terminal they are beside the bar in place of a line. Nothing is read from a GPU in between.

    Args:
        tells_of_images: log losses and images a second, which depend on the images of a step.
    """

    def __init__(
        self, interval: int, profiler: TimeProfiler, bar: terminal.Progress, *,
        tells_of_images: bool = True,
    ) -> None:  # fmt: skip
        self.tells_of_images = tells_of_images
        self.interval = interval
        self.profiler = profiler
        self.bar = bar
        self._images = 0
        self._values: dict[str, float] = {}  # of the last row
        self._before = (0.0, 0.0)  # seconds of steps and of waiting for data at the last row
        self._rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._images, self._before = 0, self.profiler.training_seconds()
        if isinstance(module, Family):
            for line in described_optimizers(trainer, module):
                log.info(line)
        batches = int(trainer.num_training_batches)
        # Lightning counts the steps of every optimizer; a batch is one, whatever is trained on it.
        self.bar.begin(trainer.fit_loop.total_batch_idx + 1, batches * (trainer.max_epochs or 1))
        self._show(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval == 0:
            # Schedules step before the end of the batch: read the rates that this step uses.
            self._rates = learning_rates(trainer.optimizers, optimizer_names(trainer, module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        self._images += len(batch["index"]) * trainer.world_size
        self.bar.advance()
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval or outputs is None:
            return
        values = {
            **(self._losses(module, outputs) if self.tells_of_images else {}),
            **self._rates,
            **self._speed(),
            "memory_gb": memory_gb(trainer.strategy.root_device),
        }
        log_row(trainer, values)
        self._values = values
        if self.bar.draws:
            self._show(trainer)
        else:
            log.info("  ".join([line(trainer, values), *self.bar.time_left()]))

    def _losses(self, module: pl.LightningModule, outputs: Any) -> dict[str, float]:
        terms = module.latest_terms if isinstance(module, Family) else {}
        others = {f"{name}_now": float(terms[name]) for name in terms if name != "train/loss"}
        return {"train/loss_now": float(outputs["loss"]), **others}

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.title = "Validating"
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.title = "Training"

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(value):.4f}"
            for name, value in trainer.callback_metrics.items()
            if name.endswith("/loss")
        ]
        if not self.bar.draws:
            shown += self.bar.time_left()
        log.info("epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, "  ".join(shown))

    def _show(self, trainer: pl.Trainer) -> None:
        """Draw the bar with the epoch, and with loss and speed of the last row."""
        facts = [
            f"epoch {min(trainer.current_epoch + 1, trainer.max_epochs or 1)}/{trainer.max_epochs}"
        ]
        if self._values and self.tells_of_images:
            facts += [
                f"loss {self._values['train/loss_now']:.4f}",
                f"{self._values['images_per_second']:.1f} images/s",
            ]
        self.bar.facts = "  ".join(facts)
        self.bar.draw()

    def _speed(self) -> dict[str, float]:
        """Training speed since the last row, without validation, pictures and saving."""
        step, data = self.profiler.training_seconds()
        stepped, waited = step - self._before[0], data - self._before[1]
        images, self._images, self._before = self._images, 0, (step, data)
        spent = max(stepped + waited, 1e-9)
        speed = {"images_per_second": images / spent} if self.tells_of_images else {}
        return {**speed, "data_wait_percent": 100 * waited / spent}


def line(trainer: pl.Trainer, values: dict[str, float]) -> str:
    """The progress line of a step."""
    losses = [
        f"{name.removeprefix('train/').removesuffix('_now')} {value:.4f}"
        for name, value in values.items()
        if name.endswith("loss_now")
    ]
    rates = [
        f"{name.replace('/', ' ')} {value:.2e}"
        for name, value in values.items()
        if name.split("/")[0] == "lr"
    ]
    return "  ".join([
        f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
        f"step {trainer.global_step}", *losses, *rates,
        *([f"{values['images_per_second']:.1f} images/s"] if "images_per_second" in values else []),
        f"data wait {values['data_wait_percent']:.0f}%",
        f"memory {values['memory_gb']:.2f} GB",
    ])  # fmt: skip


def learning_rates(optimizers: list[torch.optim.Optimizer], names: list[str]) -> dict[str, float]:
    """Learning rates as lr, lr/NAME with several optimizers, or lr/NAME/0 if groups differ."""
    named: dict[str, float] = {}
    for name, optimizer in zip(names, optimizers, strict=True):
        key = f"lr/{name}" if len(optimizers) > 1 else "lr"
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        same = len(set(rates)) == 1
        named |= {key: rates[0]} if same else {f"{key}/{i}": r for i, r in enumerate(rates)}
    return named


def optimizer_names(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Names of the optimizers: those that the family gives, or else numbers."""
    names = module.optimizer_names if isinstance(module, Family) else ()
    number = len(trainer.optimizers)
    return list(names) if len(names) == number else [str(i) for i in range(number)]


def described_optimizers(trainer: pl.Trainer, family: Family) -> list[str]:
    """A line for each optimizer: its weights, class, schedule and learning rates."""
    lines = []
    names = optimizer_names(trainer, family)
    for name, optimizer in zip(names, trainer.optimizers, strict=True):
        sizes = [weight.numel() for group in optimizer.param_groups for weight in group["params"]]
        key = "scheduler" if name == names[0] else f"{name}_scheduler"
        schedule = getattr(getattr(family.config, key, None), "name", "no")
        # A warm-up has already lowered the current rate.
        rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
        lines.append(
            f"{name}: {sum(sizes):,} weights, {type(optimizer).__name__}, {schedule} schedule, "
            f"lr {', '.join(f'{rate:.2e}' for rate in sorted(rates))}"
        )
    return lines


def memory_gb(device: torch.device) -> float:
    """Gigabytes: the peak allocated on a GPU, or what this process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resident_bytes() / 1e9


class _Part(Schema):
    """Time of one run of the training command."""

    model_config = ConfigDict(extra="allow")

    steps: int = Field(ge=0, le=MAX_COUNT, description="Steps taken.")
    seconds: dict[str, float] = Field(description="By part.")


class _File(Schema):
    """Content of throughput.json; the total is always computed again."""

    model_config = ConfigDict(extra="ignore")

    parts: list[_Part] = Field(description="Of each run of the training.")


class TimeProfiler(Profiler):
    """Measures the seconds of each part of a training, from Lightning's actions; none overlap.

    A step is everything between two waits for a batch: GPU kernels run asynchronously, so this
    includes the point where Python waits for them. The time from the start of an epoch to its
    first batch counts separately, because loader processes start then.

    Args:
        family: class name of the model, which is part of the names of its actions.
        pictures: class name of the callback that draws sample pictures.
    """

    def __init__(self, family: str, pictures: str) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(_NAMES, 0.0)
        self.others_wait_more_s = 0.0
        """How much longer the slowest process waited for data than this one."""
        fetch, epoch = "[_TrainingEpochLoop].train_dataloader_next", "run_training_epoch"
        hook = f"[LightningModule]{family}.on_validation_"
        draw = f"[Callback]{pictures}.on_train_epoch_end"
        self._opens = {
            fetch: ("data_wait",), epoch: ("step", "data_start"), "save_checkpoint": ("saving",),
            f"{hook}model_zero_grad": ("validation",), draw: ("pictures",),
        }  # fmt: skip
        self._closes = {
            fetch: {"data_wait", "data_start"}, epoch: {"step", "data_start"},
            "save_checkpoint": {"saving"}, f"{hook}end": {"validation"}, draw: {"pictures"},
        }  # fmt: skip
        self._open = ["rest"]
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        if parts := self._opens.get(action_name):
            self._count()
            first = parts == ("data_wait",) and self._open[-1] == "data_start"
            self._open += ("data_start",) if first else parts

    def stop(self, action_name: str) -> None:
        if parts := self._closes.get(action_name):
            self._count()
            while self._open[-1] in parts:
                self._open.pop()

    def training_seconds(self) -> tuple[float, float]:
        """Seconds so far of steps and of waiting for data."""
        self._count()
        return self.seconds["step"], self.data_seconds

    @property
    def data_seconds(self) -> float:
        return self.seconds["data_wait"] + self.seconds["data_start"]

    @property
    def data_share(self) -> float:
        """Share of steps and data wait that is data wait, in [0, 1], of the slowest process."""
        waited = self.data_seconds + self.others_wait_more_s
        return waited / max(self.seconds["step"] + self.data_seconds, waited, 1e-9)

    def close(self) -> float:
        """Count the current part and return all seconds since the start."""
        self._count()
        return sum(self.seconds.values())

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


class SlowestProcess(Callback):
    """Sets, at the end, how much longer the slowest process waited for data."""

    def __init__(self, profiler: TimeProfiler) -> None:
        self.profiler = profiler

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            seconds = self.profiler.data_seconds
            waited: Any = torch.tensor(seconds, device=trainer.strategy.root_device)
            longest = float(trainer.strategy.reduce(waited, reduce_op="max"))
            self.profiler.others_wait_more_s = max(0.0, longest - seconds)


def report(
    profiler: TimeProfiler, steps: int, data: DataModule, training: TrainingConfig, run: Path,
    *, resumed: bool,
) -> None:  # fmt: skip
    """Log where the time went and what would be faster; write it to `run`/throughput.json.

    A resumed run appends its part to the file; the total is the sum of all parts.
    """
    total = profiler.close()
    if steps < 1:
        return
    advice = [*data_advice(profiler, steps, data), *writing_advice(profiler.seconds, training)]
    shown = [
        f"{name} {profiler.seconds[part]:.1f} s ({profiler.seconds[part] / total:.0%})"
        for part, name in _NAMES.items()
    ]
    log.info("Where the time went, %.1f s for %d steps: %s.", total, steps, ", ".join(shown))
    for line in advice:
        log.info("%s", line)
    path = run / REPORT
    parts = _earlier(path) if resumed else []
    parts.append({
        "steps": steps,
        "seconds": _rounded(profiler.seconds),
        "data_wait_percent": round(100 * profiler.data_share, 2),
        "advice": advice,
    })  # fmt: skip
    sums = {name: sum(part["seconds"].get(name, 0.0) for part in parts) for name in _NAMES}
    total_part = {"steps": sum(part["steps"] for part in parts), "seconds": _rounded(sums)}
    try:
        write_json(path, {"total": total_part, "parts": parts})
    except OutputError as error:  # must not hide the error that ended the training
        log.warning("%s", error)


def data_advice(profiler: TimeProfiler, steps: int, data: DataModule) -> list[str]:
    """How to wait less for data; empty below 5% of the training."""
    if profiler.data_share <= _DATA_LIMIT:
        return []
    workers, wanted = data.num_workers, data.config.num_workers
    processes = data.trainer.num_devices if data.trainer else 1
    free = max(0, environment.num_cores() // processes - 1)
    waited, step = profiler.seconds["data_wait"], profiler.seconds["step"]
    # Loader processes work in parallel: this many produce batches as fast as steps use them.
    enough = math.ceil(waited / step) if not workers else math.ceil(workers * (1 + waited / step))
    wait_s = (profiler.data_seconds + profiler.others_wait_more_s) / steps
    lines = [
        f"Waiting for data took {profiler.data_share:.0%} of the training ({wait_s:.3f} s a step). "
        "To wait less:"
    ]
    if workers and profiler.seconds["data_start"] > waited:
        fewer = workers // 2 if data.config.augmentation else 0
        lines.append(
            f"- data.num_workers={fewer} instead of {workers}: starting them in every epoch "
            f"took {profiler.seconds['data_start']:.1f} s"
        )
    elif workers < wanted:
        lines.append(
            f"- a larger /dev/shm (--shm-size): {workers} of {wanted} loader processes fit"
        )
    elif workers < free:
        lines.append(
            f"- data.num_workers={min(max(enough, workers + 1), free)} instead of {workers}; "
            f"each training process has {free + 1} cores"
        )
    else:
        lines.append(
            f"- more cores: data.num_workers is {workers}, and each training process has "
            f"{free + 1} core(s) to share with it"
        )
    return [*lines, *_source_advice(data)]


def _source_advice(data: DataModule) -> list[str]:
    """The most expensive step of loading an image: its augmentation, or reading the cache."""
    if data.config.augmentation:
        costs = _augmentation_ms(data)
        slowest = max(costs, key=lambda name: costs[name])
        return [
            f"- cheaper data.augmentation: it takes {sum(costs.values()):.1f} ms per image, of "
            f"which {slowest} takes {costs[slowest]:.1f} ms: remove it, or lower its p"
        ]
    size_gb = data.cache.nbytes / 1e9
    return [
        f"- a faster disk for the cache of {size_gb:.2f} GB (SYNTHCUBE_CACHE is now "
        f"{environment.cache_folder()}), or enough free memory for the system to keep it there"
    ]


def _augmentation_ms(data: DataModule) -> dict[str, float]:
    """Milliseconds that each augmentation takes for one image, by name."""
    import torchio as tio

    image = data.examples(data.rows("train")[:1])["image"][0]
    volume = image if image.ndim == 4 else image[..., None]
    costs: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        for config in data.config.augmentation:
            transform = config.build()
            times: list[float] = []
            while len(times) < 3 and sum(times) < 0.5:
                scalar: Any = tio.ScalarImage(tensor=volume.clone())
                start = time.perf_counter()
                transform(scalar)
                times.append(time.perf_counter() - start)
            costs[config.name] = 1000 * max(times)
    return costs


def writing_advice(seconds: Mapping[str, float], training: TrainingConfig) -> list[str]:
    """How to spend less on saving and pictures; empty below 10% of the time each."""
    total, lines = sum(seconds.values()), []
    for part, name, key in (
        ("pictures", "Sample pictures", "sample_every_n_epochs"),
        ("saving", "Saving checkpoints", "validate_every_n_epochs"),
    ):
        share = seconds[part] / max(total, 1e-9)
        if share > _WRITING_LIMIT:
            now = getattr(training, key)
            lines.append(
                f"{name} took {share:.0%} of the time: training.{key}="
                f"{now * math.ceil(share / (1 - share) / _AIM)} instead of {now}."
            )
    return lines


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        file = reading.read_record(path, _File, OutputError)
    except OutputError:
        return []
    return [part.model_dump() for part in file.parts]


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
