"""The same bits every time, on a GPU too, where an operation can give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from synthcube.errors import ConfigError


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Puts back what Lightning's `deterministic` sets for the whole process.

    Raises:
        ConfigError: an operation has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not (wanted and found):
            raise
        raise ConfigError(
            f"compute.deterministic is true, but {found[1]} has no deterministic algorithm on "
            "this device. Leave compute.deterministic out, take another model, or train on a CPU, "
            "where a training repeats itself without it."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
