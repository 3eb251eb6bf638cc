"""Publishing: an exported folder to a Hub, in one commit, once."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthcube import environment, reading
from synthcube.errors import HubError
from synthcube.models import artifact
from synthcube.models.artifact import Address
from synthcube.sharing import hub
from synthcube.sharing.card import header_of
from synthcube.sharing.config import BRANCH
from synthcube.sharing.metadata import METADATA, version_of
from synthcube.sharing.runtimes import is_part
from synthcube.storage import sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("synthcube")

# What may be there before the first push, and what an older export may have left.
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
_NEUTRAL = (".gitattributes", artifact.CARD, *_LICENSES)
_OURS = (artifact.WEIGHTS, artifact.EXPORTED_WEIGHTS, artifact.PICTURE, METADATA)


def push(
    folder: Path, repo: str, *, public: bool = False, revision: str = "main", message: str = ""
) -> tuple[Address, bool]:
    """Publish an exported folder; returns its address, at its commit, and whether it is new there.

    All files go up in one commit, which is tagged with the version of the model: a reader sees the
    old state or the new one. Files that are there already are not sent again, and where all of
    them are, nothing is committed. The folder is only read.

    Args:
        repo: owner/name; created if missing.
        public: for everyone to see; otherwise a new repository is private, and one that is public
            is refused.
        revision: branch to push to; created if missing.

    Raises:
        HubError: no license or token, or the Hub cannot be reached or refuses; nothing was
            published then.
        ArtifactError: the folder is damaged, or no exported model.
    """
    repo = artifact.repo_id(repo)
    if not BRANCH.fullmatch(revision) or ".." in revision:
        raise HubError(f"--revision {revision!r} is no name of a branch.")
    artifact.load(folder)
    card = _card(folder)
    tag = f"v{version_of(folder)}"
    if environment.is_offline():
        raise HubError(f"Pushing to {repo}: HF_HUB_OFFLINE=1 forbids it.")
    api = hub.connect()
    if not hub.token():
        raise HubError(
            f"Pushing to {repo}: there is no token; set HF_TOKEN to one that may write, or log in "
            "with `hf auth login`."
        )
    with hub.hub_errors(f"Pushing to {repo}", api.endpoint):
        _check_card(api, card)
        _open(api, repo, public)
        head = _head(api, repo, revision)
        there = _files(api, repo, revision)
        foreign = sorted(name for name in there if name not in _NEUTRAL)
        if foreign and artifact.INDEX not in there:
            raise HubError(
                f"{repo} holds something else ({', '.join(foreign[:3])}) and no model of "
                "SynthCube: give another name."
            )
        files = _published(folder)
        changed = _changed(files, there)
        ours = [name for name in there if name in _OURS or is_part(name)]
        stale = [name for name in ours if name not in files]
        tags = [ref.name for ref in api.list_repo_refs(repo).tags]
        if changed or stale:
            if tag in tags and _changed(files, _files(api, repo, tag)):
                raise HubError(
                    f"{repo} has a version {tag} already, with other content: a version stays "
                    "what it is, so give this one its own number, as in --model_version 1.1.0."
                )
            title = message or f"Upload {tag} with SynthCube"
            new = {name: files[name] for name in changed}
            head = _commit(api, repo, revision, head, new, stale, title)
        if tag not in tags:
            api.create_tag(repo, tag=tag, revision=head, exist_ok=True)
    return Address(repo, head), bool(changed or stale)


def _card(folder: Path) -> str:
    """The model card; a HubError where there is none, or none that states a license."""
    path = folder / artifact.CARD
    text = reading.read_text(path, HubError) if path.is_file() else ""
    if not header_of(text).get("license"):
        raise HubError(
            f"{path} states no license, without which nobody may use the model: say which, as in "
            "--license apache-2.0; it must be one that the owners of the training images allow."
        )
    return text


def _check_card(api: HfApi, card: str) -> None:
    """Let the Hub check the metadata of the card, before a repository is created."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=build_hf_headers(library_name="synthcube"),
    )
    if response.status_code == 400:
        errors = response.json().get("errors", [])
        faults = [hub.redacted(str(fault.get("message"))) for fault in errors]
        raise HubError(f"{api.endpoint} refuses the metadata at the top of the card:", faults)
    hf_raise_for_status(response)


def _open(api: HfApi, repo: str, public: bool) -> None:
    """Create the repository, or check that it may be pushed to."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            # The Hub made nothing, because a repository exists that this token may not see.
            raise HubError(f"{repo} is taken by someone else: give another name.") from None
    if not info.private and not public:
        raise HubError(
            f"{repo} is public, and everyone would see the model: say --public if that is meant."
        )
    if info.private and public:
        log.warning("%s stays private: change that in its settings on the Hub.", repo)


def _head(api: HfApi, repo: str, branch: str) -> str:
    """The commit that a branch is at; the branch is made where there is none."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return str(api.model_info(repo, revision=branch).sha)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch, exist_ok=True)
        return str(api.model_info(repo, revision=branch).sha)


def _files(api: HfApi, repo: str, revision: str) -> dict[str, Any]:
    tree = api.list_repo_tree(repo, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _published(folder: Path) -> dict[str, Path]:
    """What goes up: the files of the model and its license, and nothing that lies beside them."""
    names = [*artifact.read_index(folder), artifact.INDEX, artifact.CARD, *_LICENSES]
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


def _changed(files: Mapping[str, Path], there: Mapping[str, Any]) -> list[str]:
    return [name for name, path in files.items() if not _same(path, there.get(name))]


def _same(path: Path, there: Any) -> bool:
    """Whether the Hub has this very content."""
    if there is None:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256(path))
    content = path.read_bytes()
    # Git's name for a file.
    name = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(there.blob_id == name.hexdigest())


def _commit(
    api: HfApi,
    repo: str,
    branch: str,
    head: str,
    files: Mapping[str, Path],
    stale: list[str],
    message: str,
) -> str:
    """One commit on top of `head`, and on nothing else; returns it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the card, which was judged before
            commit = api.create_commit(
                repo, operations, commit_message=message, revision=branch, parent_commit=head
            )
    except RuntimeError as error:
        # The client's words for a file that it could not send; what happened is its cause.
        raise error.__cause__ or error from None
    return str(commit.oid)
