"""The Typer app: options that commands share, set-up of the process, and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from synthcube import __version__, terminal
from synthcube.errors import ConfigError, PreemptedError, SynthCubeError
from synthcube.escapes import hidden_in, visible
from synthcube.interruption import INTERRUPTED

# The panels of the list of commands, and of a command's help.
MODELS, DATA, INSTALLATION = "Models", "Data and config", "Installation and containers"
FILES, SETTINGS, CODE = "Files", "Settings", "Code that may run"
BUDGET = "Machine and budget"


def option(panel: str, text: str, metavar: str = "", names: str = "", **settings: Any) -> Any:
    """What :func:`typer.Option` returns.

    Args:
        panel: heading in the command's help.
        text: its help.
        metavar: what its value is, as in FILE; empty for a flag.
        names: as in "--config -c"; empty: that of the parameter.
        settings: of typer.Option.
    """
    return typer.Option(
        *names.split(), metavar=metavar or None, rich_help_panel=panel, help=text, **settings
    )


_CONFIG = "--config -c --parameters_file"
Config = Annotated[Path, option(FILES, "YAML of the run.", "FILE", _CONFIG)]
Configs = Annotated[
    list[Path],
    option(
        FILES,
        "YAML of the run; without one, synthcube plan makes it; with several, each is trained "
        "into a subfolder of its name.",
        "FILE",
        _CONFIG,
    ),
]
OptionalConfig = Annotated[
    Path | None, option(FILES, "YAML of seed, sampling, compute.", "FILE", _CONFIG)
]
Data = Annotated[
    Path,
    option(FILES, "CSV, folder with manifest.csv, or folder of images.", "PATH", "--data_path -d"),
]
OptionalData = Annotated[
    Path | None,
    option(
        FILES,
        "Images to reconstruct or translate; or a finished run: the ones that it held out.",
        "PATH",
        "--data_path -d",
    ),
]
Output = Annotated[Path, option(FILES, "Folder to write to.", "FOLDER", "--output_path -o")]
Model = Annotated[
    Path,
    option(
        FILES,
        "Run folder, folder of an artifact, hf://owner/name or hf://owner/name@revision.",
        "MODEL",
        "--model_path -m",
    ),
]
Override = Annotated[
    list[str], option(SETTINGS, "Override a key of the YAML; repeatable.", "KEY=VALUE", "--set")
]
_MOST_HOURS = 87_600.0  # ten years


def _checked_hours(hours: float | None) -> float | None:
    if hours is not None and not 0 < hours <= _MOST_HOURS:
        raise ConfigError(f"--hours {hours:g}: above 0, and at most {_MOST_HOURS:g}, is possible.")
    return hours


Hours = Annotated[
    float | None,
    option(BUDGET, "Time that the training may take.", "NUMBER", callback=_checked_hours),
]
Plugins = Annotated[
    list[Path],
    option(CODE, "Folder whose code a model or a YAML may run; repeatable.", "FOLDER", "--plugins"),
]
Trust = Annotated[
    list[str],
    option(
        CODE,
        "Installed package whose code a model or a YAML may run; repeatable.",
        "PACKAGE",
        "--trust",
    ),
]

_LONGEST_NAME = 200
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as other programs do when `head` closes their output


class _Command(TyperCommand):
    """A command whose help says what a value is (FILE), in place of its type (<list[Path]>)."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        panels = {getattr(parameter, "rich_help_panel", None) for parameter in parameters}
        for parameter in parameters:
            _hide_type(parameter)
            if parameter.name == "help" and SETTINGS in panels:
                parameter.rich_help_panel = SETTINGS
        return parameters


class Group(TyperGroup):
    """The list of commands, likewise without types."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            _hide_type(parameter)
        return parameters


def _hide_type(parameter: Any) -> None:
    if isinstance(parameter, TyperArgument):  # Typer shows its type beside its name
        vars(parameter)["display_type_rich"] = lambda ctx: ""
    elif parameter.metavar is None:
        parameter.metavar = ""  # of a flag


app = typer.Typer(
    cls=Group,
    name="synthcube",
    help="Train, sample, judge and share generative models of medical images.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Example: synthcube train -d images -o run",
    # Spelled as MLCube and the YAML spell them; --data-path is --data_path.
    context_settings={
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "help_option_names": ["-h", "--help"],
    },
)

Function = TypeVar("Function", bound=Callable[..., None])


def command(
    panel: str, example: str, name: str | None = None, of: typer.Typer = app
) -> Callable[[Function], Function]:
    """A decorator that makes a function a command; its name is that of the function.

    Args:
        panel: heading in the list of commands.
        example: words after "synthcube", which the help shows.
        of: the group that gets the command.
    """
    return of.command(
        name, cls=_Command, rich_help_panel=panel, epilog=f"Example: synthcube {example}"
    )


def _version(is_requested: bool) -> None:
    if is_requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run one of the commands; each has its own --help."""


