"""The address of a model on a Hub: hf://owner/name, or hf://owner/name@revision."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from synthcube.errors import HubError

# A path drops one of the slashes; a dot or a dash may neither be first, nor last, nor twice.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^@]*)(@(?P<revision>.*))?")
_PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[\w][\w./-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 96


@dataclass(frozen=True, slots=True)
class Address:
    """A model on a Hub, at some revision of it."""

    repo: str  # owner/name
    revision: str = ""  # branch, tag or commit; empty for the branch main

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, whose files never change."""
        return bool(_COMMIT.fullmatch(self.revision))

    def at(self, commit: str) -> Address:
        """The same model at another revision."""
        return replace(self, revision=commit)

    def folder(self, index: str) -> Path | None:
        """Where its files lie on this disk, if it was downloaded; nothing is downloaded here.

        Args:
            index: name of a file that is among them.
        """
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, index, revision=self.revision or None)
        return Path(found).parent if isinstance(found, str) else None


def parse(text: Path | str) -> Address | None:
    """The address that `text` is; None where it is the path of something on this disk.

    Raises:
        HubError: it begins as an address, and is none.
    """
    found = _ADDRESS.fullmatch(str(text))
    if not found:
        return None
    repo, revision = repo_id(found["repo"].rstrip("/")), found["revision"]
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(
            f"{text}: {revision!r} is no revision; after @ goes a branch, a tag or a commit, as in "
            f"hf://{repo}@v1.0.0."
        )
    return Address(repo, revision or "")


def repo_id(text: str) -> str:
    """`text`, where it is the name of a repository.

    Raises:
        HubError: it is none.
    """
    if not _REPO.fullmatch(text) or len(text) > _LONGEST or text.endswith(".git"):
        raise HubError(
            f"{text!r} is no name of a model on a Hub: it is owner/name, of letters, digits and "
            f"single _ . - inside, {_LONGEST} characters at most."
        )
    return text
