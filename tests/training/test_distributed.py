"""Two processes, and two nodes, that train together (gloo), against one process."""

from __future__ import annotations

import csv
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
from synthcube.data.batches import EpochBatches
from synthcube.models import registry

SCRIPT = Path(__file__).parents[1] / "each_rank.py"
LIMIT_S = 240
TWO = "compute.num_devices=2"


def launched(config: Path, data: Path, run: Path, *overrides: str) -> None:
    """Train with two processes, of which Lightning starts the second."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, (config, data, run)), TWO, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["validation/loss"]) for row in csv.DictReader(file)
                if row["validation/loss"]]  # fmt: skip


@pytest.mark.parametrize("family", registry.names())
def test_two_processes_end_with_the_same_weights_to_the_bit(
    family: str, tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    run = tmp_path / "run"
    log = forks.script_together(SCRIPT, tiny_config(family), phantoms, run, TWO)
    first, second = (load_file(tmp_path / "run" / f"rank_{i}.safetensors") for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    artifact = load_file(tmp_path / "run" / "artifact" / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in artifact.values())
    assert log.count("epoch 1/2  step") == 2, "one process speaks"


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    """A family without noise: the same global batches give the same weights but for rounding."""
    config = tiny_config("vqvae")
    same = ("model.revive_below=0", "training.max_epochs=3")
    launched(config, phantoms, tmp_path / "two", *same)
    forks.script_together(SCRIPT, config, phantoms, tmp_path / "one", *same, processes=1)
    one, two = (load_file(tmp_path / name / "rank_0.safetensors") for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-5, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_killed_training_of_two_goes_on(
    tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    config = tiny_config("rectified_flow")

    def train(name: str, num_epochs: int) -> str:
        return forks.script_together(
            SCRIPT, config, phantoms, tmp_path / name, TWO, f"training.max_epochs={num_epochs}",
            "model.scheduler=null",
        )  # fmt: skip

    train("straight", 3)
    train("resumed", 2)
    assert train("resumed", 3).count("Continuing after epoch 2") == 1
    straight, resumed = (
        load_file(tmp_path / name / "rank_1.safetensors") for name in ("straight", "resumed")
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.slow
def test_a_bad_loss_in_one_process_is_said_once_with_its_files(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(tiny_config()), "-d", str(phantoms),
         "-o", str(tmp_path / "run"), "--set", "compute.num_devices=2",
         "--set", "model.optimizer.lr=1e4", "--set", "training.gradient_clip_norm=null",
         "--set", "training.max_epochs=20", "--set", "model.scheduler=null"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count(" became ") == 1
    assert "Traceback" not in ended.stderr
    assert str(phantoms) in ended.stderr


def test_a_batch_that_processes_cannot_share_is_refused(
    cli, tiny_config, phantoms, tmp_path
) -> None:
    code, _, text = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run",
        "--set", "compute.num_devices=3",
    )  # fmt: skip
    assert code == 2
    assert "training.batch_size is 4, which 3 processes" in text
    assert "use 3 or 6" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 10, 13])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_each_batch_without_gap_or_overlap(rows: int, shuffle: bool) -> None:
    alone = list(EpochBatches(range(rows), 4, 7, shuffle=shuffle))
    shares = [list(EpochBatches(range(rows), 4, 7, (rank, 2), shuffle=shuffle)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    seen = sorted(row for share in shares for batch in share for _, row in batch)
    if shuffle:
        assert len(set(seen)) == len(seen)
        assert all(len(a) == len(b) for a, b in zip(*shares, strict=True))
        if rows >= 4:
            assert seen == sorted(row for batch in alone for _, row in batch)
    else:
        assert seen == list(range(rows)), "every image is validated once"


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


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
