"""The commands for trained models: infer, evaluate, import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from synthcube.cli.app import (
    FILES,
    MODELS,
    SETTINGS,
    Config,
    Model,
    OptionalConfig,
    OptionalData,
    Output,
    Override,
    Plugins,
    Trust,
    command,
    located,
    say,
    setup_process,
)
from synthcube.containers import IMAGE
from synthcube.sharing.runtimes import NAMES as RUNTIMES
from synthcube.sharing.runtimes import RuntimeOrTorch, Weights

# The panels of single commands.
_IMAGES, _DESCRIPTION, _CARD, _HUB = "Images", "Description of the images", "Model card", "Hub"
_CHALLENGE = "Container for a challenge"


@command(MODELS, "infer -m run -o generated -n 16 --seed 7")
def infer(
    model: Model,
    output: Output,
    num_images: Annotated[
        str | None,
        typer.Option(
            "--num_images",
            "-n",
            metavar="NUMBER",
            rich_help_panel=_IMAGES,
            help="Images to generate: 8, or Hand=5,HeadCT=3.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="NUMBER", rich_help_panel=_IMAGES, help="Seed of the images."),
    ] = None,
    data: OptionalData = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch_size",
            min=1,
            metavar="NUMBER",
            rich_help_panel=SETTINGS,
            help="Images made at once.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            rich_help_panel=SETTINGS,
            help="How strictly conditions are followed; 1: as learned.",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=SETTINGS, help="How images are drawn: heun, ddim."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="NUMBER", rich_help_panel=SETTINGS, help="Steps of the sampler."
        ),
    ] = None,
    animate: Annotated[
        Literal["steps", "slices"] | None,
        typer.Option(
            metavar="WHAT",
            rich_help_panel=SETTINGS,
            help="Write animation.gif: from noise to images, or through the slices.",
        ),
    ] = None,
    output_format: Annotated[
        Literal["native", "dicom"] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            rich_help_panel=SETTINGS,
            help="dicom: write a DICOM series of each image too.",
        ),
    ] = None,
    config: OptionalConfig = None,
    overrides: Override = [],  # noqa: B006
    condition: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            rich_help_panel=_IMAGES,
            help="Condition of all images, as in Label=Hand; repeatable.",
        ),
    ] = [],  # noqa: B006
    conditions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_IMAGES,
            help="CSV with the conditions of each image, in place of a number.",
        ),
    ] = None,
    runtime: Annotated[
        RuntimeOrTorch | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SETTINGS,
            help="What computes the networks of a model exported for it: "
            f"{', '.join(('torch', *RUNTIMES))}.",
        ),
    ] = None,
    croissant: Annotated[
        bool,
        typer.Option(
            "--croissant",
            rich_help_panel=_DESCRIPTION,
            help="Describe the images in croissant.json.",
        ),
    ] = False,
    license_id: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="NAME",
            rich_help_panel=_DESCRIPTION,
            help="License of the images, for croissant.json.",
        ),
    ] = "",
    creator: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            rich_help_panel=_DESCRIPTION,
            help="Organization responsible for the images; repeatable.",
        ),
    ] = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Generate images, or reconstruct or translate those of --data_path."""
    setup_process(plugins, trust)
    from synthcube.sharing.croissant import CROISSANT, stated
    from synthcube.tasks.infer import InferRequest
    from synthcube.tasks.infer import infer as task
    from synthcube.tasks.inference_jobs import ANIMATION, DICOM

    picture = task(
        InferRequest(
            located(model), output, num_images=num_images, seed=seed, data=data,
            batch_size=batch_size, guidance=guidance, sampler=sampler, steps=steps,
            animate=animate, format=output_format, config=config, overrides=overrides,
            conditions=condition, conditions_table=conditions,
            croissant=stated(croissant, license_id, creator), runtime=runtime,
        )
    )  # fmt: skip
    if picture:
        say(f"Images: {output / 'images'}\nPicture: {picture}")
    if picture and (output / DICOM).exists():
        say(f"DICOM: {output / DICOM}")
    if picture and (output / ANIMATION).exists():
        say(f"Animation: {output / ANIMATION}")
    if picture and (output / CROISSANT).exists():
        say(f"Description: {output / CROISSANT}")


