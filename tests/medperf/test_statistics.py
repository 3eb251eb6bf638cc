"""Statistics: right, and of no single person."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.data.images import read_image
from synthcube.data.manifest import read_manifest
from synthcube.medperf.statistics import shown_groups


def test_statistics_tell_of_groups_alone_and_are_right(prepared) -> None:
    path = prepared.folder / "statistics.yaml"
    summary = prepared.statistics()
    assert summary["smallest_group"] == 5
    data = summary["data"]
    assert (data["images"], data["subjects"], data["channels"]) == (6, 6, 1)
    assert data["conditions"]["Label"] == {"subjects": {}, "some_left_out": True}
    voxels = np.concatenate(
        [
            read_image(row.channels).tensor.numpy().ravel()
            for row in read_manifest(prepared.data).rows
        ]
    )
    assert data["intensity"][0]["mean"] == pytest.approx(voxels.mean(), rel=1e-3)
    assert data["intensity"][0]["std"] == pytest.approx(voxels.std(), rel=1e-3)
    assert data["intensity"][0]["percentiles"]["50"] == pytest.approx(np.median(voxels), abs=2)
    text = path.read_text()
    for row in read_manifest(prepared.data).rows:
        assert row.subject not in text
        assert row.channels[0].name not in text
    assert str(prepared.folder) not in text


def test_statistics_of_too_few_subjects_tell_nothing(prepared) -> None:
    prepared.parameters.write_text("smallest_group: 7")
    summary = prepared.statistics()
    assert summary["data"] == {"images": None, "reason": "there are fewer than 7 subjects"}


def test_many_images_of_one_person_are_no_group(site) -> None:
    for folder in (site.raw, site.raw_labels):
        site.rewrite(folder, [{**row, "SubjectID": "Jane"} for row in site.rows(folder)])
    site.prepare()
    assert site.statistics()["data"]["images"] is None


def test_a_small_group_cannot_be_computed_from_the_others() -> None:
    assert shown_groups({"a": 20, "b": 9, "c": 2}, 5) == {"a": 20}
    assert shown_groups({"a": 20, "b": 9, "c": 3, "d": 3}, 5) == {"a": 20, "b": 9}
    assert shown_groups({"a": 20, "b": 9}, 5) == {"a": 20, "b": 9}
    assert shown_groups({"a": 2}, 5) == {}
    assert shown_groups({}, 5) == {}
