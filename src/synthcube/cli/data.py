"""The commands for data and configs: prepare, plan, check, init, migrate, families and schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from synthcube.cli.app import (
    BUDGET,
    DATA,
    FILES,
    SETTINGS,
    Config,
    Data,
    Hours,
    Override,
    Plugins,
    Trust,
    command,
    option,
    say,
    setup_process,
)
from synthcube.errors import ConfigError, MemoryShortageError
from synthcube.escapes import visible
from synthcube.terminal import print_table

if TYPE_CHECKING:
    from synthcube.planning.table import Plan

_SPLIT, _SLIDES = "Split", "Slides"  # panels of prepare
_MOST_GB = 1e6


@command(DATA, "prepare -d images -o data --validation 0.1")
def prepare(
    data: Annotated[Path, option(FILES, "Folder of images, or a CSV.", "PATH", "--data_path -d")],
    output: Annotated[Path, option(FILES, "Folder or .csv to write.", "PATH", "--output_path -o")],
    paradigm: Annotated[
        Literal["unlabeled", "patient", "custom"],
        option(
            SETTINGS,
            "Classes: unlabeled for none, patient for one for each patient, custom for one "
            "for each folder.",
            "NAME",
        ),
    ] = "unlabeled",
    channels: Annotated[
        str | None,
        option(
            SETTINGS,
            "Words of the channels in the file names, in order: t1,t2,seg. Usual ones are "
            "recognised; an empty text makes each file an image.",
            "NAMES",
        ),
    ] = None,
    column: Annotated[
        list[str],
        option(SETTINGS, "A CSV's own column: Channel_0=t1_path; repeatable.", "NAME=COLUMN"),
    ] = [],  # noqa: B006
    dicom_columns: Annotated[
        str,
        option(
            SETTINGS,
            "Columns out of DICOM headers: Modality,PatientAge.",
            "NAMES",
            "--dicom_columns",
        ),
    ] = "",
    validation: Annotated[float, option(_SPLIT, "Share held out.", "SHARE", min=0, max=1)] = 0.0,
    test: Annotated[float, option(_SPLIT, "Share kept for tests.", "SHARE", min=0, max=1)] = 0.0,
    seed: Annotated[
        int, option(_SPLIT, "Seed of the split, and of the choice of patches.", "NUMBER", min=0)
    ] = 0,
    patch_size: Annotated[
        str | None,
        option(
            _SLIDES,
            "Cut whole slides into patches of this size: 256 pixels, or 100um.",
            "SIZE",
            "--patch_size",
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        option(_SLIDES, "Microns per pixel of the patches. Default: those of the slide.", "NUMBER"),
    ] = None,
    magnification: Annotated[
        float | None, option(_SLIDES, "Instead of --mpp: 20 for 20x.", "NUMBER")
    ] = None,
    overlap: Annotated[
        float | None,
        option(_SLIDES, "Share that neighbouring patches have in common. Default: 0.", "SHARE"),
    ] = None,
    max_patches: Annotated[
        int | None,
        option(
            _SLIDES,
            "Most patches of a slide, evenly over its tissue. Default: all.",
            "NUMBER",
            "--max_patches",
        ),
    ] = None,
    min_tissue: Annotated[
        float | None,
        option(_SLIDES, "Least share of tissue in a patch. Default: 0.5.", "SHARE", "--min_tissue"),
    ] = None,
    verify: Annotated[
        bool,
        option(SETTINGS, "Read every image, and leave out what cannot be used.", "", "--verify"),
    ] = False,
    volume: Annotated[
        str | None,
        option(
            SETTINGS,
            "Of NIfTI files with volumes in time: mean, first, each or a number from 0, "
            "written as 3D files.",
            "WHICH",
        ),
    ] = None,
    derivatives: Annotated[
        bool, option(SETTINGS, "Of BIDS data, list derivatives/ too.", "", "--derivatives")
    ] = False,
) -> None:
    """Make a manifest CSV from a folder of images or slides, or from a CSV with other columns."""
    setup_process()
    from synthcube.data.preparation import column_names
    from synthcube.data.preparation import prepare as task
    from synthcube.data.slide_patches import patch_options

    fault_of = None
    if verify:
        from synthcube.data.images import image_fault

        fault_of = image_fault
    patterns = None
    if channels is not None:
        patterns = [pattern.strip() for pattern in channels.split(",") if pattern.strip()]
    prepared = task(
        data, output, paradigm=paradigm, channels=patterns, columns=column_names(column),
        validation=validation, test=test, seed=seed, fault_of=fault_of, volume=volume,
        derivatives=derivatives,
        dicom_columns=[name.strip() for name in dicom_columns.split(",") if name.strip()],
        patches=patch_options(
            patch_size, mpp=mpp, magnification=magnification, overlap=overlap,
            max_patches=max_patches, min_tissue=min_tissue, seed=seed,
        ),
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
        say(f"Warning: {prepared.warning}.", "yellow")


@command(DATA, "plan -d images -o plan.yaml --hours 12")
def plan(
    data: Data,
    output: Annotated[
        Path | None, option(FILES, "YAML to write.", "FILE", "--output_path -o")
    ] = None,
    memory_gb: Annotated[
        str, option(BUDGET, "Memory of the machine that trains; auto: what is free here.", "NUMBER")
    ] = "auto",
    hours: Hours = None,
    budget_images: Annotated[
        int | None,
        option(BUDGET, "Images to train on, counted each time one is seen.", "NUMBER", min=1),
    ] = None,
    goal: Annotated[
        Literal["generate", "translate", "compress"],
        option(
            SETTINGS,
            "generate images; translate channels into others; compress, for latent models.",
            "NAME",
        ),
    ] = "generate",
    family: Annotated[
        str | None, option(SETTINGS, "Family, in place of the plan's.", "NAME")
    ] = None,
    no_probe: Annotated[
        bool,
        option(
            BUDGET, "Time no training steps: the plan says nothing about time.", "", "--no_probe"
        ),
    ] = False,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Choose every setting from the images and the machine, and say why."""
    memory = _positive("--memory_gb", memory_gb)
    setup_process(plugins, trust)
    from synthcube.planning.draft import PlanRequest
    from synthcube.tasks import plan as task

    request = PlanRequest(goal, family, memory, hours, budget_images, tuple(overrides))
    planned = task.plan(data, request, timed=not no_probe)
    show_plan(planned)
    if output:
        beside = task.write(planned, output)
        say(f"Written: {output} and {beside}")
        say(f"Next: synthcube train -c {output} -d {data} -o RUN", "green")


