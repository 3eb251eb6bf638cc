"""Sanity check: damage and leaks are named, one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from synthcube.data.images import write_image
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ManifestError
from synthcube.storage import sha256


def test_sound_volumes_of_another_size_than_asked_for_are_named(prepared) -> None:
    prepared.parameters.write_text("data: {size: [32, 32]}")
    with pytest.raises(ManifestError, match="12 faults") as caught:
        prepared.check()
    assert "size [16, 16, 1], data.size is [32, 32]" in caught.value.faults[0]


def replaced(site, name: str, tensor: torch.Tensor) -> None:
    """Another image under that name, with an index that knows of it: only content is at fault."""
    path = site.data / name
    path.unlink()
    write_image(path, tensor, np.eye(4))
    index = json.loads((site.data / "prepared.json").read_text())
    index["files"][name] = sha256(path)
    (site.data / "prepared.json").write_text(json.dumps(index))


def test_damage_after_the_preparation_is_found(prepared) -> None:
    rows = prepared.rows(prepared.data)
    (prepared.data / rows[0]["Channel_0"]).write_bytes(b"")
    (prepared.labels / rows[1]["Channel_0"]).unlink()
    replaced(prepared, rows[2]["Channel_0"], torch.full((1, 16, 16), 3.0))
    replaced(prepared, rows[3]["Channel_0"], torch.rand(1, 16, 17) * 255)
    with pytest.raises(ManifestError) as caught:
        prepared.check()
    faults = "\n".join(caught.value.faults)
    for name, text in (
        (rows[0]["Channel_0"], "has changed since it was prepared"),
        (rows[0]["Channel_0"], "is empty"),
        (rows[1]["Channel_0"], "missing"),
        (rows[2]["Channel_0"], "constant image: every voxel is 3"),
        (rows[3]["Channel_0"], "shape (16, 17, 1)"),
    ):
        assert any(name in line and text in line for line in faults.splitlines()), (name, faults)


def test_voxels_that_are_no_numbers_are_named(tmp_path: Path, new_site) -> None:
    site = new_site()
    for folder in (site.raw, site.raw_labels):
        write_phantoms(folder, num=3, size=(8, 8, 8))
    site.prepare()
    import nibabel as nib

    name = site.rows(site.data)[1]["Channel_0"]
    voxels = np.full((8, 8, 8), np.nan, np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), site.data / name)
    with pytest.raises(ManifestError, match=f"{name} holds 512 NaN"):
        site.check()


def test_a_subject_in_two_splits_is_named(site) -> None:
    rows = [{**row, "Split": "test"} for row in site.rows(site.raw)]
    site.rewrite(site.raw, rows)
    site.rewrite(site.raw_labels, [{**rows[0], "Split": "train"}, *rows[1:]])
    site.prepare()
    with pytest.raises(ManifestError, match="'phantom-00000' is in several splits: test, train"):
        site.check()


def test_one_image_under_two_names_is_named(site) -> None:
    rows = site.rows(site.raw)
    shutil.copy(site.raw / rows[0]["Channel_0"], site.raw / "copy.png")
    site.rewrite(site.raw, [*rows, {**rows[0], "Channel_0": "copy.png", "SubjectID": "Jane"}])
    site.prepare()
    with pytest.raises(ManifestError, match="same image belongs to different subjects") as caught:
        site.check()
    assert "'phantom-00000'" in str(caught.value)
    assert "'Jane'" in str(caught.value)


def test_images_that_are_used_elsewhere_are_named(prepared, tmp_path: Path, new_site) -> None:
    other = new_site("other")
    write_phantoms(other.raw, num=2, size=(16, 16))
    write_phantoms(other.raw_labels, num=2, size=(16, 16))
    other.prepare(metadata_path=tmp_path / "metadata")
    known = tmp_path / "additional_files"
    known.mkdir()
    assert prepared.check(additional_files=known)
    listed = (tmp_path / "metadata" / "voxels.json").read_text()
    assert "phantom" not in listed, "it is shown to others"
    (known / "training-set.json").write_text(listed)
    with pytest.raises(ManifestError) as caught:
        prepared.check(additional_files=known)
    leaks = [text for text in caught.value.faults if "used elsewhere (training-set.json)" in text]
    assert len(leaks) == 2
    (known / "training-set.json").write_text("{}")
    with pytest.raises(ManifestError, match="not a list of digests"):
        prepared.check(additional_files=known)
