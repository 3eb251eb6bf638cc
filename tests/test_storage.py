from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from synthcube.data.images import write_image
from synthcube.data.manifest import write_manifest
from synthcube.errors import OutputError
from synthcube.models import artifact
from synthcube.schema import ImageSpec
from synthcube.storage import (
    contents,
    make_folder,
    recovered_folder,
    replaced_folder,
    require_separate,
    scratch_folder,
    sha256,
    sweep,
    write_json,
    write_text,
    write_with,
)

SPEC = ImageSpec(
    size=[8, 8],
    channels=1,
    spacing_mm=[1, 1, 1],
    affine=np.eye(4).tolist(),
    intensity_range=[[0, 255]],
    file_format="png",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=lambda mask: f"umask {mask:03o}")
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param  # nothing left it changed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def killed(code: str, *arguments: object) -> None:
    """Run `code`, which ends itself with SIGKILL, in another process."""
    head = "import os, sys\nfrom pathlib import Path\nfrom synthcube import storage\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


# -- files -------------------------------------------------------------------------------------


def test_text_and_json(folder: Path) -> None:
    write_text(folder / "a.txt", "Gehirn: größer\n")
    assert (folder / "a.txt").read_bytes() == "Gehirn: größer\n".encode()
    write_json(folder / "b.json", {"b": [1, 2.5], "a": None})
    assert (folder / "b.json").read_text() == (
        '{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null\n}\n'
    )
    with pytest.raises(ValueError, match="Out of range float values are not JSON"):
        write_json(folder / "b.json", {"a": float("nan")})
    assert '"a": null' in (folder / "b.json").read_text()
    assert names(folder) == ["a.txt", "b.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(folder: Path) -> None:
    path = folder / "model.ckpt"
    write_text(path, "good")

    def failing(temporary: Path) -> None:
        assert temporary.parent == folder  # a rename is atomic within a file system only
        assert temporary.suffix == ".ckpt"
        temporary.write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        write_with(path, failing)
    assert path.read_text() == "good"
    assert names(folder) == ["model.ckpt"]


def test_a_system_error_is_explained(folder: Path) -> None:
    write_text(folder / "file", "x")

    def full(temporary: Path) -> None:
        with Path("/dev/full").open("w") as device:
            device.write("y")

    message = (
        f"^Cannot write {folder / 'file'}: the disk is full. What was there before is unchanged.$"
    )
    with pytest.raises(OutputError, match=message):
        write_with(folder / "file", full)
    assert (folder / "file").read_text() == "x"
    assert names(folder) == ["file"]
    with pytest.raises(OutputError, match=r"Cannot write .*: No such file or directory"):
        write_text(folder / "missing" / "file", "x")
    with pytest.raises(OutputError, match=r"Cannot write .*: Not a directory"):
        write_text(folder / "file" / "below", "x")


def test_a_kill_while_writing_leaves_the_old_file(folder: Path) -> None:
    path = folder / "file.txt"
    write_text(path, "good")
    killed(
        "def write(temporary):\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "storage.write_with(Path(sys.argv[1]), write)\n",
        path,
    )
    assert path.read_text() == "good"


def test_outputs_are_readable_as_umask_says(folder: Path, umask: int) -> None:
    """Temporary files are private; what they become is not."""
    write_text(folder / "a.txt", "x")
    write_json(folder / "a.json", {})
    write_image(folder / "a.png", torch.zeros(1, 4, 4), np.eye(4))
    write_image(folder / "a.nii.gz", torch.zeros(1, 4, 4, 4), np.eye(4))
    write_manifest(folder / "manifest.csv", [{"Channel_0": "a.png"}])
    with replaced_folder(folder / "sub") as staging:
        write_text(staging / "b.txt", "x")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {path.name: oct(mode(path)) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }
    assert oct(mode(folder / "sub")) == oct(0o777 & ~umask)


def test_an_artifact_is_readable_as_umask_says(folder: Path, umask: int) -> None:
    picture = folder / "picture.png"
    write_image(picture, torch.zeros(1, 4, 4), np.eye(4))
    artifact.save(
        folder / "artifact",
        config={"model": {"name": "ddpm"}},
        image=SPEC,
        weights={"w": torch.ones(3)},
        metrics={"loss": 1.0},
        picture=picture,
    )
    files = list((folder / "artifact").iterdir())
    assert "weights.safetensors" in names(folder / "artifact")
    assert {path.name: oct(mode(path)) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


# -- folders -----------------------------------------------------------------------------------


def test_make_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert make_folder(path) == path
    (path / "kept").write_text("x")
    assert make_folder(path) == path
    assert names(path) == ["kept"]
    with pytest.raises(OutputError, match=r"Cannot write to .*kept: it is a file, a folder is"):
        make_folder(path / "kept")
    with pytest.raises(OutputError, match=r"Cannot write .*below: Not a directory"):
        make_folder(path / "kept" / "below")
    with pytest.raises(OutputError, match="Cannot write /proc/synthcube"):
        make_folder(Path("/proc/synthcube"))


def generation(folder: Path) -> str:
    return (folder / "generation").read_text()


def replace(target: Path, text: str) -> None:
    with replaced_folder(target, ["generation", "part/only in 1"]) as staging:
        (staging / "generation").write_text(text)
        if text == "1":
            (staging / "part").mkdir()
            (staging / "part" / "only in 1").touch()


def test_a_folder_is_replaced_as_a_whole(folder: Path) -> None:
    target = folder / "deep" / "artifact"
    replace(target, "1")
    assert names(target) == ["generation", "part"]
    (target / "a person's own").touch()
    replace(target, "2")
    assert generation(target) == "2"
    assert names(target) == ["a person's own", "generation"]
    assert names(target.parent) == ["artifact"]
    assert recovered_folder(target) == target


def test_a_failure_leaves_the_old_folder(folder: Path) -> None:
    target = folder / "artifact"
    replace(target, "1")

    def half() -> None:
        with replaced_folder(target) as staging:
            (staging / "generation").write_text("2")
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        half()
    assert generation(target) == "1"
    assert names(folder) == ["artifact"]


def test_a_system_error_in_a_folder_is_explained(folder: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"Cannot write {folder / 'artifact'}: the disk is full"),
        replaced_folder(folder / "artifact"),
        Path("/dev/full").open("w") as device,
    ):
        device.write("y")
    assert names(folder) == []
    (folder / "file").touch()
    with (
        pytest.raises(
            OutputError, match=r"Cannot write .*(artifact|file: it is a file, a folder is needed)"
        ),
        replaced_folder(folder / "file" / "artifact"),
    ):
        pass


@pytest.mark.parametrize("is_replaced", [False, True], ids=["new", "replaced"])
def test_a_kill_at_any_moment_leaves_a_whole_folder(
    folder: Path, kills: ModuleType, is_replaced: bool
) -> None:
    """Before the kill one generation, after it that or the next, and the same again repairs it."""
    seen = []
    for number in itertools.count():
        target = folder / str(number) / "artifact"
        target.parent.mkdir()
        if is_replaced:
            replace(target, "1")
            (target / "a person's own").touch()
        is_done = kills.killed_before(number, folder, lambda: replace(target, "2"))  # noqa: B023
        state = recovered_folder(target)
        seen.append(generation(state) if (state / "generation").exists() else "none")
        assert (target / "a person's own").exists() == is_replaced
        replace(target, "2")
        assert recovered_folder(target) == target
        assert generation(target) == "2"
        assert names(target) == (["a person's own"] if is_replaced else []) + ["generation"]
        assert names(target.parent) == ["artifact"], "litter"
        if is_done:
            break
    assert seen == sorted(seen, key=["none", "1", "2"].index)
    assert {*seen} == ({"1", "2"} if is_replaced else {"none", "2"})
    assert len(seen) > (15 if is_replaced else 5)


def test_a_kill_while_a_file_is_written_leaves_nothing_for_long(
    folder: Path, kills: ModuleType
) -> None:
    path = folder / "file.txt"
    left, seen = set(), ""
    for number in itertools.count():
        write_text(path, "1")
        if kills.killed_before(number, folder, lambda: write_text(path, "2")):
            break
        left |= {*names(folder)}
        seen += path.read_text()
        make_folder(folder)
        assert names(folder) == ["file.txt"]
        assert contents(folder) == ["file.txt"]
    assert len(left) > 1, "no kill left anything"
    assert seen == "".join(sorted(seen))
    assert {*seen} == {"1", "2"}


def test_what_somebody_is_writing_is_not_swept(folder: Path) -> None:
    with scratch_folder(folder) as scratch:

        def write(temporary: Path) -> None:
            temporary.write_text("x")
            make_folder(folder)
            with scratch_folder(folder):
                pass
            assert temporary.exists()

        write_with(folder / "file", write)
        assert names(folder) == [scratch.name, "file"]
        (scratch / "content").touch()
    assert names(folder) == ["file"]


@pytest.mark.parametrize(
    "name", [".synthcube-notes", ".hidden", "synthcube-abcdefgh", ".nv-12345678"]
)
def test_nothing_of_others_is_swept(folder: Path, name: str) -> None:
    (folder / name).touch()
    make_folder(folder)
    assert names(folder) == [name]


# -- inputs ------------------------------------------------------------------------------------


SEPARATE = {
    "the same": ("data", "data", "output_path .* is also data_path"),
    "below": ("data/run", "data", "output_path .* lies in data_path"),
    "above": (".", "data", "output_path .* holds data_path"),
    "a link": ("link", "data", "output_path .* is also data_path"),
    "below a link": ("link/run", "data", "output_path .* lies in data_path"),
    "an input by a link": ("data/run", "link", "output_path .* lies in data_path"),
    "up and down": ("data/../data", "data", "output_path .* is also data_path"),
    "a file in it": ("data", "data/list.csv", "output_path .* holds data_path"),
    "not there yet": ("new/run", "new", "output_path .* lies in data_path"),
}


def test_a_scratch_folder_that_another_command_sweeps_at_once_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_sweep(**options: Path | str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            sweep(folder)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with scratch_folder(folder) as scratch:
        assert scratch.is_dir()
        assert [str(scratch)] == made[1:]


@pytest.mark.parametrize("case", SEPARATE)
def test_an_output_is_no_input(folder: Path, case: str) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "list.csv").touch()
    (folder / "link").symlink_to("data")
    output, path, match = SEPARATE[case]
    with pytest.raises(OutputError, match=match):
        require_separate({"output_path": folder / output}, {"data_path": folder / path})


def test_all_outputs_that_are_inputs_are_named_and_others_pass(folder: Path) -> None:
    outputs = {"output_path": folder / "a", "report": folder / "b", "none": None}
    with pytest.raises(OutputError) as raised:
        require_separate(outputs, {"data_path": folder / "a", "labels": folder / "b", "t": None})
    assert len(raised.value.faults) == 2
    require_separate(outputs, {"data_path": folder / "ab", "labels": folder / "a.csv"})


def test_nothing_to_recover_is_the_target_itself(folder: Path) -> None:
    assert recovered_folder(folder / "never") == folder / "never"


# -- hashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256(folder: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = folder / "file"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == sha256(path)