def _positive(option: str, text: str) -> float | None:
    """A number above 0, or None for auto."""
    if text == "auto":
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < _MOST_GB:
        raise ConfigError(f"{option} {text}: write auto, or gigabytes, as in {option} 24.")
    return number


def show_plan(plan: Plan) -> None:
    """Print a plan as tables, and its warnings."""
    from synthcube.planning.table import rows

    titles = {
        "measured": ("Measured", "value", "details"),
        "chosen": ("Chosen", "value", "why"),
        "cost": ("Cost", "value", "details"),
        "alternatives": ("Or", "option", "what it changes"),
    }
    for part, lines in rows(plan).items():
        title, *columns = titles[part]
        shown = [[visible(cell) for cell in line] for line in lines]
        if part == "alternatives":
            print_table((title, columns[1]), [line[1:] for line in shown])
        else:
            print_table((title, *columns), shown)
    for warning in plan.warnings:
        say(f"Warning: {warning}.", "yellow")


@command(DATA, "check -c config.yaml -d images")
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
        say(f"Warning: {warning}.", "yellow")
    if report.shortage:
        raise MemoryShortageError(report.shortage)
    number = len(report.warnings)
    if number:
        say(f"Ready to train, with {number} warning{'s' if number > 1 else ''} above.", "yellow")
    else:
        say("Ready to train.", "green")


@command(DATA, "init ddpm --dims 3 > config.yaml")
def init(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Name of a family.")
    ] = "rectified_flow",
    dims: Annotated[
        int, option(SETTINGS, "Spatial axes of the images.", "NUMBER", min=2, max=3)
    ] = 2,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Print a commented YAML with every key and its default."""
    setup_process(plugins, trust)
    from synthcube.tasks.describe import starting_yaml

    say(starting_yaml(family, dims), end="")


@command(DATA, "migrate old.yaml -o config.yaml --csv old.csv")
def migrate(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="YAML of GaNDLF-Synth.")],
    output: Annotated[Path, option(FILES, "YAML to write.", "FILE", "--output_path -o")],
    csv: Annotated[
        Path | None,
        option(FILES, "Its list of images: a manifest is written beside the YAML.", "FILE"),
    ] = None,
    dims: Annotated[
        int | None,
        option(
            SETTINGS,
            "Spatial axes of the images, where the YAML does not say it.",
            "NUMBER",
            min=2,
            max=3,
        ),
    ] = None,
    modern: Annotated[
        bool,
        option(
            SETTINGS, "Leave the defaults of SynthCube where the YAML says nothing.", "", "--modern"
        ),
    ] = False,
) -> None:
    """Translate a config of GaNDLF-Synth: the same training, and what became of every key."""
    setup_process()
    from synthcube.tasks.migrate import migrate as task

    done = task(old, output, csv=csv, dims=dims, modern=modern)
    for line in done.lines:
        say(line)
    data = done.manifest or csv or "DATA"
    say(f"Next: synthcube check -c {done.config} -d {data}", "green")


@command(DATA, "families")
def families() -> None:
    """List the families of models."""
    from synthcube.tasks.describe import family_lines

    for line in family_lines():
        say(line)


@command(DATA, "schema > schema.json")
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    from synthcube.config import json_schema

    say(json.dumps(json_schema(), indent=2))
