"""How far a training is, how fast, and where its time goes."""

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

from synthcube import environment, reading
from synthcube.data.module import DataModule
from synthcube.environment import resident_bytes
from synthcube.errors import OutputError
from synthcube.models.family import Family
from synthcube.schema import MAX_COUNT, Batch, Schema
from synthcube.storage import write_json
from synthcube.training.config import TrainingConfig

log = logging.getLogger("synthcube")


class LogLines(Callback):
    """A row for every logger each N steps; lines too, where no progress bar is shown.

    Nothing is read from a GPU between two rows.
    """

    def __init__(self, interval: int, ledger: Ledger, *, quiet: bool) -> None:
        self.interval = interval
        self.ledger = ledger
        self.level = logging.DEBUG if quiet else logging.INFO
        self._images = 0
        self._before = (0.0, 0.0)  # seconds in steps, and in waiting for data
        self._rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._images, self._before = 0, self.ledger.training_seconds()
        if isinstance(module, Family):
            for line in described_optimizers(trainer, module):
                log.log(self.level, line)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval == 0:
            # Schedules step before the end of a batch: these are the rates of its own step.
            self._rates = learning_rates(trainer.optimizers, optimizer_names(trainer, module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        self._images += len(batch["index"]) * trainer.world_size
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval or outputs is None:
            return
        values = {
            "train/loss_now": float(outputs["loss"]),
            **_other_terms(module),
            **self._rates,
            **self._speed(),
            "memory_gb": memory_gb(trainer.strategy.root_device),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, trainer.global_step)
        log.log(self.level, line(trainer, values))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(value):.4f}"
            for name, value in trainer.callback_metrics.items()
            if name.endswith("/loss")
        ]
        log.log(
            self.level, "epoch %d/%s  %s",
            trainer.current_epoch + 1, trainer.max_epochs, "  ".join(shown),
        )  # fmt: skip

    def _speed(self) -> dict[str, float]:
        """Since the last row; validation, pictures and saving do not count."""
        step, data = self.ledger.training_seconds()
        stepped, waited = step - self._before[0], data - self._before[1]
        images, self._images, self._before = self._images, 0, (step, data)
        spent = max(stepped + waited, 1e-9)
        return {"images_per_second": images / spent, "data_wait_percent": 100 * waited / spent}


def line(trainer: pl.Trainer, values: dict[str, float]) -> str:
    """What a job's log says at a step."""
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
        f"{values['images_per_second']:.1f} images/s",
        f"data wait {values['data_wait_percent']:.0f}%",
        f"memory {values['memory_gb']:.2f} GB",
    ])  # fmt: skip


def learning_rates(optimizers: list[torch.optim.Optimizer], names: list[str]) -> dict[str, float]:
    """lr, or lr/name where there are several; lr/name/0 and so on for groups that differ."""
    found: dict[str, float] = {}
    for name, optimizer in zip(names, optimizers, strict=True):
        key = f"lr/{name}" if len(optimizers) > 1 else "lr"
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        alike = len(set(rates)) == 1
        found |= {key: rates[0]} if alike else {f"{key}/{i}": r for i, r in enumerate(rates)}
    return found


