"""Which labels and predictions come from training images, and what remains of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthcube.data.manifest import Manifest, read_manifest, write_manifest
from synthcube.errors import EvaluationError
from synthcube.evaluation.held_out import (
    TrainingImages,
    leave_out_trained,
    of_manifest,
    of_split,
)


def listed(path: Path, rows: list[dict[str, str]]) -> Manifest:
    for row in rows:
        (path.parent / row["Channel_0"]).touch()
    write_manifest(path, rows)
    return read_manifest(path)


@pytest.fixture
def labels(tmp_path: Path) -> Manifest:
    """Two images of each of a, b and c."""
    rows = [
        {"Channel_0": f"{subject}{i}.png", "SubjectID": subject} for subject in "abc" for i in "01"
    ]
    return listed(tmp_path / "labels.csv", rows)


def made(labels: Manifest, **cells: str) -> Manifest:
    """A prediction for each label; with `cells` it was made from noise."""
    folder = labels.path.parent
    rows = [
        {"Channel_0": f"made-{row.channels[0].name}", "SubjectID": row.subject}
        | (cells or {"Source": str(row.channels[0])})
        for row in labels.rows
    ]
    return listed(folder / "made.csv", rows)


def remains(labels: Manifest, predictions: Manifest, training: TrainingImages):
    """Names of the remaining labels and predictions, and the note."""
    sets = {"labels": labels, "predictions": predictions}
    remaining, note = leave_out_trained(sets, training, None)
    names = [[row.channels[0].name for row in remaining[name].rows] for name in sets]
    return *names, note


def test_a_subject_is_left_out_with_all_of_its_images(labels: Manifest, tmp_path: Path) -> None:
    training = of_split([{"SubjectID": "b", "Split": "train", "Channel_0": "/gone/b9.png"}])
    kept, kept_made, note = remains(labels, made(labels), training)
    assert kept == ["a0.png", "a1.png", "c0.png", "c1.png"]
    assert kept_made == [f"made-{name}" for name in kept]
    assert note == (
        "2 of the 6 labels and 2 of the 6 predictions were left out, because the model was trained "
        "on these images or on others of the same subjects (labels by their file: 0, by their "
        "SubjectID: 2)."
    )


def test_a_file_is_found_through_a_link_and_under_another_subject(
    labels: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    rows = [{"SubjectID": "z", "Split": "train", "Channel_0": str(tmp_path / "link" / "c1.png")}]
    kept, kept_made, note = remains(labels, made(labels), of_split(rows))
    assert kept == ["a0.png", "a1.png", "b0.png", "b1.png", "c0.png"]
    assert len(kept_made) == 5
    assert "by their file: 1, by their SubjectID: 0" in note


def test_a_file_that_held_out_images_share_shows_nothing(labels: Manifest, tmp_path: Path) -> None:
    atlas = str(tmp_path / "a0.png")
    rows = [
        {"SubjectID": "z", "Split": "train", "Channel_0": "/gone/z.png", "Channel_1": atlas},
        {"SubjectID": "y", "Split": "test", "Channel_0": "/gone/y.png", "Channel_1": atlas},
    ]
    assert remains(labels, made(labels), of_split(rows))[2] == ""


def test_held_out_rows_of_a_run_leave_nothing_out(labels: Manifest) -> None:
    rows = [
        {"SubjectID": row.subject, "Split": "validation", "Channel_0": str(row.channels[0])}
        for row in labels.rows
    ]
    assert len(remains(labels, made(labels), of_split(rows))[0]) == 6


def test_a_list_of_training_images_counts_in_the_same_way(labels: Manifest, tmp_path: Path) -> None:
    trained = listed(tmp_path / "t.csv", [{"Channel_0": "other.png", "SubjectID": "a"}])
    assert remains(labels, made(labels), of_manifest(trained))[0][0] == "b0.png"


def test_numbered_rows_are_no_subjects(tmp_path: Path) -> None:
    labels = listed(tmp_path / "l.csv", [{"Channel_0": f"{i}.png"} for i in range(3)])
    rows = [{"SubjectID": f"row-{i}", "Split": "train", "Channel_0": "/x.png"} for i in (2, 3)]
    assert remains(labels, made(labels), of_split(rows))[2] == ""


def test_predictions_from_noise_all_stay(labels: Manifest) -> None:
    training = TrainingImages(subjects=frozenset("a"))
    kept, kept_made, note = remains(labels, made(labels, Seed="7"), training)
    assert (len(kept), len(kept_made)) == (4, 6)
    assert note.startswith("2 of the 6 labels were left out")


def test_predictions_of_training_images_go_where_all_labels_are_held_out(labels: Manifest) -> None:
    training = TrainingImages(frozenset(labels.rows[0].channels))
    held_out = Manifest(labels.path, labels.rows[2:])
    kept, kept_made, note = remains(held_out, made(labels), training)
    assert (len(kept), len(kept_made)) == (4, 5)
    assert note.startswith("1 of the 6 predictions were left out")


def test_predictions_of_other_programs_go_with_the_label_they_match_by_name(
    tmp_path: Path,
) -> None:
    for side in ("real", "made"):
        (tmp_path / side).mkdir()
        for name in "abc":
            (tmp_path / side / f"{name}.png").touch()
    labels, predictions = read_manifest(tmp_path / "real"), read_manifest(tmp_path / "made")
    training = TrainingImages(frozenset({(tmp_path / "real" / "b.png").resolve()}))
    kept, kept_made, _ = remains(labels, predictions, training)
    assert kept == kept_made == ["a.png", "c.png"]


def test_nothing_left_is_an_error_that_says_so(labels: Manifest) -> None:
    with pytest.raises(EvaluationError, match="Nothing is left to evaluate: 6 of the 6 labels"):
        remains(labels, made(labels), TrainingImages(subjects=frozenset("abc")))
