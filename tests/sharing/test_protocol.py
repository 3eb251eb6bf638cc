"""The loopback Hub is one for huggingface_hub's own client: what we test against is real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NAME = "alice/brains"


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint)


# The client of 2.4.0 hands its files to httpx2 in a way that this will give up.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_thirty_megabytes_go_up_and_come_back_byte_for_byte(hub, api: HfApi, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(30_000_080))
    (folder / "config.yaml").write_text("seed: 1\n")
    api.create_repo(NAME, private=True)
    done = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="first")
    api.create_tag(NAME, tag="v1", revision=done.oid)
    info = api.model_info(NAME, revision="v1")
    assert (info.sha, info.private) == (done.oid, True)
    assert hub.received == 30_000_080
    got = Path(api.snapshot_download(NAME, revision="v1"))
    for path in folder.iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes()
    assert api.whoami()["name"] == "alice"


def test_the_client_raises_what_we_explain(hub, api: HfApi) -> None:
    hub.make(NAME)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(NAME, "none.json")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("bob/brains")


def test_the_validator_of_cards_has_an_opinion(validate) -> None:
    validate("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="license"):
        validate("---\nlicense: mine\n---\n")
