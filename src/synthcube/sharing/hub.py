"""The connection to a Hub, downloads from it, and its errors as plain messages.

This module and push.py are the only ones that touch the network. The token comes from the
environment or from `hf auth login`, by the Hub's own client; it is never a parameter here, and no
message of ours holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthcube import environment
from synthcube.errors import ArtifactError, HubError
from synthcube.models import artifact
from synthcube.models.artifact import Address
from synthcube.sharing.runtimes import is_part

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("synthcube")

_NO_ROOM = (402, 413, 507)
_LONGEST = 300
_NETWORK_ERRORS = {"TransportError", "ConnectionError", "TimeoutError", "InvalidURL"}
_SUFFIXES = (".safetensors", ".yaml", ".json", ".png")


def connect() -> HfApi:
    """The client of the Hub that HF_ENDPOINT names, or of the public one.

    Raises:
        HubError: HF_ENDPOINT holds a user's name or password, which messages and logs would show.
    """
    endpoint = environment.ready_hub()
    if "@" in endpoint:
        raise HubError(
            "HF_ENDPOINT holds more than the address of a Hub (a user or a password, before @): "
            "give the address alone; the token goes into HF_TOKEN."
        )
    from huggingface_hub import HfApi, constants

    if endpoint != environment.PUBLIC_HUB and not environment.uses_xet():
        # The environment is too late for a client that another library has imported before.
        constants.HF_HUB_DISABLE_XET = True
        _log_without_xet(endpoint)
    return HfApi(endpoint=endpoint, library_name="synthcube")


@cache
def _log_without_xet(endpoint: str) -> None:
    log.info("The Hub is %s: its storage service Xet is not used.", endpoint)


def token() -> str | None:
    """The user's token, where there is one."""
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def hub_errors(action: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into a :class:`HubError` of one sentence.

    Args:
        action: what the client does, as "Pushing to owner/name".
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HubError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        response = next((fault for fault in chain if isinstance(fault, HfHubHTTPError)), None)
        if response is not None:
            raise HubError(f"{action}: {_refusal(response, endpoint)}") from None
        # By name, in any version of the client's HTTP library.
        if _NETWORK_ERRORS & {base.__name__ for fault in chain for base in type(fault).__mro__}:
            raise HubError(
                f"{action}: {endpoint} cannot be reached or broke off "
                f"({type(chain[-1]).__name__}). Is there a network? The same command again goes "
                "on; what was there before is unchanged."
            ) from None
        if isinstance(error, OSError) and error.strerror:
            raise HubError(f"{action}: {error.filename}: {error.strerror}.") from error
        if isinstance(error, (JSONDecodeError, KeyError)):
            raise HubError(
                f"{action}: {endpoint} does not answer like a Hub; is HF_ENDPOINT right, or does "
                "this network want a login first?"
            ) from None
        if isinstance(error, ValueError):
            raise HubError(f"{action}: {redacted(str(error))}") from None
        raise


def redacted(text: str) -> str:
    """`text` in one line and not too long, without the token if it is in it."""
    secret = token()
    text = text.replace(secret, "***") if secret else text
    return " ".join(text.split())[:_LONGEST]


def _refusal(error: Any, endpoint: str) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = int(error.response.status_code)
    if isinstance(error, GatedRepoError):
        return "its owner asks everyone to accept terms first: do so on its page of the Hub."
    if status == 401 and token():
        return (
            f"{endpoint} does not accept the token of HF_TOKEN or hf auth login: it is wrong or "
            "has expired."
        )
    if isinstance(error, RepositoryNotFoundError):
        seen = "that this token may see" if token() else "that is public (there is no token)"
        return f"there is no such model on {endpoint} {seen}."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit."
    if isinstance(error, EntryNotFoundError):
        return "a file is missing there."
    message = str(error.server_message or "").strip()
    return _by_status(status, endpoint) + (f" It says: {redacted(message)}" if message else "")


def _by_status(status: int, endpoint: str) -> str:
    if status in (401, 403):
        return (
            "this token may not do that: it must be one that may write, of the owner or of a "
            "member of the organisation; the name may be taken by someone else."
        )
    if status in (409, 412):
        return (
            "it was changed by someone else meanwhile, and nothing was written: look at it, and "
            "run the same command again."
        )
    if status in _NO_ROOM:
        return "there is no room left for it (quota): nothing was published."
    if status == 429:
        return "too many requests: wait a few minutes."
    if status >= 500:
        return f"{endpoint} is out of order at the moment ({status}): try again later."
    return f"{endpoint} refuses it ({status})."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def located(model: Path | str) -> Path:
    """The folder of a model: a path is returned as it is, an address is downloaded.

    Raises what :func:`pull` raises.
    """
    address = artifact.parse(model)
    return pull(address)[0] if address else Path(model)


def pull(address: Address) -> tuple[Path, Address]:
    """Download a model, or find it in the cache; returns its verified folder and its commit.

    The revision is resolved once: all files are those of one commit, even where the branch moves
    meanwhile. With HF_HUB_OFFLINE=1, or at a commit that is here, nothing is asked of the Hub.

    Raises:
        HubError: the Hub cannot be reached, does not have it, or it is no model of SynthCube.
        ArtifactError: it is of a newer schema, or damaged.
    """
    if environment.is_offline():
        return _cached(address)
    known = address.folder(artifact.INDEX) if address.is_pinned else None
    folder = known or _indexed(address)
    pinned = address.at(folder.name)
    try:
        listed = artifact.read_index(folder)
    except ArtifactError:
        _fetch(pinned, [artifact.INDEX], again=True)  # may have been damaged on the way
        listed = artifact.read_index(folder)
    foreign = sorted(name for name in listed if not (name.endswith(_SUFFIXES) or is_part(name)))
    if foreign:
        raise ArtifactError(
            f"{pinned} lists {', '.join(foreign)}: only {', '.join(_SUFFIXES)} are taken from a "
            "Hub, and networks that were converted for a runtime."
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


def _cached(address: Address) -> tuple[Path, Address]:
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
    api = connect()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(f"Fetching {address}", api.endpoint):
        # Asked first, because the download would be content with an old copy in the cache.
        api.model_info(address.repo, revision=address.revision or None)
        try:
            index = api.hf_hub_download(
                address.repo, artifact.INDEX, revision=address.revision or None
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise HubError(
                f"{address} has no {artifact.INDEX}: it is no model that SynthCube has exported, "
                "and nothing of it is used."
            ) from None
    return Path(index).parent


def _fetch(pinned: Address, names: Sequence[str], *, again: bool = False) -> None:
    """Download files of a commit into the cache; `again` even where they are there."""
    api = connect()
    with hub_errors(f"Fetching {pinned}", api.endpoint):
        for name in names:
            api.hf_hub_download(pinned.repo, name, revision=pinned.revision, force_download=again)
