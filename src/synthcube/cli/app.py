"""The command line itself: its settings, its exit codes, and what every command begins with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from synthcube import __version__
from synthcube.errors import PreemptedError, SynthCubeError

app = typer.Typer(
    name="synthcube",
    help="Train, sample, judge and share generative models of medical images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Spelled as MLCube and the YAML spell them; --data-path is --data_path.
    context_settings={
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "help_option_names": ["-h", "--help"],
    },
)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run one of the commands; each has its own --help."""


def begin(plugin_folders: Sequence[Path] = (), trusted: Sequence[str] = ()) -> None:
    """Ready this process for a task; to be called before anything heavy is imported.

    Args:
        plugin_folders: whose code the user vouches for.
        trusted: packages likewise.
    """
    from synthcube import plugins, runtime

    runtime.keep_out_current_folder()
    runtime.calm_threads()
    runtime.name_user()
    runtime.ready_hub()
    runtime.open_log()
    plugins.vouch(plugin_folders, trusted)


def located(model: Path) -> Path:
    """The folder of a model, which is downloaded where it is named by its address on a Hub.

    Every command that takes a model takes it through here; what is below sees a folder.
    """
    if not str(model).startswith("hf:"):
        return model
    from synthcube.export import pull

    return pull.located(model)


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        app()
    except SynthCubeError as error:
        title = "stopped" if isinstance(error, PreemptedError) else "error"
        print(f"{title}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except PermissionError as error:
        print(f"error: {error.filename}: this user has no permission.", file=sys.stderr)
        raise SystemExit(2) from error
