"""Inference by several real processes: the same images as one makes, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthcube.storage import sha256
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train


def digests(folder: Path) -> dict[str, str]:
    """Every file but the record, which names its folder's request."""
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*")
            if p.is_file() and p.name != "provenance.json"}  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text("compute: {num_devices: 2}\n")
    return path


@pytest.fixture
def launched(forks):
    """What each of two processes wrote on standard error, started as torchrun starts them."""

    def run(words: list[object], codes: tuple[int, int]) -> list[str]:
        ended = forks.commands_together(["infer", *words])
        assert tuple(fork.returncode for fork in ended) == codes, ended
        return [fork.stderr for fork in ended]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "family"),
    [("generate", "ddpm"), ("translate", "rectified_flow"), ("reconstruct", "vqvae")],
)
def test_processes_make_what_one_makes(
    task: str, family: str, tiny_config, phantoms: Path, tmp_path: Path, two: Path, launched
) -> None:
    data, overrides = phantoms, ["training.max_epochs=1"]
    if task == "translate":
        from synthcube.data.phantom import write_phantoms

        data = write_phantoms(tmp_path / "pairs", num=7, size=(16, 16), channels=2).parent
        overrides.append("data.source_channels=[0]")
    run = tmp_path / "run"
    train(tiny_config(family), data, run, overrides=overrides)
    request = {"num_images": 7} if task == "generate" else {"data": data}
    infer(InferRequest(run, tmp_path / "one", batch_size=2, **request))
    infer(InferRequest(run, tmp_path / "pool", batch_size=2, config=two, **request))
    expected = digests(tmp_path / "one")
    assert len(expected) == 2 + (12 if task == "reconstruct" else 7)
    assert digests(tmp_path / "pool") == expected
    words = [["-n", "7"], ["-d", data]][task != "generate"]
    launched(
        ["-m", run, "-o", tmp_path / "ranks", "-c", two, "--batch_size", 2, *words], (0, 0)
    )  # fmt: skip
    assert digests(tmp_path / "ranks") == expected
    for name in ("one", "pool", "ranks"):
        record = json.loads((tmp_path / name / "provenance.json").read_text())
        assert record["complete"]
        assert record["request"]["task"] == task


@pytest.fixture
def trained(tiny_config, phantoms: Path, tmp_path: Path) -> Path:
    train(tiny_config(), phantoms, tmp_path / "run", overrides=["training.max_epochs=1"])
    return tmp_path / "run"


@pytest.mark.slow
def test_the_folder_is_taken_once_and_again_for_the_same(
    trained: Path, cli, tmp_path: Path, two: Path, launched
) -> None:
    out = tmp_path / "images"
    words = ["infer", "-m", trained, "-o", out, "-c", two, "--batch_size", 2]
    assert cli(*words, "-n", 4)[0] == 0
    before = digests(out)
    assert cli(*words, "-n", 4)[0] == 0
    assert digests(out) == before
    code, _, err = cli(*words, "-n", 5)
    assert code == 2
    assert "holds other images" in err
    first, second = launched([*words[1:], "-n", 5], (2, 2))
    assert first.count("holds other images") == 1
    assert "holds other images" not in second
    assert digests(out) == before


@pytest.mark.slow
def test_a_failure_in_one_process_fails_all_and_is_said_once(
    trained: Path, cli, tmp_path: Path, two: Path, launched
) -> None:
    """The second of two batches cannot be written: a folder is where its image belongs."""
    for name in ("pool", "ranks"):
        (tmp_path / name / "images" / "00003.png").mkdir(parents=True)
        (tmp_path / name / "images" / "00003.png" / "mine").touch()
    words = ["-m", trained, "-c", two, "--batch_size", 2, "-n", 4]
    infer(InferRequest(trained, tmp_path / "done", num_images=4, batch_size=2))
    record = json.loads((tmp_path / "done" / "provenance.json").read_text())
    for name in ("pool", "ranks"):
        # the record of an inference that was killed, so that the folder may be taken
        (tmp_path / name / "provenance.json").write_text(json.dumps(record | {"complete": False}))
    code, _, err = cli("infer", *words, "-o", tmp_path / "pool")
    assert code == 2, err
    assert err.count("00003.png") == 1
    first, second = launched([*words, "-o", tmp_path / "ranks"], (2, 2))
    assert first.count("00003.png") == 1
    assert "00003.png" not in second
    for name in ("pool", "ranks"):
        assert not (tmp_path / name / "manifest.csv").exists()
        record = json.loads((tmp_path / name / "provenance.json").read_text())
        assert record["complete"] is False
