"""Models that are exported for other runtimes: the folder, and who computes with it."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import synthcube
from synthcube.models import artifact
from synthcube.sharing.runtimes import is_part


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("runtime", [pytest.param("openvino", marks=pytest.mark.slow), "onnx"])
def test_infer_makes_the_same_pictures(runtime, converted, cli, tmp_path) -> None:
    model = converted("rectified_flow", "openvino", "onnx")
    words = ("infer", "-m", model, "-n", 5, "--seed", 3, "--set-nothing")[:-1]
    (tmp_path / "exact.yaml").write_text("compute: {precision: '32'}\n")
    exact = ("-o", tmp_path / "torch", "-c", tmp_path / "exact.yaml", "--batch_size", 5)
    assert cli(*words, *exact)[0] == 0
    code, _, err = cli(*words, "-o", tmp_path / "other", "--runtime", runtime, "--batch_size", 2)
    assert code == 0, err
    before, after = pixels(tmp_path / "torch" / "images"), pixels(tmp_path / "other" / "images")
    assert len(before) == len(after) == 5
    for one, other in zip(before, after, strict=True):
        assert np.abs(one - other).max() <= 1, "grey levels of 256"
    told = json.loads((tmp_path / "other" / "provenance.json").read_text())
    assert told["request"]["runtime"] == runtime
    assert told["precision"] == "32-true"


def test_the_yaml_chooses_the_runtime(converted, cli, tmp_path) -> None:
    model = converted("rectified_flow", "openvino", "onnx")
    (tmp_path / "config.yaml").write_text("sampling: {runtime: onnx, num_images: 2}\n")
    words = ("infer", "-m", model, "-c", tmp_path / "config.yaml")
    assert cli(*words, "-o", tmp_path / "onnx")[0] == 0
    assert cli(*words, "-o", tmp_path / "torch", "--runtime", "torch")[0] == 0
    runtimes = [
        json.loads((tmp_path / name / "provenance.json").read_text())["request"].get("runtime")
        for name in ("onnx", "torch")
    ]
    assert runtimes == ["onnx", None]
    code, _, err = cli(*words, "-o", tmp_path / "onnx", "--runtime", "openvino")
    assert code == 2, "images of two runtimes are not mixed"
    assert "holds other images" in err


@pytest.mark.slow
def test_processes_share_the_images(converted, cli, tmp_path) -> None:
    model = converted("rectified_flow", "openvino", "onnx")
    words = ("infer", "-m", model, "-n", 4, "--batch_size", 2, "--runtime", "openvino")
    (tmp_path / "two.yaml").write_text("compute: {num_devices: 2}\n")
    assert cli(*words, "-o", tmp_path / "one")[0] == 0
    assert cli(*words, "-o", tmp_path / "two", "-c", tmp_path / "two.yaml")[0] == 0
    for one, two in zip(
        pixels(tmp_path / "one" / "images"), pixels(tmp_path / "two" / "images"), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_python_opens_it_with_a_runtime(converted) -> None:
    folder = converted("rectified_flow", "openvino", "onnx")
    own = synthcube.from_pretrained(folder, accelerator="cpu")
    own._precision = "32-true"
    expected = own.sample(3, seed=2).tensor
    for runtime in ("openvino", "onnx"):
        images = synthcube.from_pretrained(folder, runtime=runtime).sample(3, seed=2).tensor
        torch.testing.assert_close(images, expected, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_reconstruction_is_converted_as_well(converted, first_stage) -> None:
    folder = converted("autoencoder_kl", "openvino")
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    own = synthcube.from_pretrained(first_stage("autoencoder_kl"), accelerator="cpu")
    own._precision = "32-true"
    reconstructed = synthcube.from_pretrained(folder, runtime="openvino").reconstruct(images).tensor
    torch.testing.assert_close(reconstructed, own.reconstruct(images).tensor, atol=2e-3, rtol=0)


def test_the_folder_lists_and_tells_of_it(converted) -> None:
    folder = converted("rectified_flow", "openvino", "onnx")
    names = {
        "onnx.json", "onnx.network.onnx", "openvino.json", "openvino.network.bin",
        "openvino.network.xml",
    }  # fmt: skip
    listed = artifact.read_index(folder)
    assert {name for name in listed if is_part(name)} == names
    assert artifact.damaged(folder, listed) == {}
    card = (folder / "README.md").read_text()
    assert "## Other runtimes" in card
    for runtime in ("onnx", "openvino"):
        told = json.loads((folder / f"{runtime}.json").read_text())
        assert 0 <= told["largest_difference"] < 1e-3
        version = told["version"].partition("-")[0]
        row = f"| {runtime} {version} | `--runtime {runtime}` | float32 | "
        assert f"{row}{told['largest_difference']:.2g} |" in card


def test_no_file_tells_of_this_machine(converted) -> None:
    folder = converted("rectified_flow", "openvino", "onnx")
    secrets = {
        str(Path.cwd()), str(Path(synthcube.__file__).parent), "site-packages", "File \"",
        str(folder.parent),
    }  # fmt: skip
    # Weights hold any three bytes somewhere.
    secrets |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4}
    for path in folder.iterdir():
        held = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in held], path.name


def test_an_export_again_keeps_what_was_converted(converted, first_stage, cli, tmp_path) -> None:
    folder, again = converted("dcgan", "onnx"), tmp_path / "again"
    assert cli("export", "-m", folder, "-o", again, "--license", "mit")[0] == 0
    for name in ("onnx.json", "onnx.generator.onnx"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert "## Other runtimes" in (again / "README.md").read_text()
    assert cli("export", "-m", first_stage("dcgan"), "-o", again)[0] == 0
    assert not [path.name for path in again.iterdir() if is_part(path.name)]
    assert "Other runtimes" not in (again / "README.md").read_text()


def test_a_package_for_medperf_has_them(converted, cli, tmp_path) -> None:
    folder, package = converted("dcgan", "onnx"), tmp_path / "package"
    code, _, err = cli("package", "-m", folder, "-o", package)
    assert code == 0, err
    model = package / "workspace" / "additional_files" / "model"
    assert parts(artifact.read_index(model)) == {"onnx.json", "onnx.generator.onnx"}
    (tmp_path / "parameters.yaml").write_text("sampling: {num_images: 2, runtime: onnx}\n")
    (tmp_path / "data").mkdir()
    code, _, err = cli(
        "medperf", "infer", "--data_path", tmp_path / "data", "--additional_files", model.parent,
        "--parameters_file", tmp_path / "parameters.yaml", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["request"]["runtime"] == "onnx"


def parts(names) -> set[str]:
    return {name for name in names if is_part(name)}


def test_the_section_export_says_for_what(first_stage, cli, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(
        "export: {runtimes: [openvino], runtime_weights: float16}\n"
    )
    words = ("export", "-m", first_stage("dcgan"), "-c", tmp_path / "config.yaml")
    code, _, err = cli(*words, "-o", tmp_path / "model")
    assert code == 0
    assert "openvino, weights in float16: its images are off those of torch by" in err
    assert json.loads((tmp_path / "model" / "openvino.json").read_text())["weights"] == "float16"
    over = ("--runtime", "onnx", "--runtime_weights", "float32")
    assert cli(*words, "-o", tmp_path / "other", *over)[0] == 0
    assert not (tmp_path / "other" / "openvino.json").exists()


def test_a_model_that_was_not_exported_for_it(first_stage, cli, tmp_path) -> None:
    run = first_stage("rectified_flow")
    code, _, err = cli("infer", "-m", run, "-o", tmp_path / "out", "--runtime", "openvino")
    assert code == 2
    assert "was not converted for openvino: write a folder that is, with `synthcube export" in err
    assert "--runtime openvino`" in err
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_not_for_it(converted, cli, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("compute: {accelerator: gpu}\n")
    code, _, err = cli(
        "infer", "-m", converted("dcgan", "onnx"), "-o", tmp_path / "out", "--runtime", "onnx",
        "-c", tmp_path / "config.yaml",
    )  # fmt: skip
    assert code == 2
    assert "--runtime onnx computes on the CPU, and compute.accelerator is gpu" in err


@pytest.mark.parametrize("name", ["onnx.generator.onnx", "onnx.json"])
def test_a_damaged_conversion_is_refused(name, converted, cli, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted("dcgan", "onnx"), folder)
    path = folder / name
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    code, _, err = cli("infer", "-m", folder, "-o", tmp_path / "out", "--runtime", "onnx")
    assert code == 2
    assert f"{name} has changed since it was written" in err


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "link.bin", "*/_ORT_MEM_ADDR_/*"]
)
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_graph_that_reads_other_files_is_refused(place, location, converted, cli, tmp_path):
    import onnx

    folder = tmp_path / "model"
    shutil.copytree(converted("dcgan", "onnx"), folder)
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to("../secret.bin")
    path = folder / "onnx.generator.onnx"
    graph = onnx.load(path)
    weights = onnx.TensorProto(
        name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    if place == "initializer":
        graph.graph.initializer.append(weights)
    else:
        graph.graph.node.append(onnx.helper.make_node("Constant", [], ["w"], value=weights))
    path.write_bytes(graph.SerializeToString())
    artifact.write_index(folder)
    code, _, err = cli("infer", "-m", folder, "-o", tmp_path / "out", "--runtime", "onnx")
    assert code == 2
    assert f"takes its weights from {location}: only onnx.generator.onnx.data beside it" in err


def test_a_graph_that_is_none_is_refused(converted, cli, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted("dcgan", "onnx"), folder)
    (folder / "onnx.generator.onnx").write_bytes(b":" + b"\xff" * 20)
    artifact.write_index(folder)
    code, _, err = cli("infer", "-m", folder, "-o", tmp_path / "out", "--runtime", "onnx")
    assert code == 2
    assert "onnx.generator.onnx is damaged: download it again" in err


def test_a_runtime_that_nobody_knows(first_stage, cli, tmp_path) -> None:
    words = ("export", "-m", first_stage("dcgan"), "-o", tmp_path / "model")
    code, _, err = cli(*words, "--runtime", "tensorrt")
    assert code == 2
    assert "--runtime: Input should be 'onnx' or 'openvino'" in err
    (tmp_path / "config.yaml").write_text("export: {runtimes: [tensorrt]}\n")
    code, _, err = cli(*words, "-c", tmp_path / "config.yaml")
    assert code == 2
    assert "export.runtimes" in err
    assert not (tmp_path / "model").exists()


def test_weights_are_refused_before_anything_is_written(first_stage, cli, tmp_path) -> None:
    code, _, err = cli(
        "export", "-m", first_stage("dcgan"), "-o", tmp_path / "model", "--runtime", "onnx",
        "--runtime_weights", "int8",
    )  # fmt: skip
    assert code == 2
    assert "--runtime_weights int8: onnx takes float32" in err
    assert not (tmp_path / "model").exists()


SIGNALS = """
import faulthandler, gc, itertools, os, signal, sys
from pathlib import Path

