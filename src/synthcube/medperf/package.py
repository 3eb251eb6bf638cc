"""Folders as .tar.gz that are the same bytes for the same files."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from synthcube import __version__, reading, storage
from synthcube.config import trained_settings
from synthcube.containers import CONTAINER_CONFIG, IMAGE, PARAMETERS, description, image_name
from synthcube.data.phantom import write_phantoms
from synthcube.errors import OutputError
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.models.family import Samples
from synthcube.tasks.export import export


def write_archive(path: Path, folder: Path) -> str:
    """Pack what is in `folder`, as `tar -czf PATH -C FOLDER .` would; returns its SHA-256.

    Names are sorted; owners, times and rights of the files are left out.

    Raises:
        OutputError: `path` cannot be written.
    """
    storage.make_folder(path.absolute().parent)
    storage.write_with(path, lambda temporary: _pack(temporary, folder))
    return storage.sha256(path)


def _pack(path: Path, folder: Path) -> None:
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for each in [folder, *sorted(folder.rglob("*"))]:
            name = "./" + each.relative_to(folder).as_posix() if each != folder else "."
            archive.add(each, name, recursive=False, filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def write_demo(path: Path, *, num: int, size: Sequence[int], seed: int = 0) -> str:
    """Write a .tar.gz of phantoms as MedPerf wants it; returns its SHA-256.

    At its root paths.yaml says where data and labels are: here the same images, as the reference
    images of a generative model are its data. The same arguments give the same bytes.

    Raises:
        ConfigError: there is nothing to write, or such phantoms cannot be drawn.
        OutputError: `path` cannot be written.
    """
    with storage.scratch_folder() as folder:
        for side in ("data", "labels"):
            write_phantoms(folder / side, num=num, size=size, seed=seed)
        text = reading.dump({"data_path": "data", "labels_path": "labels"})
        (folder / "paths.yaml").write_text(text, encoding="utf-8")
        return write_archive(path, folder)


def registration_steps(trained: Artifact, *, image: str, archive: str, archive_sha256: str) -> str:
    """Markdown with the exact commands, for the MedPerf client 0.3."""
    name = f"synthcube-{trained.config['model']['name']}-{trained.sha256[:8]}".replace("_", "-")
    return f"""# A model to register with MedPerf

A trained {trained.config["model"]["name"]} of SynthCube {__version__}, as a container that MedPerf
and MLCube can run. For research only; not a medical device.

| file | |
| --- | --- |
| `container_config.yaml` | how MedPerf and MLCube run it; its image is `{image}` |
| `workspace/parameters.yaml` | what it is to do: task, conditions, number of images, seed |
| `{archive}` | the weights, to be hosted; SHA-256 `{archive_sha256}` |
| `workspace/additional_files` | the same, unpacked, for a trial with MLCube |

## 1. The image

MedPerf pulls the image at every site, under the name in `container_config.yaml`: push it to a
registry that the sites reach (Docker Hub, where some use Singularity), and write the package anew
if it is another name: `synthcube package -m MODEL -o THIS_FOLDER --image NAME`. MedPerf records the
digest of the manifest in the registry, which

    docker buildx imagetools inspect {image} --format '{{{{json .Manifest.Digest}}}}'

shows; it is not the ID of the local image.

## 2. The weights

Put `{archive}` where the sites can download it without logging in
(or on Synapse). Its address may have 256 characters. Do not pack it anew: MedPerf compares the
SHA-256 of the file as it is.

## 3. Registration

    medperf container submit \\
      --name {name} \\
      --container-config-file container_config.yaml \\
      --parameters-file workspace/parameters.yaml \\
      --additional-file ADDRESS_OF_{archive} \\
      --additional-hash {archive_sha256} \\
      --operational

The name must be new on the server, and at most 128 characters long. As its task is `infer`, this
registers a model as well. `medperf container ls --mine` and `medperf model ls --mine` show the
numbers (UID) of both; MedPerf's other commands take such a number, never a path.

## 4. Participation

    medperf test run --benchmark BENCHMARK_UID --model MODEL_UID
    medperf model associate --model_uid MODEL_UID --benchmark BENCHMARK_UID

The owner of the benchmark has to approve. A site that takes part with a data set then runs

    medperf run --benchmark BENCHMARK_UID --data_uid DATASET_UID --model_uid MODEL_UID

and on a GPU

    medperf --gpus=all run --benchmark BENCHMARK_UID --data_uid DATASET_UID --model_uid MODEL_UID
"""


ARCHIVE = "additional_files.tar.gz"
_ADDITIONAL = "workspace/additional_files"
_MODEL = f"{_ADDITIONAL}/model"


def package(model_path: Path, folder: Path, *, image: str = IMAGE) -> Path:
    """Write everything that the model's registration needs to `folder`, in one step.

    The same model gives the same bytes.

    Args:
        image: name of the container's image in a registry that the sites can pull from.

    Raises:
        ConfigError: `image` is no name of one.
        ArtifactError: there is no trained model, or it is damaged.
        OutputError: `folder` cannot be written, or holds something that is no package.
    """
    storage.require_separate({"output_path": folder}, {"model_path": model_path})
    image_name(image)
    trained = artifact.load(model_path)
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    earlier = _written_names(folder)
    if storage.contents(folder) and not earlier:
        raise OutputError(
            f"output_path {folder} holds something that is no package: give another one."
        )
    with storage.replaced_folder(folder, earlier) as staging:
        files = staging / _ADDITIONAL
        export(trained.folder, staging / _MODEL)
        digest = write_archive(staging / ARCHIVE, files)
        config = description(f"model/{CONTAINER_CONFIG}", image, builds=False)
        storage.write_text(staging / CONTAINER_CONFIG, config)
        storage.write_text(staging / PARAMETERS, reading.dump(_parameters(trained)))
        steps = registration_steps(trained, image=image, archive=ARCHIVE, archive_sha256=digest)
        storage.write_text(staging / "README.md", steps)
    return folder


def _written_names(folder: Path) -> list[str]:
    """Of the files of a package; none where there is no package."""
    if not (folder / CONTAINER_CONFIG).is_file() or not (folder / ARCHIVE).is_file():
        return []
    model = artifact.written_names(folder / _MODEL)
    return [CONTAINER_CONFIG, ARCHIVE, *(f"{_MODEL}/{name}" for name in model)]


def _parameters(trained: Artifact) -> dict[str, Any]:
    """What the model does unless its owner says otherwise."""
    settings = trained_settings(trained)
    sampling = {name: settings["sampling"][name] for name in ("num_images", "batch_size")}
    common = {"seed": settings["seed"], "sampling": sampling}
    if trained.image.source_channels:
        return {"task": "translate", **common}
    if isinstance(trained.build(torch.device("cpu")), Samples):
        return {"task": "generate", "conditions": "drawn", **common}
    return {"task": "reconstruct", **common}
