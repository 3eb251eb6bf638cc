"""The commands of the command line, except those of MedPerf's containers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from synthcube.cli.app import (
    Config,
    Configs,
    Data,
    Model,
    OptionalConfig,
    OptionalData,
    Output,
    Override,
    Plugins,
    Trust,
    app,
    begin,
    located,
    say,
)
from synthcube.sharing.runtimes import NAMES as RUNTIMES
from synthcube.sharing.runtimes import RuntimeOrTorch, Weights
from synthcube.specs import IMAGE


@app.command()
def train(
    config: Configs,
    data: Data,
    output: Output,
    resume: Annotated[
        str, typer.Option(help="auto continues a run; never refuses one; or a checkpoint's path.")
    ] = "auto",
    debug: Annotated[
        bool, typer.Option("--debug", help="Only try a few batches of everything; keep nothing.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept_changes", help="Continue a run although keys that matter changed."),
    ] = False,
    overrides: Override = [],  # noqa: B006  # Typer copies it
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train a model; the same command again continues where it stopped."""
    begin(plugins, trust)
    if len(config) > 1:
        options = ["--resume", resume, *(["--debug"] if debug else [])]
        options += ["--accept_changes"] if accept_changes else []
        options += [word for folder in plugins for word in ("--plugins", str(folder))]
        options += [word for name in trust for word in ("--trust", name)]
        _train_series(config, data, output, overrides, options)
    elif debug:
        from synthcube.tasks.trial import trial

        for line in trial(config[0], data, output, overrides=overrides):
            say(line)
    else:
        from synthcube.tasks.train import train as task

        folder = task(
            config[0], data, output,
            overrides=overrides, resume=resume, accept_changes=accept_changes,
        )  # fmt: skip
        if folder:
            say(f"Trained model: {folder}")


def _train_series(
    configs: list[Path], data: Path, output: Path, overrides: list[str], options: list[str]
) -> None:
    from synthcube.tasks.series import exit_code, train_series

    outcomes = train_series(configs, data, output, overrides=overrides, options=options)
    for each in outcomes:
        say(f"{each.run}: {each.text}")
    raise typer.Exit(exit_code(outcomes))


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
    runtime: Annotated[
        Optional[RuntimeOrTorch],  # noqa: UP045
        typer.Option(help="What computes the networks, of a model exported for it."),
    ] = None,
    croissant: Annotated[
        bool, typer.Option("--croissant", help="Describe the images in croissant.json.")
    ] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the images, for croissant.json.")
    ] = "",
    creator: Annotated[
        list[str], typer.Option(help="Group that answers for the images; repeatable.")
    ] = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Generate images, or reconstruct or translate those given."""
    begin(plugins, trust)
    from synthcube.sharing.croissant import CROISSANT, stated
    from synthcube.tasks.infer import infer as task

    picture = task(
        located(model), output, num_images=num_images, seed=seed, data_path=data,
        batch_size=batch_size, config_path=config, conditions=condition, conditions_path=conditions,
        croissant=stated(croissant, license_id, creator), with_runtime=runtime,
    )  # fmt: skip
    if picture:
        say(f"Images: {output / 'images'}\nPicture: {picture}")
    if picture and (output / CROISSANT).exists():
        say(f"Description: {output / CROISSANT}")


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Option("--predictions", "-p", help="What infer wrote, or any images.")
    ],
    labels: Annotated[
        Path,
        typer.Option("--labels", "-l", help="Real images, held out; or a run: those it held out."),
    ],
    output: Annotated[
        Path, typer.Option("--output_path", "-o", help="YAML file to write the results to.")
    ],
    config: OptionalConfig = None,
    train_data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--train_data", "-t", help="Images of the training, to look for copies in."),
    ] = None,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for a page with plots and pictures, and for a card's table."),
    ] = None,
    model: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--model_path", "-m", help="The model, to infer who was trained on."),
    ] = None,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Judge images by real ones: how near they are, how varied, and what they copy."""
    begin(plugins, trust)
    from synthcube.tasks.evaluate import evaluate as task

    written = task(
        predictions, labels, output,
        config_path=config, train_data=train_data, report=report,
        model_path=located(model) if model else None,
    )  # fmt: skip
    say(f"Results: {written}")
    if report:
        say(f"Report: {report / 'report.html'}")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Weights: .pt, .pth, .ckpt, .safetensors.")],
    family: Annotated[str, typer.Option(help="Family of the model: ddpm, vqvae, ...")],
    config: Config,
    output: Output,
    channels: Annotated[int, typer.Option(min=1, help="Channels of one image.")] = 1,
    model_range: Annotated[
        tuple[float, float],
        typer.Option("--model_range", help="What intensities were scaled to when it was trained."),
    ] = (-1.0, 1.0),
    discriminator: Annotated[
        Path | None, typer.Option(help="Weights of an autoencoder's discriminator.")
    ] = None,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Take over weights of monai-generative or GaNDLF-Synth, checked number by number."""
    begin(plugins, trust)
    from synthcube.tasks.import_weights import import_weights

    folder = import_weights(
        checkpoint, family, config, output,
        channels=channels, model_range=model_range, discriminator=discriminator,
        overrides=overrides,
    )  # fmt: skip
    say(f"Imported model: {folder}")


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
    begin()
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
    say(f"Manifest: {found.manifest_path}")
    say(f"{found.rows} images of {found.subjects} subjects")
    for title, counts in (("Classes", found.labels), ("Splits", found.splits)):
        if counts:
            say(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    for path, reason in found.left_out:
        say(f"Left out: {path}: {reason}")


@app.command()
def check(
    config: Config,
    data: Data,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Find everything that could fail later, before any training."""
    begin(plugins, trust)
    from synthcube.tasks.check import check as task

    for line in task(config, data, overrides=overrides):
        say(line)
    say("Ready to train.")


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