faulthandler.enable()  # a signal stack of its own, as in any test
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
from synthcube.sharing.runtimes.openvino import Session

import numpy as np
given = [np.zeros((1, 8), np.float32), np.zeros((1, 0), np.float32)]
for order in itertools.permutations(range(3)):
    sessions = {place: Session(Path(sys.argv[1]), "openvino.generator") for place in range(3)}
    for place in order:
        sessions[place](given)
    for place in order:
        del sessions[place]
        gc.collect()
        os.kill(os.getpid(), signal.SIGUSR1)
assert len(heard) == 18, heard
"""


@pytest.mark.slow
def test_signals_are_heard_after_networks_have_gone(converted) -> None:
    """With an engine for each network, OpenVINO 2026.4 leaves a signal stack that is not there."""
    folder = converted("dcgan", "openvino")
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


WATCHED = """
import sys

def watch(event, given):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("REACHED OUT", event, given[-1], file=sys.stderr)

sys.addaudithook(watch)
from synthcube.cli import main
main()
"""


@pytest.mark.slow
def test_nobody_is_told_of_a_conversion(first_stage, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    quiet = ("CI", "NNCF_CI", "NNCF_DEV")  # with these they would not tell anyhow
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    environment |= {"HOME": str(home), "SYNTHCUBE_CACHE": str(tmp_path / "cache")}
    words = ["export", "-m", first_stage("dcgan"), "-o", tmp_path / "model",
             "--runtime", "openvino", "--runtime", "onnx"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "REACHED OUT" not in done.stderr
    assert not (home / "intel").exists(), "where its telemetry would keep an id"
    infer = ["infer", "-m", tmp_path / "model", "-o", tmp_path / "images", "-n", "1",
             "--runtime", "openvino"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, infer)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "REACHED OUT" not in done.stderr
    assert [path.name for path in home.iterdir()] == []
