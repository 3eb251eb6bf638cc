"""croissant.json: a folder of generated images described as a data set, for machines to read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from synthcube import __version__
from synthcube.data.channels import files_of
from synthcube.data.manifest import Row
from synthcube.data.tables import read_table
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models.artifact import Artifact
from synthcube.schema import ConditionSpec, ImageSpec
from synthcube.sharing import identities
from synthcube.sharing.card import INTENDED_USE
from synthcube.sharing.config import CroissantConfig
from synthcube.storage import sha256, write_json

log = logging.getLogger("synthcube")

CROISSANT = "croissant.json"
VERSION = "1.0.0"
"""Of the data: another seed, model or number of images is another data set, by its name."""

CITATION = (
    "@software{synthcube, title = {synthcube}, author = {{The synthcube contributors}}, "
    f"version = {{{__version__}}}, license = {{Apache-2.0}}}}"
)
"""SynthCube's, as in CITATION.cff, which an installed package does not have."""

MANIFEST, FILES, RECORDS = "manifest.csv", "image-files", "images"

# NIfTI has no registered type; the specification asks for the most appropriate address then.
_ENCODINGS = {
    "png": ["image/png"],
    "nii.gz": ["application/gzip", "https://nifti.nimh.nih.gov/nifti-1"],
}
_IN_IMAGES = "^(?:images/)?(.+)$"
# What readers of a CSV, pandas among them, take for a number, a truth value or nothing at all.
_GUESSED = re.compile(
    r"[-+]?[\d.]*\d[\d.]*(e[-+]?\d+)?|[-+]?(inf|infinity|nan)|true|false|n/?a|<na>|null|none|#.*",
    re.IGNORECASE,
)

