"""croissant.json: a folder of made images, described for machines.

In the format MLCommons Croissant 1.1 (http://mlcommons.org/croissant/1.1); mlcroissant reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError

from synthcube import __version__
from synthcube.errors import ConfigError
from synthcube.export.disclosure import MadeImages, disclosure, summary
from synthcube.export.record_sets import distribution, identifier, record_sets
from synthcube.schema import List, Schema

CROISSANT = "croissant.json"
VERSION = "1.0.0"
"""Of the data: another seed, model or number of images is another data set, by its name."""

CITATION = (
    "@software{synthcube, title = {synthcube}, author = {{The synthcube contributors}}, "
    f"version = {{{__version__}}}, license = {{Apache-2.0}}}}"
)
"""SynthCube's, as in CITATION.cff, which an installed package does not have."""

# The recommended one of the specification, appendix 1, and the vocabularies used beside it.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]


class CroissantConfig(Schema):
    """What only the user can say of the images."""

    license: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9.+-]*|https?://\S+)?$",
        description="Of the images: an identifier such as cc-by-4.0, or an address; never assumed.",
    )
    creators: List[str] = Field(
        default=(), description="Groups or institutions that answer for the images."
    )


def stated(is_wished: bool, license_id: str, creators: Sequence[str]) -> CroissantConfig | None:
    """What the command line says.

    Raises:
        ConfigError: the license is none, or something is said although nothing is wished.
    """
    if not is_wished:
        if license_id or creators:
            raise ConfigError("--license and --creator are of --croissant: give that as well.")
        return None
    try:
        return CroissantConfig(license=license_id, creators=tuple(creators))
    except ValidationError as error:
        raise ConfigError(
            f"--license {license_id!r}: give an identifier such as cc-by-4.0, or an address."
        ) from error


def description(images: MadeImages, config: CroissantConfig) -> dict[str, Any]:
    """The content of croissant.json; the same for the same images.

    Left out, because only their publisher knows them: url, datePublished, and the license and the
    creator where `config` has none. The specification asks for all four.
    """
    title = name(images)
    said: dict[str, Any] = {"license": config.license} if config.license else {}
    if config.creators:
        said["creator"] = [{"@type": "Organization", "name": each} for each in config.creators]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": title,
        "description": summary(images),
        "conformsTo": _CONFORMS_TO,
        "version": VERSION,
        **said,
        "citeAs": _cite_as(title, images, config.creators),
        "citation": CITATION,
        "keywords": [
            "synthetic data", "medical imaging", images.family, f"{images.image.rank}D",
        ],
        "isLiveDataset": False,
        **disclosure(images),
        "distribution": distribution(images),
        "recordSet": record_sets(images),
    }  # fmt: skip


def name(images: MadeImages) -> str:
    """Of the data set: of which model, and how it was asked."""
    done = {"generate": "generated", "translate": "translated", "reconstruct": "reconstructed"}
    family = identifier(images.family)
    words = [family, f"{images.image.rank}d", images.model_sha256[:8], done[images.task]]
    words += [] if images.seed is None else ["seed", str(images.seed)]
    return "-".join(words)


def _cite_as(title: str, images: MadeImages, creators: Sequence[str]) -> str:
    author = f"author = {{{' and '.join(f'{{{each}}}' for each in creators)}}}, "
    return (
        f"@misc{{{title}, title = {{{title}}}, {author if creators else ''}"
        f"note = {{Version {VERSION}, {images.number} images made by {images.model}}}}}"
    )
