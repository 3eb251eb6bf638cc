"""A mixture of the images of several models: shares, one list for all, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from synthcube.data.manifest import read_manifest
from synthcube.errors import ConfigError, FamilyError, OutputError
from synthcube.storage import sha256
from synthcube.tasks.mix import mix
from synthcube.tasks.train import train


@pytest.fixture
def sites(tiny_config, phantoms: Path, tmp_path: Path) -> list[Path]:
    """Models of two sites, one step each."""
    runs = [tmp_path / "site-a", tmp_path / "site-b"]
    for seed, run in enumerate(runs):
        train(
            tiny_config(), phantoms, run,
            overrides=[f"seed={seed}", "training.max_epochs=1", "data.conditions={Label: class}"],
        )  # fmt: skip
    return runs


def test_each_site_has_its_share_and_all_images_are_in_one_list(
    cli, sites: list[Path], phantoms: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    words = ["federate", "mix", "-m", sites[0], "-m", sites[1], "-o", mixed, "-n", 7]
    code, out, err = cli(*words, "--site_images", "1200,300")
    assert code == 0, err
    assert str(mixed / "manifest.csv") in out
    rows = read_manifest(mixed).rows
    assert Counter(row.conditions["Model"] for row in rows) == {"model-1": 6, "model-2": 1}
    assert len({row.subject for row in rows}) == 7
    assert {row.label_name for row in rows} <= {*read_manifest(phantoms).labels}
    assert len({sha256(row.channels[0]) for row in rows}) == 7, "other seeds, other images"
    record = json.loads((mixed / "mixture.json").read_text())
    assert record["images"] == [6, 1]
    before = {path: path.stat().st_mtime_ns for path in (mixed / "model-1" / "images").iterdir()}
    (mixed / "manifest.csv").unlink()  # as after a kill
    assert cli(*words, "--site_images", "1200,300")[0] == 0
    assert len(read_manifest(mixed).rows) == 7
    assert before.keys() == {*(mixed / "model-1" / "images").iterdir()}
    code, _, err = cli(*words)
    assert (code, "holds another mixture" in err) == (2, True)
    code, _, err = cli(*words[:-3], tmp_path / "new", "-n", 4, "--site_images", "1200,many")
    assert (code, "write it as 1200,300" in err) == (2, True)


@pytest.mark.parametrize(
    ("number", "site_images", "counts"),
    [(4, [], [2, 2]), (5, [], [3, 2]), (10, [2, 1], [7, 3]), (1, [1, 2], [0, 1])],
)
def test_the_largest_remainders_are_rounded_up(
    number: int, site_images: list[int], counts: list[int], sites: list[Path], tmp_path: Path
) -> None:
    mix(sites, tmp_path / "mixed", num_images=number, site_images=site_images)
    assert json.loads((tmp_path / "mixed" / "mixture.json").read_text())["images"] == counts
    folders = Counter(row.channels[0].parts[-3] for row in read_manifest(tmp_path / "mixed").rows)
    assert [folders[f"model-{place}"] for place in (1, 2)] == counts


def test_what_is_no_mixture_is_refused(
    tiny_config, sites: list[Path], phantoms: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    with pytest.raises(ConfigError, match="no such mixture") as caught:
        mix(sites[:1], mixed, num_images=0, site_images=[1, 2])
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "1 model", "2 numbers of images for 1 models", "0 images",
    ]  # fmt: skip
    other = tmp_path / "other"
    train(tiny_config(), phantoms, other, overrides=["training.max_epochs=1", "data.size=[8,8]"])
    with pytest.raises(FamilyError, match="cannot be mixed") as faults:
        mix([*sites, other], mixed, num_images=3)
    assert [fault.split(":")[0] for fault in faults.value.faults] == [
        "size", "spacing in mm", "conditions",
    ]  # fmt: skip
    assert not mixed.exists()
    mixed.mkdir()
    (mixed / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        mix(sites, mixed, num_images=3)
    with pytest.raises(OutputError, match="is a run"):
        mix(sites, other, num_images=3)
