"""Batch norms over processes, and two nodes: what is learned does not depend on who computes it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube import environment as runtime
from synthcube import reading

SCRIPT = Path(__file__).parents[1] / "each_rank.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT_S = 240


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(*nodes: subprocess.Popen[str]) -> None:
    try:
        for node in nodes:
            said, _ = node.communicate(timeout=LIMIT_S)
            assert node.returncode == 0, said
    finally:
        for node in nodes:
            node.kill()


def ranks(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / f"rank_{rank}.safetensors") for rank in (0, 1)]


def test_batch_norms_of_two_processes_are_those_of_one(
    phantoms: Path, tmp_path: Path, tiny_config, forks
) -> None:
    config = reading.dump({"model": {"name": "normed_family:NormedConfig"}})
    path = tiny_config()
    path.write_text(config + "\ntraining:" + path.read_text().partition("\ntraining:")[2])
    for name, devices in (("one", 1), ("two", 2)):
        forks.script_together(
            SCRIPT, path, phantoms, tmp_path / name, f"compute.num_devices={devices}",
            "training.max_epochs=3", processes=devices,
        )  # fmt: skip
    alone = load_file(tmp_path / "one" / "rank_0.safetensors")
    assert alone["network.1.running_mean"].abs().sum() > 0
    for together in ranks(tmp_path / "two"):
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_ranks_without_a_launcher() -> None:
    assert runtime.process_rank(4, {}) == 0
    assert runtime.process_rank(4, {"LOCAL_RANK": "3"}) == 3
    assert runtime.process_rank(4, {"NODE_RANK": "1", "LOCAL_RANK": "2"}) == 6
    assert runtime.process_rank(4, {"RANK": "5", "NODE_RANK": "0", "LOCAL_RANK": "1"}) == 5


@pytest.fixture
def two_networks() -> Iterator[tuple[list[str], list[str]]]:
    """Command prefixes that run on either end of a cable between two network namespaces."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip")
    names = [f"synthcube{os.getpid() % 10000}{end}" for end in "ab"]
    cable = [f"sc{os.getpid() % 10000}{end}" for end in "ab"]
    steps = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]],
    ]
    for index, (name, end) in enumerate(zip(names, cable, strict=True)):
        inside = ["ip", "-n", name]
        steps += [
            ["ip", "link", "set", end, "netns", name],
            [*inside, "addr", "add", f"10.231.7.{index + 1}/24", "dev", end],
            [*inside, "link", "set", end, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield tuple(
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, cable, strict=True)
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def train_on_nodes(
    prefixes: tuple[list[str], list[str]], address: str, config: Path, data: Path, run: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, str(SCRIPT), *map(str, (config, data, run)),
             "compute.num_nodes=2", "compute.num_devices=1"]  # fmt: skip
    finish(*(
        start([*prefix, *words], NODE_RANK=str(node), MASTER_ADDR=address, MASTER_PORT=port)
        for node, prefix in enumerate(prefixes)
    ))  # fmt: skip


@pytest.mark.slow
def test_two_nodes_end_with_the_same_weights(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    """Two commands on one machine, each of which takes itself for a node."""
    run = tmp_path / "run"
    train_on_nodes(([], []), "127.0.0.1", tiny_config("ddpm"), phantoms, run)
    first, second = ranks(run)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (run / "artifact" / "artifact.json").exists()


@pytest.mark.slow
def test_two_networks_end_with_the_same_weights(
    two_networks, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Nodes that reach each other over a cable, and by no other way."""
    run = tmp_path / "run"
    train_on_nodes(two_networks, "10.231.7.1", tiny_config("ddpm"), phantoms, run)
    first, second = ranks(run)
    assert all(torch.equal(first[name], second[name]) for name in first)
