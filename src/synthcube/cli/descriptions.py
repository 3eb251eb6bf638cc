"""The commands that tell: what can be said, and whether this installation works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from synthcube.cli.app import app, begin, say
from synthcube.cli.options import Plugins, Trust
from synthcube.specs import IMAGE


@app.command()
def init(
    family: Annotated[str, typer.Argument(help="Name of a family.")] = "rectified_flow",
    dims: Annotated[int, typer.Option(min=2, max=3, help="Spatial axes of the images.")] = 2,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Print a commented YAML with every key and its default."""
    begin(plugins, trust)
    from synthcube.tasks.describe import starting_yaml

    say(starting_yaml(family, dims), end="")


@app.command()
def families() -> None:
    """List the families of models."""
    from synthcube.tasks.describe import family_lines

    for line in family_lines():
        say(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    from synthcube.config import json_schema

    say(json.dumps(json_schema(), indent=2))


@app.command()
def self_check() -> None:
    """Train, infer, evaluate and export in a temporary folder: does this installation work?"""
    begin()
    from synthcube.tasks.self_check import self_check as task

    for line in task():
        say(line)
    say("self-check passed")


@app.command()
def specs(
    write: Annotated[Path, typer.Option(help="Folder to write.")],
    image: Annotated[str, typer.Option(help="Name of the container's image.")] = IMAGE,
) -> None:
    """Write the descriptions of the container that MLCube and MedPerf read."""
    from synthcube.specs import write_specs

    for path in write_specs(write, image):
        say(f"Written: {path}")
