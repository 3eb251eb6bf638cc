"""The command that shares a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from synthcube.cli.app import app, begin, located
from synthcube.cli.options import Model, Output, Plugins


@app.command()
def export(
    model: Model,
    output: Output,
    evaluation: Annotated[
        Optional[Path],  # noqa: UP045  # Typer on Python 3.10 evaluates this
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
        str, typer.Option("--model_version", help="Version of the model, its tag on a Hub.")
    ] = "1.0.0",
    push_to: Annotated[
        str, typer.Option("--push_to", metavar="OWNER/NAME", help="Publish it there, on a Hub.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="For everyone to see; private otherwise.")
    ] = False,
    revision: Annotated[str, typer.Option(help="Branch to push to.")] = "main",
    commit_message: Annotated[
        str, typer.Option("--commit_message", help="What the commit says.")
    ] = "",
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Verify a trained model and write a folder to share; publish it, if you say where."""
    begin(plugins)
    from synthcube import addresses
    from synthcube.errors import ConfigError
    from synthcube.tasks.export import export as task

    place = str(addresses.Address(addresses.repo_id(push_to))) if push_to else ""
    if push_to and not license_id:
        raise ConfigError(
            "--push_to needs a license, and none is ever assumed: say which, as in --license "
            "apache-2.0; it must be one that the owners of the training images allow."
        )
    folder = task(
        located(model), output, evaluation=evaluation, license_id=license_id, datasets=dataset,
        notes=notes, version=model_version, place=place,
    )  # fmt: skip
    print(f"Exported model: {folder}")
    if not license_id:
        print("No license is stated (--license): without one nobody else may use the model.")
    if push_to:
        from synthcube.export.push import push

        address, is_new = push(
            folder, push_to, public=public, revision=revision, message=commit_message
        )
        print(f"{'Published' if is_new else 'Already published, nothing to do'}: {address}")
