"""A commented YAML written from the fields of a config: `synthcube init`."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic import BaseModel

_WIDTH = 96


def template(config: BaseModel, indent: int = 0) -> str:
    """Every field with its description above it; sections are indented."""
    pad = "  " * indent
    parts: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        comment = textwrap.wrap(field.description or "", _WIDTH - len(pad) - 2)
        parts += [f"{pad}# {line}" for line in comment]
        if isinstance(value, BaseModel):
            parts += [f"{pad}{name}:", template(value, indent + 1).rstrip("\n")]
        else:
            parts.append(f"{pad}{name}: {_inline(value)}")
        if indent == 0:
            parts.append("")
    for name, value in (getattr(config, "model_extra", None) or {}).items():
        parts.append(f"{pad}{name}: {_inline(value)}")
    return "\n".join(parts) + "\n"


def _inline(value: Any) -> str:
    """JSON is YAML: the one-line form of a plain value."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_inline(each) for each in value) + "]"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)
