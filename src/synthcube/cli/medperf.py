"""The commands that MedPerf's containers run, and `package`, which makes such a container.

Without arguments a task finds everything where MedPerf mounts it.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from synthcube.cli.app import (
    INSTALLATION,
    MODELS,
    SETTINGS,
    Group,
    Model,
    Output,
    Plugins,
    Trust,
    app,
    command,
    located,
    say,
    setup_process,
)
from synthcube.containers import IMAGE, mounts

medperf = typer.Typer(
    cls=Group,
    name="medperf",
    help="The tasks of MedPerf's containers; paths default to where MedPerf mounts them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: synthcube medperf demo -o demo.tar.gz",
)
app.add_typer(medperf, rich_help_panel=INSTALLATION)

_task = partial(command, "Tasks", of=medperf)

_PREPARE, _CHECK, _STATISTICS, _INFER, _EVALUATE, _SCRIPT = map(
    mounts().__getitem__,
    ("prepare", "sanity_check", "statistics", "infer", "evaluate", "run_script"),
)
_PLAN, _AGGREGATE, _TRAIN, _STATUS = map(
    mounts().__getitem__, ("generate_plan", "start_aggregator", "train", "get_experiment_status")
)
_OPTIONAL = "; none where MedPerf mounts none"


def _option(name: str, text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        f"--{name}", metavar="PATH", help=text, show_default=True,
        rich_help_panel="Optional volumes" if _OPTIONAL in text else None,
    )  # fmt: skip
    return option


def _mounted(path: Path | None, mount: Path) -> Path | None:
    """The path of an optional volume: the option's, or where MedPerf has mounted one."""
    return path or (mount if mount.exists() else None)


_Parameters = Annotated[
    Path | None, _option("parameters_file", f"YAML of the container's parameters{_OPTIONAL}.")
]
_Data = Annotated[Path, _option("data_path", "Images that prepare wrote.")]
_Labels = Annotated[Path, _option("labels_path", "Reference images that prepare wrote.")]


