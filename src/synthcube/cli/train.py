"""The command train: with a YAML, with several one after the other, or with a plan of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthcube.cli.app import (
    MODELS,
    SETTINGS,
    Configs,
    Data,
    Hours,
    Output,
    Override,
    Plugins,
    Trust,
    command,
    option,
    say,
    setup_process,
)


@command(MODELS, "train -d images -o run")
def train(
    data: Data,
    output: Output,
    config: Configs = [],  # noqa: B006  # Typer copies it
    hours: Hours = None,
    resume: Annotated[
        str,
        option(SETTINGS, "auto continues a run; never refuses one; or a checkpoint's path.", "HOW"),
    ] = "auto",
    debug: Annotated[
        bool, option(SETTINGS, "Only try a few batches of every step; keep nothing.", "", "--debug")
    ] = False,
    accept_changes: Annotated[
        bool,
        option(
            SETTINGS, "Continue a run although keys that matter changed.", "", "--accept_changes"
        ),
    ] = False,
    overrides: Override = [],  # noqa: B006  # Typer copies it
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train a model; the same command again continues where it stopped."""
    setup_process(plugins, trust)
    if hours:
        overrides = [*overrides, f"training.max_minutes={hours * 60:g}"]
    if not config:
        _train_as_planned(data, output, hours, overrides, resume, accept_changes, debug)
    elif len(config) > 1:
        options = ["--resume", resume, *(["--debug"] if debug else [])]
        options += ["--accept_changes"] if accept_changes else []
        options += [word for folder in plugins for word in ("--plugins", str(folder))]
        options += [word for name in trust for word in ("--trust", name)]
        _train_series(config, data, output, overrides, options)
    elif debug:
        _try(config[0], data, output, overrides)
    else:
        _train(config[0], data, output, overrides, resume, accept_changes)


def _try(config: Path, data: Path, output: Path, overrides: list[str]) -> None:
    from synthcube.tasks.trial import trial

    for line in trial(config, data, output, overrides=overrides):
        say(line)


def _train(
    config: Path, data: Path, output: Path, overrides: list[str], resume: str, accept_changes: bool
) -> None:
    from synthcube.tasks.train import train as task

    folder = task(
        config, data, output, overrides=overrides, resume=resume, accept_changes=accept_changes
    )
    if folder:
        say(f"Trained model: {folder}")


def _train_as_planned(
    data: Path, output: Path, hours: float | None, overrides: list[str], resume: str,
    accept_changes: bool, debug: bool,
) -> None:  # fmt: skip
    """Train with the plan in the run folder, which is written first if there is none."""
    from synthcube import storage
    from synthcube.cli.data import show_plan  # here, as imports decide the order of commands
    from synthcube.planning.draft import PlanRequest
    from synthcube.tasks import plan

    request = PlanRequest(hours=hours, overrides=tuple(overrides))
    if debug:
        with storage.scratch_folder() as folder:
            planned = plan.plan(data, request, timed=False)
            plan.write(planned, folder / plan.PLAN)
            _try(folder / plan.PLAN, data, output, overrides)
        return
    config = plan.config_of_run(data, output, request, show_plan)
    _train(config, data, output, overrides, resume, accept_changes)


def _train_series(
    configs: list[Path], data: Path, output: Path, overrides: list[str], options: list[str]
) -> None:
    from synthcube.tasks.series import exit_code, train_series

    outcomes = train_series(configs, data, output, overrides=overrides, options=options)
    for outcome in outcomes:
        say(f"{outcome.run}: {outcome.text}")
    raise typer.Exit(exit_code(outcomes))
