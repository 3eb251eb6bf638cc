from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthcube.data import cache as digests
from synthcube.data.cache import Float32Rows, ImageCache, append_rows, cache_key, open_cache
from synthcube.data.preprocessing import Prepared
from synthcube.errors import ImageError, OutputError

KEYS = [letter * 32 for letter in "abcdef"]
SHAPE = (1, 16, 16)  # 1024 bytes in float32
PLENTY = 1e9

SCRIPT = """
import os, resource, sys
from pathlib import Path
import numpy as np
import torch
from synthcube.data.cache import open_cache
from synthcube.data.preprocessing import Prepared
from synthcube.errors import OutputError
root = Path(sys.argv[1])
def images(num, shape=(1, 16, 16)):
    for i in range(num):
        yield Prepared(torch.full(shape, float(i)), np.eye(4), ((0.0, 1.0),))
"""


def images(num: int, first: float = 0) -> Iterator[Prepared]:
    for i in range(num):
        affine = np.diag([1.5, 2, 1 / 3, 1])
        affine[0, 3] = i
        values = torch.arange(256, dtype=torch.float32).reshape(SHAPE) + first + 1000 * i
        yield Prepared(values, affine, ((0.1 * i, 100.0),))


def made(root: Path, key: str = KEYS[0], num: int = 3, limit: float = PLENTY) -> ImageCache:
    return open_cache(root, key, num, lambda: images(num), limit)


def never() -> Iterator[Prepared]:
    raise AssertionError("the images were prepared again")


