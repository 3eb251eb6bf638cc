"""What a user has is never an output: each command refuses it, and leaves every byte as it was."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from synthcube import reading
from synthcube.data.phantom import write_phantoms
from synthcube.models import registry
from synthcube.storage import sha256
from synthcube.tasks import run_folder

LIGHT = {"extractor": {"name": "radiomic"}, "num_repeats": 2}
TRAINING = {"max_epochs": 1, "batch_size": 4, "sample_every_n_epochs": 1, "num_sample_images": 2}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a run, its export, images of it, and somebody's notes."""
    from synthcube.tasks.export import export
    from synthcube.tasks.infer import InferRequest, infer
    from synthcube.tasks.train import train

    root = tmp_path_factory.mktemp("ready")
    write_phantoms(root / "data", num=6, size=(8, 8))
    (root / "pictures" / "images").mkdir(parents=True)
    for path in (root / "data").glob("*.png"):
        shutil.copy(path, root / "pictures" / "images")
    model = registry.find("rectified_flow").tiny().model_dump(mode="json")
    compute = {"accelerator": "cpu", "precision": "32"}
    content = {"model": model, "training": TRAINING, "compute": compute, "evaluation": LIGHT}
    (root / "config.yaml").write_text(reading.dump(content))
    train(root / "config.yaml", root / "data", root / "run")
    export(root / "run", root / "shared")
    infer(InferRequest(root / "run", root / "drawn", num_images=6))
    (root / "thesis").mkdir()
    for name in (
        "results.yaml",
        "report.html",
        "report.md",
        "cases.csv",
        "config.yaml",
        "grid.png",
    ):
        (root / "thesis" / name).write_text("a person's own\n")
    (root / "link").symlink_to("pictures")
    return root


