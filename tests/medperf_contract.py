"""What the MedPerf client 0.3.0 demands of a container_config.yaml, and what the server stores.

And the commands that it takes, as far as our pages and READMEs name them.

Strict: whatever the client would stumble over at a site, and whatever it would pass over without a
word though somebody meant it, is a fault.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from typer.testing import CliRunner

MAX_IMAGE_HASH, MAX_NAME, MAX_URL = 100, 128, 256

TYPES = {"DockerImage", "DockerArchive", "SingularityFile"}  # the encrypted ones are never ours
RUN_ARGS = {"command", "entrypoint", "environment", "shm_size", "gpus"}
RESERVED = {"/tmp", "/app", "/proc", "/dev", "/sys", "/etc"}


class Volumes(NamedTuple):
    """Volume names of a task, with their kinds: those that it must declare, and those it may."""

    needed_in: dict[str, str]
    needed_out: dict[str, str]
    optional_in: Mapping[str, str] = MappingProxyType({})
    optional_out: Mapping[str, str] = MappingProxyType({})


DIRECTORY, FILE = "directory", "file"
EVERYWHERE = {"parameters_file": FILE, "additional_files": DIRECTORY}
ROLES: dict[str, dict[str, Volumes]] = {
    "preparator": {
        "prepare": Volumes(
            {"data_path": DIRECTORY, "labels_path": DIRECTORY},
            {"output_path": DIRECTORY, "output_labels_path": DIRECTORY},
            optional_out={"report_file": FILE, "metadata_path": DIRECTORY},
        ),
        "sanity_check": Volumes(
            {"data_path": DIRECTORY, "labels_path": DIRECTORY}, {}, {"metadata_path": DIRECTORY}
        ),
        "statistics": Volumes(
            {"data_path": DIRECTORY, "labels_path": DIRECTORY},
            {"output_path": FILE},
            {"metadata_path": DIRECTORY},
        ),
    },
    "model": {"infer": Volumes({"data_path": DIRECTORY}, {"output_path": DIRECTORY})},
    "trainer": {
        "generate_plan": Volumes(
            {"training_config_path": FILE, "aggregator_config_path": FILE}, {"plan_path": FILE}
        ),
        "start_aggregator": Volumes(
            {
                "plan_path": FILE,
                "collaborators": FILE,
                "node_cert_folder": DIRECTORY,
                "ca_cert_folder": DIRECTORY,
            },
            {"output_logs": DIRECTORY, "output_weights": DIRECTORY, "report_path": FILE},
        ),
        "train": Volumes(
            {
                "data_path": DIRECTORY,
                "labels_path": DIRECTORY,
                "plan_path": FILE,
                "node_cert_folder": DIRECTORY,
                "ca_cert_folder": DIRECTORY,
            },
            {"output_logs": DIRECTORY},
        ),
        "get_experiment_status": Volumes(
            {"plan_path": FILE, "node_cert_folder": DIRECTORY, "ca_cert_folder": DIRECTORY},
            {"output_status_file": FILE},
        ),
    },
    "evaluator": {
        "evaluate": Volumes(
            {"predictions": DIRECTORY, "labels": DIRECTORY},
            {"output_path": FILE},
            optional_out={"local_outputs_path": DIRECTORY},
        )
    },
    "script": {
        "run_script": Volumes(
            {"data_path": DIRECTORY, "labels_path": DIRECTORY, "model_files": DIRECTORY},
            {"results_path": DIRECTORY},
        )
    },
}


def role_of(config: Any) -> str:
    """How the client takes it: `infer` makes a model, `run_script` a script."""
    tasks = config.get("tasks") if isinstance(config, dict) else None
    names = set(tasks) if isinstance(tasks, dict) else set()
    if "run_script" in names:
        return "script"
    if "infer" in names:
        return "model"
    if "start_aggregator" in names:
        return "trainer"
    return "evaluator" if "evaluate" in names else "preparator"


def faults_of(
    text: str, role: str, *, image_hash: str = "", name: str = "", url: str = ""
) -> list[str]:
    """All that the client or the server would refuse in a container_config.yaml."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(config, dict):
        return ["a mapping is needed"]
    faults = _top_faults(config)
    faults += [
        f"{what} has {len(value)} characters, {most} at most"
        for what, value, most in (
            ("image hash", image_hash, MAX_IMAGE_HASH), ("name", name, MAX_NAME),
            ("URL of additional_files", url, MAX_URL),
        )
        if len(value) > most
    ]  # fmt: skip
    tasks = config.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        return [*faults, "tasks: a mapping of tasks is needed"]
    if role_of(config) != role:
        faults.append(f"the client takes this {role} for a {role_of(config)}")
    known = ROLES[role]
    faults += [f"{task}: no task of a {role}" for task in tasks if task not in known]
    faults += [f"{task}: a {role} needs this task" for task in known if task not in tasks]
    for task in known.keys() & tasks.keys():
        faults += [f"{task}: {fault}" for fault in _task_faults(tasks[task], known[task])]
    if role == "preparator":
        faults += _handed_on(tasks)
    return faults


