"""The folder of a run: its lock, its checkpoint, what it was trained with, and its artifact."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthcube import environment, reading, storage
from synthcube.config import RunConfig
from synthcube.data.cache import content_digests
from synthcube.data.conditions import LABEL
from synthcube.data.manifest import Manifest, read_manifest, write_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError, ManifestError, OutputError, first_faults
from synthcube.models import artifact
from synthcube.schema import PrivacyStatement, flattened
from synthcube.training import accountant, checkpoints, privacy

log = logging.getLogger("synthcube")

CONFIG, SPLIT, ENVIRONMENT = "config.yaml", "split.csv", "environment.json"
LOCK = ".synthcube.lock"
_WRITTEN = (CONFIG, "artifact", "samples", "metrics.csv", "curve.png", "throughput.json", "logs")
HELD_OUT = ("test", "validation")
"""The splits that a model has not learned from, the one to judge it by first."""
IMAGES = "images.json"
"""File with a digest of each image, in the order of SPLIT."""
# Keys that may change when a run is continued: they affect no step already taken.
_FREE = (
    "training.max_epochs.", "training.max_minutes.", "training.sample_every_n_epochs.",
    "training.num_sample_images.", "training.log_every_n_steps.", "training.loggers.",
    "training.checkpoint_every_n_minutes.", "training.stop_signals.", "training.early_stop.",
    "sampling.", "compute.", "evaluation.", "data.num_workers.", "data.cache_gb.",
    "model.first_stage.",  # its hash must stay
    "model.first_stage_image.labels.",  # an export leaves out labels that name people
    "export.",
    "training.privacy.epsilon.",  # more may be spent; its accountant refuses less
    "training.privacy.images_at_once.",
)  # fmt: skip
# Keys that may never change: the state of the optimizers, or the privacy that is spent, would no
# longer fit.
_FIXED = r"model\.(name|.*optimizer\.name)|training\.(freeze|start_.*|privacy.*)"


def take(run: Path, rank: int, locks: ExitStack) -> None:
    """Lock an existing run folder until `locks` closes; remove leftovers of a killed training.

    Only the first of the processes that train together does so. Raises OutputError if the folder
    is not a run, or another training uses it.
    """
    if rank or not run.is_dir():
        return
    claim(run)
    locks.enter_context(locked(run))
    for name in ("artifact", "checkpoints", "samples", "logs"):
        storage.sweep(run / name)
    storage.settle(run / "artifact")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run folder for one training; the lock ends with the process, however that ends."""
    path = run / LOCK
    with ExitStack() as held:
        try:
            file = held.enter_context(path.open("r+b" if path.exists() else "w+b", buffering=0))
            # A lock of this process only: a data loader that outlives it must not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate()
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())
        except BlockingIOError as error:
            raise OutputError(
                f"output_path {run} is being trained by another process "
                f"({file.read().decode(errors='replace').strip()}): wait for its end, or give "
                "another folder."
            ) from error
        except OSError as error:  # read-only, owned by another user, or a full disk
            log.warning("%s cannot be locked against a second training: %s.", run, error.strerror)
        yield


def read_images(path: Path) -> Manifest:
    """The images at a path; a run stands for its split.csv, with all of its rows.

    Raises:
        ManifestError: it cannot be read, or it is that of an older run and lacks conditions.
    """
    if not (path / SPLIT).is_file():
        return read_manifest(path)
    manifest = read_manifest(path / SPLIT)
    columns = {LABEL}.union(*(row.conditions for row in manifest.rows))
    conditions = recorded_config(path).get("data", {}).get("conditions") or {}
    if missing := [name for name in conditions if name not in columns]:
        raise ManifestError(
            f"{path / SPLIT} lacks the conditions of the model ({', '.join(missing)}), because an "
            "older version of SynthCube wrote it: run the same synthcube train command again, "
            "which adds them."
        )
    return manifest


