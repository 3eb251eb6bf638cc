"""Export: a verified, self-contained folder of a trained model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from synthcube import artifact, storage
from synthcube.errors import OutputError
from synthcube.export.card import model_card

CARD = "README.md"


def export(model_path: Path, folder: Path) -> Path:
    """Verify the artifact and write it, with a model card, to `folder`.

    Raises:
        ArtifactError: there is no trained model, or it is damaged.
        OutputError: `folder` is not writable, or holds something that is no exported model.
    """
    trained = artifact.load(model_path)
    storage.make_folder(folder, "output_path")
    if any(folder.iterdir()) and not (folder / artifact.INDEX).exists():
        raise OutputError(
            f"output_path {folder} holds something that is no exported model: give another one."
        )
    if folder.resolve() == trained.folder.resolve():
        raise OutputError(f"output_path {folder} is model_path itself: give another one.")
    with storage.explained(folder):
        # The index goes first and comes back last: in between, the folder is no artifact.
        (folder / artifact.INDEX).unlink(missing_ok=True)
        for file in trained.folder.iterdir():
            if file.name != artifact.INDEX:
                storage.write_with(folder / file.name, partial(shutil.copyfile, file))
    has_picture = (folder / artifact.PICTURE).exists()
    storage.write_text(folder / CARD, model_card(trained, has_picture=has_picture))
    artifact.write_index(folder)
    artifact.load(folder)
    return folder
