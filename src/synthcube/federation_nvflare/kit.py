"""A startup kit of NVFLARE, and the settings of it that let nothing run but the job of SynthCube.

A kit is the folder that `nvflare provision` makes for a server or a site: `startup/` is signed and
stays as it is, `local/` belongs to whoever runs it. NVFLARE reads `local/NAME.json`, and where it
is missing `local/NAME.json.default`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from synthcube import reading, storage
from synthcube.errors import FederationError
from synthcube.federation_nvflare.job import GUARD, SERVER_RELAY, SITE_RELAY

Kind = Literal["server", "site"]
_STARTUP: dict[Kind, str] = {"server": "fed_server.json", "site": "fed_client.json"}
_RELAYS: dict[Kind, str] = {"server": SERVER_RELAY, "site": SITE_RELAY}
_RIGHTS = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate")
_DENIED = ("byoc", "server-predeployed-flwr", "shell_commands")


def guard(kit: Path) -> list[Path]:
    """Write the settings of a kit that is not in use yet; returns the files.

    Raises FederationError if it is no kit, or has settings of its own.
    """
    files = _guarded(kit)
    if own := [path for path, values in files.items() if path.exists() and _read(path) != values]:
        raise FederationError(
            f"{kit} has settings of its own, which would be lost. Give SynthCube a startup kit of "
            "its own, or remove:",
            [str(path) for path in own],
        )
    for path, values in files.items():
        storage.write_json(path, values)
    return [*files]


def require_guarded(kit: Path, kind: Kind) -> None:
    """Raise FederationError where :func:`guard` has not written the settings of a kit."""
    files = _guarded(kit)
    if not (kit / "startup" / _STARTUP[kind]).exists():
        raise FederationError(f"--certificates {kit}: is not the startup kit of a {kind}.")
    if not all(path.exists() and _read(path) == values for path, values in files.items()):
        raise FederationError(
            f"--certificates {kit}: NVFLARE would run other jobs there too. Run `synthcube "
            f"federate guard {kit}`, and start NVFLARE anew."
        )


def server_address(kit: Path) -> str:
    """HOST:PORT that the NVFLARE client of a site connects to. Raises FederationError."""
    path = kit / "startup" / _STARTUP["site"]
    try:
        return str(_read(path)["servers"][0]["service"]["target"])
    except (KeyError, IndexError, TypeError) as error:
        raise FederationError(f"{path} names no server.") from error


def _guarded(kit: Path) -> dict[Path, dict[str, Any]]:
    """What the settings of a kit must be, by their file."""
    kinds = [kind for kind, name in _STARTUP.items() if (kit / "startup" / name).exists()]
    if len(kinds) != 1:
        raise FederationError(
            f"{kit} is no startup kit of NVFLARE: it must have startup/{_STARTUP['server']}, or "
            f"startup/{_STARTUP['site']}."
        )
    resources, policy = (
        _read(kit / "local" / f"{name}.json.default") for name in ("resources", "authorization")
    )
    resources |= {"class_list_enforcement_mode": "enforce", "class_allow_list": [_RELAYS[kinds[0]]]}
    try:
        if kinds[0] == "site":
            # NVFLARE would send the log of errors to the server.
            kept = [part for part in resources["components"] if part["id"] != "site_log_streamer"]
            resources["components"] = [*kept, {"id": "synthcube", "path": GUARD, "args": {}}]
            resources["allow_log_streaming"] = False
        policy["permissions"] = {
            role: _without_code(rights) for role, rights in policy["permissions"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FederationError(f"{kit}/local has not the defaults of NVFLARE 2.9.") from error
    return {
        kit / "local" / "resources.json": resources,
        kit / "local" / "authorization.json": policy,
    }


def _without_code(rights: str | Mapping[str, str]) -> dict[str, str]:
    """The rights of a role, without those to run code and to read files; a word is one for all."""
    plain = dict.fromkeys(_RIGHTS, rights) if isinstance(rights, str) else dict(rights)
    return {**plain, **dict.fromkeys(_DENIED, "none")}


def _read(path: Path) -> dict[str, Any]:
    return reading.read_object(path, FederationError)
