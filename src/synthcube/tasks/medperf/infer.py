"""Infer: what a registered model makes of a site's prepared data."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from synthcube import artifact, storage, yaml_text
from synthcube.artifact import INDEX, Artifact
from synthcube.data.conditions import cell, requested
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.wishes import Wish
from synthcube.errors import ArtifactError, ConfigError
from synthcube.tasks.infer import infer as make_images
from synthcube.tasks.medperf.parameters import ModelConfig, read_parameters

log = logging.getLogger("synthcube")

_DEPTH = 2  # folders of a tarball above the model's own


def infer(
    data_path: Path,
    output_path: Path,
    additional_files: Path,
    *,
    parameters_file: Path | None = None,
) -> Path | None:
    """Generate images, or reconstruct or translate prepared ones; returns a picture of them.

    Raises:
        ConfigError: the parameters are not valid, or ask for what the model cannot follow.
        ArtifactError: additional_files holds no trained model, several, or a damaged one.
        FamilyError: the model cannot do what is asked.
        OutputError: `output_path` cannot be written, or holds other images.
    """
    storage.require_separate(
        {"output_path": output_path},
        {
            "data_path": data_path, "additional_files": additional_files,
            "parameters_file": parameters_file,
        },
    )  # fmt: skip
    settings = read_parameters(parameters_file, ModelConfig)
    model = find_model(additional_files)
    with storage.scratch_folder() as folder:
        given = settings.model_dump(mode="json", exclude_unset=True)
        wanted = {"seed", "sampling", "compute"}
        config_path = folder / "config.yaml"
        config_path.write_text(
            yaml_text.dump({key: given[key] for key in given if key in wanted}), encoding="utf-8"
        )
        conditions_path, trained = None, artifact.load(model)
        if settings.task == "translate" and not trained.image.source_channels:
            raise ConfigError("task: translate, but the model makes images of no others.")
        if settings.conditions == "prepared":
            number = settings.sampling.num_images
            asked = number if "num_images" in settings.sampling.model_fields_set else None
            conditions_path = folder / "conditions.csv"
            wishes = _prepared_conditions(data_path, trained, settings.beyond_training)
            count = asked if isinstance(asked, int) else len(wishes)
            write_manifest(conditions_path, list(itertools.islice(itertools.cycle(wishes), count)))
        return make_images(
            model, output_path,
            config_path=config_path, conditions_path=conditions_path,
            data_path=None if settings.task == "generate" else data_path,
        )  # fmt: skip


def find_model(folder: Path) -> Path:
    """The one trained model in a folder, or in those below it.

    Raises:
        ArtifactError: there is none, or there are several.
    """
    if (folder / INDEX).is_file():
        return folder
    patterns = ["/".join(["*"] * depth) + f"/{INDEX}" for depth in range(1, _DEPTH + 1)]
    found = [path.parent for pattern in patterns for path in sorted(folder.glob(pattern))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(folder)) for path in found)
    raise ArtifactError(
        f"additional_files {folder} holds several models ({names}): pack one."
        if found
        else f"additional_files {folder} holds no trained model: pack what synthcube package or "
        f"synthcube export wrote, with {INDEX}."
    )


def _prepared_conditions(data_path: Path, trained: Artifact, beyond: str) -> list[Wish]:
    """What the model is to follow, for each prepared image in its order."""
    specs, rows = trained.image.conditions, read_manifest(data_path).rows
    if not specs:
        raise ConfigError(
            "conditions: prepared, but the model follows no conditions, for it was trained without "
            "data.conditions: write conditions: drawn in parameters_file."
        )
    missing = [each.name for each in specs if not any(cell(row, each.name) for row in rows)]
    if missing:
        raise ConfigError(
            f"conditions: prepared, but the prepared data have nothing in {', '.join(missing)}, "
            "which the model follows."
        )
    wishes = [{each.name: cell(row, each.name) for each in specs} for row in rows]
    if beyond == "refuse":
        return wishes
    kept = [wish for wish in wishes if _known(trained, wish)]
    log.info(
        "%d of %d prepared images have conditions that the model was not trained on.",
        len(wishes) - len(kept), len(wishes),
    )  # fmt: skip
    if not kept:
        raise ConfigError("conditions: prepared, but the model was trained on none of them.")
    return kept


def _known(trained: Artifact, wish: Wish) -> bool:
    try:
        requested(trained.image.conditions, [wish])
    except ConfigError:
        return False
    return True
