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
    option,
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
        option(_IMAGES, "Images to generate: 8, or Hand=5,HeadCT=3.", "NUMBER", "--num_images -n"),
    ] = None,
    seed: Annotated[int | None, option(_IMAGES, "Seed of the images.", "NUMBER", min=0)] = None,
    data: OptionalData = None,
    batch_size: Annotated[
        int | None, option(SETTINGS, "Images made at once.", "NUMBER", "--batch_size", min=1)
    ] = None,
    guidance: Annotated[
        float | None,
        option(SETTINGS, "How strictly conditions are followed; 1: as learned.", "NUMBER"),
    ] = None,
    sampler: Annotated[
        str | None, option(SETTINGS, "How images are drawn: heun, ddim.", "NAME")
    ] = None,
    steps: Annotated[int | None, option(SETTINGS, "Steps of the sampler.", "NUMBER", min=2)] = None,
    animate: Annotated[
        Literal["steps", "slices"] | None,
        option(
            SETTINGS, "Write animation.gif: from noise to images, or through the slices.", "WHAT"
        ),
    ] = None,
    output_format: Annotated[
        Literal["native", "dicom"] | None,
        option(SETTINGS, "dicom: write a DICOM series of each image too.", "NAME", "--format"),
    ] = None,
    config: OptionalConfig = None,
    overrides: Override = [],  # noqa: B006
    condition: Annotated[
        list[str],
        option(_IMAGES, "Condition of all images, as in Label=Hand; repeatable.", "NAME=VALUE"),
    ] = [],  # noqa: B006
    conditions: Annotated[
        Path | None,
        option(_IMAGES, "CSV with the conditions of each image, in place of a number.", "FILE"),
    ] = None,
    runtime: Annotated[
        RuntimeOrTorch | None,
        option(
            SETTINGS,
            "What computes the networks of a model exported for it: "
            f"{', '.join(('torch', *RUNTIMES))}.",
            "NAME",
        ),
    ] = None,
    croissant: Annotated[
        bool, option(_DESCRIPTION, "Describe the images in croissant.json.", "", "--croissant")
    ] = False,
    license_id: Annotated[
        str, option(_DESCRIPTION, "License of the images, for croissant.json.", "NAME", "--license")
    ] = "",
    creator: Annotated[
        list[str],
        option(_DESCRIPTION, "Organization responsible for the images; repeatable.", "NAME"),
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
        Path, option(FILES, "Images that infer wrote, or any others.", "PATH", "--predictions -p")
    ],
    labels: Annotated[
        Path,
        option(
            FILES, "Held-out real images; or a run: those that it held out.", "PATH", "--labels -l"
        ),
    ],
    output: Annotated[
        Path, option(FILES, "YAML file to write the results to.", "FILE", "--output_path -o")
    ],
    config: OptionalConfig = None,
    train_data: Annotated[
        Path | None,
        option(FILES, "Training images, to search for copies.", "PATH", "--train_data -t"),
    ] = None,
    report: Annotated[
        Path | None,
        option(
            FILES, "Folder for an HTML page with plots, and for a table for the card.", "FOLDER"
        ),
    ] = None,
    model: Annotated[
        Path | None,
        option(FILES, "The model, for membership inference.", "MODEL", "--model_path -m"),
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
    family: Annotated[str, option(SETTINGS, "Family of the model: ddpm, vqvae.", "NAME")],
    config: Config,
    output: Output,
    channels: Annotated[
        int | None,
        option(
            SETTINGS, "Channels of one image: 1, or those of GaNDLF-Synth's YAML.", "NUMBER", min=1
        ),
    ] = None,
    model_range: Annotated[
        tuple[float, float] | None,
        option(
            SETTINGS,
            "Range that intensities were scaled to in training: -1 1, or that of "
            "GaNDLF-Synth's YAML.",
            "LOW HIGH",
            "--model_range",
        ),
    ] = None,
    discriminator: Annotated[
        Path | None, option(FILES, "Weights of an autoencoder's discriminator.", "FILE")
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
        option(FILES, "YAML with a section `export`.", "FILE", "--config -c --parameters_file"),
    ] = None,
    overrides: Override = [],  # noqa: B006
    evaluation: Annotated[
        Path | None,
        option(_CARD, "results.yaml of synthcube evaluate, for the card's table.", "FILE"),
    ] = None,
    license_id: Annotated[
        str,
        option(
            _CARD, "License of the model, as in apache-2.0 or cc-by-nc-4.0.", "NAME", "--license"
        ),
    ] = "",
    dataset: Annotated[
        list[str], option(_CARD, "Name on a Hub of what it was trained on; repeatable.", "NAME")
    ] = [],  # noqa: B006
    notes: Annotated[
        Path | None, option(_CARD, "Markdown to add to the card: authors, data, limits.", "FILE")
    ] = None,
    model_version: Annotated[
        str,
        option(
            _CARD, "Version of the model, its tag on a Hub: 1.0.0.", "VERSION", "--model_version"
        ),
    ] = "",
    runtime: Annotated[
        list[str],
        option(
            SETTINGS,
            f"Convert the networks for it as well: {', '.join(RUNTIMES)}; repeatable.",
            "NAME",
        ),
    ] = [],  # noqa: B006
    runtime_weights: Annotated[
        Weights | None,
        option(
            SETTINGS,
            f"How converted weights are stored: {', '.join(get_args(Weights))}.",
            "TYPE",
            "--runtime_weights",
        ),
    ] = None,
    push_to: Annotated[
        str, option(_HUB, "Publish to this repository of a Hub.", "OWNER/NAME", "--push_to")
    ] = "",
    public: Annotated[
        bool | None,
        option(_HUB, "Visibility on the Hub; private by default.", "", "--public/--private"),
    ] = None,
    revision: Annotated[str, option(_HUB, "Branch to push to: main.", "NAME")] = "",
    commit_message: Annotated[
        str, option(_HUB, "Message of the commit.", "TEXT", "--commit_message")
    ] = "",
    challenge: Annotated[
        str,
        option(
            _CHALLENGE,
            "Write a container for it: brats-inpainting, brats-brasyn, or a YAML that "
            "declares its files.",
            "NAME",
        ),
    ] = "",
    base: Annotated[
        str, option(_CHALLENGE, "Image of SynthCube to build the container on.", "NAME")
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