# The recommended one of the specification, appendix 1, and the vocabularies used beside it.
_TERMS = (
    "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field",
    "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset",
    "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
_TYPED_TERMS = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
_CONTEXT = dict(sorted(({term: f"cr:{term}" for term in _TERMS} | _TYPED_TERMS).items()))

InferTask = Literal["generate", "translate", "reconstruct"]
_BEGINNINGS: dict[InferTask, str] = {
    "generate": "Synthetic images: each was made out of noise by",
    "translate": "Images derived from real images of real people: each was translated by",
    "reconstruct": "Images derived from real images of real people: each was reconstructed by",
}
_PERSONAL_MADE = (
    "None is meant to be there: the images are made out of noise, and a SubjectID is the number of "
    "an image. Only as far as that was tested: this description was searched for the names of "
    "users, machines and known subjects. Whether an image is a copy of one that the model was "
    "trained on was not tested here; `synthcube evaluate` looks for copies, and finding none does "
    "not show that there are none.",
)
_PERSONAL_DERIVED = (
    "Yes: every image is derived from a real image of a real person, may show what identifies that "
    "person, and is to be protected as the original is.",
    "The names of the image files and manifest.csv tell the subjects' ids, and manifest.csv tells "
    "where the originals lie: neither is fit to be published. This description names no subject "
    "and no original.",
)
_LIMITS = (
    "Not for diagnosis, treatment, triage, or any decision about a person.",
    "Not to be passed on as images that a scanner has taken.",
    "The model knows no organs, scanners, protocols or populations other than those it was trained "
    "on, and does not say where its knowledge ends.",
    "What looks like anatomy or a lesion may be an invention of the model, and what is rare may be "
    "missing: nobody has looked at each image.",
    "How near the images are to real ones is not told here; `synthcube evaluate` says it.",
)


def stated(is_requested: bool, license_id: str, creators: Sequence[str]) -> CroissantConfig | None:
    """The options of the command line; a ConfigError where they do not fit each other."""
    if not is_requested:
        if license_id or creators:
            raise ConfigError("--license and --creator are of --croissant: give that as well.")
        return None
    try:
        return CroissantConfig(license=license_id, creators=tuple(creators))
    except ValidationError as error:
        raise ConfigError(
            f"--license {license_id!r}: give an identifier such as cc-by-4.0, or an address."
        ) from error


@dataclass(frozen=True, slots=True)
class MadeImages:
    """A folder of images that infer has made, without anything that names people or places."""

    image: ImageSpec
    family: str
    model_sha256: str  # of the artifact's index, which holds the hash of every file of the model
    task: InferTask
    seed: int | None  # None where nothing is drawn
    number: int
    columns: Sequence[str]  # of manifest.csv
    steps: Sequence[str]  # names of what was done to each after the model
    manifest_sha256: str

    @property
    def is_derived(self) -> bool:
        """Whether they are made out of real images."""
        return self.task != "generate"

    @property
    def model(self) -> str:
        return (
            f"a {self.family} with SynthCube {__version__} (SHA-256 of its artifact.json: "
            f"{self.model_sha256})"
        )


def wished(section: Mapping[str, Any], options: CroissantConfig | None) -> CroissantConfig | None:
    """What is given over what the section `sampling` says; None: no description is wished."""
    if section.get("croissant") is None:
        return options
    changes = options.model_dump(exclude_defaults=True) if options else {}
    return CroissantConfig.model_validate({**section["croissant"], **changes})


def check(
    trained: Artifact, request: Mapping[str, Any], originals: Sequence[Row], config: CroissantConfig
) -> None:
    """Refuse a description that would name a place or a person, before any image is made.

    Args:
        request: the record of the job.
        originals: the images that others are made of.
    """
    rows = identities.subjects_of(trained.folder)
    rows += [{"SubjectID": row.subject, **row.channel_cells} for row in originals]
    image = identities.public_image(trained.image, {row.get("SubjectID", "") for row in rows})
    images = _images(trained, image, request, 0, ())
    # Only words that are not SynthCube's: in its prose a user called research would be found.
    words = [images.family, *images.steps]
    words += [word for spec in image.conditions for word in (spec.name, *spec.classes)]
    if traces := identities.traces({CROISSANT: "\n".join(words)}, rows):
        raise ArtifactError(
            f"{CROISSANT} would tell of people or of this machine; no image was made:", traces
        )
    if not config.license:
        log.warning(
            "%s will state no license, which the Croissant specification asks for and nobody else "
            "can use the images without: say which, with --license or as "
            "sampling.croissant.license.", CROISSANT,
        )  # fmt: skip
    if images.is_derived:
        log.warning(
            "These images are made out of those of real people: their names and %s tell subjects' "
            "ids and places of originals, and %s says so.", MANIFEST, CROISSANT,
        )  # fmt: skip


def write(
    out: Path, trained: Artifact, request: Mapping[str, Any], number: int, config: CroissantConfig
) -> None:
    """Write croissant.json beside the images and their manifest, in one step."""
    image, table = identities.public_image(trained.image, ()), out / MANIFEST
    images = _images(trained, image, request, number, read_table(table).header, sha256(table))
    write_json(out / CROISSANT, description(images, config))


def description(images: MadeImages, config: CroissantConfig) -> dict[str, Any]:
    """The content of croissant.json; the same for the same images.

    Left out, because only their publisher knows them: url, datePublished, and the license and the
    creator where `config` has none. The specification asks for all four.
    """
    tasks = {"generate": "generated", "translate": "translated", "reconstruct": "reconstructed"}
    rank = f"{images.image.rank}D"
    words = [_identifier(images.family), rank.lower(), images.model_sha256[:8], tasks[images.task]]
    words += [] if images.seed is None else ["seed", str(images.seed)]
    title = "-".join(words)
    publisher: dict[str, Any] = {"license": config.license} if config.license else {}
    author = ""
    if creators := config.creators:
        publisher["creator"] = [{"@type": "Organization", "name": creator} for creator in creators]
        author = f"author = {{{' and '.join(f'{{{creator}}}' for creator in creators)}}}, "
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": title,
        "description": _summary(images),
        "conformsTo": [f"http://mlcommons.org/croissant/{name}" for name in ("1.1", "RAI/1.0")],
        "version": VERSION,
        **publisher,
        "citeAs": f"@misc{{{title}, title = {{{title}}}, {author}note = {{Version {VERSION}, "
        f"{images.number} images made by {images.model}}}}}",
        "citation": CITATION,
        "keywords": ["synthetic data", "medical imaging", images.family, rank],
        "isLiveDataset": False,
        **_disclosure(images),
        "distribution": _distribution(images),
        "recordSet": _record_sets(images),
    }