@command(MODELS, "evaluate -p generated -l run -o results.yaml")
def evaluate(
    predictions: Annotated[
        Path,
        typer.Option(
            "--predictions",
            "-p",
            metavar="PATH",
            rich_help_panel=FILES,
            help="Images that infer wrote, or any others.",
        ),
    ],
    labels: Annotated[
        Path,
        typer.Option(
            "--labels",
            "-l",
            metavar="PATH",
            rich_help_panel=FILES,
            help="Held-out real images; or a run: those that it held out.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output_path",
            "-o",
            metavar="FILE",
            rich_help_panel=FILES,
            help="YAML file to write the results to.",
        ),
    ],
    config: OptionalConfig = None,
    train_data: Annotated[
        Path | None,
        typer.Option(
            "--train_data",
            "-t",
            metavar="PATH",
            rich_help_panel=FILES,
            help="Training images, to search for copies.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=FILES,
            help="Folder for an HTML page with plots, and for a table for the card.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model_path",
            "-m",
            metavar="MODEL",
            rich_help_panel=FILES,
            help="The model, for membership inference.",
        ),
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
    *numbers, good, not_good = main_lines(reading.read_yaml(written, EvaluationError))
    for line in numbers:
        say(line)
    say(good, "green")
    say(not_good, "yellow")
    say(f"Results: {written}")
    if report:
        say(f"Report: {report / 'report.html'}")


@command(MODELS, "import old.ckpt --family ddpm -c config.yaml -o model", "import")
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Weights: .pt, .pth, .ckpt, .safetensors, or a model folder of GaNDLF-Synth.",
        ),
    ],
    family: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=SETTINGS, help="Family of the model: ddpm, vqvae."
        ),
    ],
    config: Config,
    output: Output,
    channels: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="NUMBER",
            rich_help_panel=SETTINGS,
            help="Channels of one image: 1, or those of GaNDLF-Synth's YAML.",
        ),
    ] = None,
    model_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--model_range",
            metavar="LOW HIGH",
            rich_help_panel=SETTINGS,
            help="Range that intensities were scaled to in training: -1 1, or that of "
            "GaNDLF-Synth's YAML.",
        ),
    ] = None,
    discriminator: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=FILES,
            help="Weights of an autoencoder's discriminator.",
        ),
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


@command(MODELS, "export -m run -o shared --license cc-by-nc-4.0")
def export(
    model: Model,
    output: Output,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            "--parameters_file",
            metavar="FILE",
            rich_help_panel=FILES,
            help="YAML with a section `export`.",
        ),
    ] = None,
    overrides: Override = [],  # noqa: B006
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_CARD,
            help="results.yaml of synthcube evaluate, for the card's table.",
        ),
    ] = None,
    license_id: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="NAME",
            rich_help_panel=_CARD,
            help="License of the model, as in apache-2.0 or cc-by-nc-4.0.",
        ),
    ] = "",
    dataset: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            rich_help_panel=_CARD,
            help="Name on a Hub of what it was trained on; repeatable.",
        ),
    ] = [],  # noqa: B006
    notes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_CARD,
            help="Markdown to add to the card: authors, data, limits.",
        ),
    ] = None,
    model_version: Annotated[
        str,
        typer.Option(
            "--model_version",
            metavar="VERSION",
            rich_help_panel=_CARD,
            help="Version of the model, its tag on a Hub: 1.0.0.",
        ),
    ] = "",
    runtime: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            rich_help_panel=SETTINGS,
            help=f"Convert the networks for it as well: {', '.join(RUNTIMES)}; repeatable.",
        ),
    ] = [],  # noqa: B006
    runtime_weights: Annotated[
        Weights | None,
        typer.Option(
            "--runtime_weights",
            metavar="TYPE",
            rich_help_panel=SETTINGS,
            help=f"How converted weights are stored: {', '.join(get_args(Weights))}.",
        ),
    ] = None,
    push_to: Annotated[
        str,
        typer.Option(
            "--push_to",
            metavar="OWNER/NAME",
            rich_help_panel=_HUB,
            help="Publish to this repository of a Hub.",
        ),
    ] = "",
    public: Annotated[
        bool | None,
        typer.Option(
            "--public/--private",
            rich_help_panel=_HUB,
            help="Visibility on the Hub; private by default.",
        ),
    ] = None,
    revision: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=_HUB, help="Branch to push to: main.")
    ] = "",
    commit_message: Annotated[
        str,
        typer.Option(
            "--commit_message", metavar="TEXT", rich_help_panel=_HUB, help="Message of the commit."
        ),
    ] = "",
    challenge: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_CHALLENGE,
            help="Write a container for it: brats-inpainting, brats-brasyn, or a YAML that "
            "declares its files.",
        ),
    ] = "",
    base: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_CHALLENGE,
            help="Image of SynthCube to build the container on.",
        ),
    ] = IMAGE,
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
    if challenge:
        from synthcube.tasks.challenge_container import export_container

        folder = export_container(located(model), output, request, challenge=challenge, base=base)
        say(f"Container: {folder}\nIts README.md says how to build, try and submit it.")
    else:
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
