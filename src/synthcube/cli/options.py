"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Config = Annotated[
    Path, typer.Option("--config", "-c", "--parameters_file", help="YAML of the run.")
]
Configs = Annotated[
    list[Path],
    typer.Option(
        "--config", "-c", "--parameters_file",
        help="YAML of the run; several: each is trained into the output folder's own of its name.",
    ),
]  # fmt: skip
OptionalConfig = Annotated[
    Optional[Path],  # noqa: UP045  # Typer on Python 3.10 evaluates this
    typer.Option("--config", "-c", "--parameters_file", help="YAML of seed, sampling, compute."),
]
Data = Annotated[
    Path,
    typer.Option("--data_path", "-d", help="CSV, folder with manifest.csv, or folder of images."),
]
OptionalData = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--data_path", "-d", help="Images to reconstruct or translate."),
]
Output = Annotated[Path, typer.Option("--output_path", "-o", help="Folder to write to.")]
Model = Annotated[
    Path,
    typer.Option(
        "--model_path", "-m",
        help="Run folder, folder of an artifact, or hf://owner/name[@revision].",
    ),
]  # fmt: skip
Override = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the YAML.")
]
Plugins = Annotated[
    list[Path],
    typer.Option("--plugins", help="Folder of code that may run where a model or YAML names it."),
]
Trust = Annotated[
    list[str],
    typer.Option("--trust", help="Installed package of code that may run where one names it."),
]