def _summary(images: MadeImages) -> str:
    image = images.image
    size = f"{' x '.join(map(str, image.size))} voxels"
    if image.patches and images.is_derived:
        size = "the size of their sources"
    spacing = " x ".join(f"{length:g}" for length in image.spacing_mm[: image.rank])
    warning = " They are personal data wherever the originals are." if images.is_derived else ""
    return (
        f"{_origin(images)}{warning} {images.number} image(s) of {size} with "
        f"{image.channels} channel(s), {spacing} mm. For research only: not a medical device, "
        "not for diagnosis."
    )


def _disclosure(images: MadeImages) -> dict[str, Any]:
    """The terms of the RAI vocabulary, and where the images are from as PROV-O says it."""
    source = (
        "Real images of real people, which are not part of this data set and are not named here."
        if images.is_derived
        else "None: the images begin as noise. The model was trained on real images, which are not "
        "part of this data set."
    )
    annotations = "No annotations."
    if images.image.conditions:
        annotations = "Nobody annotated the images: their columns say what the model was told to "
        annotations += "follow, which is not proof that it did."
    return {
        "rai:hasSyntheticData": True,  # not of RAI 1.0: what NeurIPS 2026 asks for beside it
        "rai:dataCollection": f"Not collected but computed. {_origin(images)}",
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionRawData": source,
        "rai:dataManipulationProtocol": "Done to each image after the model: "
        f"{', '.join(images.steps) or 'nothing'}.",
        "rai:dataAnnotationProtocol": annotations,
        "rai:dataUseCases": [INTENDED_USE],
        "rai:dataLimitations": list(_LIMITS),
        "rai:dataBiases": [
            "Those of the images that the model was trained on, and the model may have made them "
            "worse: what is frequent there can be more frequent here."
        ],
        "rai:dataSocialImpact": "Made images that pass for real ones mislead: say of everything "
        "that is made with them that they are synthetic.",
        "rai:personalSensitiveInformation": list(
            _PERSONAL_DERIVED if images.is_derived else _PERSONAL_MADE
        ),
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": images.task,
            "prov:used": {"@type": "prov:Entity", "prov:label": images.model},
        },
    }


def _origin(images: MadeImages) -> str:
    seed = "" if images.seed is None else f", seed {images.seed}"
    return f"{_BEGINNINGS[images.task]} {images.model}{seed}."


def _distribution(images: MadeImages) -> list[dict[str, Any]]:
    suffix = images.image.file_format
    note = " It names subjects and originals." if images.is_derived else ""
    table = _node("FileObject", MANIFEST, f"One row for each image.{note}")
    table |= {"contentUrl": MANIFEST, "encodingFormat": "text/csv"}
    files = _node("FileSet", FILES, f"The {images.number} images, .{suffix}.")
    files |= {"encodingFormat": _ENCODINGS[suffix], "includes": f"images/*.{suffix}"}
    return [{**table, "sha256": images.manifest_sha256}, files]


def _record_sets(images: MadeImages) -> list[dict[str, Any]]:
    parts = ["file", "image", "SubjectID", "Seed"]
    fields = [_file(images)]
    if images.image.file_format == "png":  # mlcroissant has no reader of NIfTI
        source = {"fileSet": {"@id": FILES}, "extract": {"fileProperty": "content"}}
        picture = _node("Field", f"{RECORDS}/image", "The picture.", "image")
        fields.append({**picture, "dataType": "sc:ImageObject", "source": source})
    others = [name for name in images.columns if re.fullmatch(r"Channel_[1-9]\d*", name)]
    for name in others:
        text = f"Name of the file of {name} within the folder images."
        part = f"file_{name.removeprefix('Channel_')}"
        fields.append(_column(part, name, "sc:Text", text, regex=_IN_IMAGES))
        parts.append(part)
    if "SubjectID" in images.columns:
        fields.append(_subject(images))
    if "Seed" in images.columns:
        text = "Gives the same image again, by the same model."
        fields.append(_column("Seed", "Seed", "sc:Integer", text))
    enumerations = []
    for spec in images.image.conditions:
        if spec.name not in images.columns:
            continue
        part = _identifier(spec.name, parts)
        parts.append(part)
        if spec.kind == "class":
            enumerations.append(_enumeration(spec, part))
        fields.append(_condition(spec, part))
    records = _node("RecordSet", RECORDS, "One record for each image.")
    return [{**records, "key": {"@id": f"{RECORDS}/file"}, "field": fields}, *enumerations]


