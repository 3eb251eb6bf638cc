"""Every command, killed before a change of the file system, and then given once more.

The second call must succeed, leave the very files that an undisturbed call leaves, and nothing
else; what was good before must be readable in between. Points are taken evenly from all of a
command's; SYNTHCUBE_KILL_SWEEP=all takes every one, a number so many of each.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from generative.networks.nets import VQVAE

from synthcube import reading
from synthcube.cli import main
from synthcube.data.manifest import read_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.medperf.prepared_folder import changed_files
from synthcube.models import artifact, registry
from synthcube.storage import recovered_folder, sha256
from synthcube.tasks import run_folder
from synthcube.training import checkpoints

pytestmark = pytest.mark.slow

# Times and process ids, and what holds them.
CHANGING = {
    "throughput.json", "environment.json", "last.ckpt", "best.ckpt", "index.json", run_folder.LOCK,
}  # fmt: skip
LOST = "run/throughput.json"  # of the part of a training that was killed
CONFIG = {
    "data": {"num_workers": 0},
    "training": {
        "max_epochs": 1, "batch_size": 4, "sample_every_n_epochs": 1, "num_sample_images": 2,
    },
    "compute": {"accelerator": "cpu", "precision": "32"},
    "evaluation": {"extractor": {"name": "radiomic"}, "num_repeats": 2},
}  # fmt: skip
PREPARE = (
    "medperf prepare --data_path data --labels_path data --output_path site/data "
    "--output_labels_path site/labels --report_file site/report.yaml --metadata_path site/metadata"
)
EVALUATE = "evaluate -p images -l data -c config.yaml -o results.yaml --report report"
READ_RESULTS: Callable[[], object] = lambda: yaml.safe_load(Path("results.yaml").read_text())  # noqa: E731


@dataclass(frozen=True)
class Case:
    """A command, what was done before it, and what can be read at any time since then."""

    words: str
    before: tuple[str, ...] = ()
    read: Callable[[], object] | None = None
    points: int = 9


def read_run() -> None:
    artifact.load("run").build(torch.device("cpu"))
    assert checkpoints.reached(Path("run/checkpoints/last.ckpt"))[0] in (1, 2)


def read_site() -> None:
    for name in ("site/data", "site/labels"):
        assert changed_files(Path(name)) == []
        assert len(read_manifest(Path(name)).rows) == 6


def read_package() -> None:
    artifact.load(recovered_folder(Path("package")) / "workspace/additional_files/model")


TRAIN = "train -c config.yaml -d data -o run"
CASES = {
    "prepare": Case("prepare -d pictures -o list --validation 0.2"),
    "prepare again": Case(
        "prepare -d pictures -o list --validation 0.2 --seed 1",
        ("prepare -d pictures -o list --validation 0.2",),
        lambda: read_manifest(Path("list")),
    ),
    "train": Case(TRAIN, points=6),
    "train on": Case(f"{TRAIN} --set training.max_epochs=2", (TRAIN,), read_run, points=6),
    "infer": Case("infer -m model -o drawn -n 2"),
    "infer again": Case(
        "infer -m model -o drawn -n 2",
        ("infer -m model -o drawn -n 2",),
        lambda: read_manifest(Path("drawn")),
        points=6,
    ),
    "evaluate": Case(EVALUATE),
    "evaluate again": Case(f"{EVALUATE} -t trained", (EVALUATE,), READ_RESULTS),
    "export": Case("export -m model -o shared"),
    "export again": Case(
        "export -m model -o shared", ("export -m other -o shared",), lambda: artifact.load("shared")
    ),
    "package": Case("package -m model -o package"),
    "package again": Case(
        "package -m model -o package", ("package -m other -o package",), read_package
    ),
    "import": Case("import old.pt --family vqvae -c old.yaml -o imported"),
    "medperf prepare": Case(PREPARE),
    "medperf prepare again": Case(
        f"{PREPARE} --parameters_file smaller.yaml", (PREPARE,), read_site
    ),
    "medperf infer": Case(
        "medperf infer --data_path data --additional_files model --output_path predictions "
        "--parameters_file two.yaml"
    ),
    "medperf evaluate": Case(
        "medperf evaluate --predictions images --labels data --output_path results.yaml "
        "--local_outputs_path local --parameters_file evaluation.yaml"
    ),
    "medperf statistics": Case(
        "medperf statistics --data_path site/data --labels_path site/labels "
        "--output_path statistics.yaml",
        (PREPARE,),
    ),
}


class Place:
    """A folder in which commands run in forks, put back to its beginning before each point."""

    def __init__(self, forks: ModuleType, kills: ModuleType, root: Path) -> None:
        self.forks, self.kills, self.root = forks, kills, root

    def run(self, words: str, kill: Any = None) -> Any:
        def work() -> None:
            tempfile.tempdir = None
            tempfile.gettempdir()  # Python tries the folder with a file of its own
            sys.argv = ["synthcube", *words.split()]
            if kill:
                kill.arm()
            main()

        environment = {
            "TMPDIR": str(self.root / "tmp"), "SYNTHCUBE_CACHE": str(self.root / "cache")
        }  # fmt: skip
        return self.forks.Fork(work, environment, self.root).ended()

    def reset(self, template: Path) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(template, self.root)

    def import_what(self, words: str) -> None:
        """Import here what a command imports, so that no fork must do it again."""
        names = self.root / "tmp" / "modules"

        def work() -> None:
            sys.argv = ["synthcube", *words.split()]
            with suppress(SystemExit):
                main()
            names.write_text("\n".join(sys.modules))

        self.forks.Fork(work, {"SYNTHCUBE_CACHE": str(self.root / "cache")}, self.root).ended()
        for name in names.read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)

    def files(self) -> dict[str, str]:
        """Every file and folder, with the hash of what must be the same."""
        return {
            path.relative_to(self.root).as_posix(): sha256(path)
            if path.is_file() and path.name not in CHANGING and "cache" not in path.parts
            else ""
            for path in self.root.rglob("*")
        }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and models of one epoch."""
    from synthcube.tasks.infer import InferRequest, infer
    from synthcube.tasks.train import train

    root = tmp_path_factory.mktemp("template")
    (root / "tmp").mkdir()
    write_phantoms(root / "data", num=6, size=(8, 8))
    trained = write_phantoms(root / "trained", num=6, size=(8, 8), seed=1)
    trained.write_text(trained.read_text().replace(",phantom-", ",other-"))  # other people
    (root / "pictures").mkdir()
    for path in (root / "data").glob("*.png"):
        shutil.copy(path, root / "pictures")
    model = registry.find("rectified_flow").tiny().model_dump(mode="json")
    (root / "config.yaml").write_text(reading.dump({"model": model, **CONFIG}))
    for name, seed in (("model", 0), ("other", 1)):
        train(root / "config.yaml", root / "data", root / "run", overrides=[f"seed={seed}"])
        shutil.copytree(root / "run" / "artifact", root / name)
        shutil.rmtree(root / "run")
    infer(InferRequest(root / "model", root / "images", num_images=6))
    (root / "smaller.yaml").write_text("data: {size: [6, 6]}\n")
    (root / "two.yaml").write_text("sampling: {num_images: 2}\n")
    (root / "evaluation.yaml").write_text(reading.dump({"evaluation": CONFIG["evaluation"]}))
    _write_old_weights(root)
    return root