def visible(root: Path) -> list[str]:
    """Folders below the cache's root, unfinished ones included."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def python(code: str, *arguments: object, prefix: list[str] | None = None) -> Any:
    command = [*(prefix or []), sys.executable, "-c", SCRIPT + code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(code: str, *arguments: object, prefix: list[str] | None = None) -> str:
    process = python(code, *arguments, prefix=prefix)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return str(out)


# -- what is kept ------------------------------------------------------------------------------


def test_images_are_kept_as_they_were_prepared(tmp_path: Path) -> None:
    cache = made(tmp_path / "new" / "root")
    assert len(cache) == 3
    assert cache.shape == (3, *SHAPE)
    wanted = list(images(3))
    batch = cache.read([2, 0])
    assert batch.dtype == np.float32
    assert batch.shape == (2, *SHAPE)
    for image, row in zip(batch, (2, 0), strict=True):
        np.testing.assert_array_equal(image, wanted[row].tensor.numpy())
    for row, item in enumerate(wanted):
        np.testing.assert_array_equal(cache.affines[row], item.affine)
        np.testing.assert_array_equal(cache.intensity_ranges[row], item.intensity_range)


def test_a_second_open_prepares_nothing(tmp_path: Path) -> None:
    first = made(tmp_path).read(range(3))
    again = open_cache(tmp_path, KEYS[0], 3, never, PLENTY)
    np.testing.assert_array_equal(again.read(range(3)), first)


def test_read_returns_copies(tmp_path: Path) -> None:
    cache = made(tmp_path)
    batch = cache.read([0])
    batch[:] = -7
    np.testing.assert_array_equal(cache.read([0])[0], next(images(1)).tensor.numpy())
    np.testing.assert_array_equal(made(tmp_path).read([0]), cache.read([0]))


def test_a_cache_reaches_a_loader_process_that_was_not_forked(tmp_path: Path) -> None:
    cache = made(tmp_path)
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.read([1, 2]), cache.read([1, 2]))


# -- the key -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[list[Path]]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / name for name in ("a.png", "b.png", "c.png")]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    return [[path] for path in paths]


def later(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_key_depends_on_content_settings_and_order(files: list[list[Path]], tmp_path: Path) -> None:
    root = tmp_path / "root"
    settings = {"size": [4, 4], "fit": "resize"}
    key = cache_key(files, settings, root)
    assert len(key) == 32
    assert cache_key(files, dict(reversed(settings.items())), root) == key
    others = [
        cache_key(files[::-1], settings, root),
        cache_key(files[:2], settings, root),
        cache_key([[*files[0], *files[1]], files[2]], settings, root),
        cache_key(files, settings | {"size": [4, 5]}, root),
    ]
    assert len({key, *others}) == 5


def test_key_follows_content_not_time_or_name(files: list[list[Path]], tmp_path: Path) -> None:
    root = tmp_path / "root"
    key = cache_key(files, {}, root)
    later(files[0][0])
    assert cache_key(files, {}, root) == key
    moved = files[1][0].with_name("moved.png")
    shutil.copyfile(files[1][0], moved)
    assert cache_key([files[0], [moved], files[2]], {}, root) == key
    before = files[0][0].stat()
    files[0][0].write_bytes(b"x" * before.st_size)
    os.utime(files[0][0], ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert files[0][0].stat().st_size == before.st_size
    assert cache_key(files, {}, root) != key
    assert cache_key(files, {}, tmp_path / "fresh root") == cache_key(files, {}, root)


def test_unchanged_files_are_not_read_again(
    files: list[list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    key = cache_key(files, {}, root)
    read: list[Path] = []
    monkeypatch.setattr(digests, "_digest", read.append)
    assert cache_key(files, {}, root) == key
    assert not read


@pytest.mark.parametrize("replaced", [True, False], ids=["another file", "in its place"])
def test_a_file_of_equal_size_and_time_is_read_anew(
    replaced: bool, files: list[list[Path]], tmp_path: Path
) -> None:
    """As `cp --preserve` or `rsync --times` leave it; nobody can set the time of the change."""
    root = tmp_path / "root"
    key = cache_key(files, {}, root)
    path = files[0][0]
    stat = path.stat()
    time.sleep(0.02)  # the clock of a file system ticks slowly
    other = tmp_path / "other.png" if replaced else path
    other.write_bytes(b"y" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert cache_key(files, {}, root) != key


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", "", "7"])
def test_a_broken_memo_is_made_again(files: list[list[Path]], tmp_path: Path, text: str) -> None:
    key = cache_key(files, {}, tmp_path)
    (tmp_path / "digests.json").write_text(text)
    assert cache_key(files, {}, tmp_path) == key
    assert len(json.loads((tmp_path / "digests.json").read_text())) == 3


def test_a_file_that_vanished_gets_no_kept_key(files: list[list[Path]], tmp_path: Path) -> None:
    files[1][0].unlink()
    assert cache_key(files, {}, tmp_path / "r") != cache_key(files, {}, tmp_path / "r")


# -- damage ------------------------------------------------------------------------------------


def flipped_byte(folder: Path) -> None:
    path = folder / "images.f32"
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 0x10
    path.write_bytes(raw)


def other_index(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / "index.json").read_text()
        changed = change(text)
        assert changed != text
        (folder / "index.json").write_text(changed)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte": flipped_byte,
    "cut short": lambda folder: os.truncate(folder / "images.f32", 1024),
    "too long": lambda folder: os.truncate(folder / "images.f32", 4096),
    "empty": lambda folder: os.truncate(folder / "images.f32", 0),
    "no images": lambda folder: (folder / "images.f32").unlink(),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "cut index": other_index(lambda text: text[:40]),
    "other affine": other_index(lambda text: text.replace("1.5", "1.6", 1)),
    "other range": other_index(lambda text: text.replace("100.0", "900.0", 1)),
    "no shape": other_index(lambda text: text.replace('"shapes"', '"form"')),
    "no object": other_index(lambda _: "[]"),
    "no text": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_made_again_and_says_so(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path)
    damage(tmp_path / KEYS[0])
    with caplog.at_level(logging.WARNING, "synthcube"):
        cache = open_cache(tmp_path, KEYS[0], 3, lambda: images(3, first=0.5), PLENTY)
    assert caplog.messages == [f"The cache {tmp_path / KEYS[0]} is damaged and is built again."]
    for row, item in enumerate(images(3, first=0.5)):
        np.testing.assert_array_equal(cache.read([row])[0], item.tensor.numpy())
        np.testing.assert_array_equal(cache.affines[row], item.affine)
    caplog.clear()
    open_cache(tmp_path, KEYS[0], 3, never, PLENTY)
    assert not caplog.messages


def test_an_exception_while_preparing_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Prepared]:
        yield from images(2)
        raise ImageError("the third is damaged")

    with pytest.raises(ImageError, match=r"^the third is damaged$"):
        open_cache(tmp_path, KEYS[0], 3, failing, PLENTY)
    assert visible(tmp_path) == []
    assert len(made(tmp_path)) == 3


@pytest.mark.slow
def test_a_kill_while_preparing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = """
def killed():
    yield from images(2)
    os.kill(os.getpid(), 9)