def _file(images: MadeImages) -> dict[str, Any]:
    """The column that joins the manifest to the images; the first, as mlcroissant joins once."""
    text = "Name of the file within the folder images."
    field = _column("file", "Channel_0", "sc:Text", text, regex=_IN_IMAGES)
    if images.image.file_format == "png":
        field["references"] = {"fileSet": {"@id": FILES}, "extract": {"fileProperty": "filename"}}
    return field


def _subject(images: MadeImages) -> dict[str, Any]:
    if images.is_derived:
        text = "Whose image it is, as text: 0001 is not 1."
        return _column("SubjectID", "SubjectID", "sc:Text", text)
    # The name of a made image is its number, which readers of a CSV take for one: 00001 is not 1.
    text = "No person: the number of the image, as text."
    (_, ending), *_ = files_of(images.image)
    regex = rf"^(?:images/)?(.+){ending}\.{re.escape(images.image.file_format)}$"
    return _column("SubjectID", "Channel_0", "sc:Text", text, regex=regex)


def _condition(spec: ConditionSpec, part: str) -> dict[str, Any]:
    text = "What the model was told to make; empty: nothing."
    if spec.kind == "number":
        text = f"{text} It was trained on {spec.low:g} to {spec.high:g}."
        return _column(part, spec.name, "sc:Float", text, name=spec.name)
    field = _column(part, spec.name, ["sc:Text", "cr:Label"], text, name=spec.name)
    if any(_GUESSED.fullmatch(name) for name in spec.classes):
        field["description"] += " As text: 01 is not 1, NA is not nothing."
    else:  # mlcroissant 1.1 joins the references, and fails where the columns' types differ
        field["references"] = {"field": {"@id": f"{part}-classes/name"}}
    return field


def _enumeration(spec: ConditionSpec, part: str) -> dict[str, Any]:
    top = f"{part}-classes"
    name = f"{top}/name"
    return {
        **_node("RecordSet", top, f"The classes of {spec.name} that the model knows."),
        "dataType": "sc:Enumeration",
        "key": {"@id": name},
        "field": [{"@type": "cr:Field", "@id": name, "name": "name", "dataType": "sc:Text"}],
        "data": [{name: class_name} for class_name in spec.classes],
    }


def _column(
    part: str, column: str, data_type: str | list[str], text: str, name: str = "", regex: str = ""
) -> dict[str, Any]:
    source = {"fileObject": {"@id": MANIFEST}, "extract": {"column": column}}
    source |= {"transform": {"regex": regex}} if regex else {}
    field = _node("Field", f"{RECORDS}/{part}", text, name or part)
    return {**field, "dataType": data_type, "source": source}


def _node(type_name: str, identifier: str, text: str, name: str = "") -> dict[str, Any]:
    names = {"@id": identifier, "name": name or identifier}
    return {"@type": f"cr:{type_name}", **names, "description": text}


def _identifier(text: str, others: Sequence[str] = ()) -> str:
    """`text` as part of an IRI, other than `others`."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    candidates = chain([plain], (f"{plain}_{number}" for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in others)


def _images(
    trained: Artifact,
    image: ImageSpec,
    request: Mapping[str, Any],
    number: int,
    columns: Sequence[str],
    manifest_sha256: str = "0" * 64,
) -> MadeImages:
    family = trained.config["model"]["name"]
    return MadeImages(
        image, family, trained.sha256, request["task"], request.get("seed"), number, columns,
        [str(step["name"]) for step in request["postprocessing"]], manifest_sha256,
    )  # fmt: skip
