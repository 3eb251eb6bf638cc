"""A trained model as a container for a challenge: build it, try it, submit it."""

from __future__ import annotations

from pathlib import Path

from synthcube import __version__, storage
from synthcube.containers import IMAGE, image_name
from synthcube.errors import ConfigError, OutputError
from synthcube.models import artifact
from synthcube.sharing.challenges import (
    DECLARATION,
    MODELS,
    Challenge,
    ChallengeTask,
    read_declaration,
    task_for,
)
from synthcube.sharing.config import ExportRequest
from synthcube.tasks.export import export

_DOCKERFILE, _README = "Dockerfile", "README.md"


def export_container(
    model_path: Path, folder: Path, request: ExportRequest, *, challenge: str, base: str = IMAGE
) -> Path:
    """Write all that a container for a challenge is built from; returns `folder`.

    A model of another output of the same challenge is added to those that are there already; one of
    the same output replaces it. The files appear together.

    Args:
        request: as for an export: license, notes and runtimes of the model's own folder.
        challenge: see :func:`synthcube.sharing.challenges.task_for`.
        base: name of the SynthCube image to build on.

    Raises:
        ConfigError: no such challenge, the model cannot do its task, or `base` is no name.
        ArtifactError: there is no trained model, or it is damaged.
        OutputError: `folder` cannot be written, or holds something else.
    """
    if request.push_to:
        raise ConfigError(
            f"push_to {request.push_to}: a container goes to a registry of images, not to a Hub; "
            "export the model itself without --challenge to publish it."
        )
    storage.require_separate({"output_path": folder}, {"model_path": model_path})
    image_name(base, "--base")
    trained = artifact.load(model_path)
    name, task = task_for(trained, challenge)
    storage.require_own(folder, DECLARATION, "output_path")
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    others = _other_tasks(folder, name, task)
    place = f"{MODELS}/{task.output}"
    earlier = [f"{place}/{file}" for file in artifact.written_names(folder / place)]
    declared = Challenge(name=name, tasks=(*others, task))
    with storage.replaced_folder(folder, earlier) as staging:
        export(trained.folder, staging / place, request)
        storage.write_json(
            staging / DECLARATION, declared.model_dump(mode="json", exclude_none=True)
        )
        storage.write_text(staging / _DOCKERFILE, _dockerfile(declared, base))
        storage.write_text(staging / _README, _steps(declared, base, request.license))
    return folder


def _other_tasks(folder: Path, name: str, task: ChallengeTask) -> list[ChallengeTask]:
    """The tasks of the models in a folder of the same challenge that stay."""
    if not (folder / DECLARATION).is_file():
        if storage.contents(folder):
            raise OutputError(
                f"output_path {folder} holds files that are not a container's for a challenge: "
                "give another one."
            )
        return []
    present = read_declaration(folder)
    if present.name != name:
        raise OutputError(
            f"output_path {folder} is a container for {present.name}, not for {name}: give another "
            "one."
        )
    return [other for other in present.tasks if other.output != task.output]


def _dockerfile(challenge: Challenge, base: str) -> str:
    return f"""\
# A submission to {challenge.name}; README.md says how to build and to try it.
FROM {base}
# readable for every user, whatever the permissions are here
COPY --chmod=755 {DECLARATION} /challenge/{DECLARATION}
COPY --chmod=755 {MODELS} /challenge/{MODELS}
# the folder for the output is often root's alone; any other user may run it too (docker run -u)
USER 0:0
ENTRYPOINT ["/app/bin/synthcube", "challenge", "--model_path=/challenge"]
"""


def _steps(challenge: Challenge, base: str, license_id: str) -> str:
    rows = "\n".join(
        f"| {', '.join(f'`CASE-{suffix}.nii.gz`' for suffix in task.reads)} "
        f"| `CASE-{task.output}.nii.gz` |"
        for task in challenge.tasks
    )
    stated = f"`{license_id}`" if license_id else "not stated (export it again with `--license`)"
    return f"""# A container for {challenge.name}

Written by SynthCube {__version__}. For research only; not a medical device.

| of each folder of a case it reads | it writes, all into one folder |
| --- | --- |
{rows}

The files have the grid and the header of the input. `{DECLARATION}` says which file is which
channel, `{MODELS}` holds the models.

## Build

`{base}` must be on this machine, or in a registry: `make image` in SynthCube's repository makes
`{IMAGE}`, and `make image TORCH=cuda` one for NVIDIA GPUs, which a submission usually needs.

    docker build -t my-submission .

## Try

    mkdir -p output
    docker run --rm -u $(id -u):$(id -g) --network none --read-only --tmpfs /tmp --gpus all \\
      -v $PWD/input:/input:ro -v $PWD/output:/output my-submission

It takes no arguments. For runners of MLCube's kind it answers `infer --data_path=/in
--output_path=/out` too, with `--weights` (a folder like this one, or one model) and
`--parameters_file` (a YAML of `seed`, `sampling` and `compute`).

## Submit

Push the image where the organisers say, under a name that they give:

    docker tag my-submission REGISTRY/PROJECT/my-submission:1
    docker push REGISTRY/PROJECT/my-submission:1

## License

License of the weights: {stated}. The weights go with the image to everyone who can pull it.
Weights that were trained on CC BY-NC data, such as those of BraTS, cannot carry SynthCube's own
license, Apache-2.0: only the code has it. Read the rules of the challenge and of its data before
the image becomes public.
"""
