"""Operations on finished images: what they do to voxels, what they refuse, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from synthcube import config, plugins
from synthcube.data.images import write_image
from synthcube.data.postprocessing import Postprocessing
from synthcube.errors import ConfigError, ImageError
from synthcube.schema import ImageSpec
from synthcube.storage import sha256


def spec(size: tuple[int, ...] = (4, 4), channels: int = 1, **settings: Any) -> ImageSpec:
    values: dict[str, Any] = {
        "intensity_range": [(0.0, 255.0)] * channels, "file_format": "nii.gz", "integer": True,
    }  # fmt: skip
    affine = np.diag([1, 1.5, 3, 1.0])
    affine[:3, 3] = (-5, 3, 7)
    return ImageSpec(
        size=size, channels=channels, spacing_mm=(1, 1.5, 3), affine=affine.tolist(),
        **values | settings,
    )  # fmt: skip


def done(data: Any, *steps: dict[str, Any], **settings: Any) -> np.ndarray:
    """The steps on (C, *spatial) voxels."""
    tensor = torch.as_tensor(np.asarray(data, dtype=np.float32))
    before = tensor.clone()
    image = spec(tuple(tensor.shape[1:]), len(tensor), **settings)
    after = Postprocessing(steps, image)(tensor, image.affine)
    assert after.dtype == torch.float32
    assert torch.equal(tensor, before)
    return after.numpy()


def faults(steps: list[Any], image: ImageSpec | None = None) -> list[str]:
    with pytest.raises(ConfigError, match=r"^sampling\.postprocessing ") as caught:
        Postprocessing(steps, image or spec())
    return list(caught.value.faults)


# -- what each operation does ------------------------------------------------------------------


def test_nothing_asked_is_nothing_done() -> None:
    data = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(done(data), data)


def test_clip_threshold_and_rescale_in_the_order_given() -> None:
    data = [[[-50, 10], [100, 300]]]
    clip, threshold = {"name": "clip", "low": 0, "high": 200}, {"name": "threshold", "below": 50}
    rescale = {"name": "rescale", "low": 10, "high": 20}
    assert done(data, clip).tolist() == [[[0, 10], [100, 200]]]
    assert done(data, {"name": "clip", "high": 20}).tolist() == [[[-50, 10], [20, 20]]]
    assert done(data, threshold | {"value": 7}).tolist() == [[[7, 7], [100, 300]]]
    assert done(data, clip, rescale).tolist() == [[[10, 10.5], [15, 20]]]
    assert done(data, rescale, threshold).tolist() == [[[0, 0], [0, 0]]]
    assert done([[[3, 3], [3, 3]]], rescale).tolist() == [[[10, 10], [10, 10]]]


def test_rescale_keeps_colours_and_channels_can_be_chosen() -> None:
    data = np.stack([np.full((2, 2), value) for value in (0, 50, 100)])
    rescale = {"name": "rescale", "low": 0, "high": 200}
    assert done(data, rescale)[:, 0, 0].tolist() == [0, 100, 200]
    clip = {"name": "clip", "low": 70, "channels": [0, 2]}
    assert done(data, clip)[:, 0, 0].tolist() == [70, 50, 100]


def test_the_largest_component_is_kept_and_what_is_dark_is_left() -> None:
    data = [[[9, 9, 1, 8], [9, 1, 1, 8], [1, 1, 7, 1], [1, 0, 1, 1]]]
    step = {"name": "largest_component", "above": 5, "background": -1}
    assert done(data, step).tolist() == [
        [[9, 9, 1, -1], [9, 1, 1, -1], [1, 1, -1, 1], [1, 0, 1, 1]]
    ]
    joined = [[[9, 1, 1, 8], [1, 9, 1, 1], [1, 1, 9, 1], [1, 0, 1, 1]]]
    assert done(joined, step).tolist() == [
        [[9, 1, 1, -1], [1, -1, 1, 1], [1, 1, -1, 1], [1, 0, 1, 1]]  # of equals, the first
    ]
    assert done(joined, step | {"diagonal": True}).tolist() == [
        [[9, 1, 1, -1], [1, 9, 1, 1], [1, 1, 9, 1], [1, 0, 1, 1]]
    ]
    nothing = np.zeros((1, 4, 4))
    np.testing.assert_array_equal(done(nothing, step), nothing)


def test_components_of_volumes_and_of_several_channels() -> None:
    data = np.zeros((2, 5, 5, 5))
    data[0, 0, 0, :4] = 10  # a rod along z, in the first channel
    data[1, 0, 1, :4] = 10  # beside it, in the second: one part of eight voxels
    data[:, 3:5, 3:5, 2] = 10  # a plate of four
    kept = done(data, {"name": "largest_component", "above": 5})
    expected = data.copy()
    expected[:, 3:5, 3:5, 2] = 0
    np.testing.assert_array_equal(kept, expected)
    alone = done(data, {"name": "largest_component", "above": 5, "channels": [1]})
    np.testing.assert_array_equal(alone[0], data[0])
    assert int(alone[1].sum()) == 40


def test_holes_are_filled_in_a_picture_and_in_a_volume() -> None:
    ring = np.zeros((5, 5))
    ring[1:4, 1:4] = 9
    ring[2, 2] = 1
    step = {"name": "fill_holes", "above": 5, "value": 6}
    filled = ring.copy()
    filled[2, 2] = 6
    np.testing.assert_array_equal(done(ring[None], step)[0], filled)
    tube = np.repeat(ring[..., None], 5, axis=2)  # open at both ends
    np.testing.assert_array_equal(done(tube[None], step)[0], tube)
    tube[..., 0] = tube[..., 4] = filled
    shut = tube.copy()
    shut[2, 2, 1:4] = 6
    np.testing.assert_array_equal(done(tube[None], step)[0], shut)


def test_histogram_matching_to_a_file_by_hand(tmp_path: Path) -> None:
    """Half of the reference is 10, a quarter each 20 and 40."""
    path = tmp_path / "reference.nii.gz"
    write_image(path, torch.tensor([[[10.0, 10], [20, 40]]]), np.eye(4))
    step = {"name": "histogram_matching", "reference": str(path)}
    assert done([[[1, 2], [3, 4]]], step).tolist() == [[[10, 10], [20, 40]]]
    assert done([[[5, 5], [6, 6]]], step).tolist() == [[[10, 10], [40, 40]]]
    twice = done([[[1, 2], [3, 4]], [[4, 3], [2, 1]]], step)
    assert twice.tolist() == [[[10, 10], [20, 40]], [[40, 20], [10, 10]]]


def test_histogram_matching_gives_the_distribution_of_the_reference(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    reference = random.gamma(2, 30, (1, 20, 20, 20)).astype(np.float32)
    path = tmp_path / "reference.nii.gz"
    write_image(path, torch.from_numpy(reference), np.eye(4))
    data = random.normal(size=(1, 16, 16, 16))
    positions = np.linspace(0, 1, 65)
    stored = [np.quantile(reference, positions).tolist()]
    for kind in ({"reference": str(path)}, {"quantiles": stored}):
        after = done(data, {"name": "histogram_matching", **kind})
        inner = np.linspace(0.05, 0.95, 19)
        np.testing.assert_allclose(
            np.quantile(after, inner), np.quantile(reference, inner), rtol=0.02
        )
        order = np.argsort(data.ravel())
        assert bool((np.diff(after.ravel()[order]) >= 0).all())  # ranks stay


def test_a_colour_reference_serves_channel_by_channel(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[..., 1] = [[10, 20], [30, 40]]
    pixels[..., 2] = 200
    Pillow.fromarray(pixels).save(tmp_path / "colour.png")
    step = {"name": "histogram_matching", "reference": str(tmp_path / "colour.png")}
    data = np.arange(12.0).reshape(3, 2, 2)
    after = done(data, step)
    assert after.tolist() == [[[0, 0], [0, 0]], [[10, 20], [30, 40]], [[200, 200], [200, 200]]]
    assert faults([step], spec((2, 2), 2)) == [
        "0 (histogram_matching): the reference has 3 channels, the image 2: one is needed, or "
        "as many"
    ]


# -- transforms by name ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 6, 5, 4)])
def test_transforms_of_monai_and_torchio(shape: tuple[int, ...]) -> None:
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shifted = done(data, {"name": "ShiftIntensity", "offset": 5})
    np.testing.assert_allclose(shifted, data + 5)
    flipped = done(data, {"name": "Flip", "axes": 0})
    np.testing.assert_array_equal(flipped, data[:, ::-1])
    median = done(np.where(data == 7, 500, data), {"name": "MedianSmooth", "radius": 1})
    assert median.max() < 300
    clamped = done(data, {"name": "Clamp", "out_min": 3}, {"name": "AdjustContrast", "gamma": 1})
    assert clamped.min() == pytest.approx(3)


def test_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_steps_xyz.py").write_text(
        "import torchio\n"
        "class Plus:\n"
        "    def __init__(self, what=1):\n"
        "        self.what = what\n"
        "    def __call__(self, image):\n"
        "        assert image.ndim == 3\n"
        "        return image + self.what\n"
        "class Lost(Plus):\n"
        "    def __call__(self, image):\n"
        "        raise KeyError('no key today')\n"
        "class Logs(Plus):\n"
        "    def __call__(self, image):\n"
        "        return image.log()\n"
        "class Half(torchio.SpatialTransform):\n"
        "    def apply_transform(self, subject):\n"
        "        for image in subject.get_images():\n"
        "            image.affine = image.affine / 2\n"
        "        return subject\n"
    )
    plugins.vouch([tmp_path])
    assert done(np.ones((1, 2, 2)), {"name": "my_steps_xyz:Plus", "what": 4}).max() == 5
    assert faults([{"name": "my_steps_xyz:Lost"}]) == ["0 (my_steps_xyz:Lost): 'no key today'"]
    assert faults([{"name": "clip", "low": 0}, {"name": "my_steps_xyz:Logs"}]) == [
        "1 (my_steps_xyz:Logs) leaves voxels that are not a number"
    ]
    assert faults([{"name": "my_steps_xyz:Half"}]) == [
        "0 (my_steps_xyz:Half): it moves the image in space; the geometry must stay"
    ]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "Pad", "padding": [0, 0, 1, 0, 0, 0]}, "(Pad): it moves the image in space"),
        ({"name": "Pad", "padding": [0, 2, 0, 0, 0, 0]}, "(Pad) makes (1, 7, 4, 6) of an image of "
         "the shape (1, 5, 4, 6); the shape must stay"),
        ({"name": "ToOrientation", "orientation": "LPS"}, "(ToOrientation): it moves the image"),
        ({"name": "SavitzkyGolaySmooth", "window_length": 3, "order": 1, "axis": 9},
         "(SavitzkyGolaySmooth): "),
    ],
)  # fmt: skip
def test_what_changes_shape_or_place_is_found_before_sampling(
    step: dict[str, Any], message: str
) -> None:
    (told,) = faults([step], spec((5, 4, 6)))
    assert told.startswith(f"0 {message}")


# -- before and after ---------------------------------------------------------------------------


def test_what_does_not_fit_the_images_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    missing, broken = str(tmp_path / "gone.nii.gz"), str(tmp_path / "broken.png")
    told = faults(
        [
            {"name": "histogram_matching", "reference": missing},
            {"name": "clip", "low": 0},
            {"name": "threshold", "below": 3, "channels": [0, 2]},
            {"name": "histogram_matching", "reference": broken},
            {"name": "histogram_matching", "quantiles": [[0, 1], [0, 2], [0, 3]]},
        ],
        spec(channels=2),
    )
    assert told[:2] == [
        f"0 (histogram_matching): {missing} is missing.",
        "2 (threshold): channels [0, 2]: the images have 2, counted from 0",
    ]
    assert told[2].startswith(f"3 (histogram_matching): {broken} is not a .png image")
    assert told[3].startswith("4 (histogram_matching): the reference has 3 channels, the image 2")
    assert len(told) == 4


def test_a_png_that_would_be_black_is_refused() -> None:
    png, step = spec(file_format="png"), {"name": "rescale", "low": 0, "high": 1}
    expected = ["intensities of 0 to 1 are left; a PNG holds those of 0 to 255"]
    assert faults([step], png) == expected
    Postprocessing([step], spec())
    Postprocessing([step | {"high": 255}], png)


def test_whole_numbers_are_kept_by_what_moves_or_cuts_and_by_nothing_else() -> None:
    whole = [{"name": "clip", "low": 0}, {"name": "Flip", "axes": 0}]
    assert Postprocessing(whole, spec()).keeps_integers
    for step in ({"name": "rescale", "low": 0, "high": 9}, {"name": "GaussianSmooth"}):
        assert not Postprocessing([*whole, step], spec()).keeps_integers


def test_the_record_is_plain_and_holds_the_digest_of_a_reference(tmp_path: Path) -> None:
    path = tmp_path / "reference.png"
    Pillow.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).save(path)
    steps = [{"name": "histogram_matching", "reference": str(path)}, {"name": "MedianSmooth"}]
    record = Postprocessing(steps, spec()).record
    assert json.loads(json.dumps(record)) == record
    assert record[0]["reference_sha256"] == sha256(path)
    assert record[1] == {"name": "MedianSmooth"}


def test_a_failure_on_a_real_image_names_the_step() -> None:
    after = Postprocessing([{"name": "ShiftIntensity", "offset": 1}], spec())
    with pytest.raises(ImageError, match=r"^sampling\.postprocessing\.0 \(ShiftIntensity\) leaves"):
        after(torch.full((1, 4, 4), float("inf")), np.eye(4))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{name: clip, lo: 0}", "0.lo: unknown key; did you mean low?"),
        ("{name: clip}", "0: clip needs low, high or both"),
        ("{name: clip, low: 5, high: 1}", "0: low 5 and high 1: the first must be below"),
        ("{name: threshold, below: .nan}", "0.below: should be a finite number, not nan"),
        ("{name: threshold, below: '1'}", "0.below: should be a valid number, not '1'"),
        ("{name: threshold}", "0.below: Field required"),
        ("{name: fill_holes, above: 1}", "0.value: Field required"),
        ("{name: clip, low: 1, channels: []}", "0.channels: at least one is needed, not []"),
        ("{name: clip, low: 1, channels: [-1]}", "0.channels.0: should be greater than or equal"),
        ("{name: clp, low: 0}", "0: there is no operation or transform 'clp'; did you mean clip?"),
        ("{name: Clip, low: 0}", "'Clip'; did you mean clip?"),
        ("{name: MedianSmoth}", "'MedianSmoth'; did you mean MedianSmooth?"),
        ("{name: Xyzzy}", "'Xyzzy'; known: clip, rescale, threshold, largest_component, fill_ho"),
        ("{name: MedianSmooth, radios: 1}", "argument 'radios'; did you mean radius?"),
        ("{name: RandGaussianNoise}", "0: RandGaussianNoise is random; an image is to depend on"),
        ("{name: RandomNoise}", "0: RandomNoise is random"),
        ("{name: Flip, axes: 0, p: 0.5}", "0: Flip is random"),
        ("{name: 'os:system', command: ls}", "0: os:system cannot be used: what belongs"),
        ("{name: histogram_matching}", "0: histogram_matching needs either reference or quantiles"),
        ("{name: histogram_matching, reference: a.png, quantiles: [[0, 1]]}", "needs either"),
        ("{name: histogram_matching, quantiles: [[1, 0]]}", "0: quantiles [1.0, 0.0]: each must"),
        ("{name: histogram_matching, quantiles: [[]]}", "0.quantiles.0: at least one is needed"),
        ("clip", "0: a mapping is needed, such as {name: clip, low: 0}, not 'clip'"),
        ("{low: 0}", "0.name: Field required"),
    ],
)
def test_config_faults(step: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.build({}, [f"sampling.postprocessing=[{step}]", "seed=-1"])
    assert len(caught.value.faults) == 2
    assert message in caught.value.faults[1]
    assert caught.value.faults[1].startswith("sampling.postprocessing.0")


def test_a_trained_models_steps_that_cannot_be_had_here() -> None:
    assert faults([{"name": "my_gone_package:Step"}, {"name": "clip"}])[0].startswith(
        "0: my_gone_package:Step is code that does not belong to SynthCube"
    )


def test_a_config_with_steps_loads_equal() -> None:
    steps = [
        {"name": "clip", "low": 0},
        {"name": "histogram_matching", "quantiles": [[0, 1.5]]},
        {"name": "MedianSmooth", "radius": 2},
    ]
    settings = config.build({"sampling": {"postprocessing": steps}})
    assert config.build(settings.dump()) == settings
    assert settings.dump()["sampling"]["postprocessing"][2] == steps[2]
    described = json.dumps(config.json_schema())
    assert "LargestComponent" in described
