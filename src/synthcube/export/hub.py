"""The connection to a Hub: its client, made ready, and its faults in our words.

This module, push.py and pull.py are the only ones that touch the network. The token comes from the
environment or from `hf auth login`, by the Hub's own client; it is never a parameter here, and no
message of ours holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

from synthcube import runtime
from synthcube.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("synthcube")

_NO_ROOM = (402, 413, 507)
_LONGEST = 300


def connect() -> HfApi:
    """The client of the Hub that HF_ENDPOINT names, or of the public one.

    Raises:
        HubError: HF_ENDPOINT holds a user's name or password, which messages and logs would show.
    """
    endpoint = runtime.ready_hub()
    if "@" in endpoint:
        raise HubError(
            "HF_ENDPOINT holds more than the address of a Hub (a user or a password, before @): "
            "give the address alone; the token goes into HF_TOKEN."
        )
    from huggingface_hub import HfApi, constants

    if endpoint != runtime.PUBLIC_HUB and not runtime.uses_xet():
        # The environment is too late for a client that another library has imported before.
        constants.HF_HUB_DISABLE_XET = True
        _tell(endpoint)
    return HfApi(endpoint=endpoint, library_name="synthcube")


@cache
def _tell(endpoint: str) -> None:
    log.info("The Hub is %s: its storage service Xet is not used.", endpoint)


def token() -> str | None:
    """The user's token, where there is one."""
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def explained(asked: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into a :class:`HubError` of one sentence.

    Args:
        asked: what was to be done, as "Pushing to owner/name".
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HubError:
        raise
    except Exception as error:
        response = next((each for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)
        if response is not None:
            raise HubError(f"{asked}: {_refusal(response, endpoint)}") from None
        if _is_of_network(error):
            raise HubError(
                f"{asked}: {endpoint} cannot be reached or broke off ({_named(error)}). Is there "
                "a network? The same command again goes on; what was there before is unchanged."
            ) from None
        if isinstance(error, OSError) and error.strerror:
            raise HubError(f"{asked}: {error.filename}: {error.strerror}.") from error
        if isinstance(error, (JSONDecodeError, KeyError)):
            raise HubError(
                f"{asked}: {endpoint} does not answer as a Hub does; is HF_ENDPOINT right, or does "
                "this network want a login first?"
            ) from None
        if isinstance(error, ValueError):
            raise HubError(f"{asked}: {redacted(str(error))}") from None
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
    return _by_status(status, endpoint) + _said(error)


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


def _said(error: Any) -> str:
    message = str(error.server_message or "").strip()
    return f" It says: {redacted(message)}" if message else ""


def _is_of_network(error: BaseException) -> bool:
    """Whether it is a fault of the connection, in any version of the client's HTTP library."""
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError", "InvalidURL"})


def _named(error: BaseException) -> str:
    return type(list(_chain(error))[-1]).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
