"""Every test: one thread, its own cache and home, no network, libraries' global state put back."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import locale
import logging
import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthcube import plugins
from synthcube.cli import main

torch.set_num_threads(1)  # the first backward pass takes 0.04 s instead of 2.8 s on two cores
# A training must not choose more either: processes that tests fork would wait for their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NO_TIME = "no time left"
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--begin-within", type=float, metavar="SECONDS",
        help="skip the slow tests that have not begun by then; see --order",
    )  # fmt: skip
    parser.addoption(
        "--gpu-tests-on", choices=["gpu", "cpu"], default="gpu",
        help="where the tests of tests/gpu compute; cpu: to try the tests themselves",
    )  # fmt: skip
    parser.addoption("--order", metavar="TEXT", help="run the tests in an order that TEXT decides")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if text := config.getoption("--order"):
        items.sort(key=lambda item: hashlib.sha256(f"{text} {item.nodeid}".encode()).digest())


_BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit_s = item.config.getoption("--begin-within")
    is_late = limit_s is not None and time.monotonic() - _BEGAN > limit_s
    if is_late and item.get_closest_marker("slow"):
        pytest.skip(f"{NO_TIME}: not begun within {limit_s:g} s")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if number := sum(NO_TIME in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"NOT CHECKED: {number} tests, for which no time was left")


def pytest_collection_finish() -> None:
    """Exempt the imported libraries from garbage collection, which costs 0.4 s each time.

    Forks then do not copy the memory of these libraries either.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("SYNTHCUBE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # commands set it for the processes that they start
    monkeypatch.delenv("PYTHONSAFEPATH")
    characters = locale.setlocale(locale.LC_CTYPE)
    with plugins.vouching():
        yield
    # Where a library has changed it, the next test would read text in another encoding.
    locale.setlocale(locale.LC_CTYPE, characters)
    for name in ("my_autoencoder", "my_transforms"):  # of examples/plugins, or a copy of them
        sys.modules.pop(name, None)
    log = logging.getLogger("synthcube")
    log.handlers.clear()
    log.propagate = True
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def mednist() -> Path:
    """Folder of real 64x64 pictures by class, where the machine has them."""
    folder = SHARED / "mednist"
    if not folder.is_dir():
        pytest.skip("the real images are not on this machine")
    return folder


@pytest.fixture(scope="session")
def volumes() -> Path:
    """Folder of real volumes, where the machine has them."""
    folder = SHARED / "volumes"
    if not folder.is_dir():
        pytest.skip("the real volumes are not on this machine")
    return folder


def _module(name: str) -> ModuleType:
    """Of this folder, which is on no path."""
    specification = importlib.util.spec_from_file_location(
        name, Path(__file__).with_name(f"{name}.py")
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def medperf_contract() -> ModuleType:
    """tests/medperf_contract.py: what MedPerf demands of a container_config.yaml."""
    return _module("medperf_contract")


@pytest.fixture(scope="session")
def forks() -> ModuleType:
    """tests/forks.py: commands and processes that need no start of Python."""
    return _module("forks")


@pytest.fixture(scope="session")
def federations() -> ModuleType:
    """tests/federations.py: federations of real processes, on any engine."""
    return _module("federations")


@pytest.fixture(scope="session")
def certificates() -> ModuleType:
    """tests/certificates.py: certificates of a study."""
    return _module("certificates")


@pytest.fixture(scope="session")
def kills() -> ModuleType:
    """tests/kills.py: processes that are killed before a change of the file system."""
    return _module("kills")


@pytest.fixture(scope="session")
def dicom() -> ModuleType:
    """tests/dicom_maker.py: DICOM files."""
    return _module("dicom_maker")


@pytest.fixture(scope="session")
def brats() -> ModuleType:
    """tests/brats_maker.py: cases of BraTS's challenges."""
    return _module("brats_maker")


@pytest.fixture(scope="session")
def gandlf_networks() -> ModuleType:
    """tests/test_import_gandlf.py: networks and checkpoints as GaNDLF-Synth has them."""
    return _module("test_import_gandlf")


TRAINING = """
training:
  max_epochs: 2
  batch_size: 4
  log_every_n_steps: 1
  sample_every_n_epochs: 1
  num_sample_images: 2
compute:
  accelerator: cpu
  precision: "32"
"""


@pytest.fixture
def phantoms(tmp_path: Path) -> Path:
    """Folder with a manifest of twelve 16x16 pictures."""
    from synthcube.data.phantom import write_phantoms

    return write_phantoms(tmp_path / "phantoms", num=12, size=(16, 16)).parent


@pytest.fixture
def tiny_config(tmp_path: Path, first_stage):
    """Writes the YAML of a training of two seconds, for a family."""
    from synthcube import reading
    from synthcube.models import registry

    def write(family: str = "rectified_flow", name: str = "tiny.yaml") -> Path:
        kind = registry.find(family)
        model = kind.tiny().model_dump(mode="json")
        if kind.needs:
            model = {**model, "first_stage": str(first_stage(kind.needs))}
        path = tmp_path / name
        path.write_text(reading.dump({"model": model}) + TRAINING, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory):
    """Trains a family once, on 16x16 pictures, for those whose first stage it is."""
    runs: dict[str, Path] = {}

    def trained(family: str) -> Path:
        from synthcube import reading
        from synthcube.data.phantom import write_phantoms
        from synthcube.models import registry
        from synthcube.tasks.train import train

        if family not in runs:
            folder = tmp_path_factory.mktemp(family)
            model = registry.find(family).tiny().model_dump(mode="json")
            (folder / "config.yaml").write_text(reading.dump({"model": model}) + TRAINING)
            data = write_phantoms(folder / "data", num=12, size=(16, 16)).parent
            train(folder / "config.yaml", data, folder / "run")
            runs[family] = folder / "run"
        return runs[family]

    return trained


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns its exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["synthcube", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