open_cache(root, sys.argv[2], 3, killed, 1e9)
"""
    for key in KEYS[:2]:
        process = python(code, tmp_path, key)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    left = visible(tmp_path)
    assert len(left) == 2
    assert all(name.startswith(".building-") for name in left)
    cache = made(tmp_path)
    np.testing.assert_array_equal(cache.read([2])[0], list(images(3))[2].tensor.numpy())
    assert visible(tmp_path) == [KEYS[0]]  # the killed build of the other one is gone, too


# -- several processes -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_at_once_build_it_once_and_agree(tmp_path: Path) -> None:
    code = """
import time
def slow():
    with (root / "builds.log").open("a") as log:
        log.write("built\\n")
    for image in images(5):
        time.sleep(0.05)
        yield image
(root / f"ready-{sys.argv[3]}").touch()
while len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.01)
cache = open_cache(root, sys.argv[2], 5, slow, 1e9)
print(cache.read(range(5)).sum())
"""
    processes = [python(code, tmp_path, KEYS[0], number) for number in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert (tmp_path / "builds.log").read_text() == "built\n"
    assert results[0][0] == results[1][0] == f"{float(256 * 10)}\n"


# -- room --------------------------------------------------------------------------------------


def test_what_exceeds_the_limit_is_refused_with_numbers(tmp_path: Path) -> None:
    message = (
        r"^The preprocessed images take 4\.10 GB, data\.cache_gb allows 2\.5: "
        r"raise it, or lower data\.size\.$"
    )
    with pytest.raises(OutputError, match=message):
        open_cache(tmp_path, KEYS[0], 4_000_000, lambda: images(3), 2.5e9)
    assert visible(tmp_path) == []


def test_what_exceeds_the_disk_is_refused_with_numbers(tmp_path: Path) -> None:
    message = (
        rf"take 10240000000\.00 GB, {tmp_path} has \d+\.\d\d GB free: make room, "
        "or name another folder in the variable SYNTHCUBE_CACHE"
    )
    with pytest.raises(OutputError, match=message):
        open_cache(tmp_path, KEYS[0], 10**16, lambda: images(3), 1e30)
    assert visible(tmp_path) == []


def aged(root: Path, *keys: str) -> None:
    """Least recently used first."""
    for age, key in enumerate(keys):
        os.utime(root / key, (1e9 + age, 1e9 + age))


def test_the_least_recently_used_caches_go_first(tmp_path: Path) -> None:
    for key in KEYS[:4]:
        made(tmp_path, key)
    aged(tmp_path, *KEYS[:4])
    size = sum(file.stat().st_size for file in (tmp_path / KEYS[0]).iterdir())
    made(tmp_path, KEYS[0])  # used again
    made(tmp_path, KEYS[4], limit=3 * size + 100)
    assert visible(tmp_path) == [KEYS[0], KEYS[3], KEYS[4]]
    open_cache(tmp_path, KEYS[0], 3, never, PLENTY)


def test_the_new_cache_stays_at_the_very_limit(tmp_path: Path) -> None:
    """The index beside the images is not held against it."""
    made(tmp_path, KEYS[1])
    cache = made(tmp_path, KEYS[0], limit=3 * 1024)
    assert visible(tmp_path) == [KEYS[0]]
    assert len(cache) == 3


def test_a_cache_that_is_open_elsewhere_is_not_pruned(tmp_path: Path) -> None:
    open_one = made(tmp_path, KEYS[0])
    made(tmp_path, KEYS[1])
    made(tmp_path, KEYS[2], limit=3 * 1024)
    assert visible(tmp_path) == [KEYS[0], KEYS[2]]
    assert float(open_one.read([1])[0, 0, 0, 0]) == 1000
    del open_one
    made(tmp_path, KEYS[3], limit=3 * 1024)
    assert visible(tmp_path) == [KEYS[3]]


def test_pruning_leaves_alone_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("thesis", ".building-site", "abc", "G" * 32):
        (tmp_path / name).mkdir()
        (tmp_path / name / "only_copy.txt").write_text("years of work")
    made(tmp_path, KEYS[0], limit=3 * 1024)
    assert visible(tmp_path) == sorted([KEYS[0], "thesis", ".building-site", "abc", "G" * 32])


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(OutputError, match=f"Cannot write to {file}: it is a file, a folder"):
        made(file)
    with pytest.raises(OutputError, match=f"Cannot write {file / 'below'}: Not a directory"):
        made(file / "below")
    with pytest.raises(OutputError, match=f"Cannot write {file / 'below'}: Not a directory"):
        cache_key([[file]], {}, file / "below")
    assert file.read_text() == "in the way"


FULL_DISK = """
open_cache(root, "a" * 32, 3, lambda: images(3), 1e9)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:  # more images than were announced: the first check cannot foresee it
    open_cache(root, "b" * 32, 1, lambda: images(5000, (1, 64, 64)), 1e9)
