"""How a packaged model becomes part of a MedPerf benchmark: the README of the package."""

from __future__ import annotations

from synthcube import __version__
from synthcube.artifact import Artifact


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
