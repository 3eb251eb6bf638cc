"""MLCube 0.0.9 with mlcube/mlcube.yaml, on a copy of the repository's two folders."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "mlcube.md"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The folders mlcube/ and workspace/ as committed, but for a training of two epochs."""
    shutil.copytree(ROOT / "mlcube", tmp_path / "mlcube", symlinks=True)
    (tmp_path / "workspace").mkdir()
    shutil.copytree(ROOT / "workspace" / "data", tmp_path / "workspace" / "data")
    text = (ROOT / "workspace" / "config.yaml").read_text(encoding="utf-8")
    shorter, replaced = re.subn(r"max_epochs: \d+", "max_epochs: 2", text)
    assert replaced == 1
    (tmp_path / "workspace" / "config.yaml").write_text(shorter, encoding="utf-8")
    return tmp_path


@pytest.fixture
def own_config(inputs: Path, tmp_path: Path) -> Path:
    """The configuration of `inputs`, which makes as many images as `expected` has."""
    values = yaml.safe_load((inputs / "config.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "parameters" / "own.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**values, "sampling": {"num_images": 3}}), encoding="utf-8")
    return path


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fault(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence in which SynthCube says what is wrong."""
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def mounted(tool: str, image: str) -> str:
    """The host's folders in containers of the image, ended ones too, and those of other tests."""
    listed = subprocess.run(
        [tool, "ps", "--all", "--quiet", f"--filter=ancestor={image}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if not (numbers := listed.stdout.split()):
        return ""
    # Of another test one may be gone by now, which is an error, and the others are shown.
    shown = subprocess.run(
        [tool, "inspect", "--format={{range .Mounts}}{{.Source}} {{end}}", *numbers],
        capture_output=True, text=True,
    )  # fmt: skip
    return shown.stdout


@pytest.mark.slow
def test_defaults_from_the_top_and_from_within_and_again(
    mlcube, podman, tool: str, image: str, tree: Path, known
) -> None:
    data = known.hashes(tree / "workspace" / "data")
    for task in ("train", "infer", "evaluate", "export"):
        succeeded(mlcube(tree, "--mlcube=mlcube", f"--task={task}", *podman))
    workspace = tree / "workspace"
    images = known.hashes(workspace / "images" / "images")
    assert len(images) == 16
    assert (workspace / "model" / "artifact.json").is_file()
    log = succeeded(mlcube(tree / "mlcube", "--task=train,infer,evaluate,export", *podman))
    assert "This training is complete" in log
    assert known.hashes(workspace / "images" / "images") == images
    assert known.hashes(workspace / "data") == data
    assert {path.name for path in workspace.iterdir()} == {
        "config.yaml", "data", "evaluation", "images", "model", "report", "run",
    }  # fmt: skip
    assert {path.lstat().st_uid for path in workspace.rglob("*")} == {os.getuid()}
    assert str(tree) not in mounted(tool, image), "MLCube leaves containers unless told --rm"

    config = workspace / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("max_epochs: 2", "max_epochs: 3"), encoding="utf-8")
    log = succeeded(mlcube(tree, "--mlcube=mlcube", "--task=train", *podman))
    assert "Continuing after epoch" in log
    told = fault(mlcube(tree, "--mlcube=mlcube", "--task=infer,export", *podman))
    assert re.search(r"^error: output_path /mlcube_io\d holds other images, .*or empty it\.$", told)
    assert known.hashes(workspace / "images" / "images") == images


def test_own_files_make_the_same_images_as_the_command_line(
    mlcube, podman, tree: Path, inputs: Path, own_config: Path, expected, known
) -> None:
    before = known.hashes(inputs)
    common = (*podman, f"parameters_file={own_config}")
    run, images = tree / "my-run", tree / "my-images"
    succeeded(
        mlcube(
            tree,
            "--mlcube=mlcube",
            "--task=train",
            *common,
            f"data_path={inputs}/data",
            f"output_path={run}",
        )
    )
    succeeded(
        mlcube(
            tree,
            "--mlcube=mlcube",
            "--task=infer",
            *common,
            f"model_path={run}",
            f"output_path={images}",
        )
    )
    assert known.hashes(images / "images") == expected
    assert known.hashes(inputs) == before


def test_another_workspace(mlcube, podman, tree: Path, inputs: Path, own_config, known) -> None:
    """Its own data; a missing config.yaml is MLCube's copy of the default one."""
    other = tree / "other"
    shutil.copytree(inputs / "data", other / "data")
    shutil.copy(own_config, tree / "workspace" / "config.yaml")
    succeeded(
        mlcube(tree, "--mlcube=mlcube", "--task=train,infer", f"--workspace={other}", *podman)
    )
    assert len(list((other / "images" / "images").iterdir())) == 3
    assert {path.name for path in (tree / "workspace").iterdir()} == {"config.yaml", "data"}


@pytest.mark.slow
def test_singularity_makes_the_same_images(
    mlcube, tree: Path, sif: Path, inputs: Path, own_config: Path, expected, known
) -> None:
    """With the SIF where `make sif` puts it, and nothing but the defaults."""
    (tree / "synthcube.sif").symlink_to(sif)
    shutil.rmtree(tree / "workspace" / "data")
    shutil.copytree(inputs / "data", tree / "workspace" / "data")
    shutil.copy(own_config, tree / "workspace" / "config.yaml")
    singularity = ("--mlcube=mlcube", "--platform=singularity")
    for task in ("train", "infer"):
        succeeded(mlcube(tree, *singularity, f"--task={task}"))
    told = fault(mlcube(tree, *singularity, "--task=evaluate"))
    assert "Nothing is left to evaluate: 12 of the 12 labels must be left out" in told
    manifest = tree / "workspace" / "data" / "manifest.csv"
    header, *rows = manifest.read_text().splitlines()
    split = [f"{row},{'train' if i < 6 else 'test'}" for i, row in enumerate(rows)]
    manifest.write_text("\n".join([f"{header},Split", *split, ""]))
    for task in ("evaluate", "export"):
        succeeded(mlcube(tree, *singularity, f"--task={task}"))
    assert known.hashes(tree / "workspace" / "images" / "images") == expected
    assert (tree / "workspace" / "model" / "artifact.json").is_file()
    again = mlcube(tree, "--mlcube=mlcube", "--task=infer", "--platform=singularity",
                   f"model_path={tree / 'nothing'}")  # fmt: skip
    assert "error: model_path /mlcube_io0: no trained model is here" in fault(again)


def test_export_publishes_with_a_token_that_only_the_environment_has(
    mlcube, podman, tool: str, image: str, tree: Path, hub
) -> None:
    """As docs/how-to/share.md says it; without network and token, only the folder is made."""
    config, model = tree / "workspace" / "config.yaml", tree / "workspace" / "model"
    text = config.read_text(encoding="utf-8")
    section = "export: {license: mit, push_to: alice/brains, notes: Ours.}\n"
    config.write_text(text + section, encoding="utf-8")
    succeeded(mlcube(tree, "--mlcube=mlcube", "--task=train", *podman))
    export = ("--mlcube=mlcube", "--task=export")
    assert "there is no token; set HF_TOKEN" in fault(mlcube(tree, *export, *podman))
    assert (model / "artifact.json").is_file()
    secret = {"HF_TOKEN": next(iter(hub.users)), "HF_ENDPOINT": hub.endpoint}
    passed_on = "-Pdocker.env_args=-e HF_TOKEN -e HF_ENDPOINT"
    told = fault(mlcube(tree, *export, passed_on, *podman, **secret))
    assert "cannot be reached" in told
    log = succeeded(mlcube(tree, *export, "--network=host", passed_on, *podman, **secret))
    assert "evaluation: there is no results.yaml" in log
    assert f"Published: hf://alice/brains@{hub.repos['alice/brains'].branches['main']}" in log
    left = subprocess.run(
        [tool, "ps", "--all", "--quiet", f"--filter=ancestor={image}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert left.stdout == "", "a container that is left would know the token"
    files = [path for path in tree.rglob("*") if path.is_file()]
    assert not [path for path in files if secret["HF_TOKEN"].encode() in path.read_bytes()]
    assert secret["HF_TOKEN"] not in log + told


@pytest.mark.parametrize(
    ("task", "parameter", "expected"),
    [
        ("train", "data_path=nothing", "data_path /mlcube_io0 holds no manifest.csv and no image"),
        ("train", "parameters_file=nothing/at.yaml",
         "parameters_file (--config) /mlcube_io1/at.yaml: No such file"),
        ("infer", "model_path=nothing", "model_path /mlcube_io0: no trained model is here"),
        ("infer", "output_path=data", "output_path /mlcube_io2 already holds images"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_mlcube_fails(
    mlcube, podman, tree: Path, task: str, parameter: str, expected: str
) -> None:
    if "output_path" in parameter:
        succeeded(mlcube(tree, "--mlcube=mlcube", "--task=train", *podman))
        (tree / "workspace" / "data" / "images").mkdir()
    told = fault(mlcube(tree, "--mlcube=mlcube", f"--task={task}", *podman, parameter))
    assert told.startswith(f"error: {expected}")


def test_what_mlcube_itself_refuses(mlcube, podman, tree: Path) -> None:
    (tree / "file").write_text("")
    done = mlcube(tree, "--mlcube=mlcube", "--task=train", *podman, f"output_path={tree / 'file'}")
    assert done.returncode == 1
    assert "FileExistsError" in done.stderr
    done = mlcube(tree, "--mlcube=mlcube", "--task=dance", *podman)
    assert done.returncode == 1
    assert "Unknown tasks have been requested" in done.stderr


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    mlcube, podman, tree: Path, own_config: Path, request: pytest.FixtureRequest
) -> None:
    """In order, with /my/... as folders of the test."""
    mine = tree / "my"
    shutil.copytree(tree / "workspace" / "data", mine / "data")
    shutil.copytree(tree / "workspace" / "data", mine / "workspace" / "data")
    for folder in (tree / "workspace", mine):
        shutil.copy(own_config, folder / "config.yaml")
    page = PAGE.read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines()
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line.replace("=/my/", f"={mine}/"))
        assert words[:2] == ["mlcube", "run"], line
        if "--platform=singularity" in words:
            sif: Path = request.getfixturevalue("sif")
            (tree / "synthcube.sif").symlink_to(sif)
        succeeded(mlcube(tree, *words[2:], *podman))
    assert len(list((mine / "images" / "images").iterdir())) == 3
