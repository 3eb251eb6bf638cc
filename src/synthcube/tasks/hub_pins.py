"""Download the models of a Hub that a config starts from, pin them to their commit, read them.

Only the tasks contact a Hub; below them, an address with its commit is a local folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthcube import config
from synthcube.config import RunConfig
from synthcube.errors import HubError
from synthcube.models import artifact
from synthcube.models.artifact import Address
from synthcube.sharing.hub import pull
from synthcube.training import fine_tuning


def pinned(settings: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The config with each Hub address pinned to the downloaded commit, and its first stage read.

    Args:
        before: the config of the run that is continued, empty for a new one. Such a run keeps its
            commit even if the branch has moved, and its training.start_from is not needed again.
    """
    model, training = settings.model, settings.training
    stage = getattr(model, "first_stage", "")
    recorded = before.get("model", {}).get("first_stage", "")
    if (address := _pinned(stage, recorded, is_needed=True)) != stage:
        pinned_model = model.model_copy(update={"first_stage": address})
        settings = settings.model_copy(update={"model": pinned_model})
    start, recorded = training.start_from or "", before.get("training", {}).get("start_from", "")
    if (address := _pinned(start, recorded, is_needed=not recorded)) != start:
        pinned_training = training.model_copy(update={"start_from": address})
        settings = settings.model_copy(update={"training": pinned_training})
    settings = _with_start_model(settings, before)
    return settings.model_copy(update={"model": settings.model.resolved()})


def resolved(settings: RunConfig) -> RunConfig:
    """The config of a new federation: pinned, with the hash of the weights that it starts from."""
    settings = pinned(settings, {})
    training = fine_tuning.resolved(settings.training, {})
    return settings.model_copy(update={"training": training})


def _with_start_model(settings: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The config with what its section `model` does not state taken from training.start_from."""
    start = settings.training.start_from
    if start is None:
        return settings
    trained = before.get("model") or artifact.load(start).config["model"]
    model = fine_tuning.start_model(settings.model, settings.model.model_fields_set, trained)
    if model == settings.model.model_dump(mode="json"):
        return settings
    return config.build(
        settings.dump() | {"model": model}, where=f"The model with training.start_from {start}"
    )


def _pinned(text: str, recorded: Any, *, is_needed: bool) -> str:
    address = artifact.parse(text)
    if address is None:
        return text
    earlier = _address(recorded)
    if earlier and earlier.is_pinned and earlier.repo == address.repo:
        address = earlier if address.revision in ("", earlier.revision) else address
        if address == earlier and not is_needed:
            return str(address)
    _, downloaded = pull(address)
    return str(downloaded)


def _address(recorded: Any) -> Address | None:
    """The address that a run recorded; None if its text is something else."""
    try:
        return artifact.parse(str(recorded))
    except HubError:
        return None
