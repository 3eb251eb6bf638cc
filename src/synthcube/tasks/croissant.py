"""The description of the images that a job makes: refused before them, written after them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthcube.artifact import Artifact
from synthcube.data.manifest import Row
from synthcube.data.table import read_table
from synthcube.errors import ArtifactError
from synthcube.export import identities
from synthcube.export.croissant import CROISSANT, CroissantConfig, description
from synthcube.export.disclosure import MadeImages
from synthcube.export.record_sets import MANIFEST
from synthcube.schema import ImageSpec
from synthcube.storage import sha256, write_json

log = logging.getLogger("synthcube")


def wished(section: Mapping[str, Any], given: CroissantConfig | None) -> CroissantConfig | None:
    """What is given over what the section `sampling` says; None: no description is wished."""
    said = section.get("croissant")
    if said is None:
        return given
    over = given.model_dump(exclude_defaults=True) if given else {}
    return CroissantConfig.model_validate({**said, **over})


def check(
    trained: Artifact,
    asked: Mapping[str, Any],
    originals: Sequence[Row],
    config: CroissantConfig,
) -> None:
    """Refuse a description that would name a place or a person; warn of what it cannot say.

    Args:
        asked: the record of the job.
        originals: the images that others are made of.

    Raises:
        ArtifactError: what, before any image is made.
    """
    known = identities.subjects_of(trained.folder)
    rows = [*known, *map(_cells, originals)]
    image = identities.public_image(trained.image, {row.get("SubjectID", "") for row in rows})
    images = _images(trained, image, asked, 0, ())
    # Not our own prose, where a user called research would be found; nor what is said to be told.
    if found := identities.traces({CROISSANT: "\n".join(images.words)}, rows):
        raise ArtifactError(
            f"{CROISSANT} would tell of people or of this machine; no image was made:", found
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
    out: Path, trained: Artifact, asked: Mapping[str, Any], number: int, config: CroissantConfig
) -> Path:
    """Write croissant.json beside the images and their manifest, in one step.

    Raises:
        OutputError: it cannot be written.
    """
    image, manifest = identities.public_image(trained.image, ()), out / MANIFEST
    columns = read_table(manifest).header
    images = _images(trained, image, asked, number, columns, sha256(manifest))
    write_json(out / CROISSANT, description(images, config))
    return out / CROISSANT


def _images(
    trained: Artifact,
    image: ImageSpec,
    asked: Mapping[str, Any],
    number: int,
    columns: Sequence[str],
    manifest_sha256: str = "0" * 64,
) -> MadeImages:
    family = trained.config["model"]["name"]
    return MadeImages(
        image, family, trained.sha256, asked["task"], asked.get("seed"), number, columns,
        [str(step["name"]) for step in asked["postprocessing"]], manifest_sha256,
    )  # fmt: skip


def _cells(row: Row) -> dict[str, str]:
    channels = {f"Channel_{index}": str(path) for index, path in enumerate(row.channels)}
    return {"SubjectID": row.subject, **channels}
