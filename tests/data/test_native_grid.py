"""Images on the grid of the file that they were made of: where they lie, and what bytes change."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthcube.data.geometry import resampled
from synthcube.data.native_grid import on_grid, write_filled, write_like

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS[1, 3] = 239


def test_axes_in_another_order_and_direction_move_voxels_and_change_none() -> None:
    native = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    turned = nib.as_closest_canonical(nib.Nifti1Image(native, LPS[[1, 2, 0, 3]]))
    image = torch.from_numpy(np.ascontiguousarray(turned.get_fdata(dtype=np.float32)))
    voxels, inside = on_grid(image, turned.affine, native.shape, LPS[[1, 2, 0, 3]])
    assert inside.all()
    np.testing.assert_array_equal(voxels, native)


def test_a_ramp_stays_a_ramp_on_a_finer_grid_and_is_lowest_beyond_the_image() -> None:
    ramp = torch.arange(16.0)[:, None, None].expand(16, 6, 6).contiguous()
    coarse, affine = resampled(ramp[None], np.eye(4), (8, 3, 3), (2.0, 2.0, 2.0))
    voxels, inside = on_grid(coarse[0], affine, (16, 6, 6), np.eye(4))
    assert inside.all()
    inner = slice(3, 13)  # the wide kernel of a coarser grid ends at the border
    np.testing.assert_allclose(voxels[inner, 0, 0], np.arange(3, 13), atol=1e-5)
    assert voxels[0, 0, 0] == voxels[:, 0, 0].min() == coarse.min()
    ramp = ramp[:8]
    part, within = on_grid(ramp[2:6] + 10, np.array(nib.affines.from_matvec(np.eye(3), [2, 0, 0])),
                           (8, 6, 6), np.eye(4))  # fmt: skip
    assert within[:, 0, 0].tolist() == [False, False, True, True, True, True, False, False]
    assert part[:, 0, 0].tolist() == [12, 12, 12, 13, 14, 15, 12, 12]


def test_a_flat_image_has_one_slice() -> None:
    voxels, inside = on_grid(torch.arange(6.0).reshape(2, 3), np.eye(4), (2, 3, 1), np.eye(4))
    assert voxels.shape == inside.shape == (2, 3, 1)
    assert voxels[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("dtype", "slope", "value", "stored"),
    [("<f4", 1, 3.25, 3.25), (">i2", 1, 3.6, 4), ("<i2", 0.5, 3.6, 7), ("<u1", 1, -3, 0),
     ("<i2", 1, 1e9, 32767)],
)  # fmt: skip
def test_only_the_bytes_of_the_filled_voxels_change(
    tmp_path: Path, dtype: str, slope: float, value: float, stored: float
) -> None:
    source, path = tmp_path / "source.nii.gz", tmp_path / "filled.nii.gz"
    image = nib.Nifti1Image(np.arange(60).reshape(3, 4, 5, 1).astype(dtype), LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of a scanner"))
    raw = bytearray(image.to_bytes())
    image.header["scl_slope"] = slope
    raw[112:116] = np.array(slope, image.header.structarr.dtype["scl_slope"]).tobytes()
    source.write_bytes(gzip.compress(bytes(raw)))
    where = np.zeros((3, 4, 5), bool)
    where[1, 2, 3] = where[0, 0, 4] = True
    write_filled(path, source, np.full((3, 4, 5), value, np.float32), where)
    before, after = (np.frombuffer(gzip.decompress(p.read_bytes()), "u1") for p in (source, path))
    size = np.dtype(dtype).itemsize
    starts = [len(before) - 60 * size + size * (x + 3 * y + 12 * z)
              for x, y, z in ((1, 2, 3), (0, 0, 4))]  # fmt: skip
    changed = {start + i for start in starts for i in range(size)}
    assert {*np.flatnonzero(before != after).tolist()} <= changed
    content = np.asarray(nib.load(path).dataobj.get_unscaled())[..., 0]
    assert [content[1, 2, 3], content[0, 0, 4]] == [stored, stored]


def test_a_file_like_another_lies_where_it_does_and_keeps_no_text_of_it(tmp_path: Path) -> None:
    source, path = tmp_path / "source.nii", tmp_path / "like.nii.gz"
    image = nib.Nifti1Image(np.arange(60).reshape(3, 4, 5).astype("i2"), LPS)
    image.set_qform(LPS, code=2)
    image.set_sform(LPS, code=4)
    image.header["descrip"], image.header["cal_max"] = b"Jane Doe", 9
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    image.to_filename(source)
    voxels = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    write_like(path, source, voxels, integer=False)
    like = nib.load(path)
    assert like.get_data_dtype() == np.float32
    np.testing.assert_array_equal(like.get_fdata(dtype=np.float32), voxels)
    np.testing.assert_array_equal(like.affine, LPS)
    assert (int(like.header["qform_code"]), int(like.header["sform_code"])) == (2, 4)
    assert b"Jane" not in gzip.decompress(path.read_bytes())
    assert float(like.header["cal_max"]) == 0
    write_like(path, source, voxels * 9, integer=True)
    assert nib.load(path).get_data_dtype() == np.uint8
