"""What the user's environment says of the Hub; no network is touched here."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from synthcube.runtime.messages import is_terminal

PUBLIC_HUB = "https://huggingface.co"


def ready_hub(environment: MutableMapping[str, str] = os.environ) -> str:
    """Ready this process for a Hub; to be called before huggingface_hub is imported.

    Returns:
        Address of the Hub: HF_ENDPOINT, or the public one. No other has the storage service Xet,
        which the client would insist on: uploads would fail, so it is switched off.
    """
    endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB
    if endpoint != PUBLIC_HUB:
        environment.setdefault("HF_HUB_DISABLE_XET", "1")
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not is_terminal():
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return endpoint


def uses_xet(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether files go by the Hub's storage service Xet: see :func:`ready_hub`."""
    return not _is_true(environment.get("HF_HUB_DISABLE_XET", ""))


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user forbids to ask a Hub for anything: HF_HUB_OFFLINE=1."""
    return _is_true(environment.get("HF_HUB_OFFLINE", ""))


def _is_true(text: str) -> bool:
    return text.upper() in ("1", "ON", "YES", "TRUE")
