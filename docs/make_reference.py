"""Writes docs/reference.md from the config's own fields: python docs/make_reference.py."""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from synthcube import config
from synthcube.data.postprocessing import OPERATIONS
from synthcube.models import registry

PATH = Path(__file__).with_name("reference.md")
HEAD = """# Every key of the YAML

Written by `python docs/make_reference.py` from the fields themselves; do not edit.
Every key with a default may be left out; `synthcube init FAMILY` prints the same as a YAML to
start from, and `synthcube schema` as a JSON Schema for editors. A file wins over the defaults,
`--set key=value` over the file.
"""


def main() -> None:
    PATH.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page as Markdown."""
    parts = [HEAD, "## Top level\n", table(config.RunConfig, skip=("model",), nested=False)]
    for name, field in config.RunConfig.model_fields.items():
        kind = model_in(field.annotation)
        if kind and name != "model":
            parts += [f"## `{name}`\n", table(kind, prefix=f"{name}.")]
    for operation, kind in OPERATIONS.items():
        head = f"## `sampling.postprocessing` for `{operation}`\n"
        parts += [head, f"{inspect.getdoc(kind)}\n", table(kind, skip=("name",))]
    for family in registry.names():
        kind = registry.find(family)
        parts += [
            f"## `model` for `{family}`\n",
            f"{kind.summary}.\n",
            table(kind, prefix="model."),
        ]
    return "\n".join(parts).rstrip() + "\n"


def table(
    kind: type[BaseModel], prefix: str = "", skip: tuple[str, ...] = (), nested: bool = True
) -> str:
    """One row for each field; fields of sections within a section follow it."""
    rows = [] if prefix.count(".") > 1 else ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        inner = model_in(field.annotation)
        if name in skip or (inner and not nested):
            continue
        default = field.get_default(call_default_factory=True)
        blank = field.is_required() or isinstance(default, BaseModel)
        shown = "" if blank else f"`{plain(default)}`"
        rows.append(f"| `{prefix}{name}` | {shown} | {field.description} |")
        if inner and isinstance(default, BaseModel):
            rows.append(table(inner, f"{prefix}{name}.").rstrip())
    return "\n".join(rows) + "\n"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds exactly one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list):
        return None
    models = [model_in(part) for part in typing.get_args(annotation)]
    return next((model for model in models if model), None)


def plain(value: Any) -> str:
    """A default as a YAML writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{name}: {plain(part)}" for name, part in value) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool | dict) else str(value)


if __name__ == "__main__":
    main()