def rows_of(manifest: Manifest, splits: Sequence[str], name: str) -> Manifest:
    """The rows of the first of the splits that the manifest has; all rows if it has none.

    Raises:
        ManifestError: it has other splits only.
    """
    present = {row.split for row in manifest.rows}
    if present == {""}:
        return manifest
    for split in splits:
        if split in present:
            rows = tuple(row for row in manifest.rows if row.split == split)
            log.info("%s: the %d rows of the split %s.", name, len(rows), split)
            return replace(manifest, rows=rows)
    raise ManifestError(
        f"{manifest.path} has the splits {sorted(present)}; rows of {' or '.join(splits)} are "
        "needed"
    )


def claim(run: Path) -> None:
    """Raise OutputError unless a folder is a run, or a training would overwrite nothing in it."""
    storage.require_own(run, SPLIT, "output_path")
    if any((run / name).exists() for name in (LOCK, SPLIT, ENVIRONMENT, "checkpoints")):
        return
    if existing := [name for name in _WRITTEN if (run / name).exists()]:
        raise OutputError(
            f"output_path {run} is no run, and files in it would be overwritten "
            f"({', '.join(existing)}): give another one."
        )


def starting_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that a training continues from; None: it starts anew. See `train`."""
    last = run / "checkpoints" / checkpoints.LAST
    if resume == "auto":
        return last if last.exists() else None
    if resume == "never":
        if last.exists() or (run / "artifact").exists():
            raise OutputError(
                f"output_path {run} already holds a run, and --resume is never: give another one, "
                "or remove this one."
            )
        return None
    if not Path(resume).is_file():
        raise ConfigError(
            f"--resume {resume}: there is no such checkpoint; use auto, never, or the path of one."
        )
    if lack := checkpoints.lack(Path(resume)):
        raise ConfigError(
            f"--resume {resume}: {lack}. Only a checkpoint of synthcube train can be continued: "
            "checkpoints/last.ckpt of a run. To start a new training from the weights of a model, "
            "set training.start_from to its folder (a run, an exported or an imported model)."
        )
    return Path(resume)


def recorded_config(run: Path) -> dict[str, Any]:
    """The config that a run was last trained with; empty if there is none."""
    path = run / CONFIG
    recorded = reading.read_yaml(path, OutputError) if path.exists() else {}
    for section in ("model", "data", "training", "sampling", "compute"):
        if not isinstance(recorded.get(section, {}), dict):
            raise OutputError(f"{path} is damaged: {section} is not a section.")
    return recorded


def check_unchanged(
    run: Path, recorded: Mapping[str, Any], settings: RunConfig, accept_changes: bool
) -> None:
    """Raise ConfigError if a key differs that affects the result, unless `accept_changes`."""
    before, now = (
        {key: value for key, value in flattened(values).items() if value != {}}
        for values in (recorded, settings.dump())
    )
    changed = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not f"{key}.".startswith(_FREE)
        # Keys may be added to the schema, as long as they are left empty.
        and (key in before or now[key])
    ]
    faults = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
    fixed = [key for key in changed if re.fullmatch(_FIXED, key)]
    if faults and accept_changes and not fixed:
        log.warning("Continuing with other values: %s", "; ".join(faults))
    elif faults:
        way = "" if fixed else ", or --accept_changes to go on with these"
        raise ConfigError(
            f"output_path {run} was trained with another config; give another one, or the "
            f"same values{way}:",
            faults,
        )


def record_run(
    run: Path, settings: RunConfig, data: DataModule, machine: dict[str, Any], *,
    continued: bool, accept_changes: bool,
) -> None:  # fmt: skip
    """Write config, split, digests of the images, and environment.

    Args:
        continued: whether the run has a checkpoint or an artifact already; then the images must
            not have changed, unless `accept_changes`.
    """
    rows = [
        {
            "SubjectID": row.subject, "Split": split, "Label": row.label_name,
            **row.channel_cells, **row.conditions,
        }
        for row, split in zip(data.files.rows, data.file_splits, strict=True)
    ]  # fmt: skip
    _check_same_split(run / SPLIT, rows)
    paths = [path for row in data.files.rows for path in row.channels]
    by_path = content_digests(paths, environment.cache_folder())
    digests = ["-".join(by_path[path] for path in row.channels) for row in data.files.rows]
    if continued:
        _check_same_content(run / IMAGES, data.files, digests, accept_changes)
    storage.write_text(run / CONFIG, reading.dump(settings.dump()))
    write_manifest(run / SPLIT, rows)
    storage.write_json(run / IMAGES, digests)
    storage.write_json(run / ENVIRONMENT, machine)


def recorded_threads(run: Path) -> int | None:
    """The threads that a run was last trained with; None if that is not recorded."""
    path = run / ENVIRONMENT
    recorded = reading.read_json(path, OutputError) if path.exists() else {}
    threads = recorded.get("threads") if isinstance(recorded, dict) else None
    return threads if isinstance(threads, int) and threads > 0 else None


def _check_same_split(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Refuse another split than the run's: subjects must not move from validation to training."""
    if not path.exists():
        return
    recorded_rows = reading.read_rows(path, ("SubjectID", "Split"), OutputError)
    before = [(row["SubjectID"], row["Split"]) for row in recorded_rows]
    if before != [(row["SubjectID"], row["Split"]) for row in rows]:
        raise ConfigError(
            f"output_path {path.parent} was trained on other subjects ({len(before)} images then, "
            f"{len(rows)} now); give another one, or the same data."
        )