def _write_old_weights(root: Path) -> None:
    network = VQVAE(
        spatial_dims=2, in_channels=1, out_channels=1, num_channels=(8, 8), num_res_layers=1,
        num_res_channels=(8, 8), downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=8, embedding_dim=4,
    )  # fmt: skip
    torch.save(network.state_dict(), root / "old.pt")
    model = {"channels": [8, 8], "num_res_layers": 1, "num_embeddings": 8, "embedding_dim": 4}
    config = {"model": {"name": "vqvae", **model}, "data": {"size": [16, 16]}}
    (root / "old.yaml").write_text(reading.dump(config))


@pytest.mark.parametrize("name", CASES)
def test_a_kill_before_any_change(
    template: Path, tmp_path: Path, forks: ModuleType, kills: ModuleType, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case, place = CASES[name], Place(forks, kills, tmp_path / "work")
    place.reset(template)
    monkeypatch.chdir(tmp_path)
    for words in case.before:
        done = place.run(words)
        assert done.returncode == 0, done.stderr
    beginning = tmp_path / "beginning"
    shutil.copytree(place.root, beginning)
    place.import_what(case.words)
    place.reset(beginning)
    count = kills.Kill(place.root)
    done = place.run(case.words, count)
    assert done.returncode == 0, done.stderr
    expected = place.files()
    faults = [
        f"before change {number} of {count.seen}: {fault}"
        for number in chosen(count.seen, case.points)
        if (fault := fault_after_kill(place, beginning, case, number, expected))
    ]
    assert not faults, "\n".join(faults)


def chosen(number: int, points: int) -> list[int]:
    if wish := os.environ.get("SYNTHCUBE_KILL_SWEEP", ""):
        points = number if wish == "all" else int(wish)
    if number <= points:
        return list(range(number))
    return sorted({round(i * (number - 1) / (points - 1)) for i in range(points)})


def fault_after_kill(
    place: Place, beginning: Path, case: Case, number: int, expected: dict[str, str]
) -> str:
    """What is wrong after a kill and the same command once more; empty where nothing is."""
    place.reset(beginning)
    killed = place.run(case.words, place.kills.Kill(place.root, number))
    if killed.returncode != -signal.SIGKILL:
        return f"not killed, exit code {killed.returncode}: {killed.stderr}"
    if case.read:
        os.chdir(place.root)
        try:
            case.read()
        except Exception as error:
            return f"what was there cannot be read: {error!r}"
        finally:
            os.chdir(place.root.parent)
    again = place.run(case.words)
    if again.returncode:
        return f"refused: {again.stderr}"
    files = place.files()
    different = {path for path in files if files[path] != expected.get(path, "absent")}
    different |= expected.keys() - files.keys() - {LOST}
    return f"not as undisturbed: {sorted(different)}" if different else ""