except OutputError as error:
    print(error)
def never():
    raise AssertionError("prepared again")
kept = open_cache(root, "a" * 32, 3, never, 1e9)
print(kept.read([2]).mean(), sorted(p.name for p in root.iterdir() if p.is_dir()))
try:
    open_cache(root, "b" * 32, 5000, lambda: images(5000, (1, 64, 64)), 1e9)
except OutputError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_takes_nothing_else_with_it(tmp_path: Path) -> None:
    unshare = ["unshare", "-rm", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=8m tmpfs "$0"'
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, mount, tmp_path], capture_output=True, check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    prefix = [*unshare, f'root="$0"; {mount} && exec "$@"', str(tmp_path)]
    first, kept, second = output(FULL_DISK, tmp_path, prefix=prefix).splitlines()
    folder = tmp_path / KEYS[1]
    unchanged = "What was there before is unchanged."
    assert first == f"Cannot write {folder}: the disk is full. {unchanged}"
    assert kept == f"2.0 ['{KEYS[0]}']"
    assert second.startswith(
        f"The preprocessed images take 0.08 GB, {tmp_path} has 0.01 GB free: make room"
    )


def test_a_file_size_limit_is_named(tmp_path: Path) -> None:
    first, kept, second = output(FULL_DISK, tmp_path, "limited").splitlines()
    assert first.startswith(f"Cannot write {tmp_path / KEYS[1]}: File too large.")
    assert second == first
    assert kept == f"2.0 ['{KEYS[0]}']"


# -- memory ------------------------------------------------------------------------------------


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    code = """
def mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cache = open_cache(root, "a" * 32, 300, lambda: images(300, (1, 512, 512)), 1e9)
before = mebibytes()
total = sum(float(cache.read(range(i, i + 10)).mean()) for i in range(0, 300, 10))
print(total, mebibytes() - before)
"""
    total, growth = map(float, output(code, tmp_path).split())
    assert total == pytest.approx(sum(range(300)) / 10)
    assert growth < 150


def test_rows_are_read_in_the_order_that_is_wanted(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    path = tmp_path / "rows.f32"
    with append_rows(path) as append:
        for start in (0, 2, 4):
            append(values[start : start + 2])
    rows = Float32Rows(path, (2, 3))
    assert np.array_equal(rows.read([4, 0, 4]), values[[4, 0, 4]])
    assert np.array_equal(rows.mapped, values)
    assert rows.read([]).shape == (0, 2, 3)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "nowhere" / "rows.f32"
    with pytest.raises(OutputError, match=r"Cannot write .*rows\.f32"), append_rows(path):
        pass
