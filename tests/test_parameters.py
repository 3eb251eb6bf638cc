"""Parameters as MLCube passes them: what is wrong is said with the name that MLCube knows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from synthcube.data.phantom import write_phantoms


@pytest.fixture
def cli(cli):
    """Runs a command in this process; returns its exit code and the last line it printed."""

    def run(*words: object) -> tuple[int, str]:
        code, out, err = cli(*words)
        assert "Traceback" not in err
        return code, (out + err).strip().splitlines()[-1]

    return run


@pytest.fixture
def parameters(tmp_path: Path, tiny_config, phantoms: Path) -> dict[str, str]:
    """The words of a training that would succeed, by parameter."""
    return {
        "data_path": f"--data_path={phantoms}",
        "parameters_file": f"--parameters_file={tiny_config()}",
        "output_path": f"--output_path={tmp_path / 'run'}",
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data_path", "nowhere", "data_path {} does not exist; a CSV or a folder of images is"),
        ("data_path", "empty", "data_path {} holds no manifest.csv and no image"),
        ("data_path", "file", "{} is empty: it holds only a header"),
        ("parameters_file", "nowhere", "parameters_file (--config) {}: No such file"),
        ("parameters_file", "empty", "parameters_file (--config) {}: Is a directory"),
        ("output_path", "file", "Cannot write to output_path {}: it is a file, a folder is needed"),
        ("output_path", "/proc/nothing", "Cannot write output_path {}: No such file"),
    ],
)
def test_a_path_that_cannot_be_used(
    cli, parameters, tmp_path: Path, name: str, value: str, expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    parameters[name] = f"--{name}={tmp_path / value}"
    code, line = cli("train", *parameters.values())
    assert code == 2
    assert line.startswith(f"error: {expected.format(tmp_path / value)}"), line


@pytest.mark.parametrize("command", ["infer", "export"])
def test_a_model_that_is_not_there(cli, command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for value, expected in (
        ("nowhere", "there is no such folder"),
        ("", "no trained model is here"),
        ("file", "no trained model is here"),
    ):
        words = (f"--model_path={tmp_path / value}", f"--output_path={tmp_path / 'out'}")
        code, line = cli(command, *words)
        assert code == 2
        assert line.startswith(f"error: model_path {tmp_path / value}: {expected}"), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data_path", "output_path"])  # without parameters it plans
def test_a_parameter_that_is_missing(cli, parameters, name: str) -> None:
    del parameters[name]
    code, line = cli("train", *parameters.values())
    assert code == 2
    assert line.startswith("Error: Missing option")
    assert f"'--{name}'" in line


def test_parameters_and_tasks_that_are_unknown(cli, parameters) -> None:
    for spelling in ("--data_paths", "--data-paths"):
        code, line = cli("train", *parameters.values(), f"{spelling}=/x")
        assert code == 2
        assert line.startswith("Error: No such option: --data_paths")
        assert "--data_path" in line.removeprefix("Error: No such option: --data_paths")
    assert cli("dance") == (2, "Error: No such command 'dance'.")


def test_dashes_are_underscores(cli, parameters, tmp_path: Path) -> None:
    code, line = cli("train", *(word.replace("_", "-", 1) for word in parameters.values()))
    assert code == 0, line
    code, _ = cli("infer", "--model-path", tmp_path / "run", "--output-path", tmp_path / "a",
                  "--num-images=2", "--batch-size=1")  # fmt: skip
    assert code == 0
    assert len(list((tmp_path / "a" / "images").iterdir())) == 2


def test_infer_takes_seed_and_number_from_its_own_file(cli, parameters, tmp_path: Path) -> None:
    assert cli("train", *parameters.values())[0] == 0
    own = tmp_path / "own.yaml"
    own.write_text("seed: 5\nsampling: {num_images: 3}\n")

    def images(name: str, *words: object) -> dict[str, bytes]:
        model = f"--model_path={tmp_path / 'run'}"
        assert cli("infer", model, f"--output_path={tmp_path / name}", *words)[0] == 0
        folder = tmp_path / name / "images"
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    wanted = images("flags", "-n", 3, "--seed", 5)
    assert images("file", f"--parameters_file={own}") == wanted
    assert images("both", f"--parameters_file={own}", "-n", 1, "--seed", 5) == {
        "00000.png": wanted["00000.png"]
    }
    assert len(images("neither")) == 16
    code, line = cli("infer", "-m", tmp_path / "run", "-o", tmp_path / "x", "-c", tmp_path / "no")
    assert code == 2
    assert line.startswith(f"error: parameters_file (--config) {tmp_path / 'no'}: No such file")


def test_export_takes_its_section_from_a_file(cli, first_stage, tmp_path: Path) -> None:
    words = (f"--model_path={first_stage('vqvae')}", f"--output_path={tmp_path / 'model'}")
    path = tmp_path / "own.yaml"
    path.write_text("seed: 5\nexport: {license: mit, notes: Ours.}\n")
    missing = f"--parameters_file={tmp_path / 'no'}"
    code, line = cli("export", *words, missing)
    assert code == 2
    assert line.startswith(f"error: parameters_file (--config) {tmp_path / 'no'}: No such file")
    assert cli("export", *words, f"--parameters_file={path}")[0] == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: mit" in card
    assert "Ours." in card


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("closed", "Error: Invalid value for '--data_path' / '-d': path 'closed' is not readable."),
        ("closed/below", "error: closed/below: this user has no permission."),
    ],
)
def test_a_folder_that_this_user_may_not_read(data: str, expected: str) -> None:
    """As in a container that runs under another user's number."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        write_phantoms(Path(name) / "closed" / "below", num=4, size=(16, 16))
        (Path(name) / "closed").chmod(0o700)
        (Path(name) / "config.yaml").write_text("seed: 1")
        script = (  # imports first: afterwards even the libraries may be out of reach
            "import os, sys, lightning, monai, synthcube.tasks.train\n"
            "from synthcube.cli import main\n"
            f"os.setuid(12345)\nos.chdir({name!r})\n"
            f"sys.argv = ['synthcube', 'train', '-c', 'config.yaml', '-d', {data!r}, '-o', 'out']\n"
            "main()\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, expected)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_user_without_a_name_is_given_one() -> None:
    """MONAI's import asks for it: KeyError where neither environment nor passwd has one."""
    script = (
        "import getpass, os\nfrom synthcube import environment\nos.setuid(12345)\n"
        "environment.name_user()\nprint(getpass.getuser())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={})
    assert (done.returncode, done.stdout) == (0, "synthcube\n"), done.stderr
