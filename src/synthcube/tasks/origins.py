"""The models that a config begins with: those of a Hub are downloaded, and pinned to a commit.

So only this floor asks a Hub; below, an address with its commit is a folder on this disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthcube import addresses, artifact
from synthcube.config import RunConfig
from synthcube.digests import PREFIX
from synthcube.errors import HubError
from synthcube.export.pull import pull
from synthcube.storage import sha256


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
    if kept := _kept_hash(model, before.get("model", {})):
        settings = settings.model_copy(
            update={"model": model.model_copy(update={"first_stage_sha256": kept})}
        )
    start, recorded = training.start_from or "", before.get("training", {}).get("start_from", "")
    if (found := _pinned(start, recorded, is_needed=not recorded)) != start:
        settings = settings.model_copy(
            update={"training": training.model_copy(update={"start_from": found})}
        )
    return settings


def _kept_hash(model: Any, recorded: Mapping[str, Any]) -> str:
    """What a run of an older version was recorded with, where its first stage has that hash.

    It was that of the file; a run is continued with the kind of hash that it has.
    """
    stage = getattr(model, "first_stage", "")
    before = str(recorded.get("first_stage_sha256") or "")
    if not stage or not before or before.startswith(PREFIX) or model.first_stage_sha256:
        return ""
    return before if sha256(artifact.load(stage).weights) == before else ""


def _pinned(text: str, recorded: Any, *, is_needed: bool) -> str:
    address = addresses.parse(text)
    if address is None:
        return text
    earlier = _address(recorded)
    if earlier and earlier.is_pinned and earlier.repo == address.repo:
        address = earlier if address.revision in ("", earlier.revision) else address
        if address == earlier and not is_needed:
            return str(address)
    _, found = pull(address)
    return str(found)


def _address(recorded: Any) -> addresses.Address | None:
    """What a run was recorded with, as an address; its text may be anything."""
    try:
        return addresses.parse(str(recorded))
    except HubError:
        return None