def _top_faults(config: dict[str, Any]) -> list[str]:
    faults = [
        f"{key} is missing" for key in ("container_type", "image", "tasks") if not config.get(key)
    ]
    kind, image = config.get("container_type"), config.get("image")
    if kind and kind not in TYPES:
        faults.append(f"container_type {kind!r} is not one of {sorted(TYPES)}")
    if image and not isinstance(image, str):
        faults.append(f"image {image!r} is no text")
    elif image and kind == "DockerImage" and ("://" in image or image.startswith(("/", "."))):
        faults.append(f"image {image!r}: a DockerImage is a name in a registry, no path or URL")
    elif (
        image
        and kind in TYPES - {"DockerImage"}
        and not image.startswith(("http://", "https://", "direct:", "synapse:"))
    ):
        faults.append(f"image {image!r}: a {kind} is a URL")
    return faults


def _task_faults(task: Any, volumes: Volumes) -> list[str]:
    if not isinstance(task, dict):
        return ["a mapping is needed"]
    faults = _run_args_faults(task.get("run_args", {}))
    sides = {
        "input_volumes": (volumes.needed_in, {**volumes.optional_in, **EVERYWHERE}),
        "output_volumes": (volumes.needed_out, volumes.optional_out),
    }
    places: dict[str, str] = {}
    for side, (needed, optional) in sides.items():
        declared = task.get(side, {})
        if not isinstance(declared, dict):
            faults.append(f"{side}: a mapping is needed")
            continue
        faults += [f"{side}: {name} is missing" for name in needed if name not in declared]
        for name, volume in declared.items():
            kind = {**needed, **optional}.get(name)
            if kind is None:
                faults.append(f"{side}: the client does not supply {name!r}")
            else:
                faults += [
                    f"{side}.{name}: {fault}"
                    for fault in _volume_faults(volume, kind, places, name)
                ]
    return faults


def _run_args_faults(run_args: Any) -> list[str]:
    if not isinstance(run_args, dict):
        return ["run_args: a mapping is needed"]
    faults = [f"run_args: {key!r} is forbidden" for key in run_args if key not in RUN_ARGS]
    if not isinstance(run_args.get("command"), (str, list)) or not run_args["command"]:
        faults.append("run_args: command is missing; tasks of one image differ by nothing else")
    if "gpus" in run_args and run_args["gpus"] != "all":
        faults.append(f"run_args: gpus {run_args['gpus']!r}; Singularity takes `all` or nothing")
    if "shm_size" in run_args and not isinstance(run_args["shm_size"], str):
        faults.append(f"run_args: shm_size {run_args['shm_size']!r} is no text")
    environment = run_args.get("environment", {})
    if not isinstance(environment, dict):
        faults.append("run_args: environment is no mapping")
    elif any(not isinstance(value, str) for value in environment.values()):
        faults.append("run_args: environment holds what is no text")
    return faults


