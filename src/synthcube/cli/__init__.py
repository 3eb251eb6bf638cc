"""The command line: few commands, few flags, a YAML for the rest.

Nothing heavy is imported before a command runs. A user's fault prints its message and exits with
code 2; anything else is a bug of SynthCube, with its traceback and code 1.
"""

from synthcube.cli import train

# isort: split
# The list of commands has the order of the imports.
from synthcube.cli import models

# isort: split
from synthcube.cli import challenge

# isort: split
from synthcube.cli import data, federate, installation, medperf
from synthcube.cli.app import app, main

__all__ = [
    "app",
    "challenge",
    "data",
    "federate",
    "installation",
    "main",
    "medperf",
    "models",
    "train",
]
