"""The commands of a federation: several sites train one model, and no image leaves a site."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from synthcube.cli.app import (
    FILES,
    MODELS,
    SETTINGS,
    Config,
    Data,
    Group,
    Output,
    Override,
    Plugins,
    Trust,
    app,
    command,
    located,
    option,
    say,
    setup_process,
)
from synthcube.federation import EngineName

federate = typer.Typer(
    cls=Group,
    name="federate",
    help="Train one model at several sites without moving their images.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: synthcube federate simulate -o run",
)
app.add_typer(federate, rich_help_panel=MODELS)

_FEDERATION = "Federation"  # a panel

Ranges = Annotated[
    list[str],
    option(
        _FEDERATION,
        "Declared range of a column of numbers, as in Age=0,100; repeatable.",
        "NAME=LOW,HIGH",
        "--range",
    ),
]
LocalEpochs = Annotated[
    int,
    option(
        _FEDERATION,
        "Passes of each site over its images in a round.",
        "NUMBER",
        "--local_epochs",
        min=1,
    ),
]
Plan = Annotated[Path, option(FILES, "The plan that all sites have.", "FILE", "--plan -p")]
Proximal = Annotated[
    float,
    option(
        _FEDERATION,
        "FedProx: holds a site near the weights of its round, as with 0.01.",
        "NUMBER",
        min=0,
    ),
]
ServerOptimizer = Annotated[
    str,
    option(
        _FEDERATION,
        "FedAvgM or FedAdam, as in '{name: sgd, lr: 1.0, momentum: 0.9}'; without "
        "it the plain average.",
        "MAPPING",
        "--server_optimizer",
    ),
]
Average = Annotated[
    Literal["sites", "server"],
    option(
        _FEDERATION,
        "Where the moving average of the weights is: at the sites, or at the server "
        "over the rounds, with half the traffic.",
        "PLACE",
        "--average",
    ),
]
AverageDecay = Annotated[
    float,
    option(
        _FEDERATION, "Decay of the server's moving average.", "NUMBER", "--average_decay", min=0
    ),
]
SecureAggregation = Annotated[
    bool,
    option(
        _FEDERATION,
        "Sites mask their weights: the coordinator sees the average alone, and "
        "each round needs all sites.",
        "",
        "--secure_aggregation",
    ),
]
Certificates = Annotated[
    Path,
    option(
        FILES,
        "Folder with crt.crt, key.key and root.crt; for nvflare the startup kit.",
        "FOLDER",
        "--certificates -k",
    ),
]

Engine = Annotated[
    EngineName,
    option(
        _FEDERATION,
        "What carries the messages: our own connection (https), flower or nvflare; "
        "the same at the coordinator and all sites.",
        "NAME",
        "--engine",
    ),
]


@command(MODELS, "federate plan -c config.yaml --sites a,b --rounds 50 -o plan.json", of=federate)
def plan(
    config: Config,
    output: Annotated[
        Path,
        option(
            FILES,
            "JSON file to write; for openfl the folder of the workspace.",
            "FILE",
            "--output_path -o",
        ),
    ],
    sites: Annotated[
        str, option(_FEDERATION, "Labels of the sites, as in site-a,site-b.", "LABELS")
    ],
    rounds: Annotated[
        int, option(_FEDERATION, "How often the weights are averaged.", "NUMBER", min=1)
    ],
    local_epochs: LocalEpochs = 1,
    minimum_sites: Annotated[
        int | None,
        option(
            _FEDERATION,
            "Sites that a round needs; without it two.",
            "NUMBER",
            "--minimum_sites",
            min=1,
        ),
    ] = None,
    ranges: Ranges = [],  # noqa: B006  # Typer copies it
    proximal: Proximal = 0.0,
    server_optimizer: ServerOptimizer = "",
    average: Average = "sites",
    average_decay: AverageDecay = 0.9,
    secure_aggregation: SecureAggregation = False,
    engine: Annotated[
        Literal["https", "flower", "nvflare", "openfl"],
        option(
            _FEDERATION,
            "openfl: write a workspace, which OpenFL runs; else the plan is the same "
            "for https, flower and nvflare.",
            "NAME",
            "--engine",
        ),
    ] = "https",
    address: Annotated[
        str,
        option(
            _FEDERATION,
            "openfl: address of the aggregator, by the name in its certificate.",
            "HOST:PORT",
            "--address -a",
        ),
    ] = "",
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write what all sites of a federation must have the same."""
    if bool(address) != (engine == "openfl"):
        raise typer.BadParameter(
            "--engine openfl needs it, and no other engine takes it.", param_hint="--address"
        )
    setup_process(plugins, trust)
    from synthcube.federation_openfl.workspace import write_workspace
    from synthcube.tasks.federation_plan import write_plan

    task = partial(write_workspace, address=address) if address else write_plan
    written = task(
        config, output, sites=[label.strip() for label in sites.split(",")], num_rounds=rounds,
        local_epochs=local_epochs, minimum_sites=minimum_sites, ranges=_declared(ranges),
        proximal=proximal, server_optimizer=_mapping(server_optimizer), average=average,
        average_decay=average_decay, secure_aggregation=secure_aggregation, overrides=overrides,
    )  # fmt: skip
    say(f"Plan: {output}, SHA-256 {written.sha256}")


