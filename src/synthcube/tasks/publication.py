"""What is said of an exported model and where it goes: the YAML, and the command line over it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthcube import addresses, config
from synthcube.errors import ConfigError
from synthcube.export.config import TOKEN, ExportConfig

log = logging.getLogger("synthcube")

# Where MLCube mounts the folder of a file, whether the file is there or not.
_MOUNTED = re.compile(r"/mlcube_io\d+/.*")


def publication(config_path: Path | None, given: Mapping[str, Any]) -> ExportConfig:
    """The section `export` of a YAML, with what the command line says in place of it.

    Args:
        config_path: YAML of the run, of which no other section is used; none for the defaults.
        given: by the section's keys; what is None or empty was not given.

    Raises:
        ConfigError: all that is wrong with the YAML; a token in place of something else; or a
            model that is to be published has no license.
        HubError: what it is to be published as is no name of a model.
    """
    section = config.load(config_path, trained=True).export if config_path else ExportConfig()
    said = {name: value for name, value in given.items() if value not in (None, "", ())}
    settings = section.model_copy(update=said)
    if TOKEN.search(repr(said)):
        raise ConfigError("A token is on the command line, where others see it: set HF_TOKEN.")
    if settings.push_to:
        addresses.repo_id(settings.push_to)
        if not settings.license:
            raise ConfigError(
                "--push_to needs a license, and none is ever assumed: say which, as in --license "
                "apache-2.0; it must be one that the owners of the training images allow."
            )
    return settings


def place(settings: ExportConfig) -> str:
    """Address under which the model will be found; empty where it is not published."""
    return str(addresses.Address(settings.push_to)) if settings.push_to else ""


def present(path: Path | None) -> Path | None:
    """A file that MLCube always names and that need not be there; any other is as it was given."""
    if path and _MOUNTED.fullmatch(str(path)) and not path.exists():
        log.warning("evaluation: there is no %s, and the card shows no numbers.", path.name)
        return None
    return path
