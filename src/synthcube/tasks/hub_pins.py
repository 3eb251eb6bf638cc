"""Models of a Hub that a config starts from: downloaded, and pinned to their commit.

Only this layer asks a Hub; below it, an address with its commit is a folder on this disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthcube.config import RunConfig
from synthcube.errors import HubError
from synthcube.models import artifact
from synthcube.models.artifact import Address
from synthcube.sharing.hub import pull


def pinned(settings: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The same config, in which every address of a Hub names the commit that was downloaded.

    Args:
        before: the config of the run that is continued: it stays with its commit, even where the
            branch has moved, and no longer needs the start of its weights; empty for a new one.

    Raises:
        HubError, ArtifactError: a model cannot be had, or is none.
    """
    model, training = settings.model, settings.training
    stage = getattr(model, "first_stage", "")
    recorded = before.get("model", {}).get("first_stage", "")
    if (found := _pinned(stage, recorded, is_needed=True)) != stage:
        settings = settings.model_copy(
            update={"model": model.model_copy(update={"first_stage": found})}
        )
        model = settings.model
    start, recorded = training.start_from or "", before.get("training", {}).get("start_from", "")
    if (found := _pinned(start, recorded, is_needed=not recorded)) != start:
        settings = settings.model_copy(
            update={"training": training.model_copy(update={"start_from": found})}
        )
    return settings


def _pinned(text: str, recorded: Any, *, is_needed: bool) -> str:
    address = artifact.parse(text)
    if address is None:
        return text
    earlier = _address(recorded)
    if earlier and earlier.is_pinned and earlier.repo == address.repo:
        address = earlier if address.revision in ("", earlier.revision) else address
        if address == earlier and not is_needed:
            return str(address)
    _, found = pull(address)
    return str(found)


def _address(recorded: Any) -> Address | None:
    """What a run was recorded with, as an address; its text may be anything."""
    try:
        return artifact.parse(str(recorded))
    except HubError:
        return None
