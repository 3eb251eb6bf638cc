"""The files and the records of croissant.json: what is in a folder of made images, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from synthcube.export.disclosure import MadeImages
from synthcube.schema import ConditionSpec

MANIFEST, FILES, RECORDS = "manifest.csv", "image-files", "images"

# NIfTI has no registered type; the specification asks for the most appropriate address then.
_ENCODINGS = {
    "png": ["image/png"],
    "nii.gz": ["application/gzip", "https://nifti.nimh.nih.gov/nifti-1"],
}
# What readers of a CSV, pandas among them, take for a number, a truth value or nothing at all.
_GUESSED = re.compile(
    r"[-+]?[\d.]*\d[\d.]*(e[-+]?\d+)?|[-+]?(inf|infinity|nan)|true|false|n/?a|<na>|null|none|#.*",
    re.IGNORECASE,
)


def distribution(images: MadeImages) -> list[dict[str, Any]]:
    file_format = images.image.file_format
    note = " It names subjects and originals." if images.is_derived else ""
    return [
        {
            "@type": "cr:FileObject",
            "@id": MANIFEST,
            "name": MANIFEST,
            "description": f"One row for each image.{note}",
            "contentUrl": MANIFEST,
            "encodingFormat": "text/csv",
            "sha256": images.manifest_sha256,
        },
        {
            "@type": "cr:FileSet",
            "@id": FILES,
            "name": FILES,
            "description": f"The {images.number} images, .{file_format}.",
            "encodingFormat": _ENCODINGS[file_format],
            "includes": f"images/*.{file_format}",
        },
    ]


def record_sets(images: MadeImages) -> list[dict[str, Any]]:
    taken: list[str] = ["file", "image", "SubjectID", "Seed"]
    fields = [_file(images)]
    if images.image.file_format == "png":  # mlcroissant has no reader of NIfTI
        fields.append(
            {
                "@type": "cr:Field",
                "@id": f"{RECORDS}/image",
                "name": "image",
                "description": "The picture.",
                "dataType": "sc:ImageObject",
                "source": {"fileSet": {"@id": FILES}, "extract": {"fileProperty": "content"}},
            }
        )
    fields += [_known(column, images) for column in _KNOWN if column in images.columns]
    enumerations = []
    for spec in images.image.conditions:
        if spec.name not in images.columns:
            continue
        part = identifier(spec.name, taken)
        taken.append(part)
        if spec.kind == "class":
            enumerations.append(_enumeration(spec, part))
        fields.append(_condition(spec, part))
    records = {
        "@type": "cr:RecordSet",
        "@id": RECORDS,
        "name": RECORDS,
        "description": "One record for each image.",
        "key": {"@id": f"{RECORDS}/file"},
        "field": fields,
    }
    return [records, *enumerations]


def _file(images: MadeImages) -> dict[str, Any]:
    """The column that joins the manifest to the images; the first, as mlcroissant joins once."""
    found = _column("file", "Channel_0", "sc:Text", "Name of the file within the folder images.")
    found["source"]["transform"] = {"regex": "^(?:images/)?(.+)$"}
    if images.image.file_format == "png":
        found["references"] = {"fileSet": {"@id": FILES}, "extract": {"fileProperty": "filename"}}
    return found


_KNOWN = {
    "SubjectID": ("sc:Text", "Whose image it is, as text: 0001 is not 1."),
    "Seed": ("sc:Integer", "Gives the same image again, by the same model."),
}


def _known(column: str, images: MadeImages) -> dict[str, Any]:
    kind, text = _KNOWN[column]
    if column != "SubjectID" or images.is_derived:
        return _column(column, column, kind, text)
    # The name of a made image is its number, which readers of a CSV take for one: 00001 is not 1.
    found = _column(column, "Channel_0", kind, "No person: the number of the image, as text.")
    suffix = re.escape(images.image.file_format)
    found["source"]["transform"] = {"regex": rf"^(?:images/)?(.+)\.{suffix}$"}
    return found


def _condition(spec: ConditionSpec, part: str) -> dict[str, Any]:
    told = "What the model was told to make; empty: nothing."
    if spec.kind == "number":
        text = f"{told} It was trained on {spec.low:g} to {spec.high:g}."
        return _column(part, spec.name, "sc:Float", text, name=spec.name)
    found = _column(part, spec.name, ["sc:Text", "cr:Label"], told, name=spec.name)
    if any(_GUESSED.fullmatch(each) for each in spec.classes):
        found["description"] += " As text: 01 is not 1, NA is not nothing."
    else:  # mlcroissant 1.1 joins the references, and fails where the columns' types differ
        found["references"] = {"field": {"@id": f"{part}-classes/name"}}
    return found


def _enumeration(spec: ConditionSpec, part: str) -> dict[str, Any]:
    top = f"{part}-classes"
    return {
        "@type": "cr:RecordSet",
        "@id": top,
        "name": top,
        "description": f"The classes of {spec.name} that the model knows.",
        "dataType": "sc:Enumeration",
        "key": {"@id": f"{top}/name"},
        "field": [
            {"@type": "cr:Field", "@id": f"{top}/name", "name": "name", "dataType": "sc:Text"}
        ],
        "data": [{f"{top}/name": each} for each in spec.classes],
    }


def _column(
    part: str, column: str, kind: str | list[str], text: str, name: str = ""
) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{RECORDS}/{part}",
        "name": name or part,
        "description": text,
        "dataType": kind,
        "source": {"fileObject": {"@id": MANIFEST}, "extract": {"column": column}},
    }


def identifier(text: str, taken: Iterable[str] = ()) -> str:
    """`text` as part of an IRI, another one than those taken."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    found, number, others = plain, 1, set(taken)
    while found in others:
        number += 1
        found = f"{plain}_{number}"
    return found
