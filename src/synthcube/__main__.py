"""The command `synthcube`, which a signal ends quietly from its first moment on."""

import sys

from synthcube import interruption


def main() -> None:
    """Run the command line; the entry point of the package."""
    interruption.guard_start(sys.argv[1:])
    try:
        from synthcube.cli import main as command_line

        command_line()
    finally:
        interruption.release()


if __name__ == "__main__":
    main()
