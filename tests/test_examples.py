"""Every example YAML validates, and the example of a user's own code really runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from synthcube import config, plugins
from synthcube.data.phantom import write_phantoms
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture
def own_code() -> None:
    plugins.vouch([ROOT / "examples" / "plugins"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("own_code")
def test_example_validates_and_its_images_fit(path: Path) -> None:
    settings = config.load(path)
    assert settings.data.size


def test_there_is_an_example_of_every_family_in_2d_and_3d() -> None:
    names = set()
    for path in EXAMPLES:
        if path.stem != "own_family":
            settings = config.load(path)
            names.add((settings.model.name, len(settings.data.size or ())))
    from synthcube.models import registry

    assert names == {(name, rank) for name in registry.names() for rank in (2, 3)}


@pytest.mark.slow
def test_own_family_and_transform_train_and_reconstruct(tmp_path: Path, forks) -> None:
    data = write_phantoms(tmp_path / "data", num=8, size=(32, 32))
    own = ["--plugins", str(ROOT / "examples" / "plugins")]
    run, out = str(tmp_path / "run"), tmp_path / "out"
    yaml = str(ROOT / "examples" / "own_family.yaml")
    for command in (
        ["train", "-c", yaml, "-d", str(data), "-o", run, "--set", "training.max_epochs=1"],
        ["infer", "-m", run, "-d", str(data), "-o", str(out)],
    ):
        done = forks.command(*command, *own)
        assert done.returncode == 0, done.stderr
    assert len(list((out / "images").iterdir())) == 8
    # In a process that has never heard of the folder.
    done = subprocess.run(
        [sys.executable, "-m", "synthcube", "infer", "-m", run, "-o", str(tmp_path / "x")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.name: my_autoencoder:MyAutoencoderConfig is code that does not" in done.stderr
    assert "data.preprocessing.0.name: my_transforms:SquareRoot is code that" in done.stderr
    assert "--plugins" in done.stderr


def test_missing_plugin_folder_is_named() -> None:
    with pytest.raises(config.ConfigError, match=r"--plugins nowhere: there is no such folder"):
        plugins.vouch([Path("nowhere")])


def test_an_entry_point_is_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package: its metadata on the path is all that installing means here."""
    from synthcube.models import registry

    package = tmp_path / "site"
    info = package / "their_family-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[synthcube.families]\ntheirs = my_autoencoder:MyAutoencoderConfig\n"
    )
    source = ROOT / "examples" / "plugins" / "my_autoencoder.py"
    (package / "my_autoencoder.py").write_text(source.read_text())
    monkeypatch.setattr(sys, "path", [str(package), *sys.path])
    assert "theirs" in registry.names()
    assert registry.find("theirs").__name__ == "MyAutoencoderConfig"
    data = write_phantoms(tmp_path / "data", num=4, size=(16, 16))
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: {name: theirs}\ntraining: {max_epochs: 1, batch_size: 2}\n")
    train(yaml, data, tmp_path / "run")
    infer(InferRequest(tmp_path / "run", tmp_path / "out", data=data))
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