@command(MODELS, "federate serve -p plan.json -k keys -s sites.yaml -o run", of=federate)
def serve(
    plan: Plan,
    certificates: Certificates,
    output: Output,
    site_certificates: Annotated[
        Path | None,
        option(
            FILES,
            "YAML with the certificate of each site; not for nvflare.",
            "FILE",
            "--site_certificates -s",
        ),
    ] = None,
    address: Annotated[
        str,
        option(
            _FEDERATION,
            "Address to listen on; without it 0.0.0.0:50273, and for nvflare "
            "that of the startup kit.",
            "HOST:PORT",
            "--address -a",
        ),
    ] = "",
    round_minutes: Annotated[
        float,
        option(
            _FEDERATION,
            "How long a round waits for all sites.",
            "NUMBER",
            "--round_minutes",
            min=0.01,
        ),
    ] = 120.0,
    engine: Engine = "https",
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Coordinate the sites of a federation; the same command again continues it."""
    setup_process(plugins, trust)
    from synthcube.tasks.serve import serve as task

    folder = task(
        plan, certificates, site_certificates, output, address=address,
        round_minutes=round_minutes, engine=engine, overrides=overrides,
    )  # fmt: skip
    say(f"Trained model: {folder}")


@command(MODELS, "federate join -p plan.json -d images -k keys -a host:50273 -o run", of=federate)
def join(
    plan: Plan,
    data: Data,
    certificates: Certificates,
    output: Output,
    address: Annotated[
        str,
        option(
            _FEDERATION,
            "Address of the coordinator; for nvflare the startup kit has it.",
            "HOST:PORT",
            "--address -a",
        ),
    ] = "",
    site: Annotated[
        str | None,
        option(
            _FEDERATION,
            "Label of this site in the plan; without it, that of its certificate.",
            "LABEL",
        ),
    ] = None,
    patience_minutes: Annotated[
        float,
        option(
            _FEDERATION,
            "How long the coordinator may be away.",
            "NUMBER",
            "--patience_minutes",
            min=0,
        ),
    ] = 60.0,
    engine: Engine = "https",
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train as a site of a federation; the same command again continues it."""
    setup_process(plugins, trust)
    from synthcube.tasks.join import join as task

    folder = task(
        plan, data, certificates, output, address=address, site=site,
        patience_minutes=patience_minutes, engine=engine, overrides=overrides,
    )  # fmt: skip
    say(f"Trained model: {folder}")


@command(MODELS, "federate simulate -c config.yaml -d images --sites 2 -o run", of=federate)
def simulate(
    output: Output,
    config: Annotated[
        Path | None,
        option(
            FILES,
            "YAML of the run; none, and no data: a demonstration.",
            "FILE",
            "--config -c --parameters_file",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        option(FILES, "Images to divide among the sites: CSV or folder.", "PATH", "--data_path -d"),
    ] = None,
    sites: Annotated[
        int | None,
        option(
            _FEDERATION, "Sites that share the subjects; without it two.", "NUMBER", min=1, max=100
        ),
    ] = None,
    site_column: Annotated[
        str,
        option(
            _FEDERATION, "Column of the list whose values are the sites.", "COLUMN", "--site_column"
        ),
    ] = "",
    rounds: Annotated[
        int, option(_FEDERATION, "How often the weights are averaged.", "NUMBER", min=1)
    ] = 2,
    local_epochs: LocalEpochs = 1,
    ranges: Ranges = [],  # noqa: B006  # Typer copies it
    proximal: Proximal = 0.0,
    server_optimizer: ServerOptimizer = "",
    average: Average = "sites",
    average_decay: AverageDecay = 0.9,
    secure_aggregation: SecureAggregation = False,
    overrides: Override = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train at several sites on this machine; the same command again continues it."""
    setup_process(plugins, trust)
    from synthcube.tasks.federate import simulate as task

    folder = task(
        config, data, output, sites=sites, site_column=site_column or None, num_rounds=rounds,
        local_epochs=local_epochs,
        ranges=_declared(ranges), proximal=proximal,
        server_optimizer=_mapping(server_optimizer), average=average,
        average_decay=average_decay, secure_aggregation=secure_aggregation, overrides=overrides,
    )  # fmt: skip
    say(f"Trained model: {folder}")


@command(MODELS, "federate mix -m site-a -m site-b -n 100 -o mixed", of=federate)
def mix(
    model: Annotated[
        list[Path],
        option(
            FILES,
            "Trained model of a site: run, artifact or hf://owner/name; repeatable.",
            "MODEL",
            "--model_path -m",
        ),
    ],
    output: Output,
    num_images: Annotated[
        int, option(SETTINGS, "Images of all models together.", "NUMBER", "--num_images -n", min=1)
    ],
    site_images: Annotated[
        str,
        option(
            _FEDERATION,
            "Training images of each model, as in 1200,300; without it all models "
            "make as many images.",
            "NUMBERS",
            "--site_images",
        ),
    ] = "",
    seed: Annotated[int, option(SETTINGS, "Seed.", "NUMBER", min=0)] = 0,
    plugins: Plugins = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Generate images with the models of several sites, each in its share."""
    setup_process(plugins, trust)
    numbers = [text.strip() for text in site_images.split(",")] if site_images else []
    if not all(text.isdecimal() for text in numbers):
        raise typer.BadParameter(
            f"{site_images}: write it as 1200,300.", param_hint="--site_images"
        )
    from synthcube.tasks.mix import mix as task

    path = task(
        [located(folder) for folder in model], output, num_images=num_images,
        site_images=[int(text) for text in numbers], seed=seed,
    )  # fmt: skip
    say(f"Images: {path}")


@command(MODELS, "federate guard /opt/nvflare/site-a", of=federate)
def guard(
    kit: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Startup kit of NVIDIA FLARE, or workspace of OpenFL."
        ),
    ],
) -> None:
    """Let NVIDIA FLARE run the job of SynthCube alone, or check a workspace of OpenFL for code."""
    setup_process()
    from synthcube.federation_nvflare.kit import guard as guard_kit
    from synthcube.federation_openfl.workspace import guard as guard_workspace

    if (kit / "plan").exists():
        say(f"No code but that of SynthCube. Plan: SHA-256 {guard_workspace(kit).sha256}")
    else:
        say(f"Written: {', '.join(map(str, guard_kit(kit)))}")


@command(MODELS, "federate audit run --server coordinator/audit.jsonl", of=federate)
def audit(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of a site, or its audit.jsonl.")
    ],
    server: Annotated[
        Path | None,
        option(FILES, "Folder of the coordinator, or its audit.jsonl, to compare with.", "FOLDER"),
    ] = None,
) -> None:
    """Show what a site has sent and received, by its audit log."""
    setup_process()
    from synthcube import terminal
    from synthcube.tasks.federation_audit import audit_table

    titles, rows = audit_table(folder, server)
    terminal.print_table(titles, rows)
    if server:
        say("The server says the same.")


def _mapping(text: str) -> dict[str, Any] | None:
    """The value of --server_optimizer; None if it is not given."""
    from synthcube import reading

    if not text:
        return None
    value, _ = reading.parse(text, "--server_optimizer")
    if not isinstance(value, dict):
        raise typer.BadParameter(
            f"{text}: write it as {{name: adam, lr: 0.01}}.", param_hint="--server_optimizer"
        )
    return value


def _declared(texts: list[str]) -> dict[str, tuple[float, float]]:
    """The ranges by column that NAME=LOW,HIGH declare."""
    declared = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        try:
            low, high = map(float, bounds.split(","))
        except ValueError:
            low = high = 0.0
        if not name.strip() or not -math.inf < low < high < math.inf:
            raise typer.BadParameter(f"{text}: write it as Age=0,100.", param_hint="--range")
        declared[name.strip()] = (low, high)
    return declared