def _check_same_content(
    path: Path, manifest: Manifest, digests: Sequence[str], accept_changes: bool
) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a run that was killed before it was written
    if not isinstance(before, list) or len(before) != len(digests):
        return
    changed = [
        ", ".join(map(str, row.channels))
        for row, old, new in zip(manifest.rows, before, digests, strict=True)
        if old != new
    ]
    if changed and accept_changes:
        log.warning("Continuing on changed images: %s", "; ".join(first_faults(changed)))
    elif changed:
        count = "1 image has" if len(changed) == 1 else f"{len(changed)} images have"
        raise ConfigError(
            f"{count} changed since output_path {path.parent} was trained on them; restore them, "
            "give another output_path, or --accept_changes to go on with these:",
            first_faults(changed),
        )


def save_artifact(run: Path, settings: RunConfig, data: DataModule) -> None:
    """Write the best checkpoint of a run, or else its last, as an artifact."""
    source = _source(run)
    epochs, steps = checkpoints.reached(source)
    pictures = sorted((run / "samples").glob("*.png"))
    artifact.save(
        run / "artifact",
        config=settings.dump(),
        image=data.image,
        # In float32, whatever they were trained in: every machine can sample with that.
        weights={
            name: value.float() if value.is_floating_point() else value
            for name, value in checkpoints.weights(source).items()
        },
        metrics={"epochs": epochs, "steps": steps, **checkpoints.monitored(source)},
        picture=pictures[-1] if pictures else None,
        checkpoint=checkpoints.fingerprint(source),
        privacy=_statement(settings, source),
    )


def _statement(settings: RunConfig, source: Path) -> PrivacyStatement | None:
    """What a private training promises, from the steps that its checkpoint counts."""
    chosen = settings.training.privacy
    if chosen is None:
        return None
    budget = privacy.recorded_budget(checkpoints.load(source, mapped=True), source)
    return PrivacyStatement(
        **budget.spent().model_dump(),
        accountant=accountant.described(),
        draws=chosen.draws,
        start_sha256=settings.training.start_from_sha256,
        first_stage_sha256=getattr(settings.model, "first_stage_sha256", ""),
    )


def has_current_artifact(run: Path, settings: RunConfig) -> bool:
    """Whether the artifact was written from the current checkpoint and config of the run.

    A training that was killed between the two leaves an older artifact.
    """
    folder = run / "artifact"
    try:
        index = json.loads((folder / artifact.INDEX).read_text(encoding="utf-8"))
        written = (folder / artifact.CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return (
        isinstance(index, dict)
        and index.get("checkpoint") == checkpoints.fingerprint(_source(run))
        and written == reading.dump(settings.dump())
    )


def _source(run: Path) -> Path:
    best = run / "checkpoints" / checkpoints.BEST
    return best if best.exists() else run / "checkpoints" / checkpoints.LAST
