"""The command that a challenge's container runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from synthcube.cli.app import (
    FILES,
    MODELS,
    OptionalConfig,
    Override,
    Plugins,
    Trust,
    command,
    located,
    option,
    say,
    setup_process,
)


@command(MODELS, "challenge -m container -d cases -o predictions")
def challenge(
    task: Annotated[
        Literal["infer"], typer.Argument(metavar="[infer]", help="May be left out.")
    ] = "infer",
    model: Annotated[
        Path,
        option(
            FILES, "What export --challenge wrote.",
            "FOLDER", "--model_path -m", show_default=True,
        ),
    ] = Path("/challenge"),
    data: Annotated[
        Path,
        option(
            FILES, "Folders of cases; nothing is written into it.",
            "FOLDER", "--data_path -d", show_default=True,
        ),
    ] = Path("/input"),
    output: Annotated[
        Path,
        option(
            FILES, "Folder for one file of each case.",
            "FOLDER", "--output_path -o", show_default=True,
        ),
    ] = Path("/output"),
    weights: Annotated[
        Path | None,
        option(
            FILES, "Another such folder, or a trained model, in place of --model_path.", "FOLDER"
        ),
    ] = None,
    config: OptionalConfig = None,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:  # fmt: skip
    """Make the missing image, or the missing part, of every case of a challenge."""
    setup_process(plugins, trust)
    from synthcube.tasks.challenge import run_challenge

    paths = run_challenge(
        model, data, output,
        weights=located(weights) if weights else None, config=config, overrides=overrides,
    )  # fmt: skip
    say(f"Written: {len(paths)} files in {output}")
