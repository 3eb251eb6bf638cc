"""Networks that were converted for a runtime go up and come down with their model."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthcube.models import artifact
from synthcube.sharing.runtimes import is_part

NAME = "alice/brains"


def parts(names) -> set[str]:
    return {name for name in names if is_part(name)}


def test_who_gets_the_model_computes_with_the_runtime(publish, hub, cli, tmp_path: Path) -> None:
    code, _, err = publish("--runtime", "onnx", family="dcgan")
    assert code == 0, err
    repo = hub.repos[NAME]
    there = repo.commits[repo.branches["main"]]
    assert parts(there) == {"onnx.json", "onnx.generator.onnx"}
    words = ("infer", "-n", 2, "--runtime", "onnx")
    assert cli(*words, "-m", tmp_path / "model", "-o", tmp_path / "here")[0] == 0
    code, _, err = cli(*words, "-m", f"hf://{NAME}", "-o", tmp_path / "there")
    assert code == 0, err
    for path in (tmp_path / "here" / "images").iterdir():
        assert (tmp_path / "there" / "images" / path.name).read_bytes() == path.read_bytes()


def test_a_version_without_them_takes_them_away(publish, hub) -> None:
    assert publish("--runtime", "onnx", family="dcgan")[0] == 0
    code, _, err = publish("--model-version", "1.1.0", family="dcgan")
    assert code == 0, err
    repo = hub.repos[NAME]
    assert parts(repo.commits[repo.branches["main"]]) == set()
    assert len(parts(repo.commits[repo.tags["v1.0.0"]])) == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "openvino.py", "onnx.network.pkl"])
def test_other_binary_files_are_not_taken(name, publish, hub, cli, tmp_path: Path) -> None:
    assert publish(family="dcgan")[0] == 0
    repo = hub.repos[NAME]
    folder = tmp_path / "model"
    (folder / name).write_bytes(b"anything")
    artifact.write_index(folder, [*artifact.read_index(folder), name])
    files = dict(repo.commits[repo.branches["main"]])
    index = files["artifact.json"]
    files["artifact.json"] = type(index)((folder / "artifact.json").read_bytes())
    files[name] = type(index)(b"anything")
    repo.commit(files, "main", "something else")
    code, _, err = cli("infer", "-m", f"hf://{NAME}", "-o", tmp_path / "out", "-n", 1)
    assert code == 2
    assert f"lists {name}: only" in err
    assert not (tmp_path / "out").exists()