def _volume_faults(volume: Any, kind: str, places: dict[str, str], name: str) -> list[str]:
    if not isinstance(volume, dict) or set(volume) != {"mount_path", "type"}:
        return ["exactly mount_path and type are needed"]
    path, mount_kind = volume["mount_path"], volume["type"]
    faults = [] if mount_kind == kind else [f"type {mount_kind!r}, the client mounts a {kind}"]
    if not isinstance(path, str) or not path.startswith("/"):
        return [*faults, f"mount_path {path!r} is not absolute"]
    plain = str(PurePosixPath(path))
    if plain != path or ".." in path.split("/") or path == "/":
        faults.append(f"mount_path {path!r} is not written plainly")
    if any(plain == reserved or plain.startswith(reserved + "/") for reserved in RESERVED):
        faults.append(f"mount_path {path!r} hides a folder of the container")
    faults += [
        f"mount_path {path!r} is in, or holds, that of {other}"
        for there, other in places.items()
        if f"{plain}/".startswith(f"{there}/") or f"{there}/".startswith(f"{plain}/")
    ]
    places[plain] = name
    return faults


def _handed_on(tasks: dict[str, Any]) -> list[str]:
    """metadata_path is supplied to the later tasks only where prepare writes it."""

    def has(task: str, side: str) -> bool:
        of_container = tasks.get(task)
        volumes = of_container.get(side) if isinstance(of_container, dict) else None
        return isinstance(volumes, dict) and "metadata_path" in volumes

    if has("prepare", "output_volumes"):
        return []
    return [
        f"{task}: metadata_path, which prepare does not write"
        for task in ("sanity_check", "statistics")
        if has(task, "input_volumes")
    ]


client = typer.Typer(add_completion=False, rich_markup_mode=None)
_groups = {name: typer.Typer() for name in ("benchmark", "container", "model", "test")}
for _name, _group in _groups.items():
    client.add_typer(_group, name=_name)

Benchmark = Annotated[int, typer.Option("--benchmark", "-b")]
Model = Annotated[int, typer.Option("--model_uid", "-m")]
Name = Annotated[str, typer.Option("--name", "-n")]
Flag = Annotated[bool, typer.Option()]
Yes = Annotated[bool, typer.Option("-y")]
Mine = Annotated[bool, typer.Option("--mine")]
Operational = Annotated[bool, typer.Option("--operational")]


@client.callback()
def _before_the_command(gpus: str = "", platform: str = "docker") -> None: ...


@client.command("run")
def _run(
    benchmark: Benchmark,
    dataset: Annotated[int, typer.Option("--data_uid", "-d")],
    model: Model,
    yes: Yes = False,
) -> None: ...


@_groups["test"].command("run")
def _test_run(
    benchmark: Benchmark,
    model: Annotated[int, typer.Option("--model", "-m")] = 0,
) -> None: ...


@_groups["test"].command("ls")
def _test_ls() -> None: ...


@_groups["container"].command("submit")
def _container_submit(
    name: Name,
    config: Annotated[str, typer.Option("--container-config-file", "-m")],
    parameters: Annotated[str, typer.Option("--parameters-file", "-p")] = "",
    additional_file: Annotated[str, typer.Option("--additional-file", "-a")] = "",
    additional_hash: str = "",
    image_hash: str = "",
    operational: Operational = False,
) -> None: ...


@_groups["container"].command("ls")
@_groups["model"].command("ls")
def _ls(mine: Mine = False) -> None: ...


@_groups["model"].command("associate")
def _associate(benchmark: Benchmark, model: Model, yes: Yes = False) -> None: ...


@_groups["benchmark"].command("submit")
def _benchmark_submit(
    name: Name,
    description: Annotated[str, typer.Option("--description", "-d")],
    preparator: Annotated[int, typer.Option("--data-preparation-container", "-p")],
    model: Annotated[int, typer.Option("--reference-model", "-m")],
    evaluator: Annotated[int, typer.Option("--evaluator-container", "-e")],
    demo_url: str = "",
    operational: Operational = False,
) -> None: ...


@_groups["benchmark"].command("ls")
def _benchmark_ls(mine: Mine = False) -> None: ...


def commands_in(page: str) -> list[str]:
    """Every command of MedPerf's client in a page of Markdown: in blocks, and within a sentence."""
    text = page.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^ {4}\S.*$", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    return [" ".join(text.split()) for text in (*lines, *spans) if text.startswith("medperf ")]


def command_fault(command: str) -> str:
    """What the client says to a command, where it refuses it; empty where it would run."""
    words = re.sub(r"\b[A-Z]+_UID\b", "1", command)  # the reader's own number
    done = CliRunner().invoke(client, shlex.split(words)[1:])
    return done.output if done.exit_code else ""
