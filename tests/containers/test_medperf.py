"""MedPerf's three containers, run as its client runs them, and by MLCube with the same files.

The client itself is in no package index; what it does is in its sources, and here.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PREPARATOR, EVALUATOR = ROOT / "mlcube" / "preparator", ROOT / "mlcube" / "evaluator"
SCRIPT = ROOT / "mlcube" / "script"
STRANGER = 12345
EVALUATION = {"evaluation": {"extractor": {"name": "radiomic"}, "num_repeats": 2}}

Paths = Mapping[str, Path]
Run = Callable[[list[tuple[str, Path, str]], dict[str, Any], Path], list[str]]


@dataclass(frozen=True)
class Client:
    """One of the platforms of MedPerf's client."""

    command: Run
    """The words that run a container: from mounts (mode, host, inside), run_args and a /tmp."""
    owner: int

    def run(self, cube: Path, task: str, inputs: Paths, outputs: Paths, **extra: Path) -> str:
        """Run a task of the container_config.yaml in `cube`, as the client does; returns its log.

        Args:
            inputs: host paths of the inputs, by volume name; `extra` are parameters_file and
                additional_files, which every task may declare.
            outputs: host paths of the outputs; a file is made empty before, a folder is made.
        """
        config = yaml.safe_load((cube / "container_config.yaml").read_text(encoding="utf-8"))
        section = config["tasks"][task]
        supplied = {**inputs, **extra}
        mounts = []
        for name, volume in section["input_volumes"].items():
            path = supplied[name]  # an unknown name is a KeyError in the client as well
            assert path.exists(), f"input volume {name} should exist"
            mounts.append(("ro", path, volume["mount_path"]))
        for name, volume in section["output_volumes"].items():
            path = outputs[name]
            if volume["type"] == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
            else:
                path.mkdir(parents=True, exist_ok=True)
            os.chown(path, self.owner, self.owner)
            mounts.append(("rw", path, volume["mount_path"]))
        before = {path: hashes(path) for path in supplied.values()}
        temporary = next(iter({**outputs, **inputs}.values())).parent / f"tmp-{task}"
        temporary.mkdir()
        os.chown(temporary, self.owner, self.owner)
        words = self.command(mounts, section["run_args"], temporary)
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        shutil.rmtree(temporary)
        assert {path: hashes(path) for path in before} == before, "an input was changed"
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def hashes(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }


def dataset_uid(*folders: Path) -> str:
    """MedPerf's: of the files' contents, whatever their names."""
    digests = sorted(digest for folder in folders for digest in hashes(folder).values())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@pytest.fixture
def docker_client(tool: str, image: str) -> Client:
    owner = os.getuid() or STRANGER
    group = os.getgid() if os.getuid() else STRANGER

    def command(
        mounts: list[tuple[str, Path, str]], run_args: dict[str, Any], temporary: Path
    ) -> list[str]:
        volumes = [f"--volume={host}:{inside}:{mode}" for mode, host, inside in mounts]
        own = ["--userns=keep-id"] if tool == "podman" and os.getuid() else []
        return [
            tool, "run", "--rm", "-u", f"{owner}:{group}", *own, *volumes,
            f"--volume={temporary}:/tmp:rw", "--network", "none",
            "--shm-size=64m",  # Docker's own; the client gives what run_args says, which is more
            image, *run_args["command"].split(),
        ]  # fmt: skip

    return Client(command, owner)


@pytest.fixture
def singularity_client(sif: Path) -> Client:
    if os.getuid():
        pytest.skip("singularity gives a network of its own to root alone")

    def command(
        mounts: list[tuple[str, Path, str]], run_args: dict[str, Any], temporary: Path
    ) -> list[str]:
        binds = [f"--bind={host}:{inside}:{mode}" for mode, host, inside in mounts]
        return [
            "singularity", "run", "-eC", *binds, f"--bind={temporary}:/tmp:rw",
            "--net", "--network", "none", str(sif), *run_args["command"].split(),
        ]  # fmt: skip

    return Client(command, 0)


