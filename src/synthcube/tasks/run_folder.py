"""The folder of a run: what is recorded there, and whether a training may go on in it."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from synthcube import artifact, runtime, storage
from synthcube.config import RunConfig
from synthcube.data.digests import content_digests
from synthcube.data.manifest import Manifest, capped, write_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError, OutputError
from synthcube.training import checkpoints

log = logging.getLogger("synthcube")

CONFIG, SPLIT, ENVIRONMENT = "config.yaml", "split.csv", "environment.json"
IMAGES = "images.json"
"""A digest of the files of each image, in the order of SPLIT."""
# Keys that may differ from the run that is continued: they change no step already taken.
_FREE = (
    "training.max_epochs.", "training.max_minutes.", "training.sample_every_n_epochs.",
    "training.num_sample_images.", "training.log_every_n_steps.", "training.loggers.",
    "training.checkpoint_every_n_minutes.", "training.stop_signals.", "training.early_stop.",
    "sampling.", "compute.", "evaluation.", "data.num_workers.", "data.cache_gb.",
    "model.first_stage.",  # its hash must stay
    "model.first_stage_image.labels.",  # an export leaves out those that are people
    "export.",
)  # fmt: skip
# Keys that may not differ at all: the state of the optimizers would be of others.
_FIXED = r"model\.(name|.*optimizer\.name)|training\.(freeze|start_.*)"


def save_artifact(run: Path, settings: RunConfig, data: DataModule) -> None:
    """Write what the best checkpoint of a run holds, or else its last, as an artifact."""
    source = _source(run)
    epochs, steps = checkpoints.reached(source)
    pictures = sorted((run / "samples").glob("*.png"))
    artifact.save(
        run / "artifact",
        config=settings.dump(),
        image=data.image,
        weights=_single(checkpoints.weights(source)),
        metrics={"epochs": epochs, "steps": steps, **checkpoints.monitored(source)},
        picture=pictures[-1] if pictures else None,
        checkpoint=checkpoints.fingerprint(source),
    )


def has_current_artifact(run: Path, settings: RunConfig) -> bool:
    """Whether the artifact of a run is of its checkpoint and its config as they are now.

    It is not where a training was killed after its last checkpoint, over an older artifact.
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
        and written == yaml.safe_dump(settings.dump(), sort_keys=False)
    )


def _source(run: Path) -> Path:
    best = run / "checkpoints" / checkpoints.BEST
    return best if best.exists() else run / "checkpoints" / checkpoints.LAST


def _single(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in float32, whatever they were trained in: what every machine can sample with."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def checkpoint(run: Path, resume: str) -> Path | None:
    """Where a training starts from; None for the beginning.

    Args:
        resume: "auto", "never" or a path; see `train`.

    Raises:
        ConfigError: there is no such checkpoint.
        OutputError: nothing may be resumed, and there is something.
    """
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


def recorded(run: Path) -> dict[str, Any]:
    """The config that a run was trained with last; empty where there is none."""
    path = run / CONFIG
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return found or {}


def check_unchanged(
    run: Path, recorded: Mapping[str, Any], settings: RunConfig, accept_changes: bool
) -> None:
    """Compare the config of a run with what it is to be continued with.

    Raises:
        ConfigError: a key that matters differs, and that is not accepted, or no checkpoint can
            be continued so.
    """
    before, now = _flat(recorded), _flat(settings.dump())
    changed = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not f"{key}.".startswith(_FREE)
        # A key that an older version did not know, and that is left empty.
        and (key in before or now[key])
    ]
    faults = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
    kinds = [key for key in changed if re.fullmatch(_FIXED, key)]
    if faults and accept_changes and not kinds:
        log.warning("Continuing with other values: %s", "; ".join(faults))
    elif faults:
        way = "" if kinds else ", or --accept_changes to go on with these"
        raise ConfigError(
            f"output_path {run} was trained with another config; give another one, or the "
            f"same values{way}:",
            faults,
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def record(
    run: Path, settings: RunConfig, data: DataModule, environment: dict[str, Any], *,
    continued: bool, accept_changes: bool,
) -> None:  # fmt: skip
    """Write config, split, digests of the images, and environment.

    Args:
        continued: whether something was trained in this run before.

    Raises:
        ConfigError: the run was trained on other subjects; or on other content of their files, and
            that is not accepted.
    """
    rows = [
        {
            "SubjectID": row.subject,
            "Split": split,
            "Label": row.label_name,
            **{f"Channel_{i}": str(path) for i, path in enumerate(row.channels)},
        }
        for row, split in zip(data.manifest.rows, data.splits, strict=True)
    ]
    _check_same_split(run / SPLIT, rows)
    digests = _digests(data.manifest)
    if continued:
        _check_same_content(run / IMAGES, data.manifest, digests, accept_changes)
    storage.write_text(run / CONFIG, yaml.safe_dump(settings.dump(), sort_keys=False))
    write_manifest(run / SPLIT, rows)
    storage.write_json(run / IMAGES, digests)
    storage.write_json(run / ENVIRONMENT, environment)


def _check_same_split(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A run is continued on the images it was started with: subjects must not change sides."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        before = [(row["SubjectID"], row["Split"]) for row in csv.DictReader(file)]
    if before != [(row["SubjectID"], row["Split"]) for row in rows]:
        raise ConfigError(
            f"output_path {path.parent} was trained on other subjects ({len(before)} images then, "
            f"{len(rows)} now); give another one, or the same data."
        )


def _digests(manifest: Manifest) -> list[str]:
    digests = content_digests(
        [path for row in manifest.rows for path in row.channels], runtime.cache_folder()
    )
    return ["-".join(digests[path] for path in row.channels) for row in manifest.rows]


def _check_same_content(
    path: Path, manifest: Manifest, digests: Sequence[str], accept_changes: bool
) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # of an older version, which did not write it
    if not isinstance(before, list) or len(before) != len(digests):
        return
    changed = [
        ", ".join(map(str, row.channels))
        for row, old, new in zip(manifest.rows, before, digests, strict=True)
        if old != new
    ]
    if changed and accept_changes:
        log.warning("Continuing on changed images: %s", "; ".join(capped(changed)))
    elif changed:
        count = "1 image has" if len(changed) == 1 else f"{len(changed)} images have"
        raise ConfigError(
            f"{count} changed since output_path {path.parent} was trained on them; restore them, "
            "give another output_path, or --accept_changes to go on with these:",
            capped(changed),
        )
