"""The command line: few commands, few flags, a YAML for the rest.

Nothing heavy is imported before a command runs. A user's fault prints its message and exits with
code 2; anything else is a bug of SynthCube, with its traceback and code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from synthcube import __version__
from synthcube.errors import SynthCubeError

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

Config = Annotated[
    Path, typer.Option("--config", "-c", "--parameters_file", help="YAML of the run.")
]
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
    typer.Option("--data_path", "-d", help="Images to reconstruct, instead of generating."),
]
Output = Annotated[Path, typer.Option("--output_path", "-o", help="Folder to write to.")]
Model = Annotated[
    Path, typer.Option("--model_path", "-m", help="Run folder, or the folder of an artifact.")
]
Override = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the YAML.")
]
Plugins = Annotated[
    list[Path], typer.Option("--plugins", help="Folder with your own families or transforms.")
]


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


@app.command()
def train(
    config: Config,
    data: Data,
    output: Output,
    resume: Annotated[
        str, typer.Option(help="auto continues a run; never refuses one; or a checkpoint's path.")
    ] = "auto",
    overrides: Override = [],  # noqa: B006  # Typer copies it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Train a model; the same command again continues where it stopped."""
    _prepare(plugins)
    from synthcube.tasks.train import train as task

    folder = task(config, data, output, overrides=overrides, resume=resume)
    if folder:
        print(f"Trained model: {folder}")


@app.command()
def infer(
    model: Model,
    output: Output,
    num_images: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--num_images", "-n", help="Images to generate: 8, or Hand=5,HeadCT=3."),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed of the images.")] = None,  # noqa: UP045
    data: OptionalData = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--batch_size", min=1, help="Images made at once."),
    ] = None,
    config: OptionalConfig = None,
    condition: Annotated[
        list[str], typer.Option(help="What all images follow, as in Label=Hand; repeatable.")
    ] = [],  # noqa: B006
    conditions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="CSV of what each image follows, in place of a number."),
    ] = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Generate images, or reconstruct or translate those given."""
    _prepare(plugins)
    from synthcube.tasks.infer import infer as task

    picture = task(
        model, output, num_images=num_images, seed=seed, data_path=data, batch_size=batch_size,
        config_path=config, conditions=condition, conditions_path=conditions,
    )  # fmt: skip
    print(f"Images: {output / 'images'}\nPicture: {picture}")


@app.command()
def export(model: Model, output: Output) -> None:
    """Verify a trained model and write a self-contained folder to share."""
    _prepare([])
    from synthcube.tasks.export import export as task

    print(f"Exported model: {task(model, output)}")


@app.command()
def prepare(
    data: Annotated[Path, typer.Option("--data_path", "-d", help="Folder of images.")],
    output: Annotated[Path, typer.Option("--output_path", "-o", help="Folder or .csv to write.")],
    paradigm: Annotated[
        Literal["unlabeled", "patient", "custom"],
        typer.Option(help="Classes: none, one for each patient, or one for each folder."),
    ] = "unlabeled",
    channels: Annotated[
        str, typer.Option(help="Name patterns of the channels, in order: t1,t2,flair.")
    ] = "",
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share held out.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share kept for tests.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every image, and leave out what cannot be used.")
    ] = False,
) -> None:
    """Make a manifest CSV from a folder of images."""
    _prepare([])
    from synthcube.data.preparation import prepare as task

    fault_of = None
    if verify:
        from synthcube.data.images import image_fault

        fault_of = image_fault
    patterns = [each.strip() for each in channels.split(",") if each.strip()]
    found = task(
        data, output, paradigm=paradigm, channels=patterns,
        validation=validation, test=test, seed=seed, fault_of=fault_of,
    )  # fmt: skip
    print(f"Manifest: {found.manifest_path}")
    print(f"{found.rows} images of {found.subjects} subjects")
    for title, counts in (("Classes", found.labels), ("Splits", found.splits)):
        if counts:
            print(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    for path, reason in found.left_out:
        print(f"Left out: {path}: {reason}")


@app.command()
def check(config: Config, data: Data, overrides: Override = [], plugins: Plugins = []) -> None:  # noqa: B006
    """Find everything that could fail later, before any training."""
    _prepare(plugins)
    from synthcube.tasks.check import check as task

    for line in task(config, data, overrides=overrides):
        print(line)
    print("Ready to train.")


@app.command()
def init(
    family: Annotated[str, typer.Argument(help="Name of a family.")] = "rectified_flow",
    dims: Annotated[int, typer.Option(min=2, max=3, help="Spatial axes of the images.")] = 2,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Print a commented YAML with every key and its default."""
    _prepare(plugins)
    from synthcube.tasks.describe import starting_yaml

    print(starting_yaml(family, dims), end="")


@app.command()
def families() -> None:
    """List the families of models."""
    from synthcube.tasks.describe import family_lines

    for line in family_lines():
        print(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    from synthcube.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def self_check() -> None:
    """Train, infer and export in a temporary folder: does this installation work?"""
    _prepare([])
    from synthcube.tasks.self_check import self_check as task

    for line in task():
        print(line, flush=True)
    print("self-check passed")


@app.command(hidden=True)
def specs(write: Annotated[Path, typer.Option(help="Folder of mlcube.yaml.")]) -> None:
    """Write the description of the container that MLCube reads."""
    from synthcube.specs import write_specs

    print(f"Written: {write_specs(write)}")


def _prepare(plugin_folders: list[Path]) -> None:
    from synthcube import plugins, runtime

    runtime.calm_threads()
    runtime.name_user()
    runtime.open_log()
    plugins.add_folders(plugin_folders)


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        app()
    except SynthCubeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except PermissionError as error:
        print(f"error: {error.filename}: this user has no permission.", file=sys.stderr)
        raise SystemExit(2) from error
