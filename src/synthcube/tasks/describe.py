"""Describe: the list of families, and a commented config to start from."""

from __future__ import annotations

from synthcube.config import config_class, template
from synthcube.data.preprocessing import DataConfig
from synthcube.models import registry


def family_lines() -> list[str]:
    """One line for each family: its name and what it is."""
    width = max(map(len, registry.names()))
    return [f"{name:{width}}  {registry.find(name).summary}" for name in registry.names()]


def starting_yaml(family: str, dims: int) -> str:
    """A commented YAML with every key of a family's run, for 64 x 64 or 32 x 32 x 32 voxels."""
    model_config = registry.find(family)
    side = 64 if dims == 2 else 32
    config = config_class(model_config)(
        model=model_config(name=family), data=DataConfig(size=(side,) * dims)
    )
    heading = (
        f"# A {dims}D {family}. Leave out any key to take the value shown here.\n"
        "# synthcube train -c THIS_FILE -d DATA -o RUN\n\n"
    )
    return heading + template(config)