@_task("medperf prepare --data_path raw --labels_path raw")
def prepare(
    data_path: Annotated[
        Path, _option("data_path", "Images, with or without a manifest.csv.")
    ] = _PREPARE["data_path"],
    labels_path: Annotated[
        Path, _option("labels_path", "Reference images, or a CSV of SubjectID and conditions.")
    ] = _PREPARE["labels_path"],
    output_path: Annotated[Path, _option("output_path", "Folder for the images.")] = _PREPARE[
        "output_path"
    ],
    output_labels_path: Annotated[
        Path, _option("output_labels_path", "Folder for the reference images.")
    ] = _PREPARE["output_labels_path"],
    parameters_file: _Parameters = None,
    report_file: Annotated[
        Path | None, _option("report_file", f"YAML of the state of each subject{_OPTIONAL}.")
    ] = None,
    metadata_path: Annotated[
        Path | None,
        _option("metadata_path", f"Folder for settings, versions and voxels.json{_OPTIONAL}."),
    ] = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Check raw images and bring them to one orientation, spacing and size."""
    setup_process(plugins, trust)
    from synthcube.medperf.prepare import prepare as task

    counts = task(
        data_path, labels_path, output_path, output_labels_path,
        parameters_file=_mounted(parameters_file, _PREPARE["parameters_file"]),
        report_file=_mounted(report_file, _PREPARE["report_file"]),
        metadata_path=_mounted(metadata_path, _PREPARE["metadata_path"]),
    )  # fmt: skip
    say(f"Prepared: {counts}")


@_task("medperf sanity_check --data_path data --labels_path labels", "sanity_check")
def sanity_check(
    data_path: _Data = _CHECK["data_path"],
    labels_path: _Labels = _CHECK["labels_path"],
    parameters_file: _Parameters = None,
    additional_files: Annotated[
        Path | None,
        _option("additional_files", f"Folder of lists (voxels.json) of other data{_OPTIONAL}."),
    ] = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Fail where prepared images are damaged, of different shapes, constant, or leak."""
    setup_process(plugins, trust)
    from synthcube.medperf.sanity_check import sanity_check as task

    counts = task(
        data_path, labels_path,
        parameters_file=_mounted(parameters_file, _CHECK["parameters_file"]),
        additional_files=_mounted(additional_files, _CHECK["additional_files"]),
    )  # fmt: skip
    say(f"Sound: {counts}")


@_task("medperf statistics --data_path data --labels_path labels")
def statistics(
    data_path: _Data = _STATISTICS["data_path"],
    labels_path: _Labels = _STATISTICS["labels_path"],
    output_path: Annotated[Path, _option("output_path", "YAML to write.")] = _STATISTICS[
        "output_path"
    ],
    parameters_file: _Parameters = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Count and summarize, only in groups of several subjects."""
    setup_process(plugins, trust)
    from synthcube.medperf.statistics import statistics as task

    path = task(
        data_path, labels_path, output_path,
        parameters_file=_mounted(parameters_file, _STATISTICS["parameters_file"]),
    )  # fmt: skip
    say(f"Statistics: {path}")


@_task("medperf infer --data_path data --output_path predictions")
def infer(
    data_path: _Data = _INFER["data_path"],
    output_path: Annotated[Path, _option("output_path", "Folder for the images.")] = _INFER[
        "output_path"
    ],
    parameters_file: _Parameters = None,
    additional_files: Annotated[
        Path, _option("additional_files", "Folder with the trained model.")
    ] = _INFER["additional_files"],
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Generate images, or reconstruct or translate prepared ones."""
    setup_process(plugins, trust)
    from synthcube.medperf.infer import infer as task

    task(
        data_path, output_path, additional_files,
        parameters=_mounted(parameters_file, _INFER["parameters_file"]),
    )  # fmt: skip
    say(f"Predictions: {output_path}")


@_task("medperf evaluate --predictions predictions --labels labels")
def evaluate(
    predictions: Annotated[Path, _option("predictions", "Images that infer wrote.")] = _EVALUATE[
        "predictions"
    ],
    labels: Annotated[Path, _option("labels", "Reference images that prepare wrote.")] = _EVALUATE[
        "labels"
    ],
    output_path: Annotated[
        Path, _option("output_path", "YAML to write, to be uploaded.")
    ] = _EVALUATE["output_path"],
    parameters_file: _Parameters = None,
    additional_files: Annotated[
        Path | None, _option("additional_files", f"Folder with train_data, or weights{_OPTIONAL}.")
    ] = None,
    local_outputs_path: Annotated[
        Path | None,
        _option("local_outputs_path", f"Folder for results that stay at the site{_OPTIONAL}."),
    ] = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Compare predictions with reference images."""
    setup_process(plugins, trust)
    from synthcube.medperf.evaluate import evaluate as task

    path = task(
        predictions, labels, output_path,
        parameters=_mounted(parameters_file, _EVALUATE["parameters_file"]),
        additional_files=_mounted(additional_files, _EVALUATE["additional_files"]),
        local_outputs_path=_mounted(local_outputs_path, _EVALUATE["local_outputs_path"]),
    )  # fmt: skip
    say(f"Results: {path}")


@_task("medperf run_script --model_files model --results_path results", "run_script")
def run_script(
    data_path: _Data = _SCRIPT["data_path"],
    labels_path: _Labels = _SCRIPT["labels_path"],
    model_files: Annotated[
        Path, _option("model_files", "Folder with the trained model.")
    ] = _SCRIPT["model_files"],
    results_path: Annotated[
        Path, _option("results_path", "Folder for results.yaml, to be uploaded.")
    ] = _SCRIPT["results_path"],
    parameters_file: _Parameters = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Make images with a model that is an asset, and compare them with reference images."""
    setup_process(plugins, trust)
    from synthcube.medperf.run_script import run_script as task

    path = task(
        data_path, labels_path, model_files, results_path,
        parameters_file=_mounted(parameters_file, _SCRIPT["parameters_file"]),
    )  # fmt: skip
    say(f"Results: {path}")


@_task("medperf demo -o demo.tar.gz --num 12")
def demo(
    output: Annotated[
        Path, typer.Option("--output_path", "-o", metavar="FILE", help=".tar.gz to write.")
    ],
    num: Annotated[
        int, typer.Option("--num", "-n", min=1, metavar="NUMBER", help="Subjects.")
    ] = 12,
    size: Annotated[
        str, typer.Option(metavar="SIDES", help="Voxels along each axis: 32x32 or 32x32x32.")
    ] = "32x32",
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Seed of the images.")] = 0,
) -> None:
    """Write a small data set of drawn shapes to try a benchmark with."""
    setup_process()
    from synthcube.medperf.package import write_demo

    sides = size.lower().split("x")
    if not all(re.fullmatch("[0-9]{1,6}", side) for side in sides):
        raise typer.BadParameter(f"{size}: write it as 32x32 or 32x32x32.", param_hint="--size")
    digest = write_demo(output, num=num, size=[int(side) for side in sides], seed=seed)
    say(f"Demo data: {output}\nSHA-256: {digest}")


_PlanFile = Annotated[Path, _option("plan_path", "Plan that generate_plan wrote.")]
_NodeCertificates = Annotated[
    Path, _option("node_cert_folder", "Folder with the own crt.crt and key.key.")
]
_Authority = Annotated[Path, _option("ca_cert_folder", "Folder with the authority's root.crt.")]
_Logs = Annotated[Path, _option("output_logs", "Folder for the training and the audit log.")]
_FirstStage = Annotated[
    Path | None, _option("additional_files", f"Folder with a trained first stage{_OPTIONAL}.")
]


@_task("medperf generate_plan --plan_path plan.yaml", "generate_plan")
def generate_plan(
    training_config_path: Annotated[
        Path, _option("training_config_path", "YAML of the config, the sites and the rounds.")
    ] = _PLAN["training_config_path"],
    aggregator_config_path: Annotated[
        Path, _option("aggregator_config_path", "YAML of address and port.")
    ] = _PLAN["aggregator_config_path"],
    plan_path: Annotated[Path, _option("plan_path", "YAML to write.")] = _PLAN["plan_path"],
    additional_files: _FirstStage = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write what all sites of a federated training have in common."""
    setup_process(plugins, trust)
    from synthcube.medperf.training import generate_plan as task

    digest = task(
        training_config_path, aggregator_config_path, plan_path,
        additional_files=_mounted(additional_files, _PLAN["additional_files"]),
    )  # fmt: skip
    say(f"Plan: {plan_path}, SHA-256 {digest}")


@_task("medperf start_aggregator --plan_path plan.yaml", "start_aggregator")
def start_aggregator(
    plan_path: _PlanFile = _AGGREGATE["plan_path"],
    collaborators: Annotated[
        Path, _option("collaborators", "YAML with the certificate of each site.")
    ] = _AGGREGATE["collaborators"],
    node_cert_folder: _NodeCertificates = _AGGREGATE["node_cert_folder"],
    ca_cert_folder: _Authority = _AGGREGATE["ca_cert_folder"],
    output_logs: _Logs = _AGGREGATE["output_logs"],
    output_weights: Annotated[
        Path, _option("output_weights", "Folder for the trained model.")
    ] = _AGGREGATE["output_weights"],
    report_path: Annotated[
        Path, _option("report_path", "YAML that says when it is done.")
    ] = _AGGREGATE["report_path"],
    parameters_file: _Parameters = None,
    additional_files: _FirstStage = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Average what the sites of a federated training send, until the last round."""
    setup_process(plugins, trust)
    from synthcube.medperf.training import start_aggregator as task

    folder = task(
        plan_path, collaborators, node_cert_folder, ca_cert_folder, output_logs, output_weights,
        report_path, parameters_file=_mounted(parameters_file, _AGGREGATE["parameters_file"]),
        additional_files=_mounted(additional_files, _AGGREGATE["additional_files"]),
    )  # fmt: skip
    say(f"Trained model: {folder}")


@_task("medperf train --data_path data --plan_path plan.yaml")
def train(
    data_path: _Data = _TRAIN["data_path"],
    labels_path: Annotated[
        Path, _option("labels_path", "Reference images; a training does not read them.")
    ] = _TRAIN["labels_path"],
    plan_path: _PlanFile = _TRAIN["plan_path"],
    node_cert_folder: _NodeCertificates = _TRAIN["node_cert_folder"],
    ca_cert_folder: _Authority = _TRAIN["ca_cert_folder"],
    output_logs: _Logs = _TRAIN["output_logs"],
    parameters_file: _Parameters = None,
    additional_files: _FirstStage = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train on the prepared images of a site, and send weights and counts."""
    setup_process(plugins, trust)
    from synthcube.medperf.training import train as task

    folder = task(
        data_path, plan_path, node_cert_folder, ca_cert_folder, output_logs,
        parameters_file=_mounted(parameters_file, _TRAIN["parameters_file"]),
        additional_files=_mounted(additional_files, _TRAIN["additional_files"]),
    )  # fmt: skip
    say(f"Trained: {folder}")


@_task("medperf get_experiment_status --plan_path plan.yaml", "get_experiment_status")
def get_experiment_status(
    plan_path: _PlanFile = _STATUS["plan_path"],
    node_cert_folder: _NodeCertificates = _STATUS["node_cert_folder"],
    ca_cert_folder: _Authority = _STATUS["ca_cert_folder"],
    output_status_file: Annotated[
        Path, _option("output_status_file", "YAML to write.")
    ] = _STATUS["output_status_file"],
) -> None:  # fmt: skip
    """Write where a federated training stands, as its administrator."""
    setup_process()
    from synthcube.medperf.training import get_experiment_status as task

    say(task(plan_path, node_cert_folder, ca_cert_folder, output_status_file).rstrip())


@command(MODELS, "package -m run -o container")
def package(
    model: Model,
    output: Output,
    image: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SETTINGS,
            help="Name of the container's image, in a registry.",
        ),
    ] = IMAGE,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write a trained model as a container that can be registered with MedPerf."""
    setup_process(plugins, trust)
    from synthcube.medperf.package import package as task

    folder = task(located(model), output, image=image)
    say(f"Package: {folder}\nIts README.md says how to register it.")
