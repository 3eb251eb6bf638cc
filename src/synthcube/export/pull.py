"""Models of others: hf://owner/name[@revision] to a verified folder on this disk.

What is downloaded is what the model's artifact.json lists, once its schema is known: weights as
safetensors, YAML, JSON and pictures; nothing that could run, and nothing else of the repository.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from synthcube import addresses, artifact, runtime
from synthcube.addresses import Address
from synthcube.errors import ArtifactError, HubError
from synthcube.export import hub
from synthcube.export.runtimes.formats import is_part

log = logging.getLogger("synthcube")

_KINDS = (".safetensors", ".yaml", ".json", ".png")


def located(model: Path | str) -> Path:
    """The folder of a model, wherever it is: a path stays one, an address is downloaded.

    Raises:
        HubError, ArtifactError: see :func:`pull`.
    """
    address = addresses.parse(model)
    return pull(address)[0] if address else Path(model)


def pull(address: Address) -> tuple[Path, Address]:
    """Download a model, or find it in the cache; returns its verified folder and its commit.

    The revision is resolved once: all files are those of one commit, even where the branch moves
    meanwhile. With HF_HUB_OFFLINE=1, or at a commit that is here, nothing is asked of the Hub.

    Raises:
        HubError: the Hub cannot be reached, does not have it, or it is no model of SynthCube.
        ArtifactError: it is of a newer schema, or damaged.
    """
    if runtime.is_offline():
        return _kept(address)
    known = address.folder(artifact.INDEX) if address.is_pinned else None
    folder = known or _indexed(address)
    pinned = address.at(folder.name)
    try:
        listed = artifact.read_index(folder)
    except ArtifactError:
        _fetch(pinned, [artifact.INDEX], again=True)  # may have been damaged on the way
        listed = artifact.read_index(folder)
    if strange := sorted(name for name in listed if not _is_taken(name)):
        raise ArtifactError(
            f"{pinned} lists {', '.join(strange)}: only {', '.join(_KINDS)} are taken from a Hub, "
            "and networks that were converted for a runtime."
        )
    if any(not (folder / name).is_file() for name in listed):
        _fetch(pinned, sorted(listed))
    if broken := artifact.damaged(folder, listed):
        log.warning("%s: %s; downloading again.", pinned, "; ".join(broken.values()))
        _fetch(pinned, sorted(broken), again=True)
    if faults := artifact.damaged(folder, listed):
        raise ArtifactError(
            f"{pinned} is damaged, on the Hub or on the way from it (twice); nothing of it is "
            "used:",
            faults.values(),
        )
    log.info("%s: every file verified.", pinned)
    return folder, pinned


def _is_taken(name: str) -> bool:
    return name.endswith(_KINDS) or is_part(name)


def _kept(address: Address) -> tuple[Path, Address]:
    folder = address.folder(artifact.INDEX)
    if folder is None:
        raise HubError(
            f"{address} is not in the cache of this machine, and HF_HUB_OFFLINE=1 forbids to "
            "download it: use it once where there is a network."
        )
    if faults := artifact.damaged(folder, artifact.read_index(folder)):
        raise ArtifactError(
            f"{address}: its copy in the cache is not complete; download it again without "
            "HF_HUB_OFFLINE:",
            faults.values(),
        )
    return folder, address.at(folder.name)


def _indexed(address: Address) -> Path:
    """Download the index; returns the folder of the commit that it is from."""
    api = hub.connect()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub.explained(f"Fetching {address}", api.endpoint):
        # Asked first, because the download would be content with an old copy in the cache.
        api.model_info(address.repo, revision=address.revision or None)
        try:
            found = api.hf_hub_download(
                address.repo, artifact.INDEX, revision=address.revision or None
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise HubError(
                f"{address} has no {artifact.INDEX}: it is no model that SynthCube has exported, "
                "and nothing of it is used."
            ) from None
    return Path(found).parent


def _fetch(pinned: Address, names: Sequence[str], *, again: bool = False) -> None:
    """Download files of a commit into the cache; `again` even where they are there."""
    api = hub.connect()
    with hub.explained(f"Fetching {pinned}", api.endpoint):
        for name in names:
            api.hf_hub_download(pinned.repo, name, revision=pinned.revision, force_download=again)
