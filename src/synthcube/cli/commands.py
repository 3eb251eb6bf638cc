"""The commands of the command line, except those of MedPerf's containers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

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
    located,
    say,
    setup_process,
)
from synthcube.containers import IMAGE
from synthcube.errors import MemoryShortageError
from synthcube.sharing.runtimes import NAMES as RUNTIMES
from synthcube.sharing.runtimes import RuntimeOrTorch, Weights


@app.command()
def train(
    config: Configs,
    data: Data,
    output: Output,
    resume: Annotated[
        str, typer.Option(help="auto continues a run; never refuses one; or a checkpoint's path.")
    ] = "auto",
    debug: Annotated[
        bool, typer.Option("--debug", help="Only try a few batches of every step; keep nothing.")
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
    setup_process(plugins, trust)
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
    for outcome in outcomes:
        say(f"{outcome.run}: {outcome.text}")
    raise typer.Exit(exit_code(outcomes))


@app.command()
def infer(
    model: Model,
    output: Output,
    num_images: Annotated[
        str | None,
        typer.Option("--num_images", "-n", help="Images to generate: 8, or Hand=5,HeadCT=3."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the images.")] = None,
    data: OptionalData = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", min=1, help="Images made at once.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strictly conditions are followed; 1: as learned.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="How images are drawn: heun, ddim...")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of the sampler.")] = None,
    animate: Annotated[
        Literal["steps", "slices"] | None,
        typer.Option(help="Write animation.gif: from noise to images, or through the slices."),
    ] = None,
    config: OptionalConfig = None,
    overrides: Override = [],  # noqa: B006
    condition: Annotated[
        list[str], typer.Option(help="Condition of all images, as in Label=Hand; repeatable.")
    ] = [],  # noqa: B006
    conditions: Annotated[
        Path | None,
        typer.Option(help="CSV with the conditions of each image, in place of a number."),
    ] = None,
    runtime: Annotated[
        RuntimeOrTorch | None,
        typer.Option(help="What computes the networks, of a model exported for it."),
    ] = None,
    croissant: Annotated[
        bool, typer.Option("--croissant", help="Describe the images in croissant.json.")
    ] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the images, for croissant.json.")
    ] = "",
    creator: Annotated[
        list[str], typer.Option(help="Organization responsible for the images; repeatable.")
    ] = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Generate images, or reconstruct or translate those of --data_path."""
    setup_process(plugins, trust)
    from synthcube.sharing.croissant import CROISSANT, stated
    from synthcube.tasks.infer import InferRequest
    from synthcube.tasks.infer import infer as task
    from synthcube.tasks.inference_jobs import ANIMATION

    picture = task(
        InferRequest(
            located(model), output, num_images=num_images, seed=seed, data=data,
            batch_size=batch_size, guidance=guidance, sampler=sampler, steps=steps,
            animate=animate, config=config, overrides=overrides, conditions=condition,
            conditions_table=conditions,
            croissant=stated(croissant, license_id, creator), runtime=runtime,
        )
    )  # fmt: skip
    if picture:
        say(f"Images: {output / 'images'}\nPicture: {picture}")
    if picture and (output / ANIMATION).exists():
        say(f"Animation: {output / ANIMATION}")
    if picture and (output / CROISSANT).exists():
        say(f"Description: {output / CROISSANT}")


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Option("--predictions", "-p", help="Images that infer wrote, or any others.")
    ],
    labels: Annotated[
        Path,
        typer.Option(
            "--labels", "-l", help="Held-out real images; or a run: those that it held out."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output_path", "-o", help="YAML file to write the results to.")
    ],
    config: OptionalConfig = None,
    train_data: Annotated[
        Path | None,
        typer.Option("--train_data", "-t", help="Training images, to search for copies."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for an HTML page with plots, and for a table for the card."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model_path", "-m", help="The model, for membership inference.")
    ] = None,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Compare images with real ones: fidelity, diversity, and copies of training images."""
    setup_process(plugins, trust)
    from synthcube import reading
    from synthcube.errors import EvaluationError
    from synthcube.evaluation.verdict import main_lines
    from synthcube.tasks.evaluate import evaluate as task

    written = task(
        predictions, labels, output,
        config_path=config, overrides=overrides, train_data=train_data, report=report,
        model_path=located(model) if model else None,
    )  # fmt: skip
    for line in main_lines(reading.read_yaml(written, EvaluationError)):
        say(line)
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
        typer.Option("--model_range", help="Range that intensities were scaled to in training."),
    ] = (-1.0, 1.0),
    discriminator: Annotated[
        Path | None, typer.Option(help="Weights of an autoencoder's discriminator.")
    ] = None,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Import weights of monai-generative or GaNDLF-Synth, and verify their outputs."""
    setup_process(plugins, trust)
    from synthcube.tasks.import_weights import import_weights

    folder = import_weights(
        checkpoint, family, config, output,
        channels=channels, model_range=model_range, discriminator=discriminator,
        overrides=overrides,
    )  # fmt: skip
    say(f"Imported model: {folder}")


@app.command()
def prepare(
    data: Annotated[Path, typer.Option("--data_path", "-d", help="Folder of images, or a CSV.")],
    output: Annotated[Path, typer.Option("--output_path", "-o", help="Folder or .csv to write.")],
    paradigm: Annotated[
        Literal["unlabeled", "patient", "custom"],
        typer.Option(help="Classes: none, one for each patient, or one for each folder."),
    ] = "unlabeled",
    channels: Annotated[
        str | None,
        typer.Option(
            help="Words of the channels in the file names, in order: t1,t2,seg. Usual ones are "
            "recognised; an empty text makes each file an image."
        ),
    ] = None,
    column: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=COLUMN", help="A CSV's own column: Channel_0=t1_path; repeatable."
        ),
    ] = [],  # noqa: B006
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share held out.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share kept for tests.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every image, and leave out what cannot be used.")
    ] = False,
) -> None:
    """Make a manifest CSV from a folder of images, or from a CSV with other columns."""
    setup_process()
    from synthcube.data.preparation import column_names
    from synthcube.data.preparation import prepare as task

    fault_of = None
    if verify:
        from synthcube.data.images import image_fault

        fault_of = image_fault
    patterns = None
    if channels is not None:
        patterns = [pattern.strip() for pattern in channels.split(",") if pattern.strip()]
    prepared = task(
        data, output, paradigm=paradigm, channels=patterns, columns=column_names(column),
        validation=validation, test=test, seed=seed, fault_of=fault_of,
    )  # fmt: skip
    say(f"Manifest: {prepared.manifest_path}")
    say(f"{prepared.rows} images of {prepared.subjects} subjects")
    if prepared.channels:
        named = (f"Channel_{i} {name}" for i, name in enumerate(prepared.channels))
        how = " (recognised by their names; --channels names others)" if patterns is None else ""
        say(f"Channels: {', '.join(named)}{how}")
    if prepared.columns:
        say(f"Columns: {', '.join(prepared.columns)}")
    for title, counts in (("Classes", prepared.labels), ("Splits", prepared.splits)):
        if counts:
            say(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    for line in prepared.left_out_lines:
        say(f"Left out: {line}")
    if prepared.masks:
        from synthcube.data.channels import mask_settings

        listed = ", ".join(f"channel {channel}" for channel in prepared.masks)
        say(f"Masks: {listed}; add to the config: {mask_settings(prepared.masks)}")
    if prepared.warning:
        say(f"Warning: {prepared.warning}.")


@app.command()
def check(
    config: Config,
    data: Data,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Find everything that could fail later, before any training."""
    setup_process(plugins, trust)
    from synthcube.tasks.check import check as task

    report = task(config, data, overrides=overrides)
    for line in report.lines:
        say(line)
    for warning in report.warnings:
        say(f"Warning: {warning}.")
    if report.shortage:
        raise MemoryShortageError(report.shortage)
    number = len(report.warnings)
    if number:
        say(f"Ready to train, with {number} warning{'s' if number > 1 else ''} above.")
    else:
        say("Ready to train.")


@app.command()
def init(
    family: Annotated[str, typer.Argument(help="Name of a family.")] = "rectified_flow",
    dims: Annotated[int, typer.Option(min=2, max=3, help="Spatial axes of the images.")] = 2,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Print a commented YAML with every key and its default."""
    setup_process(plugins, trust)
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
    setup_process()
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
    from synthcube.containers import write_specs

    for path in write_specs(write, image):
        say(f"Written: {path}")


@app.command()
def export(
    model: Model,
    output: Output,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", "--parameters_file", help="YAML with a section `export`."),
    ] = None,
    overrides: Override = [],  # noqa: B006
    evaluation: Annotated[
        Path | None, typer.Option(help="results.yaml of synthcube evaluate, for the card's table.")
    ] = None,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the model: apache-2.0, cc-by-nc-4.0, ...")
    ] = "",
    dataset: Annotated[
        list[str], typer.Option(help="Name on a Hub of what it was trained on; repeatable.")
    ] = [],  # noqa: B006
    notes: Annotated[
        Path | None, typer.Option(help="Markdown to add to the card: authors, data, limits.")
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
        Weights | None,
        typer.Option("--runtime_weights", help="How converted weights are stored: float32."),
    ] = None,
    push_to: Annotated[
        str,
        typer.Option(
            "--push_to", metavar="OWNER/NAME", help="Publish to this repository of a Hub."
        ),
    ] = "",
    public: Annotated[
        bool | None,
        typer.Option("--public/--private", help="Visibility on the Hub; private by default."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch to push to: main.")] = "",
    commit_message: Annotated[
        str, typer.Option("--commit_message", help="Message of the commit.")
    ] = "",
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Verify a trained model and write a folder to share; publish it with --push_to."""
    setup_process(plugins, trust)
    from synthcube.tasks.export import export as task
    from synthcube.tasks.export import read_request

    options = {
        "evaluation": evaluation, "license": license_id, "datasets": tuple(dataset),
        "notes_file": notes, "version": model_version, "runtimes": tuple(runtime),
        "runtime_weights": runtime_weights, "push_to": push_to, "public": public,
        "revision": revision, "commit_message": commit_message,
    }  # fmt: skip
    request = read_request(config, options, overrides)
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
