"""The command line itself: its settings, its exit codes, and the options that commands share."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer

from synthcube import __version__
from synthcube.errors import ConfigError, PreemptedError, SynthCubeError
from synthcube.escapes import hidden_in, visible
from synthcube.interruption import INTERRUPTED

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


def check_words(words: Sequence[str], app: typer.Typer) -> None:
    """Refuse what a terminal would obey, what is not UTF-8 and could be written to no record, and
    an empty path, which would be the folder that one is in.

    Raises:
        ConfigError: all such words.
    """
    faults = [
        f"{visible(word)[:120]}: it holds {hidden}; rename the file or folder"
        for word in words
        if (hidden := hidden_in(word))
    ]
    if "" in words or any(word.endswith("=") for word in words):
        faults += [f"{name}: the path is empty" for name in _empty(words, {*_path_options(app)})]
    if faults:
        raise ConfigError("The command line holds what cannot be used:", faults)


def _empty(words: Sequence[str], path_options: set[str]) -> Iterator[str]:
    """What has an empty path: an option, or an argument, by the word before it."""
    for before, word in zip(["", *words], words, strict=False):
        option = before if word == "" else word.removesuffix("=") if word.endswith("=") else None
        if option is None:
            continue
        name = "--" + option[2:].replace("-", "_") if option.startswith("--") else option
        if name in path_options or (word == "" and not option.startswith("-")):
            yield option


def _path_options(app: typer.Typer) -> Iterator[str]:
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and _holds_path(get_args(hint)[0]):
                yield from getattr(get_args(hint)[1], "param_decls", None) or (f"--{name}",)
    for group in app.registered_groups:
        if group.typer_instance:
            yield from _path_options(group.typer_instance)


def _holds_path(kind: Any) -> bool:
    return kind is Path or any(_holds_path(part) for part in get_args(kind))


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
    from synthcube import environment, plugins

    environment.keep_out_current_folder()
    environment.calm_threads()
    environment.name_user()
    environment.open_log()
    plugins.vouch(plugin_folders, trusted)
    environment.keep_caches_private()
    environment.ready_hub()


def located(model: Path) -> Path:
    """The folder of a model, which is downloaded where it is named by its address on a Hub.

    Every command that takes a model takes it through here; what is below sees a folder.
    """
    if not str(model).startswith("hf:"):
        return model
    from synthcube.sharing import hub

    return hub.located(model)


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