@pytest.fixture
def place(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that, in which commands run."""
    folder = tmp_path / "place"
    shutil.copytree(ready, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != run_folder.LOCK
    }


PREPARE = "medperf prepare --data_path {} --labels_path {} --output_path {} --output_labels_path {}"
IS, IN, HOLDS = "is also", "lies in", "holds"
REFUSED = {
    "raw data": (PREPARE.format("pictures", "data", "pictures", "out"), f"{IS} data_path"),
    "raw data by a link": (PREPARE.format("pictures", "data", "link", "out"), f"{IS} data_path"),
    "raw data below a link": (PREPARE.format("link", "data", "pictures", "out"), f"{IS} data_path"),
    "above the raw data": (
        PREPARE.format("pictures/images", "data", "pictures", "out"), f"{HOLDS} data_path",
    ),
    "in the raw data": (PREPARE.format("pictures", "data", "pictures/x", "o"), f"{IN} data_path"),
    "labels for the data": (PREPARE.format("data", "pictures", "pictures", "o"), "labels_path"),
    "labels for themselves": (PREPARE.format("data", "pictures", "o", "pictures"), "labels_path"),
    "images that a list names": (
        PREPARE.format("list.csv", "data", "pictures", "out"), "holds images that are read",
    ),
    "a folder like a prepared one": (
        PREPARE.format("data", "data", "pictures", "out"), "files other than prepared images",
    ),
    "the report in the data": (
        PREPARE.format("data", "data", "o", "p") + " --report_file data/manifest.csv",
        f"{IN} data_path",
    ),
    "a report of somebody": (
        PREPARE.format("data", "data", "o", "p") + " --report_file thesis/results.yaml",
        "did not write",
    ),
    "export to the artifact": ("export -m run -o run/artifact", f"{IN} model_path"),
    "export to another's artifact": ("export -m shared -o run/artifact", "no exported model"),
    "export over the run": ("export -m run/artifact -o run", f"{HOLDS} model_path"),
    "export onto itself": ("export -m shared -o shared", f"{IS} model_path"),
    "package over the model": ("package -m shared -o shared", f"{IS} model_path"),
    "package over images": ("package -m shared -o data", "not a package"),
    "train over a model": ("train -c config.yaml -d data -o shared", "is a trained model"),
    "train over images made": ("train -c config.yaml -d data -o drawn", "images that infer"),
    "train in its data": ("train -c config.yaml -d data -o data/run", f"{IN} data_path"),
    "train over its data": ("train -c config.yaml -d data -o data", f"{IS} data_path"),
    "train above its data": ("train -c config.yaml -d pictures/images -o pictures", HOLDS),
    "train over listed images": ("train -c config.yaml -d list.csv -o pictures", "that are read"),
    "train over a config": ("train -c config.yaml -d data -o thesis", r"no run.*\(config\.yaml\)"),
    "try over its data": ("train --debug -c config.yaml -d data -o data/run", f"{IN} data_path"),
    "train several in the data": (
        "train -c config.yaml -c other.yaml -d data -o data/runs", f"{IN} data_path",
    ),
    "train over its start": (
        "train -c config.yaml -d data -o shared/run --set training.start_from=shared",
        f"{IN} training.start_from",
    ),
    "infer over its data": ("infer -m run -d drawn -o drawn", f"{IS} data_path"),
    "infer in its model": ("infer -m shared -n 1 -o shared/images", f"{IN} model_path"),
    "infer over a model": ("infer -m run -n 1 -o shared", "is a trained model"),
    "infer over a picture": ("infer -m run -n 1 -o thesis", "already holds images"),
    "evaluate over notes": ("evaluate -p drawn -l data -o thesis/results.yaml", "did not write"),
    "evaluate over an image": ("evaluate -p drawn -l data -o data/manifest.csv", f"{IN} labels"),
    "evaluate in predictions": ("evaluate -p drawn -l data -o drawn/r.yaml", f"{IN} predictions"),
    "report over notes": (
        "evaluate -p drawn -l data -o results.yaml --report thesis",
        r"did not write.*\s- report\.html\s.*- cases\.csv",
    ),
    "report in the images": ("evaluate -p drawn -l data -o r.yaml --report data/report", IN),
    "import over its weights": (
        "import old/old.pt --family vqvae -c config.yaml -o old", f"{HOLDS} checkpoint",
    ),
    "medperf infer over data": (
        "medperf infer --data_path drawn --additional_files shared --output_path drawn",
        f"{IS} data_path",
    ),
    "medperf infer in its model": (
        "medperf infer --data_path data --additional_files shared --output_path shared/p",
        f"{IN} additional_files",
    ),
    "medperf evaluate over notes": (
        "medperf evaluate --predictions drawn --labels data --output_path thesis/results.yaml",
        "did not write",
    ),
    "medperf evaluate over data": (
        "medperf evaluate --predictions drawn --labels data --output_path r.yaml "
        "--local_outputs_path data",
        f"{IS} labels",
    ),
    "statistics over notes": (
        "medperf statistics --data_path data --labels_path data --output_path thesis/results.yaml",
        "did not write",
    ),
    "statistics over data": (
        "medperf statistics --data_path data --labels_path data --output_path data/manifest.csv",
        f"{IN} data_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_user_has_is_never_written_over(place: Path, cli, case: str) -> None:
    words, match = REFUSED[case]
    images = sorted((place / "pictures" / "images").iterdir())
    (place / "list.csv").write_text("\n".join(["Channel_0", *map(str, images)]))
    (place / "old").mkdir()
    (place / "old" / "old.pt").touch()
    shutil.copy(place / "config.yaml", place / "other.yaml")
    before = hashes(place)
    code, _, err = cli(*words.split())
    assert code == 2, err
    assert pytest.RaisesExc(BaseException, match=f"(?s){match}").matches(ValueError(err)), err
    assert {path: text for path, text in hashes(place).items() if path in before} == before


ALLOWED = (
    "train -c config.yaml -d data -o run --set training.max_epochs=2",
    "train -c run/config.yaml -d data -o run",
    "infer -m run -o drawn -n 6",
    "infer -m run -d data/manifest.csv -o d2 -n 2",
    "export -m run -o shared",
    "evaluate -p drawn -l data -o results.yaml --report thesis-report",
    "evaluate -p drawn/images -l data -o drawn/results.yaml",
    "prepare -d pictures -o pictures",
    PREPARE.format("data", "data", "site/data", "site/labels") + " --report_file site/report.yaml",
)


@pytest.mark.parametrize("words", [words for words in ALLOWED if "d2" not in words])
def test_what_is_ours_is_written_twice(place: Path, cli, words: str) -> None:
    for _ in range(2):
        code, _, err = cli(*words.split())
        assert code == 0, err


def test_what_lies_beside_an_export_stays(place: Path, cli) -> None:
    (place / "shared" / "LICENSE").write_text("mine")
    (place / "shared" / "openvino.network.bin").write_text("of an earlier runtime, not listed")
    assert cli("export", "-m", "run", "-o", "shared")[0] == 0
    assert (place / "shared" / "LICENSE").read_text() == "mine"
    assert cli("package", "-m", "run", "-o", "package")[0] == 0
    (place / "package" / "workspace" / "notes.txt").write_text("mine")
    assert cli("package", "-m", "shared", "-o", "package")[0] == 0
    assert (place / "package" / "workspace" / "notes.txt").read_text() == "mine"


def test_a_manifest_edited_by_hand_stays(place: Path, cli) -> None:
    words = ("prepare", "-d", "pictures", "-o", "pictures")
    manifest = place / "pictures" / "manifest.csv"
    assert cli(*words)[0] == 0
    first = manifest.read_text()
    code, out, _ = cli(*words, "--paradigm", "patient")
    assert code == 0
    assert "sha256" not in out, "not told of as a stray file"
    assert manifest.read_text() != first
    manifest.write_text(first.replace("images", "Anna", 1))
    edited = manifest.read_text()
    code, _, err = cli(*words)
    assert code == 2
    assert f"output_path {manifest} was edited" in err
    assert manifest.read_text() == edited


def test_a_manifest_of_somebody_else_stays_but_the_same_is_no_fault(place: Path, cli) -> None:
    manifest = place / "pictures" / "manifest.csv"
    manifest.write_text("Channel_0\nimages/phantom-00000.png\n")
    code, _, err = cli("prepare", "-d", "pictures", "-o", "pictures")
    assert code == 2
    assert "was not written by synthcube prepare" in err
    manifest.unlink()
    assert cli("prepare", "-d", "pictures", "-o", "pictures")[0] == 0
    (place / "pictures" / ".manifest.csv.sha256").unlink()
    assert cli("prepare", "-d", "pictures", "-o", "pictures")[0] == 0


# -- two trainings -----------------------------------------------------------------------------


@pytest.fixture
def trained_elsewhere(place: Path, kills: ModuleType) -> Iterator[int]:
    """Another process that holds the run folder; its number."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with run_folder.locked(place / "run"):
                os.write(writer, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x", "the other process did not get the lock"
    os.close(reader)
    yield child
    os.kill(child, 9)
    os.waitpid(child, 0)


AGAIN = ("train", "-c", "config.yaml", "-d", "data", "-o", "run", "--set", "training.max_epochs=2")


def test_a_second_training_is_refused_until_the_first_is_dead(
    place: Path, cli, trained_elsewhere: int
) -> None:
    before = hashes(place / "run")
    code, _, err = cli(*AGAIN)
    assert code == 2
    assert f"is being trained by another process (host {os.uname().nodename}, pid " in err
    assert str(trained_elsewhere) in err
    assert hashes(place / "run") == before
    os.kill(trained_elsewhere, 9)
    while os.waitid(os.P_PID, trained_elsewhere, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert cli(*AGAIN)[0] == 0


def test_where_nothing_can_be_locked_a_training_goes_on(
    place: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", failing)
    code, _, err = cli(*AGAIN)
    assert code == 0
    assert "cannot be locked against a second training: No locks available" in err


def test_processes_that_outlive_a_training_do_not_hold_its_folder(place: Path) -> None:
    with run_folder.locked(place / "run"):
        child = os.fork()
        if not child:
            try:
                signal.pause()
            finally:
                os._exit(1)
    try:
        taker = os.fork()
        if not taker:
            code = 1
            try:
                with run_folder.locked(place / "run"):
                    code = 0
            finally:
                os._exit(code)
        assert os.waitpid(taker, 0)[1] == 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_results_begin_with_their_mark(place: Path, cli) -> None:
    """By which evaluate knows them for its own, also those that a kill has cut short."""
    assert cli("evaluate", "-p", "drawn", "-l", "data", "-o", "r.yaml", "-c", "config.yaml")[0] == 0
    text = (place / "r.yaml").read_text()
    assert next(iter(yaml.safe_load(text))) == "synthcube_evaluation"
    for cut in (0, 5, 40):
        (place / "r.yaml").write_text(text[:cut])
        words = ("evaluate", "-p", "drawn", "-l", "data", "-o", "r.yaml", "-c", "config.yaml")
        assert cli(*words)[0] == 0
        assert (place / "r.yaml").read_text() == text
