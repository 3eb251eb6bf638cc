"""The tools, the images and the three tasks, for the tests marked `container`.

Environment: IMAGE and SIF name what `make image` and `make sif` have built, FLOWER_IMAGE an image
with Flower, CONTAINER the tool that built it. REQUIRE_TOOLS lists the tools, separated by commas,
whose absence is a failure: without it their tests are skipped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
model:
  name: rectified_flow
  channels: [8, 8]
  num_res_blocks: 1
  attention_from: 1
  num_sampling_steps: 2
training:
  max_epochs: 2
  batch_size: 4
  sample_every_n_epochs: 1
  num_sample_images: 2
compute:
  accelerator: cpu
  precision: "32"
"""
Launch = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.container)


def _need(name: str, is_there: bool, otherwise: str) -> None:
    if is_there:
        return
    if name in os.environ.get("REQUIRE_TOOLS", "").split(","):
        pytest.fail(f"{name} is required here: {otherwise}")
    pytest.skip(otherwise)


def _succeeds(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def need() -> Callable[[str, bool, str], None]:
    """Skips the test where a tool is missing, or fails it where the tool is required."""
    return _need


@pytest.fixture(scope="session")
def tool() -> str:
    """The tool that CONTAINER names; else docker where its daemon answers, else podman."""
    names = [os.environ["CONTAINER"]] if "CONTAINER" in os.environ else ["docker", "podman"]
    working = [name for name in names if _succeeds(name, "info")]
    _need("podman", bool(working), "neither docker nor podman works here")
    return working[0]


@pytest.fixture(scope="session")
def image(tool: str) -> str:
    name = os.environ.get("IMAGE", "synthcube:latest")
    _need("podman", _succeeds(tool, "image", "inspect", name), f"no image {name}: make image")
    return name


@pytest.fixture(scope="session")
def flower_image(tool: str) -> str:
    name = os.environ.get("FLOWER_IMAGE", "synthcube-flower:latest")
    build = f"no image {name}: {tool} build -t {name} --build-arg ENGINE=flower ."
    _need("flower", _succeeds(tool, "image", "inspect", name), build)
    return name


@pytest.fixture(scope="session")
def sif() -> Path:
    _need("singularity", _succeeds("singularity", "--version"), "singularity is not here")
    path = Path(os.environ.get("SIF", ROOT / "synthcube.sif"))
    _need("singularity", path.is_file(), f"no {path}: make sif")
    return path.absolute()


@pytest.fixture(scope="session")
def docker(tool: str, image: str) -> Launch:
    """Runs an image: docker(arguments, {host path: "inside[:ro]"}, flags, user, by, image)."""

    def run(
        arguments: Sequence[str],
        mounts: dict[Path, str],
        flags: Sequence[str] = ("--rm",),
        user: int | None = None,
        by: Sequence[str] = (),
        image: str = image,
    ) -> subprocess.CompletedProcess[str]:
        uid, gid = (user, user) if user is not None else (os.getuid(), os.getgid())
        own = ["--passwd=false"] if tool == "podman" else []  # podman would add the user to it
        if tool == "podman" and os.getuid():
            own.append("--userns=keep-id")
        volumes = [f"--volume={host}:{inside}" for host, inside in mounts.items()]
        entry = ["--entrypoint", by[0], image, *by[1:]] if by else [image]
        return subprocess.run(
            [tool, "run", f"--user={uid}:{gid}", *own, *flags, *volumes, *entry, *arguments],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def singularity(sif: Path) -> Launch:
    """Runs the SIF: singularity(arguments, {host path: "inside[:ro]"}, flags)."""

    def run(
        arguments: Sequence[str], mounts: dict[Path, str], flags: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        binds = [f"--bind={host}:{inside}" for host, inside in mounts.items()]
        return subprocess.run(
            ["singularity", "run", *flags, *binds, str(sif), *arguments],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with phantoms and the YAML of a training of two seconds; nobody may change it."""
    from synthcube.data.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("shared") / "inputs"
    write_phantoms(folder / "data", num=12, size=(16, 16))
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory, forks) -> dict[str, str]:
    """Hashes of the images that the plain command line of this machine makes."""
    out = tmp_path_factory.mktemp("host")
    home = {"HOME": str(out / "home"), "SYNTHCUBE_CACHE": str(out / "cache")}
    for arguments in _tasks(str(inputs), str(out)):
        done = forks.command(*arguments, **home)
        assert done.returncode == 0, done.stderr
    return _hashes(out / "images" / "images")


def _tasks(inputs: str, out: str, extra: Sequence[str] = ()) -> list[list[str]]:
    return [
        ["train", f"--parameters_file={inputs}/config.yaml", f"--data_path={inputs}/data",
         f"--output_path={out}/run", *extra],
        ["infer", f"--model_path={out}/run", f"--output_path={out}/images", "--num-images=3"],
        ["export", f"--model_path={out}/run", f"--output_path={out}/model"],
    ]  # fmt: skip


@pytest.fixture
def run_tasks(inputs: Path, expected: dict[str, str], tmp_path: Path):
    """Trains, infers and exports with `launch`, and checks what comes out; returns the logs."""

    def run(
        launch: Launch, *, read_only: bool = False, owner: int | None = None,
        extra: Sequence[str] = (), **options: object,
    ) -> str:  # fmt: skip
        out = tmp_path / "outputs"
        out.mkdir()
        if owner is not None:
            os.chown(out, owner, owner)
        before = _hashes(inputs)
        logs = []
        for arguments in _tasks("/in", "/out", extra):
            mounts = {inputs: "/in:ro" if read_only else "/in", out: "/out"}
            done = launch(arguments, mounts, **options)
            assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
            logs.append(done.stdout + done.stderr)
        assert _hashes(inputs) == before, "the inputs were changed"
        assert _hashes(out / "images" / "images") == expected, "other images than on the host"
        assert (out / "model" / "artifact.json").is_file()
        assert {path.name for path in out.iterdir()} == {"run", "images", "model"}
        uid = os.getuid() if owner is None else owner
        strangers = [path for path in out.rglob("*") if path.lstat().st_uid != uid]
        assert strangers == [], "not the caller's"
        return "\n".join(logs)

    return run


@pytest.fixture(scope="session")
def known() -> SimpleNamespace:
    """Functions that several tests share."""
    return SimpleNamespace(hashes=_hashes, tasks=_tasks)


@pytest.fixture(scope="session")
def mlcube(need, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs `mlcube run` in a folder; its own settings do not land in the home folder."""
    own = ROOT / ".venv-mlcube" / "bin" / "mlcube"
    program = str(own) if own.is_file() else shutil.which("mlcube")
    need("mlcube", bool(program), "no MLCube: make mlcube")
    settings = tmp_path_factory.mktemp("mlcube") / "settings.yaml"
    environment = {**os.environ, "MLCUBE_SYSTEM_SETTINGS": str(settings)}
    if os.getuid():
        environment["PODMAN_USERNS"] = "keep-id"

    def run(folder: Path, *words: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), "run", *map(str, words)], cwd=folder, env={**environment, **extra},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    return run


@pytest.fixture
def podman(tool: str, image: str) -> list[str]:
    """The last words for MLCube: which container tool there is; which image, if not the usual one.

    Without the `--`, MLCube takes an h in a -P word for -h, prints its help and does nothing.
    """
    other = [] if image == "synthcube:latest" else ["--", f"-Pdocker.image={image}"]
    return [f"-Pdocker.docker={tool}", *other]


@pytest.fixture
def hub() -> Iterator[Any]:
    """The Hub of tests/sharing, on loopback, which a container reaches with the host's network."""
    path = ROOT / "tests" / "sharing" / "conftest.py"
    specification = importlib.util.spec_from_file_location("loopback_hub", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["loopback_hub"] = module  # where its dataclasses look for their names
    specification.loader.exec_module(module)
    with module.serving() as state:
        yield state
    del sys.modules["loopback_hub"]
