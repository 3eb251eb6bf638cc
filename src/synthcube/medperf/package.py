"""A trained model as a container to register with MedPerf, and demo data for a benchmark."""

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

_ARCHIVE = "additional_files.tar.gz"
_ADDITIONAL = "workspace/additional_files"
_MODEL = f"{_ADDITIONAL}/model"


def package(model_path: Path, folder: Path, *, image: str = IMAGE) -> Path:
    """Write all files that are needed to register a model with MedPerf; return `folder`.

    The files appear together. The same model gives the same bytes.

    Args:
        image: name of the container's image in a registry that the sites can pull from.

    Raises:
        ConfigError: `image` is not the name of an image.
        ArtifactError: there is no trained model, or it is damaged.
        OutputError: `folder` cannot be written, or holds files that are not a package's.
    """
    storage.require_separate({"output_path": folder}, {"model_path": model_path})
    image_name(image)
    trained = artifact.load(model_path)
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    earlier = _written_names(folder)
    if storage.contents(folder) and not earlier:
        raise OutputError(
            f"output_path {folder} holds files that are not a package's: use another folder."
        )
    with storage.replaced_folder(folder, earlier) as staging:
        export(trained.folder, staging / _MODEL)
        digest = _write_archive(staging / _ARCHIVE, staging / _ADDITIONAL)
        config = description(f"model/{CONTAINER_CONFIG}", image, builds=False)
        storage.write_text(staging / CONTAINER_CONFIG, config)
        storage.write_text(staging / PARAMETERS, reading.dump(_parameters(trained)))
        storage.write_text(staging / "README.md", _registration_steps(trained, image, digest))
    return folder


def write_demo(path: Path, *, num: int, size: Sequence[int], seed: int = 0) -> str:
    """Write drawn images as a .tar.gz for MedPerf; return its SHA-256.

    Its paths.yaml names the folders of data and labels. Both hold the same images, because the
    reference images of a generative model are its data. The same arguments give the same bytes.

    Raises:
        ConfigError: `num` or `size` cannot be drawn.
        OutputError: `path` cannot be written.
    """
    with storage.scratch_folder() as folder:
        for side in ("data", "labels"):
            write_phantoms(folder / side, num=num, size=size, seed=seed)
        text = reading.dump({"data_path": "data", "labels_path": "labels"})
        (folder / "paths.yaml").write_text(text, encoding="utf-8")
        return _write_archive(path, folder)


def _written_names(folder: Path) -> list[str]:
    """Return the names of the files of a package, or none if there is no package."""
    if not (folder / CONTAINER_CONFIG).is_file() or not (folder / _ARCHIVE).is_file():
        return []
    model = artifact.written_names(folder / _MODEL)
    return [CONTAINER_CONFIG, _ARCHIVE, *(f"{_MODEL}/{name}" for name in model)]


def _parameters(trained: Artifact) -> dict[str, Any]:
    """Return the default parameters of the container of a model."""
    settings = trained_settings(trained)
    sampling = {name: settings["sampling"][name] for name in ("num_images", "batch_size")}
    common = {"seed": settings["seed"], "sampling": sampling}
    if trained.image.source_channels:
        return {"task": "translate", **common}
    if isinstance(trained.build(torch.device("cpu")), Samples):
        return {"task": "generate", "conditions": "drawn", **common}
    return {"task": "reconstruct", **common}


def _write_archive(path: Path, folder: Path) -> str:
    """Pack a folder as `tar -czf PATH -C FOLDER .` does; return the SHA-256.

    Names are sorted; owners, times and permissions are left out: the same files, the same bytes.
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
        archive.add(folder, ".", recursive=False, filter=_anonymous)
        for entry in sorted(folder.rglob("*")):
            name = f"./{entry.relative_to(folder).as_posix()}"
            archive.add(entry, name, recursive=False, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def _registration_steps(trained: Artifact, image: str, digest: str) -> str:
    """Return Markdown with the exact commands for the MedPerf client 0.3."""
    family = trained.config["model"]["name"]
    conditions = (
        "The model follows conditions: `conditions: prepared` asks for those of a site's images."
        if trained.image.conditions
        else "The model follows no conditions, and refuses `conditions: prepared`."
    )
    name = f"synthcube-{family}-{trained.sha256[:8]}".replace("_", "-")
    return f"""# A model to register with MedPerf

A trained {family} of SynthCube {__version__}, as a container that MedPerf
and MLCube can run. For research only; not a medical device.

| file | |
| --- | --- |
| `container_config.yaml` | how MedPerf and MLCube run it; its image is `{image}` |
| `workspace/parameters.yaml` | its task, conditions, number of images and seed |
| `{_ARCHIVE}` | the weights, which you host; SHA-256 `{digest}` |
| `workspace/additional_files` | the same, unpacked, to try with MLCube |

{conditions}

## 1. The image

Every site pulls the image by its name in `container_config.yaml`. Push it to a registry that the
sites can reach (Docker Hub if some use Singularity). For another name, write the package again:
`synthcube package -m MODEL -o THIS_FOLDER --image NAME`. MedPerf records the digest of the image's
manifest in the registry, which is not the ID of the local image:

    docker buildx imagetools inspect {image} --format '{{{{json .Manifest.Digest}}}}'

## 2. The weights

Put `{_ARCHIVE}` where the sites can download it without logging in
(or on Synapse). Its address may have up to 256 characters. Do not pack it again: MedPerf checks
the SHA-256 of this file.

## 3. Registration

    medperf container submit \\
      --name {name} \\
      --container-config-file container_config.yaml \\
      --parameters-file workspace/parameters.yaml \\
      --additional-file ADDRESS_OF_{_ARCHIVE} \\
      --additional-hash {digest} \\
      --operational

The name must be new on the server and have at most 128 characters. Because its task is `infer`,
this registers a model as well. `medperf container ls --mine` and `medperf model ls --mine` show the
UIDs of both; MedPerf's other commands take a UID, never a path.

## 4. Participation

    medperf test run --benchmark BENCHMARK_UID --model MODEL_UID
    medperf model associate --model_uid MODEL_UID --benchmark BENCHMARK_UID

The owner of the benchmark has to approve. A site that takes part with a data set then runs

    medperf run --benchmark BENCHMARK_UID --data_uid DATASET_UID --model_uid MODEL_UID

and on a GPU

    medperf --gpus=all run --benchmark BENCHMARK_UID --data_uid DATASET_UID --model_uid MODEL_UID
"""
