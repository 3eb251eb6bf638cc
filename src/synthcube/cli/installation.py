"""The commands for an installation and its containers: self-check and specs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from synthcube.cli.app import FILES, INSTALLATION, SETTINGS, command, option, say, setup_process
from synthcube.containers import IMAGE


@command(INSTALLATION, "self-check")
def self_check() -> None:
    """Train, infer, evaluate and export in a temporary folder: does this installation work?"""
    setup_process()
    from synthcube.tasks.self_check import self_check as task

    for line in task():
        say(line)
    say("self-check passed")


@command(INSTALLATION, "specs --write mlcube")
def specs(
    write: Annotated[Path, option(FILES, "Folder to write.", "FOLDER")],
    image: Annotated[str, option(SETTINGS, "Name of the container's image.", "NAME")] = IMAGE,
) -> None:
    """Write the descriptions of the container that MLCube and MedPerf read."""
    from synthcube.containers import write_specs

    for path in write_specs(write, image):
        say(f"Written: {path}")
