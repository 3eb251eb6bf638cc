"""Names of GaNDLF: every one works on 2D and 3D images, or says what to do instead."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from pydantic import ValidationError

from synthcube.data.images import Image
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.data.transforms import ALIASES, WITHOUT, TransformConfig, alias

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "transforms.md"
NEEDED: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.0},
    "clip": {"out_min": -0.5},
    "clamp": {"out_max": 0.5},
    "crop": {"cropping": [1, 1, 0]},
    "centercrop": {"target_shape": [6, 6, 1]},
    "resize": {"target_shape": [5, 5, 1]},
}
SHAPED = {"crop", "centercrop", "resize", "resample"}
TINY = {"flat": (1, 16, 16, 1), "colour": (3, 12, 12, 1), "deep": (2, 8, 8, 10)}
ROW = re.compile(r"^\| `(\w+)` \| (?:`(\w+)`|(none)) \| (.*?) ?\|$", re.MULTILINE)


def scan(shape: tuple[int, ...], **settings: Any) -> tio.ScalarImage:
    """In [-1, 1], its border black."""
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tensor[:, 0] = tensor[:, -1] = -1
    return tio.ScalarImage(tensor=tensor, affine=np.diag([1, 1, 2, 1.0]), **settings)


def applied(name: str, image: Any, seed: int = 0, **arguments: Any) -> torch.Tensor:
    transform = TransformConfig(name=name, **arguments).build()
    torch.manual_seed(seed)
    return transform(image).data


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_changes_tiny_images_as_it_should(name: str, shape: tuple[int, ...]) -> None:
    image = scan(shape)
    before = image.data.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a transform in doubt about an image warns at every image
        outcomes = [applied(name, image, seed, **NEEDED.get(name, {})) for seed in range(4)]
    assert torch.equal(image.data, before)
    for after in outcomes:
        assert bool(torch.isfinite(after).all())
        assert name in SHAPED or after.shape == before.shape
    changed = any(not torch.equal(after, before) for after in outcomes if name not in SHAPED)
    kept = {"to_canonical", "crop_external_zero_planes"}  # already so
    assert changed is (name not in SHAPED | kept)
    pickle.dumps(TransformConfig(name=name, **NEEDED.get(name, {})).build())  # as to loaders


def test_the_page_says_what_the_aliases_are() -> None:
    rows = {row[0]: row[1:] for row in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    assert set(rows) == set(ALIASES) | set(WITHOUT)
    for name, (kind, none, remark) in rows.items():
        assert (none == "none") is (name in WITHOUT), name
        if kind:
            own: Any = alias(name)
            assert issubclass(own, getattr(tio, kind)), name
        elif WITHOUT[name].startswith("leave it out"):
            assert remark.startswith("leave it out"), name


@pytest.mark.parametrize("name", WITHOUT)
def test_a_name_without_a_transform_says_what_to_do(name: str) -> None:
    with pytest.raises(ValidationError, match=f"there is no transform '{name}': ") as caught:
        DataConfig(augmentation=[{"name": name}])
    assert WITHOUT[name] in str(caught.value)


def test_near_misses_of_names_and_arguments() -> None:
    with pytest.raises(ValidationError, match="no transform 'anisotropi'; did you mean anisotrop"):
        TransformConfig(name="anisotropi")
    with pytest.raises(ValidationError, match="no transform 'normalize_nonZero'; did you mean nor"):
        TransformConfig(name="normalize_nonZero")
    with pytest.raises(ValidationError, match="argument 'degree'; did you mean degrees"):
        TransformConfig(name="affine", degree=5)
    with pytest.raises(ValidationError, match="axis must be 0, 1 or 2, or a list of them, not 3"):
        TransformConfig(name="rotate_90", axis=3)


def test_black_stays_black_under_gamma_and_bias() -> None:
    """In [-1, 1], TorchIO's own would count from mid-grey."""
    image = scan((1, 16, 16, 1))
    for name, arguments in (("gamma", {"log_gamma": (0.7, 0.7)}), ("bias", {})):
        after = applied(name, image, **arguments)
        assert bool((after[:, 0] == -1).all()), name
    unit = (image.data + 1) / 2
    low, high = unit.min(), unit.max()
    expected = ((unit - low) / (high - low)) ** np.exp(0.7) * (high - low) + low
    after = applied("gamma", image, log_gamma=(0.7, 0.7))
    torch.testing.assert_close((after + 1) / 2, expected, atol=1e-5, rtol=0)


def test_turns_are_exact() -> None:
    data = torch.arange(9.0).reshape(1, 3, 3, 1)
    image = tio.ScalarImage(tensor=data)
    quarter = applied("rotate_90", image, p=1)[0, :, :, 0].tolist()
    assert quarter == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    half = applied("rotate_180", image, p=1)[0, :, :, 0].tolist()
    assert half == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]
    volume = scan((1, 4, 5, 6))
    about_x = applied("rotate_180", volume, axis=0, p=1)
    assert torch.equal(about_x, volume.data.flip(2, 3))


def test_noise_var_follows_the_image() -> None:
    for scale in (1, 100):
        data = scan((1, 64, 64, 1)).data * scale
        after = applied("noise_var", tio.ScalarImage(tensor=data), std=(0.1, 0.1))
        assert float((after - data).std() / data.std()) == pytest.approx(0.1, rel=0.05)


def test_elastic_never_folds_and_a_swap_always_finds_a_place() -> None:
    strong = applied("elastic", scan((1, 16, 16, 1)), max_displacement=100.0)
    assert strong.shape == (1, 16, 16, 1)
    data = torch.arange(16.0).reshape(1, 4, 4, 1)
    after = applied("swap", tio.ScalarImage(tensor=data))
    assert set(after.flatten().tolist()) <= set(range(16))
    assert not torch.equal(after, data)


def test_zero_planes_are_cut_off_and_the_rest_stays_where_it_is() -> None:
    data = torch.zeros(2, 8, 8, 8)
    data[1, 2:6, 3:5, 1:8] = -5
    affine = np.diag([1, 2, 3, 1.0])
    image = Image(data + torch.randn(8, 8, 8) * (data != 0), affine, "nii.gz", False, False)
    config = DataConfig(
        preprocessing=[{"name": "crop_external_zero_planes"}], intensity_range=[-9, 9]
    )
    result = Preprocessing(config)(image)
    assert result.tensor.shape == (2, 4, 2, 7)
    np.testing.assert_allclose(result.affine[:3, 3], [2, 6, 3])
    expected = image.tensor[:, 2:6, 3:5, 1:] / 9
    torch.testing.assert_close(result.tensor, expected, atol=1e-6, rtol=0)
    assert applied("crop_external_zero_planes", torch.zeros(1, 4, 4, 1)).shape == (1, 4, 4, 1)


def test_threshold_as_gandlf_meant_it() -> None:
    data = torch.tensor([0.0, 10, 20, 30]).reshape(1, 2, 2, 1)
    image = tio.ScalarImage(tensor=data)
    low = applied("threshold", image, threshold=10)
    assert low.flatten().tolist() == [0, 0, 20, 30]
    high = applied("threshold", image, threshold=25, above=False, cval=-1)
    assert high.flatten().tolist() == [0, 10, 20, -1]
