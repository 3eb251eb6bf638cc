"""The command `synthcube`, which a signal ends quietly from its first moment on."""

import sys
from pathlib import Path

import synthcube
from synthcube import interruption


def main() -> None:
    """Run the command line; the entry point of the package."""
    interruption.guard_start(sys.argv[1:])
    try:
        from synthcube.cli import main as command_line

        command_line()
    finally:
        interruption.release()


def _forget_current_folder() -> None:
    """Take the folder that `python -m` puts on the path off it: a stranger's file may lie there.

    Not where SynthCube itself lies there, as in its sources.
    """
    is_first = sys.path and not getattr(sys.flags, "safe_path", False)
    if is_first and Path(sys.path[0]) == Path.cwd() != Path(synthcube.__file__).parents[1]:
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_folder()
    main()