@pytest.fixture(scope="session")
def benchmark(inputs: Path, tmp_path_factory: pytest.TempPathFactory, forks) -> Path:
    """What the owners of a model and of a benchmark host: a packaged model, and demo data."""
    folder = tmp_path_factory.mktemp("benchmark")
    for words in (
        ("train", "-c", inputs / "config.yaml", "-d", inputs / "data", "-o", "run"),
        ("package", "-m", "run", "-o", "cube"),
        ("medperf", "demo", "-o", "demo.tar.gz", "--size", "16x16"),
    ):
        done = forks.command(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    for name in ("evaluation.yaml", "script.yaml"):
        (folder / name).write_text(yaml.safe_dump(EVALUATION))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def _extracted(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


def _pass_through(client: Client, benchmark: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Every task of a benchmark on its demo data; returns the hashes of what each has written."""
    folder.mkdir()
    demo = _extracted(benchmark / "demo.tar.gz", folder / "demo")
    weights = _extracted(benchmark / "cube" / "additional_files.tar.gz", folder / "weights")
    empty = folder / "empty"
    empty.mkdir()
    paths = yaml.safe_load((demo / "paths.yaml").read_text())
    raw = {name: demo / paths[name] for name in ("data_path", "labels_path")}
    prepared = {"data_path": folder / "data", "labels_path": folder / "labels"}
    own = {"parameters_file": PREPARATOR / "workspace/parameters.yaml", "additional_files": empty}
    report, statistics = folder / "report" / "report.yaml", folder / "statistics.yaml"
    outputs = {"output_path": folder / "data", "output_labels_path": folder / "labels",
            "report_file": report, "metadata_path": folder / "metadata"}  # fmt: skip
    client.run(PREPARATOR, "prepare", raw, outputs, **own)
    assert dataset_uid(*raw.values()) != dataset_uid(*prepared.values())
    assert {row["status"] for row in yaml.safe_load(report.read_text()).values()} == {"prepared"}
    client.run(PREPARATOR, "sanity_check", prepared, {}, **own)
    client.run(PREPARATOR, "statistics", prepared, {"output_path": statistics}, **own)
    told = yaml.safe_load(statistics.read_text())
    assert told["data"]["subjects"] == 12
    cube, predictions = benchmark / "cube", folder / "predictions"
    client.run(
        cube, "infer", {"data_path": folder / "data"}, {"output_path": predictions},
        parameters_file=cube / "workspace" / "parameters.yaml", additional_files=weights,
    )  # fmt: skip
    assert len(list((predictions / "images").iterdir())) == 16
    results, local = folder / "results" / "results.yaml", folder / "local"
    client.run(
        EVALUATOR, "evaluate", {"predictions": predictions, "labels": folder / "labels"},
        {"output_path": results, "local_outputs_path": local},
        parameters_file=benchmark / "evaluation.yaml", additional_files=empty,
    )  # fmt: skip
    assert isinstance(yaml.safe_load(results.read_text()), dict)
    assert (local / "report" / "report.html").is_file()
    of_script = folder / "script-results"
    client.run(
        SCRIPT, "run_script",
        {"data_path": folder / "data", "labels_path": folder / "labels", "model_files": weights},
        {"results_path": of_script},
        parameters_file=benchmark / "script.yaml",
    )  # fmt: skip
    assert [path.name for path in of_script.iterdir()] == ["results.yaml"]
    assert yaml.safe_load((of_script / "results.yaml").read_text())["images"]
    assert {written.lstat().st_uid for written in predictions.rglob("*")} == {client.owner}
    written = {"data": folder / "data", "labels": folder / "labels", "statistics": statistics,
               "images": predictions / "images", "results": results}  # fmt: skip
    return {name: hashes(path) for name, path in written.items()}


@pytest.mark.parametrize(
    "platform", ["docker_client", pytest.param("singularity_client", marks=pytest.mark.slow)]
)
def test_a_benchmark_runs_as_the_client_runs_it_and_again(
    platform: str, benchmark: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    client: Client = request.getfixturevalue(platform)
    first = _pass_through(client, benchmark, tmp_path / "first")
    assert _pass_through(client, benchmark, tmp_path / "second") == first


def test_what_is_wrong_ends_the_task_and_is_said(
    docker_client: Client, benchmark: Path, tmp_path: Path
) -> None:
    demo = _extracted(benchmark / "demo.tar.gz", tmp_path / "demo")
    (demo / "data" / "phantom-00003.png").write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    own = {"parameters_file": PREPARATOR / "workspace/parameters.yaml", "additional_files": empty}
    outputs = {
        "output_path": tmp_path / "data",
        "output_labels_path": tmp_path / "labels",
        "report_file": tmp_path / "report.yaml",
        "metadata_path": tmp_path / "metadata",
    }
    raw = {"data_path": demo / "data", "labels_path": demo / "labels"}
    with pytest.raises(AssertionError, match=r"phantom-00003\.png is empty"):
        docker_client.run(PREPARATOR, "prepare", raw, outputs, **own)
    shutil.rmtree(tmp_path / "tmp-prepare", ignore_errors=True)
    prepared = {"data_path": tmp_path / "data", "labels_path": tmp_path / "labels"}
    with pytest.raises(AssertionError, match="its preparation was interrupted"):
        docker_client.run(PREPARATOR, "sanity_check", prepared, {}, **own)


def _mlcube_tasks(mlcube, last: list[str], benchmark: Path, tree: Path) -> Path:
    """Every role by MLCube, in copies of the committed folders; returns that of the evaluator."""
    shutil.copytree(ROOT / "mlcube", tree / "mlcube", symlinks=True)
    preparator, evaluator = tree / "mlcube" / "preparator", tree / "mlcube" / "evaluator"
    demo = _extracted(benchmark / "demo.tar.gz", tree / "demo")
    for side in ("data", "labels"):
        shutil.copytree(demo / side, preparator / "workspace" / f"raw_{side}")
    cube = tree / "cube"
    shutil.copytree(benchmark / "cube", cube)
    shutil.copy(benchmark / "evaluation.yaml", evaluator / "workspace" / "parameters.yaml")
    work = preparator / "workspace"
    calls = [
        (preparator, "prepare,sanity_check,statistics", []),
        (cube, "infer", [f"data_path={work}/data"]),
        (evaluator, "evaluate",
         [f"predictions={cube}/workspace/predictions", f"labels={work}/labels"]),
    ]  # fmt: skip
    for folder, tasks, inputs in calls:
        done = mlcube(tree, f"--mlcube={folder}/container_config.yaml", f"--task={tasks}",
                      *inputs, *last)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((work / "statistics" / "statistics.yaml").read_text())
    assert (work / "report" / "report.yaml").stat().st_uid == os.getuid()
    assert len(list((cube / "workspace" / "predictions" / "images").iterdir())) == 16
    return evaluator


@pytest.mark.slow
def test_mlcube_runs_the_same_files(mlcube, podman, benchmark: Path, tmp_path: Path) -> None:
    evaluator = _mlcube_tasks(mlcube, podman, benchmark, tmp_path)
    assert yaml.safe_load((evaluator / "workspace" / "results" / "results.yaml").read_text())


def test_mlcube_runs_a_preparator_with_singularity(
    mlcube, benchmark: Path, sif: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "mlcube", tmp_path / "mlcube", symlinks=True)
    (tmp_path / "synthcube.sif").symlink_to(sif)
    demo = _extracted(benchmark / "demo.tar.gz", tmp_path / "demo")
    work = tmp_path / "mlcube" / "preparator" / "workspace"
    for side in ("data", "labels"):
        shutil.copytree(demo / side, work / f"raw_{side}")
    done = mlcube(
        tmp_path, f"--mlcube={work.parent}/container_config.yaml",
        "--task=prepare,sanity_check,statistics", "--platform=singularity",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = yaml.safe_load((work / "statistics" / "statistics.yaml").read_text())
    assert told["data"]["subjects"] == 12
