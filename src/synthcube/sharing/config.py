"""The sections `export` and `sampling.croissant` of the YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from synthcube.errors import HubError
from synthcube.models import artifact
from synthcube.schema import List, Schema
from synthcube.sharing.runtimes import RuntimeName, Weights

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
VERSION = re.compile(r"\d+(\.\d+){1,2}([-.+]?[0-9A-Za-z.-]+)?")
BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
"""What a Hub gives to those who log in; it is in no file and in no message."""

_FORMS = {
    "license": (_LICENSE, "a license as the Hub spells it, such as apache-2.0 or other"),
    "datasets": (_DATASET, "the name of a data set: owner/name"),
    "version": (VERSION, "a version: two or three numbers, such as 1.0.0"),
    "revision": (BRANCH, "the name of a branch, such as main"),
}


class ExportConfig(Schema):
    """What `synthcube export` says of a model, and where it publishes it; no other task reads it.

    The token of a Hub is no setting: see sharing/hub.py.
    """

    license: str = Field(
        default="", description="License of the model, as the Hub spells it; none is ever assumed."
    )
    datasets: List[str] = Field(
        default=(), description="Names on a Hub of what it was trained on: [owner/name]."
    )
    version: str = Field(default="1.0.0", description="Version of the model, its tag on a Hub.")
    notes: str = Field(
        default="", description="Markdown of yours for the card: authors, data, limits."
    )
    runtimes: List[RuntimeName] = Field(
        default=(), description="Other runtimes to convert the networks for: [openvino, onnx]."
    )
    runtime_weights: Weights = Field(
        default="float32",
        description="How the converted weights are stored: as they are, or smaller and less "
        "exactly.",
    )
    push_to: str = Field(
        default="", description="owner/name: publish it there, on a Hub; empty: only the folder."
    )
    public: bool = Field(default=False, description="For everyone to see; private otherwise.")
    revision: str = Field(default="main", description="Branch to push to.")
    commit_message: str = Field(default="", description="What the commit says.")

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, values: Any) -> Any:
        keys = values if isinstance(values, Mapping) else ()
        if TOKEN.search(repr(values)) or any(str(key).lower().endswith("token") for key in keys):
            raise ValueError(
                "a token is never in a file: take it out, make a new one, and set HF_TOKEN to it"
            )
        return values

    @field_validator(*_FORMS)
    @classmethod
    def _well_formed(cls, value: Any, info: ValidationInfo) -> Any:
        form, right = _FORMS[str(info.field_name)]
        for text in value if isinstance(value, tuple) else (value,):
            if text and not form.fullmatch(text):
                raise ValueError(f"{text!r} is not {right}")
        return value

    @field_validator("push_to")
    @classmethod
    def _name_of_a_model(cls, value: str) -> str:
        try:
            return artifact.repo_id(value) if value else ""
        except HubError as error:
            raise ValueError(str(error)) from None


class ExportRequest(ExportConfig):
    """One export: the section `export` with the options of the command line over it."""

    evaluation: Path | None = Field(
        default=None, description="results.yaml of synthcube evaluate, for the card's table."
    )
    notes_file: Path | None = Field(default=None, description="A file in place of notes.")

    @property
    def address(self) -> str:
        """Address under which the model will be found; empty where it is not published."""
        return str(artifact.Address(self.push_to)) if self.push_to else ""

    @model_validator(mode="after")
    def _licensed(self) -> Self:
        if self.push_to and not self.license:
            raise ValueError(
                "--push_to needs a license, and none is ever assumed: state one, as in --license "
                "apache-2.0; it must be one that the owners of the training images allow."
            )
        return self


class CroissantConfig(Schema):
    """What only the user can say of the images."""

    license: str = Field(
        default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9.+-]*|https?://\S+)?$",
        description="Of the images: an identifier such as cc-by-4.0, or an address; never assumed.",
    )  # fmt: skip
    creators: List[str] = Field(
        default=(), description="Groups or institutions that answer for the images."
    )
