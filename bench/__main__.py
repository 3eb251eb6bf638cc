"""Print a table of measurements; exit with code 1 where a bound is missed."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from bench.process import QUICK
from bench.report import Options, Row, exit_code, table

DEFAULT = (
    "startup", "train_step", "gan_step", "vqvae_step", "data_path", "sampling", "runtimes",
    "memory", "evaluation",
)  # fmt: skip
ON_REQUEST = (
    "precision", "family_step", "volumes", "processes", "saving", "manifest", "profile",
)  # fmt: skip


def main() -> int:
    """Run the benches that the command line names, or the default ones."""
    if sys.argv[1:2] in (
        ["quality"],
        ["federation"],
        ["memorisation"],
        ["plan"],
        ["privacy"],
        ["gpu"],
    ):  # they take other options, and print other tables
        return int(import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"{', '.join(DEFAULT)} (the default), {', '.join(ON_REQUEST)}",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="tiny numbers and no verdict: only to see it run"
    )
    parser.add_argument("--output", type=Path, help="picture to draw (precision)")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.names} - {*DEFAULT, *ON_REQUEST})
    if unknown:
        parser.error(f"there is no bench {', '.join(unknown)}")
    options = Options(quick=arguments.quick, output=arguments.output)
    if arguments.quick:
        os.environ[QUICK] = "1"
    rows: list[Row] = []
    for name in arguments.names or DEFAULT:
        print(f"bench {name} ...", file=sys.stderr, flush=True)
        rows += import_module(f"bench.{name}").measure(options)
    print(table(rows, options))
    return exit_code(rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
