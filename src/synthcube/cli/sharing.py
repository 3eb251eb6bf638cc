"""The command that shares a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from synthcube.cli.app import app, begin, located, say
from synthcube.cli.options import Model, Output, Plugins, Trust


@app.command()
def export(
    model: Model,
    output: Output,
    config: Annotated[
        Optional[Path],  # noqa: UP045  # Typer on Python 3.10 evaluates this
        typer.Option("--config", "-c", "--parameters_file", help="YAML with a section `export`."),
    ] = None,
    evaluation: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="results.yaml of synthcube evaluate, for the card's table."),
    ] = None,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the model: apache-2.0, cc-by-nc-4.0, ...")
    ] = "",
    dataset: Annotated[
        list[str], typer.Option(help="Name on a Hub of what it was trained on; repeatable.")
    ] = [],  # noqa: B006
    notes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Markdown of yours for the card: authors, data, limits."),
    ] = None,
    model_version: Annotated[
        str, typer.Option("--model_version", help="Version of the model, its tag on a Hub: 1.0.0.")
    ] = "",
    runtime: Annotated[
        list[str],
        typer.Option(help="Convert the networks for it as well: onnx, openvino; repeatable."),
    ] = [],  # noqa: B006
    runtime_weights: Annotated[
        Optional[Literal["float32", "float16", "int8"]],  # noqa: UP045
        typer.Option("--runtime_weights", help="How converted weights are stored: float32."),
    ] = None,
    push_to: Annotated[
        str, typer.Option("--push_to", metavar="OWNER/NAME", help="Publish it there, on a Hub.")
    ] = "",
    public: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--public/--private", help="For everyone to see; private by default."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch to push to: main.")] = "",
    commit_message: Annotated[
        str, typer.Option("--commit_message", help="What the commit says.")
    ] = "",
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Verify a trained model and write a folder to share; publish it, if you say where."""
    begin(plugins, trust)
    from synthcube.tasks.export import export as task
    from synthcube.tasks.publication import place, present, publication

    given = {
        "license": license_id, "datasets": tuple(dataset), "version": model_version,
        "runtimes": tuple(runtime), "runtime_weights": runtime_weights, "push_to": push_to,
        "public": public, "revision": revision,
        "commit_message": commit_message,
    }  # fmt: skip
    said = publication(config, given)
    folder = task(
        located(model), output, evaluation=present(evaluation), license_id=said.license,
        datasets=said.datasets, notes=notes or said.notes, version=said.version, place=place(said),
        for_runtimes=said.runtimes, runtime_weights=said.runtime_weights,
    )  # fmt: skip
    say(f"Exported model: {folder}")
    if not said.license:
        say("No license is stated (--license): without one nobody else may use the model.")
    if said.push_to:
        from synthcube.export.push import push

        address, is_new = push(
            folder, said.push_to,
            public=said.public, revision=said.revision, message=said.commit_message,
        )  # fmt: skip
        say(f"{'Published' if is_new else 'Already published, nothing to do'}: {address}")
