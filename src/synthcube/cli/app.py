"""The command line itself: its settings, its exit codes, and what every command begins with."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from synthcube import __version__
from synthcube.cli.words import check_words
from synthcube.errors import PreemptedError, SynthCubeError
from synthcube.escapes import visible
from synthcube.interruption import INTERRUPTED

_LONGEST_NAME = 200
_UNREAD = 141  # 128 + SIGPIPE, as other programs end whose output goes to `head`

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
    runtime.open_log()
    plugins.vouch(plugin_folders, trusted)
    runtime.keep_caches_private()
    runtime.ready_hub()


def located(model: Path) -> Path:
    """The folder of a model, which is downloaded where it is named by its address on a Hub.

    Every command that takes a model takes it through here; what is below sees a folder.
    """
    if not str(model).startswith("hf:"):
        return model
    from synthcube.export import pull

    return pull.located(model)


def main() -> None:
    """Run the command line, and end with the exit code that its outcome has."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may have letters that a terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:], app)
        app()
    except PreemptedError as stop:
        print(visible(f"stopped: {stop}"), file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except SynthCubeError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except (OSError, RuntimeError) as error:
        if not (fault := _fault_of_a_path(error)):
            raise
        print(visible(f"error: {fault}."), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        raise SystemExit(INTERRUPTED) from stop
    except SystemExit as end:
        raise SystemExit(_exit_code(end)) from end


def _fault_of_a_path(error: OSError | RuntimeError) -> str:
    """What is wrong with a path that the system refuses; empty where it is something else."""
    if isinstance(error, PermissionError):
        return f"{_shortened(error.filename)}: this user has no permission"
    if isinstance(error, OSError):
        return f"{_shortened(error.filename)}: {error.strerror}" if error.filename else ""
    # pathlib's word for links that lead to one another, before Python 3.13
    return str(error) if str(error).startswith("Symlink loop") else ""


def say(line: str, end: str = "\n") -> None:
    """Print what a command has to tell; names of others in it give no orders to a terminal."""
    print(visible(line), end=end, flush=True)


def _shortened(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _exit_code(end: SystemExit) -> int:
    """What a command ends with that Typer or Lightning has ended, or whose output nobody reads."""
    reasons = list(_chain(end))
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError as error:
        reasons.append(error)
    if any(isinstance(reason, KeyboardInterrupt) for reason in reasons):
        return INTERRUPTED
    if any(isinstance(reason, BrokenPipeError) for reason in reasons):
        # What is left in Python's buffers would break the pipe once more at the very end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        return _UNREAD
    return int(end.code or 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__
