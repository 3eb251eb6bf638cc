"""Caches are kept where nobody else could have prepared them; else in a fresh folder."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from synthcube.environment import cache_folder, keep_caches_private, private

SOMEONE = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that everyone may write to, as /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def theirs(path: Path) -> None:
    path.mkdir(mode=0o755)
    os.chown(path, SOMEONE, SOMEONE)


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def open_to_the_group(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_file(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    "prepare",
    [pytest.param(theirs, marks=needs_root), open_to_all, open_to_the_group, a_link,
     a_dangling_link, a_file],
)  # fmt: skip
@pytest.mark.parametrize("below", ["", "images"])
def test_what_someone_else_could_have_prepared_is_not_used(
    prepare: Callable[[Path], None], below: str, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(shared / "caches")
    with caplog.at_level(logging.WARNING, "synthcube"):
        folder = private(shared / "caches" / below)
    assert not folder.is_relative_to(shared / "caches")
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert folder.parent.stat().st_uid == os.geteuid()
    assert "may be someone else's" in caplog.text
    assert private(shared / "caches" / below) == folder


def test_a_folder_that_is_made_is_this_user_s_alone(shared: Path) -> None:
    path = shared / "caches" / "images"
    assert private(path) == path
    assert stat.S_IMODE((shared / "caches").stat().st_mode) == 0o700
    assert private(path) == path


@needs_root
def test_root_s_own_shared_folder_is_looked_into(shared: Path) -> None:
    inner = shared / "also"
    inner.mkdir()
    inner.chmod(0o1777)
    theirs(inner / "caches")
    assert private(inner / "mine") == inner / "mine"
    assert private(inner / "caches") != inner / "caches"


def test_where_only_the_user_writes_links_are_followed(tmp_path: Path) -> None:
    a_link(tmp_path / "caches")
    assert private(tmp_path / "caches") == tmp_path / "caches"


def test_every_variable_of_a_cache_is_looked_at(shared: Path) -> None:
    """As an image sets them: below a /tmp that may be the host's."""
    open_to_all(shared / "synthcube-0")
    names = ("SYNTHCUBE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR")
    environment = {name: str(shared / "synthcube-0" / name.lower()) for name in names}
    keep_caches_private(environment)
    assert not any(path.startswith(str(shared)) for path in environment.values())
    assert len(set(environment.values())) == len(names)
    assert cache_folder(environment) == Path(environment["SYNTHCUBE_CACHE"])


def test_without_a_home_it_is_a_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    folder = cache_folder({})
    assert folder == shared / f"synthcube-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_fresh_folder_goes_at_the_end(shared: Path) -> None:
    open_to_all(shared / "caches")
    script = (
        "from pathlib import Path; from synthcube.environment import private; "
        f"found = private(Path({str(shared / 'caches')!r})); found.mkdir(); print(found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env=os.environ | {"TMPDIR": str(shared)},
    )  # fmt: skip
    folder = Path(done.stdout.strip())
    assert folder.parent.parent == shared
    assert not folder.parent.exists()
