"""The strict base of all settings: numbers have bounds, so that no setting takes all memory."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import synthcube
from synthcube.schema import Schema


def schemas(base: type[Schema] = Schema) -> Iterator[type[Schema]]:
    for kind in base.__subclasses__():
        yield kind
        yield from schemas(kind)


def unbounded(part: Any, path: str) -> Iterator[str]:
    """Where a JSON Schema takes an integer of any size."""
    if isinstance(part, list):
        for item in part:
            yield from unbounded(item, path)
    if not isinstance(part, dict):
        return
    is_integer = part.get("type") == "integer" and not {"enum", "const"} & part.keys()
    if is_integer and not {"maximum", "exclusiveMaximum"} & part.keys():
        yield path
    for key, inner in part.items():
        yield from unbounded(inner, f"{path}.{key}")


NOT_IMPORTED = ("synthcube.__main__", "synthcube.federation_flower.apps",
                "synthcube.federation_flower.nodes",
                "synthcube.federation_nvflare.relays",
                "synthcube.federation_openfl.parties")  # fmt: skip
"""The program itself, and what runs in the environments of Flower, NVIDIA FLARE and OpenFL."""


def test_every_integer_has_a_maximum() -> None:
    for module in pkgutil.walk_packages(synthcube.__path__, "synthcube."):
        if module.name not in NOT_IMPORTED:
            importlib.import_module(module.name)
    kinds = {kind for kind in schemas() if kind.__module__.startswith("synthcube.")}
    assert len(kinds) > 30
    faults = [
        f"{kind.__module__}.{path}"
        for kind in kinds
        for path in unbounded(kind.model_json_schema(), kind.__name__)
        if "$defs" not in path  # a class of its own, or a family of another test
    ]
    assert not sorted(faults)