@app.command()
def export(
    model: Model,
    output: Output,
    config: Annotated[
        Optional[Path],  # noqa: UP045  # Typer on Python 3.10 evaluates this
        typer.Option("--config", "-c", "--parameters_file", help="YAML with a section `export`."),
    ] = None,
    evaluation: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="results.yaml of synthcube evaluate, for the card's table."),
    ] = None,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the model: apache-2.0, cc-by-nc-4.0, ...")
    ] = "",
    dataset: Annotated[
        list[str], typer.Option(help="Name on a Hub of what it was trained on; repeatable.")
    ] = [],  # noqa: B006
    notes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Markdown of yours for the card: authors, data, limits."),
    ] = None,
    model_version: Annotated[
        str, typer.Option("--model_version", help="Version of the model, its tag on a Hub: 1.0.0.")
    ] = "",
    runtime: Annotated[
        list[str],
        typer.Option(
            help=f"Convert the networks for it as well: {', '.join(RUNTIMES)}; repeatable."
        ),
    ] = [],  # noqa: B006
    runtime_weights: Annotated[
        Optional[Weights],  # noqa: UP045
        typer.Option("--runtime_weights", help="How converted weights are stored: float32."),
    ] = None,
    push_to: Annotated[
        str, typer.Option("--push_to", metavar="OWNER/NAME", help="Publish it there, on a Hub.")
    ] = "",
    public: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--public/--private", help="For everyone to see; private by default."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch to push to: main.")] = "",
    commit_message: Annotated[
        str, typer.Option("--commit_message", help="What the commit says.")
    ] = "",
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Verify a trained model and write a folder to share; publish it, if you say where."""
    begin(plugins, trust)
    from synthcube.tasks.export import export as task
    from synthcube.tasks.export import read_request

    options = {
        "evaluation": evaluation, "license": license_id, "datasets": tuple(dataset),
        "notes_file": notes, "version": model_version, "runtimes": tuple(runtime),
        "runtime_weights": runtime_weights, "push_to": push_to, "public": public,
        "revision": revision, "commit_message": commit_message,
    }  # fmt: skip
    request = read_request(config, options)
    folder = task(located(model), output, request)
    say(f"Exported model: {folder}")
    if not request.license:
        say("No license is stated (--license): without one nobody else may use the model.")
    if request.push_to:
        from synthcube.sharing.push import push

        address, is_new = push(
            folder, request.push_to,
            public=request.public, revision=request.revision, message=request.commit_message,
        )  # fmt: skip
        say(f"{'Published' if is_new else 'Already published, nothing to do'}: {address}")