def setup_process(plugin_folders: Sequence[Path] = (), trusted: Sequence[str] = ()) -> None:
    """Set up threads, log, caches and plugins; call it before anything heavy is imported.

    Args:
        plugin_folders: folders whose code may run.
        trusted: installed packages whose code may run.
    """
    from synthcube import environment, plugins

    environment.keep_out_current_folder()
    environment.calm_threads()
    environment.delay_garbage_collection()
    environment.name_user()
    environment.open_log()
    plugins.vouch(plugin_folders, trusted)
    environment.keep_caches_private()
    environment.ready_hub()


def located(model: Path) -> Path:
    """The folder of a model; a model on a Hub is downloaded first.

    Every command passes its --model_path through here, so that the tasks only see folders.
    """
    if not str(model).startswith("hf:"):
        return model
    from synthcube.sharing import hub

    return hub.located(model)


def say(line: str, style: str = "", end: str = "\n") -> None:
    """Print a line with control characters escaped: it may hold names that others chose.

    Args:
        style: its colour on a terminal, as in "green".
    """
    terminal.print_line(visible(line), style, end=end)


def _complain(text: str, style: str = "red") -> None:
    """Print a line about what went wrong, once the bar is gone."""
    terminal.clear()
    terminal.print_line(visible(text), style, to_stderr=True)


# The base of typer.BadParameter, which Typer does not name.
_UsageFault: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def main() -> None:
    """Run the command line and exit with the code of its outcome; see errors.py."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal can print every name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:], app)
        # Typer would draw a box around its errors, which breaks paths in two.
        raise SystemExit(app(prog_name="synthcube", standalone_mode=False) or 0)
    except _UsageFault as fault:
        _explain(fault)
        raise SystemExit(fault.exit_code) from fault
    except PreemptedError as stop:
        _complain(f"stopped: {stop}", "yellow")
        raise SystemExit(stop.exit_code) from stop
    except SynthCubeError as error:
        _complain(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except (OSError, RuntimeError) as error:
        if not (path_fault := _path_fault(error)):
            raise
        _complain(f"error: {path_fault}.")
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        raise SystemExit(INTERRUPTED) from stop
    except SystemExit as end:
        raise SystemExit(_exit_code(end)) from end
    finally:
        terminal.clear()


def _explain(fault: Any) -> None:
    """Print the usage that an error of the command line comes with, and the error in red."""
    text = io.StringIO()
    fault.show(file=text)
    usage, error, message = text.getvalue().rstrip("\n").rpartition("Error: ")
    sys.stderr.write(usage)
    _complain(f"{error}{message}")


def _path_fault(error: OSError | RuntimeError) -> str:
    """Message for an error of a path; empty where the error is another one."""
    if isinstance(error, PermissionError):
        return f"{_shortened(error.filename)}: this user has no permission"
    if isinstance(error, OSError) and error.filename:
        return f"{_shortened(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _discard_output()
        return f"standard output: {error.strerror}"
    # how pathlib reports symlinks in a circle before Python 3.13
    return str(error) if str(error).startswith("Symlink loop") else ""


def _shortened(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _exit_code(end: SystemExit) -> int:
    """Exit code of a command that Typer or Lightning ended, or whose output nobody reads."""
    reasons = list(_chain(end))
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError as error:
        reasons.append(error)
    if end.code == INTERRUPTED or any(isinstance(reason, KeyboardInterrupt) for reason in reasons):
        _complain("stopped: Ctrl-C.", "yellow")
        return INTERRUPTED
    if any(isinstance(reason, BrokenPipeError) for reason in reasons):
        _discard_output()
        return _BROKEN_PIPE
    return int(end.code or 0)


def _discard_output() -> None:
    """Let what is left in Python's buffers go nowhere: it would be written again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def check_words(words: Sequence[str], app: typer.Typer) -> None:
    """Refuse control characters, text that is not UTF-8, and empty paths.

    An empty path would mean the current folder; other text could not be written to a record.

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
    """The options with an empty path; for an argument, the word before it."""
    for before, word in zip(["", *words], words, strict=False):
        spelling = before if word == "" else word.removesuffix("=") if word.endswith("=") else None
        if spelling is None:
            continue
        name = "--" + spelling[2:].replace("-", "_") if spelling.startswith("--") else spelling
        if name in path_options or (word == "" and not spelling.startswith("-")):
            yield spelling


def _path_options(app: typer.Typer) -> Iterator[str]:
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and _holds_path(get_args(hint)[0]):
                yield from getattr(get_args(hint)[1], "param_decls", None) or (f"--{name}",)
    for group in app.registered_groups:
        if group.typer_instance:
            yield from _path_options(group.typer_instance)


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(_holds_path(part) for part in get_args(hint))
