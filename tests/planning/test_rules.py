"""The rules of a plan, as tables: from measures, machine and budget to values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from synthcube.data.fingerprint import Fingerprint
from synthcube.errors import ConfigError
from synthcube.planning import length, rules
from synthcube.planning.draft import Draft, Machine, PlanRequest
from synthcube.tasks import plan

CPU = Machine(torch.device("cpu"), int(16e9), cores=4, processes=1, precision="32-true")
GPU = Machine(torch.device("cuda"), int(24e9), 8, 1, "bf16-mixed", is_here=False)
IMAGE = {
    "kind": "image", "integer": True, "lowest": 0.0, "highest": 255.0, "mean": 100.0, "std": 50.0,
    "percentiles": (1.0, 100.0, 250.0), "foreground": 0.5,
}  # fmt: skip
CT = IMAGE | {"lowest": -1024.0, "highest": 3071.0, "percentiles": (-800.0, 40.0, 1210.0)}
MASK = IMAGE | {"kind": "mask", "classes": (0, 1, 2), "highest": 2.0}


def spread(low: Any, median: Any = None, high: Any = None) -> dict[str, Any]:
    median = median or low
    ends = {"lowest": low, "median": median, "highest": high or median}
    return {name: tuple(map(float, values)) for name, values in ends.items()}


def measured(
    shape: tuple[int, ...] = (64, 64), number: int = 1500, channels: Any = (IMAGE,), **others: Any
) -> Fingerprint:
    """A fingerprint of images of one shape, and pictures unless it is said otherwise."""
    spacing = others.pop("spacing", (1.0,) * len(shape))
    values = {
        "num_images": number, "num_subjects": None, "splits": {}, "class_counts": (),
        "classes_of_subjects": False, "numbers": {}, "has_geometry": len(shape) == 3,
        "file_format": "nii.gz" if len(shape) == 3 else "png", "one_shape": True,
        "one_spacing": True, "shape": spread(shape), "content": spread(shape),
        "spacing_mm": spread(spacing), "spacing_10": tuple(map(float, spacing)),
        "extent_mm": spread([a * b for a, b in zip(shape, spacing, strict=True)]),
        "channels": channels, "near_duplicates": 0, "duplicates_across_subjects": 0,
    }  # fmt: skip
    return Fingerprint.model_validate(values | others)


def draft(
    of: Fingerprint,
    where: Machine = CPU,
    *overrides: str,
    longest: int | None = None,
    **request: Any,
) -> Draft:
    """All choices that need no memory and no time."""
    planned = Draft(of, where, PlanRequest(overrides=overrides, **request))
    rules.choose_model(planned)
    rules.choose_channels(planned)
    rules.choose_conditions(planned)
    rules.choose_validation(planned)
    length.choose_recipe(planned)
    rules.choose_size(planned, longest)
    rules.choose_depth(planned)
    rules.choose_augmentation(planned)
    rules.choose_batch(planned)
    return planned


def value(planned: Draft, key: str) -> Any:
    return planned.choices[key].value if key in planned.choices else None


@pytest.mark.parametrize(
    ("shape", "longest", "size", "channels", "attention_from"),
    [
        ((64, 64), None, [64, 64], [32, 64, 64, 64], 2),
        ((28, 28), None, [28, 28], [32, 64, 64], 2),  # 28 / 4 = 7 places are left
        ((30, 30), None, [32, 32], [32, 64, 64, 64], 2),
        ((250, 200), 64, [64, 48], [32, 64, 64, 64], 2),  # in the aspect of the image
        ((512, 512), 256, [256, 256], [32, 64, 64, 64], 2),
        ((512, 512), None, [512, 512], [32, 64, 64, 64], 3),  # 128 x 128 places are too many
        ((64, 64, 64), None, [64, 64, 64], [32, 64, 64, 64], 2),
        ((128, 128, 128), None, [128, 128, 128], [32, 64, 64, 64], 3),
        ((256, 256, 256), None, [256, 256, 256], [32, 64, 64, 64, 64], 4),
        ((192, 192, 12), None, [192, 192, 12], [32, 64, 64], 3),  # thick slices: 3 places
    ],
)
def test_size_and_depth_follow_the_shape(
    shape: tuple[int, ...], longest: int | None, size: Any, channels: Any, attention_from: int
) -> None:
    planned = draft(measured(shape), GPU, longest=longest, family="ddpm")
    assert value(planned, "data.size") == size
    assert value(planned, "model.channels") == channels
    assert value(planned, "model.attention_from") == attention_from
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []


def test_the_network_of_wavelets_is_planned_for_images_of_half_the_size() -> None:
    wavelets = "model.wavelet_levels=1"
    volumes = draft(measured((128, 128, 128)), CPU, wavelets)
    assert value(volumes, "data.size") == [128, 128, 128]
    assert value(volumes, "model.attention_from") == 2  # 16 places along an axis, not 32
    odd = draft(measured((70, 70, 70)), CPU, wavelets)
    assert value(odd, "data.size") == [72, 72, 72]  # a multiple of 8, not of 4
    for planned in (volumes, odd):
        settings = planned.config()
        assert settings.model.faults(planned.image(settings)) == []
        names = [other.command for other in plan._alternatives(planned, settings)]
        assert not any(wavelets in name for name in names)
    pixels = draft(measured((128, 128, 128)), GPU, "model.wavelet_levels=0")
    names = [other.command for other in plan._alternatives(pixels, pixels.config())]
    assert f"--set {wavelets}" in names


def test_no_alternative_is_offered_twice() -> None:
    planned = draft(measured((128, 128), 40), GPU, "data.patches=[64,64]")
    names = [other.command for other in plan._alternatives(planned, planned.config())]
    assert names == ["--family ddpm"]


def test_volumes_of_several_spacings_are_padded_and_never_stretched() -> None:
    of = measured(
        (160, 192, 160), one_shape=False, one_spacing=False, spacing=(1.0, 1.0, 1.2),
        extent_mm=spread((150, 180, 150), (160, 190, 170), (170, 200, 190)),
    )  # fmt: skip
    planned = draft(of)
    assert value(planned, "data.spacing_mm") == [1.0, 1.0, 1.2]
    assert value(planned, "data.fit") == "crop_or_pad"
    size = value(planned, "data.size")
    assert all(
        side * step >= extent
        for side, step, extent in zip(size, (1.0, 1.0, 1.2), (170, 200, 190), strict=True)
    )
    coarse = draft(of, longest=32)
    steps = value(coarse, "data.spacing_mm")
    assert max(steps) / min(steps) < 1.01, "fine axes give way first, and then all alike"
    assert max(value(coarse, "data.size")) <= 48


def test_a_coarse_axis_takes_the_tenth_percentile() -> None:
    """nnU-Net: more than 3 times as coarse, with less than a third of the voxels."""
    shape, spacing = (512, 512, 30), (0.7, 0.7, 5.0)
    others = {"one_shape": False, "one_spacing": False, "spacing": spacing}
    of = measured(shape, **others, spacing_10=(0.6, 0.6, 2.5))
    assert rules.target_spacing(draft(of)) == (0.7, 0.7, 2.5)
    many = measured((512, 512, 400), **others, spacing_10=(0.6, 0.6, 2.5))
    assert rules.target_spacing(draft(many)) == (0.7, 0.7, 5.0)


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((48, 56, 8), (4, 4, 20), [28, 32, 8]),  # 7 mm in the plane
        ((512, 512, 100), (0.7, 0.7, 5), [24, 24, 32]),  # 15.6 mm along all axes
        ((64, 64, 48), (1, 1, 1), [32, 32, 24]),
    ],
)
def test_volumes_become_coarser_along_fine_axes_first(
    shape: tuple[int, ...], spacing: tuple[float, ...], size: list[int]
) -> None:
    planned = draft(measured(shape, spacing=spacing), longest=32)
    assert value(planned, "data.size") == size
    reason = planned.choices["data.size"].reason
    assert ("fine axes made coarser until no side is above 32" in reason) == (spacing[2] != 1)


@pytest.mark.parametrize(
    ("shape", "number", "batch"),
    [
        ((64, 64), 1500, 8),
        ((64, 64), 60, 5),  # 10% of 54
        ((64, 64), 20, 2),
        ((64, 64), 2, 1),
        ((32, 32, 32), 1500, 4),
        ((32, 32, 32), 7, 2),
    ],
)
def test_a_batch_is_a_small_share_of_the_images(
    shape: tuple[int, ...], number: int, batch: int
) -> None:
    planned = draft(measured(shape, number))
    assert value(planned, "training.batch_size") == batch


@pytest.mark.parametrize(
    ("shape", "number", "where", "request_of", "lacks"),
    [
        ((64, 64), 1500, CPU, {}, True),  # 135,000 images are seen
        ((64, 64), 300, CPU, {}, True),  # 27,000
        ((64, 64), 1500, CPU, {"hours": 24}, True),
        ((64, 64), 300, CPU, {"recipe": "default"}, False),
        ((64, 64), 300, GPU, {"hours": 0.5}, False),
        ((64, 64), 300, CPU, {"family": "ddpm"}, False),
        ((64, 64), 300, CPU, {"goal": "compress"}, False),
        ((32, 32), 1500, CPU, {}, False),
        ((32, 32), 1500, CPU, {"hours": 2}, True),
        ((32, 32), 1500, CPU, {"hours": 2.5}, False),
        ((32, 32), 1500, CPU, {"budget_images": 54_000}, True),
        ((32, 32), 1500, CPU, {"budget_images": 54_001}, False),
    ],
)
def test_a_training_that_lacks_steps_takes_more_and_cheaper_ones(
    shape: tuple[int, ...], number: int, where: Machine, request_of: dict[str, Any], lacks: bool
) -> None:
    planned = draft(measured(shape, number), where, **request_of)
    assert length.lacks_steps(planned) == lacks
    small = lacks and shape == (32, 32)
    assert value(planned, "model.refinement_channels") == (8 if small else None)
    of_default = {"ddpm": [32, 64, 64, 64], "rectified_flow": [32, 64, 96]}
    if planned.request.goal == "generate":
        channels = [16, 32, 64] if small else of_default[planned.values["model"]["name"]]
        assert value(planned, "model.channels") == channels
    if lacks:
        assert value(planned, "training.batch_size") == 8
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []


def test_attention_of_a_flow_is_at_the_coarsest_level_alone() -> None:
    planned = draft(measured(number=300), CPU, "model.wavelet_levels=0")
    assert value(planned, "model.refinement_channels") is None
    assert value(planned, "model.channels") == [32, 64, 96]
    assert value(planned, "model.attention_from") == 2
    wide = draft(measured(number=300), CPU, "model.channels=[16,32,64,64]")
    assert value(wide, "model.attention_from") == 3


@pytest.mark.parametrize(
    ("shape", "overrides"), [((32, 32), ()), ((64, 64), ("data.size=[32,32]",))]
)
def test_small_pictures_of_a_short_training_have_a_small_network(
    shape: tuple[int, ...], overrides: tuple[str, ...]
) -> None:
    planned = draft(measured(shape, 300), CPU, *overrides)
    assert value(planned, "model.wavelet_levels") == 1
    assert value(planned, "model.refinement_channels") == 8
    assert value(planned, "model.channels") == [16, 32, 64]
    assert value(planned, "model.attention_from") == 2
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []


def test_without_classes_the_groups_of_norms_are_the_default() -> None:
    assert value(draft(measured()), "model.num_norm_groups") is None


@pytest.mark.parametrize(
    ("shape", "channels", "attention_from"),
    [
        ((32, 32, 24), [32, 64], 1),  # 12 / 2 = 6 places are left
        ((256, 256, 256), [32, 64, 96, 96], 3),
        ((192, 192, 12), [32, 64], 2),  # 48 x 48 x 3 places are too many
    ],
)
def test_the_depth_of_volumes_on_a_cpu_is_that_of_half_their_size(
    shape: tuple[int, ...], channels: list[int], attention_from: int
) -> None:
    planned = draft(measured(shape))
    assert value(planned, "data.size") == list(shape)
    assert value(planned, "model.channels") == channels
    assert value(planned, "model.attention_from") == attention_from
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []


@pytest.mark.parametrize("hours", [0.5, 24])
def test_volumes_on_a_cpu_are_made_of_wavelets_however_long_it_trains(hours: float) -> None:
    planned = draft(measured((48, 56, 32), 40), hours=hours)
    assert value(planned, "model.wavelet_levels") == 1
    assert value(planned, "model.channels") == [32, 64, 96]
    assert value(planned, "model.attention_from") == 2
    assert value(planned, "training.batch_size") == 2
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []


@pytest.mark.parametrize(
    ("where", "number", "batch"),
    [(CPU, 1500, 16), (CPU, 150, 13), (CPU, 40, 3), (GPU, 1500, 16), (GPU, 150, 6), (GPU, 40, 2)],
)
def test_a_batch_of_the_default_recipe_is_a_small_share_too(
    where: Machine, number: int, batch: int
) -> None:
    planned = draft(measured(number=number), where, recipe="default")
    assert value(planned, "training.batch_size") == batch


def test_processes_share_a_batch_evenly() -> None:
    three = Machine(torch.device("cpu"), int(16e9), 4, 3, "32-true")
    assert value(draft(measured(), three), "training.batch_size") == 6
    assert value(draft(measured(), three, recipe="default"), "training.batch_size") == 15


@pytest.mark.parametrize("number", [20, 400, 5000])
def test_no_plan_flips(number: int) -> None:
    for shape in ((64, 64), (32, 32, 32)):
        planned = draft(measured(shape, number))
        steps = value(planned, "data.augmentation") or []
        assert not any("Flip" in step["name"] for step in steps)
        assert bool(steps) == (number < 500)
        planned.config()


@pytest.mark.parametrize(
    ("budget", "overrides", "augmented"),
    [
        (72_000, (), False),  # 200 passes over 360 training images
        (73_000, (), True),
        (3_600, ("data.augmentation=[{name: RandomFlip, axes: 0}]",), True),
    ],
)
def test_images_that_are_seldom_seen_are_not_augmented(
    budget: int, overrides: tuple[str, ...], augmented: bool
) -> None:
    request = PlanRequest(budget_images=budget, overrides=overrides)
    planned = plan.planned(measured((64, 64), 400), CPU, request, None)
    assert bool(planned.settings.data.augmentation) == augmented
    reason = planned.by_key["data.augmentation"].reason
    assert (reason == "200 passes are too few to make copies") != augmented


def test_without_augmentation_a_gpu_needs_no_workers() -> None:
    for budget, workers in ((72_000, 0), (73_000, 4)):
        small = ("model.channels=[8,8]", "model.num_res_blocks=1")
        request = PlanRequest(budget_images=budget, overrides=small)
        planned = plan.planned(measured((64, 64), 400), GPU, request, None)
        assert planned.settings.data.num_workers == workers


def test_a_user_may_flip() -> None:
    planned = draft(measured(), CPU, "data.augmentation=[{name: RandomFlip, axes: 0}]")
    assert planned.config().data.augmentation[0].name == "RandomFlip"


def test_a_ct_gets_one_range_and_others_their_own() -> None:
    ct = draft(measured((32, 32, 32), channels=(CT,)))
    assert value(ct, "data.intensity_range") == [-1024.0, 1250.0]
    assert ct.config().data.intensity_range == (-1024, 1250)
    assert value(draft(measured((32, 32, 32))), "data.intensity_range") is None
    both = draft(measured((32, 32, 32), channels=(CT, MASK)))
    assert [*value(both, "data.channels")] == [1, 0]
    assert both.config().data.masks == {1: (0, 1, 2)}
    assert both.image(both.config()).channels == 4, "a channel for each class"


def test_classes_are_followed_unless_they_are_people_or_few() -> None:
    plain = draft(measured(class_counts=(500, 500, 500)))
    assert value(plain, "data.conditions") == {"Label": "class"}
    assert value(plain, "model.num_norm_groups") == 8
    for of in (
        measured(class_counts=(1490, 10), classes_of_subjects=True),
        measured(class_counts=(1495, 5)),
    ):
        planned = draft(of)
        assert value(planned, "data.conditions") is None
        assert "classes are not followed" in planned.warnings[0]
    assert draft(measured(class_counts=(1500,))).warnings == []


@pytest.mark.parametrize(
    ("channels", "sources"), [((IMAGE, IMAGE), [0]), ((IMAGE, MASK), [1]), ((IMAGE,) * 3, [0, 1])]
)
def test_the_last_channel_is_made_out_of_the_others(channels: Any, sources: list[int]) -> None:
    planned = draft(measured(channels=channels), goal="translate")
    assert value(planned, "data.source_channels") == sources
    planned.config()


def test_one_channel_cannot_be_translated() -> None:
    with pytest.raises(ConfigError, match="these images have one channel"):
        draft(measured(), goal="translate")


@pytest.mark.parametrize(
    ("others", "share"),
    [
        ({"number": 1500}, 0.1),
        ({"number": 7}, 0.143),
        ({"number": 1}, 0.0),
        ({"number": 100_000}, 0.02),
        ({"number": 100, "splits": {"train": 80, "validation": 20}}, None),
        ({"number": 100, "num_subjects": 4}, 0.25),
    ],
)
def test_how_many_are_held_out(others: dict[str, Any], share: float | None) -> None:
    assert value(draft(measured(**others)), "data.validation_fraction") == share


def needs(planned: Draft) -> int:
    """Bytes as a network might need them: by voxels, batch, channels and recomputation."""
    settings = planned.config()
    model: Any = settings.model
    size = 1
    for side in planned.values["data"]["size"]:
        size *= side
    cost = size * settings.training.batch_size * model.channels[0] * model.num_res_blocks
    return cost * 50 // (2 if settings.compute.activation_checkpointing else 1)


@pytest.mark.parametrize(
    ("usable", "batch", "accumulate", "recomputed", "blocks", "first"),
    [
        (300e6, 16, None, None, None, 32),
        (120e6, 8, 2, None, None, 32),
        (14e6, 1, 16, None, None, 32),
        (7e6, 1, 16, True, None, 32),
        (4e6, 1, 16, True, 1, 32),
        (2e6, 1, 16, True, 1, 16),
    ],
)
def test_what_gives_way_to_a_lack_of_memory(
    usable: float, batch: int, accumulate: Any, recomputed: Any, blocks: Any, first: int
) -> None:
    """The batch first, which changes nothing; the network last."""
    where = Machine(torch.device("cpu"), int((usable + 1e9) / 0.9) + 1, 4, 1, "32-true")
    planned = draft(measured(), where, family="ddpm")
    assert rules.fit_memory(planned, needs)
    assert value(planned, "training.batch_size") == batch
    assert value(planned, "training.accumulate") == accumulate
    assert value(planned, "compute.activation_checkpointing") == recomputed
    assert value(planned, "model.num_res_blocks") == blocks
    assert value(planned, "model.channels")[0] == first


def test_what_the_user_fixed_stays_and_the_rest_adapts() -> None:
    where = Machine(torch.device("cpu"), int(1.14e9), 4, 1, "32-true")
    planned = draft(measured(), where, "training.batch_size=12", "model.channels=[16, 32, 32]")
    rules.fit_memory(planned, needs)
    assert value(planned, "training.batch_size") == 12
    assert value(planned, "model.channels") == [16, 32, 32]
    assert planned.choices["model.channels"].reason == "set by you"
    assert value(planned, "compute.activation_checkpointing") is True
    smaller = draft(measured((512, 512)), GPU, "data.size=[64,64]", family="ddpm")
    assert value(smaller, "model.attention_from") == 2
    larger = draft(measured((512, 512)), GPU, family="ddpm")
    assert value(larger, "model.attention_from") == 3


@pytest.mark.parametrize(
    ("number", "request_of", "seconds", "epochs"),
    [
        (1500, {}, None, 100),
        (40, {}, None, 750),  # 27,000 images of the 36
        (50_000, {}, None, 4),  # 200,000 on a CPU
        (1500, {"budget_images": 13_500}, None, 10),
        (1500, {"hours": 1.0}, 0.1, 27),
        (1500, {"hours": 1.0}, None, 100),  # not timed: the clock ends it
    ],
)
def test_length(number: int, request_of: dict[str, Any], seconds: Any, epochs: int) -> None:
    planned = draft(measured(number=number), **request_of)
    length.choose_length(planned, seconds)
    assert value(planned, "training.max_epochs") == epochs
    assert value(planned, "training.max_minutes") == (60 if "hours" in request_of else None)
    assert bool(planned.warnings) == (number == 40)
    stop = {"metric": "copies", "num_images": 16} if number == 40 else None
    assert value(planned, "training.early_stop") == stop
    settings = planned.config()
    assert settings.training.max_epochs >= settings.training.validate_every_n_epochs


@pytest.mark.parametrize(("epochs", "augmented"), [(90, False), (500, True)])
def test_the_length_that_the_user_fixed_decides_what_follows_from_it(
    epochs: int, augmented: bool
) -> None:
    planned = draft(measured((32, 32), 160), CPU, f"training.max_epochs={epochs}")
    assert planned.config().data.augmentation  # 160 images would be seen 188 times by default
    length.omit_augmentation(planned, None)
    assert bool(planned.config().data.augmentation) == augmented
    length.choose_length(planned, None)
    assert value(planned, "training.max_epochs") == epochs
    assert value(planned, "model.channels") == ([16, 32, 64] if epochs == 90 else [32, 64, 96])


@pytest.mark.parametrize(
    ("images", "overrides", "decay"),
    [
        (13_500, (), 0.999),  # 1,687 steps: the ramp is at 0.995
        (80_000, (), 0.999),
        (160_000, (), 0.9995),  # 20,000 steps of 8 images
        (8_000_000, (), 0.9999),
        (160_000, ("training.accumulate=4",), 0.999),
        (160_000, ("training.ema.decay=0.9",), 0.9),
    ],
)
def test_the_average_is_over_a_tenth_of_the_steps(
    images: int, overrides: tuple[str, ...], decay: float
) -> None:
    planned = draft(measured(number=1600), CPU, *overrides, budget_images=images)
    length.choose_length(planned, None)
    length.choose_average(planned)
    average = planned.config().training.ema
    assert average
    assert average.decay == pytest.approx(decay, abs=1e-5)


def test_no_average_stays_none() -> None:
    planned = draft(measured(), CPU, "training.ema=null")
    length.choose_average(planned)
    assert planned.choices["training.ema"].by_user
    assert planned.config().training.ema is None


@pytest.mark.parametrize(
    ("shape", "others", "slices", "false_alarms"),
    [
        ((64, 64), {"number": 1500}, None, None),
        ((64, 64), {"number": 400}, None, 0.025),  # 40 held out
        ((48, 48, 32), {"number": 400}, 8, 0.025),
        ((192, 192, 4), {"number": 1500}, 4, None),
        ((64, 64), {"number": 1}, None, None),  # nothing is held out
        ((64, 64), {"number": 30, "splits": {"train": 20, "validation": 10}}, None, 0.091),
    ],
)
def test_what_is_compared_of_the_images(
    shape: tuple[int, ...], others: dict[str, Any], slices: int | None, false_alarms: float | None
) -> None:
    planned = draft(measured(shape, **others))
    rules.choose_evaluation(planned)
    assert value(planned, "evaluation.slices_per_plane") == slices
    assert value(planned, "evaluation.copy_false_alarms") == false_alarms
    planned.config()


@pytest.mark.parametrize("number", [5, 17, 40, 98])
def test_the_planned_false_alarms_can_be_told(number: int) -> None:
    others = {"number": 200, "splits": {"train": 200 - number, "validation": number}}
    planned = draft(measured(**others))
    rules.choose_evaluation(planned)
    rate = planned.config().evaluation.copy_false_alarms
    assert int(rate * (number + 1)) == 1  # else memorisation.calibrate warns


@pytest.mark.parametrize(
    ("others", "overrides", "looks"),
    [
        ({"splits": {"train": 36, "validation": 4}}, (), True),
        ({"splits": {"train": 36, "test": 4}}, (), False),  # nothing is validated
        ({"num_subjects": 2}, (), False),  # one is trained on
        ({}, ("data.validation_fraction=0",), False),
        ({}, ("training.privacy={epsilon: 8}", "data.intensity_range=[0,255]"), False),
        ({}, ("model.name=vqvae",), False),
    ],
)
def test_copies_are_looked_for_where_a_training_can(
    others: dict[str, Any], overrides: tuple[str, ...], looks: bool
) -> None:
    planned = draft(measured(number=40, **others), CPU, *overrides,
                    family="vqvae" if overrides == ("model.name=vqvae",) else None)  # fmt: skip
    length.choose_length(planned, None)
    assert value(planned, "training.max_epochs") > 300
    assert (value(planned, "training.early_stop") is not None) == looks


def test_slices_of_volumes_are_planned_as_pictures() -> None:
    planned = draft(measured((64, 64, 40), 20), CPU, "data.slices=axial")
    assert value(planned, "data.size") == [64, 64]
    assert planned.num_images == 800
    assert value(planned, "training.batch_size") == 8


def test_copies_are_warned_of() -> None:
    planned = draft(measured(near_duplicates=4, duplicates_across_subjects=2, num_subjects=700))
    rules.warn_of_data(planned)
    assert (
        "4 of 1500 images nearly equal another one, 2 of them of different" in planned.warnings[0]
    )


def test_an_image_that_is_too_large_to_read_is_warned_of() -> None:
    request = PlanRequest(overrides=("data.size=[32,32,32]", "model.autoguidance_from=0"))
    where = Machine(torch.device("cpu"), int(1.3e9), cores=2, processes=1, precision="32-true")
    planned = plan.planned(measured((256, 256, 256), 40), where, request, None)
    assert planned.cost.reading_bytes > planned.cost.training_bytes
    assert any(
        "the largest image takes 0.22 GB while it is read, and 0.17 GB can be used" in warning
        for warning in planned.warnings
    )


@pytest.mark.parametrize(
    ("shape", "where", "images", "overrides", "expected"),
    [
        ((64, 64), CPU, 4_500, (), (0.25, 1.75, 10)),
        ((64, 64), CPU, 40_000, (), (0.25, 1.75, None)),  # 5,000 steps
        ((64, 64), CPU, 3_500, (), (None, None, None)),  # fewer than 500 steps
        ((64, 64), GPU, 160_000, (), (None, None, None)),
        ((32, 32), CPU, 17_000, (), (0.25, 2, None)),
        ((32, 32), CPU, 15_000, (), (None, None, None)),  # fewer than 2,000 steps
        ((32, 32), CPU, 60_000, (), (None, None, None)),  # steps enough
        ((64, 64, 64), CPU, 16_000, (), (0.25, 2, None)),
        ((64, 64, 64), CPU, 1_500, (), (None, None, None)),
        ((64, 64), CPU, 17_000, ("compute.strategy=fsdp",), (None, None, None)),
        ((64, 64), CPU, 17_000, ("model.autoguidance=1",), (0.25, 1, 10)),
        ((64, 64), CPU, 17_000, ("model.autoguidance_from=0",), (0, None, None)),
    ],
)
def test_pictures_are_guided_by_earlier_weights(
    shape: tuple[int, ...], where: Machine, images: int, overrides: tuple[str, ...],
    expected: tuple[Any, ...],
) -> None:  # fmt: skip
    planned = draft(measured(shape, 1600), where, *overrides, budget_images=images)
    length.choose_length(planned, None)
    length.choose_autoguidance(planned)
    keys = ("autoguidance_from", "autoguidance", "num_sampling_steps")
    assert tuple(value(planned, f"model.{key}") for key in keys) == expected
    settings = planned.config()
    assert settings.model.faults(planned.image(settings)) == []