def optimizer_names(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """A name for each optimizer: the family's, or its number where that has none."""
    names = module.optimizer_names if isinstance(module, Family) else ()
    number = len(trainer.optimizers)
    return list(names) if len(names) == number else [str(i) for i in range(number)]


def described_optimizers(trainer: pl.Trainer, family: Family) -> list[str]:
    """One line for each: what it trains, how, and on what schedule."""
    lines = []
    names = optimizer_names(trainer, family)
    for name, optimizer in zip(names, trainer.optimizers, strict=True):
        numbers = [each.numel() for group in optimizer.param_groups for each in group["params"]]
        key = "scheduler" if name == names[0] else f"{name}_scheduler"
        schedule = getattr(getattr(family.config, key, None), "name", "no")
        # Schedules with a warm-up have lowered it by now.
        rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
        lines.append(
            f"{name}: {sum(numbers):,} weights, {type(optimizer).__name__}, {schedule} schedule, "
            f"lr {', '.join(f'{rate:.2e}' for rate in sorted(rates))}"
        )
    return lines


def memory_gb(device: torch.device) -> float:
    """On a GPU the most that was allocated so far; on a CPU what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resident_bytes() / 1e9


def _other_terms(module: pl.LightningModule) -> dict[str, float]:
    terms = module.latest_terms if isinstance(module, Family) else {}
    return {f"{name}_now": float(value) for name, value in terms.items() if name != "train/loss"}


REPORT = "throughput.json"
_NAMES = {
    "step": "step", "data_wait": "data wait", "data_start": "loader start",
    "validation": "validation", "pictures": "pictures", "saving": "saving",
    "rest": "start and rest",
}  # fmt: skip
_DATA_LIMIT, _WRITING_LIMIT, _AIM = 0.05, 0.10, 0.05  # shares of the time


class _Part(Schema):
    """What one run of a training spent."""

    model_config = ConfigDict(extra="allow")

    steps: int = Field(ge=0, le=MAX_COUNT, description="Steps taken.")
    seconds: dict[str, float] = Field(description="By part.")


class _File(Schema):
    """throughput.json; the total is computed anew."""

    model_config = ConfigDict(extra="ignore")

    parts: list[_Part] = Field(description="Of each run of the training.")


class Ledger(Profiler):
    """Seconds by part, each moment booked once: Lightning says when an action starts and stops.

    A step is all between two waits for a batch, so that on a GPU, where work is only handed over,
    it holds the place where the work is waited for. The start of an epoch up to its first batch
    is booked apart: loader processes start then.

    Args:
        family: class name of the model, of whose hooks Lightning speaks.
        pictures: class name of the callback that draws.
    """

    def __init__(self, family: str, pictures: str) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(_NAMES, 0.0)
        self.others_wait_more_s = 0.0
        """Data wait of the process that waited longest, beyond that of this one."""
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
            self._book()
            first = parts == ("data_wait",) and self._open[-1] == "data_start"
            self._open += ("data_start",) if first else parts

    def stop(self, action_name: str) -> None:
        if parts := self._closes.get(action_name):
            self._book()
            while self._open[-1] in parts:
                self._open.pop()

    def training_seconds(self) -> tuple[float, float]:
        """Seconds until now in steps, and in waiting for their batches."""
        self._book()
        return self.seconds["step"], self.data_seconds

    @property
    def data_seconds(self) -> float:
        return self.seconds["data_wait"] + self.seconds["data_start"]

    @property
    def data_share(self) -> float:
        """Share of the training, validation and the rest aside, that waits for data, in [0, 1]."""
        waited = self.data_seconds + self.others_wait_more_s
        return waited / max(self.seconds["step"] + self.data_seconds, waited, 1e-9)

    def close(self) -> float:
        """Book what is open; returns all seconds since the start."""
        self._book()
        return sum(self.seconds.values())

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


class SlowestProcess(Callback):
    """Learns, at the end, how long the process that waited longest has waited for data."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            own = self.ledger.data_seconds
            waited: Any = torch.tensor(own, device=trainer.strategy.root_device)
            longest = float(trainer.strategy.reduce(waited, reduce_op="max"))
            self.ledger.others_wait_more_s = max(0.0, longest - own)


def report(
    ledger: Ledger, steps: int, data: DataModule, training: TrainingConfig, run: Path,
    *, resumed: bool,
) -> None:  # fmt: skip
    """Say where the time went and what to change, and write it to `run`/throughput.json.

    A resumed run adds to the file, where the total is that of all its parts.
    """
    total = ledger.close()
    if steps < 1:
        return
    advice = [*data_advice(ledger, steps, data), *writing_advice(ledger.seconds, training)]
    shown = [
        f"{name} {ledger.seconds[part]:.1f} s ({ledger.seconds[part] / total:.0%})"
        for part, name in _NAMES.items()
    ]
    log.info("Where the time went, %.1f s for %d steps: %s.", total, steps, ", ".join(shown))
    for line in advice:
        log.info("%s", line)
    path = run / REPORT
    parts = _earlier(path) if resumed else []
    parts.append({
        "steps": steps,
        "seconds": _rounded(ledger.seconds),
        "data_wait_percent": round(100 * ledger.data_share, 2),
        "advice": advice,
    })  # fmt: skip
    sums = {name: sum(each["seconds"].get(name, 0.0) for each in parts) for name in _NAMES}
    whole = {"steps": sum(each["steps"] for each in parts), "seconds": _rounded(sums)}
    try:
        write_json(path, {"total": whole, "parts": parts})
    except OutputError as error:  # it must not hide why a training ended
        log.warning("%s", error)


def data_advice(ledger: Ledger, steps: int, data: DataModule) -> list[str]:
    """What to change, where waiting for data takes more than a twentieth of the training."""
    if ledger.data_share <= _DATA_LIMIT:
        return []
    workers, wanted = data.num_workers, data.config.num_workers
    processes = data.trainer.num_devices if data.trainer else 1
    free = max(0, environment.num_cores() // processes - 1)
    waited, step = ledger.seconds["data_wait"], ledger.seconds["step"]
    # A loader process makes a batch while the others make theirs: so many keep up with the steps.
    enough = math.ceil(waited / step) if not workers else math.ceil(workers * (1 + waited / step))
    lines = [
        f"Waiting for data took {ledger.data_share:.0%} of the training "
        f"({(ledger.data_seconds + ledger.others_wait_more_s) / steps:.3f} s a step). To wait less:"
    ]
    if workers and ledger.seconds["data_start"] > waited:
        fewer = workers // 2 if data.config.augmentation else 0
        lines.append(
            f"- data.num_workers={fewer} instead of {workers}: they are started in every epoch, "
            f"which took {ledger.seconds['data_start']:.1f} s"
        )
    elif workers < wanted:
        lines.append(f"- room in /dev/shm for {wanted} loader processes, not {workers}: --shm-size")
    elif workers < free:
        lines.append(
            f"- data.num_workers={min(max(enough, workers + 1), free)} instead of {workers}; "
            f"{free + 1} cores are there for each training process"
        )
    else:
        lines.append(
            f"- more cores: data.num_workers is {workers}, and each training process has "
            f"{free + 1} core(s) to share with it"
        )
    return [*lines, *_source_advice(data)]


def _source_advice(data: DataModule) -> list[str]:
    """What makes an image dear: its augmentation, or the place it is read from."""
    if data.config.augmentation:
        costs = _augmentation_ms(data)
        dearest = max(costs, key=lambda name: costs[name])
        return [
            f"- less dear data.augmentation: it takes {sum(costs.values()):.1f} ms an image, of "
            f"which {dearest} {costs[dearest]:.1f} ms: drop that, or lower its p"
        ]
    size_gb = math.prod(data.cache.shape) * 4 / 1e9
    return [
        f"- a faster disk for the cache of {size_gb:.2f} GB (SYNTHCUBE_CACHE is now "
        f"{environment.cache_folder()}), or so much free memory that the system keeps it there"
    ]


def _augmentation_ms(data: DataModule) -> dict[str, float]:
    """Milliseconds that each transform takes for one image where it is applied, by name."""
    import torchio as tio

    image = data.examples(data.rows("train")[:1])["image"][0]
    volume = image if image.ndim == 4 else image[..., None]
    costs: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        for config in data.config.augmentation:
            transform = config.build()
            times: list[float] = []
            while len(times) < 3 and sum(times) < 0.5:  # somebody waits for the end
                scalar: Any = tio.ScalarImage(tensor=volume.clone())
                began = time.perf_counter()
                transform(scalar)
                times.append(time.perf_counter() - began)
            costs[config.name] = 1000 * max(times)
    return costs


def writing_advice(seconds: Mapping[str, float], training: TrainingConfig) -> list[str]:
    """What to change, where saving or pictures take more than a tenth of the time."""
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
        found = reading.validated(reading.read_object(path, OutputError), _File, path, OutputError)
    except OutputError:
        return []
    return [part.model_dump() for part in found.parts]


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
