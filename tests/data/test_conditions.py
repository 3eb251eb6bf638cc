"""Columns of a manifest as what a model follows: vocabulary, ranges, wishes, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from synthcube.data.conditions import (
    condition_specs,
    condition_values,
    draw_missing_conditions,
    parse_counts,
    read_condition_requests,
    requested_values,
    shown,
)
from synthcube.data.manifest import Manifest, Row
from synthcube.errors import ConfigError, ManifestError
from synthcube.schema import ConditionSpec

SITE = ConditionSpec(name="Site", kind="class", classes=("north", "south"))
AGE = ConditionSpec(name="Age", kind="number", low=20, high=80)
SPECS = (SITE, AGE)


def manifest(*cells: tuple[str, str]) -> Manifest:
    rows = [
        Row((Path("a.png"),), f"s{i}", conditions={"Site": site, "Age": age}, number=i + 2)
        for i, (site, age) in enumerate(cells)
    ]
    return Manifest(Path("m.csv"), tuple(rows))


def test_vocabulary_and_range_are_those_of_the_training_rows() -> None:
    data = manifest(("south", "20"), ("north", "80"), ("north", "95"))
    kinds = {"Site": "class", "Age": "number"}
    assert condition_specs(data, [0, 1], kinds) == SPECS
    values = condition_values(SPECS, data.rows)
    np.testing.assert_allclose(values, [[1, -1], [0, 1], [0, 1.5]])


def test_labels_keep_their_ids() -> None:
    rows = tuple(
        Row((Path("a.png"),), f"s{i}", label, name, number=i)
        for i, (label, name) in enumerate([(2, "b"), (0, "z"), (2, "b")])
    )
    (spec,) = condition_specs(Manifest(Path("m.csv"), rows), [0, 1, 2], {"Label": "class"})
    assert spec.classes == ("z", "1", "b")
    assert condition_values((spec,), rows)[:, 0].tolist() == [2, 0, 2]


def test_an_empty_cell_is_not_known() -> None:
    data = manifest(("south", ""), ("", "50"))
    values = condition_values(SPECS, data.rows)
    assert np.isnan(values).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("cells", "kinds", "text"),
    [
        ([("a", "1")], {"Sex": "class"}, "'Sex', which is missing or empty; there are Age, Site"),
        ([("a", "1"), ("b", "old")], {"Age": "number"}, "row 3, column Age: 'old' is not a number"),
        ([("a", "1"), ("b", "1")], {"Age": "number"}, "every training row has 1, nothing to learn"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_followed(cells, kinds, text: str) -> None:
    with pytest.raises(ManifestError, match=text):
        condition_specs(manifest(*cells), range(len(cells)), kinds)


def test_a_class_that_only_validation_has_is_named() -> None:
    data = manifest(("north", "1"), ("west", "2"))
    with pytest.raises(ManifestError, match="row 3, column Site: 'west' is not among the classes"):
        condition_specs(data, [0], {"Site": "class"})


def test_what_is_asked_becomes_what_the_model_sees() -> None:
    values = requested_values(SPECS, [{"site": "south", "AGE": "50"}, {"Age": "80"}, {}])
    np.testing.assert_allclose(values, [[1, 0], [math.nan, 1], [math.nan, math.nan]])
    assert [shown(spec, value) for spec, value in zip(SPECS, values[0], strict=True)] == [
        "south", "50",
    ]  # fmt: skip
    assert shown(AGE, math.nan) == ""


def test_all_that_cannot_be_met_is_named_with_what_is_known() -> None:
    with pytest.raises(ConfigError) as caught:
        requested_values(SPECS, [{"Site": "west"}, {"Age": "90"}, {"Sex": "f"}, {"Age": "old"}])
    text = str(caught.value)
    assert "Site=west: 'west' is not among the classes north, south" in text
    assert "Age=90: it was trained on 20 to 80" in text
    assert "Sex: the model knows Site (north, south), Age (20 to 80)" in text
    assert "Age=old: 'old' is not a number" in text


def test_numbers_outside_the_training_are_extrapolated_only_where_allowed() -> None:
    assert requested_values(SPECS, [{"Age": "110"}], extrapolate=True)[0, 1] == 2
    with pytest.raises(ConfigError, match="Age=old: 'old' is not a number"):
        requested_values(SPECS, [{"Age": "old"}], extrapolate=True)
    with pytest.raises(ConfigError, match="Age=110: it was trained on 20 to 80"):
        requested_values(SPECS, [{"Age": "110"}])


def test_what_is_not_asked_is_drawn_from_the_seed_of_the_image() -> None:
    wishes = [{"site": "south"}, {"Site": ""}] + [{}] * 200
    values = requested_values(SPECS, wishes)
    seeds = list(range(len(wishes)))
    filled = draw_missing_conditions(values, SPECS, wishes, seeds)
    assert filled[0, 0] == 1
    assert math.isnan(filled[1, 0]), "asked to be unknown"
    assert not np.isnan(filled[2:]).any()
    assert 0.35 < filled[2:, 0].mean() < 0.65
    assert filled[2:, 1].min() < -0.9
    assert filled[2:, 1].max() > 0.9
    again = draw_missing_conditions(values[5:9], SPECS, wishes[5:9], seeds[5:9])
    assert np.array_equal(again, filled[5:9]), "an image's draw is its seed's"


def test_counts() -> None:
    assert parse_counts("8") == 8
    assert parse_counts("north=2, south=1") == {"north": 2, "south": 1}
    wishes = read_condition_requests(SPECS, {"north": 2, "south": 1}, ["Age=30"])
    assert wishes == [{"Age": "30", "Site": "north"}] * 2 + [{"Age": "30", "Site": "south"}]


@pytest.mark.parametrize("text", ["0", "-1", "many", "north=0", "north=2,3"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="write a number above 0, or Hand=5,HeadCT=3"):
        parse_counts(text)


def test_counts_need_one_class() -> None:
    with pytest.raises(ConfigError, match="the model has 0 conditions that are classes"):
        read_condition_requests([AGE], {"north": 2})


def test_a_table_asks_for_each_image(tmp_path: Path) -> None:
    path = tmp_path / "wanted.csv"
    path.write_text("Site,Age,Count\nnorth,30,2\nsouth,,\n")
    north = {"Site": "north", "Age": "30"}
    assert read_condition_requests(SPECS, 99, [], path) == [
        north,
        north,
        {"Site": "south", "Age": ""},
    ]
    path.write_text("Site,Count\nnorth,two\n")
    with pytest.raises(ConfigError, match="row 2, column Count: 'two' is not a whole number"):
        read_condition_requests(SPECS, 99, [], path)


def test_a_wish_without_equals() -> None:
    with pytest.raises(ConfigError, match="--condition Hand: write it as name=value"):
        read_condition_requests(SPECS, 1, ["Hand"])
