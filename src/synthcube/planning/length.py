"""How long a plan trains, and the recipe of a training that lacks steps."""

from __future__ import annotations

import math

from synthcube.models.families.rectified_flow import RectifiedFlowConfig
from synthcube.planning.cost import draws_images
from synthcube.planning.draft import Draft, lookup
from synthcube.training.config import EMAConfig, TrainingConfig

FLOOR_IMAGES = 27_000  # 20 epochs of 1,350 hands: the first good pictures (docs/results.md)
_SHORT_IMAGES, _SHORT_HOURS = 2 * FLOOR_IMAGES, 2.0  # of small pictures
_CEILING_IMAGES = {True: 2_000_000, False: 200_000}  # on a GPU, on a CPU
_MANY_PASSES = 300
_FEW_PASSES = 200  # of 50 hands, the held-out loss fell until the 210th (docs/recipes.md)
_STEPS_BETWEEN = 200  # validations
_SMALL_PICTURE = 32
_AVERAGED_SHARE = 0.1  # of the steps, by the last average
_SLOWEST_AVERAGE = 0.9999
_LEAST_STEPS_TO_GUIDE = {True: 2000, False: 500}  # of small pictures, of others
_SHORT_STEPS = 5000  # of a training whose pictures gain nothing from more steps of the sampler
_DEFAULTS = TrainingConfig()


def images_wanted(draft: Draft, seconds_an_image: float | None) -> tuple[float, str]:
    """Images to train on, counting each time it is seen, and why.

    The user's epochs, images or hours (with a timed step) say it; else it follows from the data:
    the default number of epochs, at least what the first good model of this project took.
    """
    request, number = draft.request, draft.num_training_images
    is_fixed, epochs = lookup(draft.fixed, "training.max_epochs")
    if is_fixed and isinstance(epochs, int):
        return epochs * number, "set by you"
    if request.budget_images:
        return request.budget_images, f"--budget_images {request.budget_images:,}"
    if request.hours and seconds_an_image:
        images = request.hours * 3600 / seconds_an_image
        return images, f"{request.hours:g} hours at {seconds_an_image:.3g} s an image"
    ceiling = _CEILING_IMAGES[draft.machine.is_gpu]
    images = min(max(_DEFAULTS.max_epochs * number, FLOOR_IMAGES), max(ceiling, number))
    if images == FLOOR_IMAGES:
        return images, f"{images:,} images seen: fewer gave no good pictures"
    if images < _DEFAULTS.max_epochs * number:
        return images, f"{images:,} images seen; more with --hours"
    return images, f"{_DEFAULTS.max_epochs} passes over the data, the default"


def choose_length(draft: Draft, seconds_an_image: float | None) -> None:
    """Epochs, the end by the clock, and how often to validate.

    Memorisation begins after a number of passes over the data that hardly depends on how many
    images there are (Bonnaire et al., NeurIPS 2025, arXiv 2505.17638): about 700 with 50 hands of
    32 x 32 (docs/recipes.md). Other networks differ: above 300 the training looks for copies.
    """
    number, training = draft.num_training_images, draft.values["training"]
    wanted, reason = images_wanted(draft, seconds_an_image)
    epochs = max(1, round(wanted / number))
    epochs = draft.choose("training.max_epochs", epochs, reason)
    if draft.request.hours:
        limit = f"--hours {draft.request.hours:g}"
        draft.choose("training.max_minutes", round(draft.request.hours * 60, 2), limit)
    steps = max(1, number // training["batch_size"])
    every = max(1, min(round(_STEPS_BETWEEN / steps), epochs // 10 or 1))
    if every > 1:
        reason = f"{steps * every} steps between: {steps} an epoch would mostly validate"
        draft.choose("training.validate_every_n_epochs", every, reason)
    pictures = max(_DEFAULTS.sample_every_n_epochs, math.ceil(epochs / 20 / every) * every)
    if pictures != _DEFAULTS.sample_every_n_epochs:
        draft.choose("training.sample_every_n_epochs", pictures, "about 20 sample pictures")
    if epochs > _MANY_PASSES:
        draft.warnings.append(
            f"each of the {number} training images is seen {epochs:,} times: the model may "
            "memorise them. More images are the cure, or fewer passes (--budget_images)"
        )
        if _can_look_for_copies(draft):
            drawn = 16 if draft.rank == 2 else 8
            draft.choose(
                "training.early_stop", {"metric": "copies", "num_images": drawn},
                f"{epochs:,} passes: stop when drawn images are copies",
            )  # fmt: skip


def num_steps(draft: Draft) -> int:
    """Steps of the optimizer in the planned epochs."""
    training = draft.config().training
    batches = max(1, draft.num_training_images // training.batch_size)
    return training.max_epochs * math.ceil(batches / training.accumulate)


def choose_average(draft: Draft) -> None:
    """The moving average of the weights: over the last tenth of the steps.

    EDM2 (Karras et al. 2024, arXiv 2312.02696) finds the best average about as wide. The ramp of
    the decay keeps this share up to 10,000 steps; longer trainings need a slower decay for it.
    """
    steps = num_steps(draft)
    default = EMAConfig().decay
    decay = min(_SLOWEST_AVERAGE, round(1 - 1 / (_AVERAGED_SHARE * steps), 5))
    reason = f"averages over a tenth of the {steps:,} steps"
    if decay <= default:
        decay, reason = default, "the default: its ramp averages over a tenth of the steps so far"
    draft.choose("training.ema", {"decay": decay}, reason)


def omit_augmentation(draft: Draft, seconds_an_image: float | None) -> bool:
    """Leave augmentation out where no image is seen often enough to be copied.

    In a minute of drawn shapes it left the held-out loss at 0.154 in place of 0.119, as it took a
    fifth of the time (docs/recipes.md).

    Args:
        seconds_an_image: of a step without augmentation.
    """
    planned = draft.choices.get("data.augmentation")
    if planned is None or planned.by_user:
        return False
    passes = round(images_wanted(draft, seconds_an_image)[0] / draft.num_training_images)
    if passes > _FEW_PASSES:
        return False
    draft.choose("data.augmentation", [], f"{passes} passes are too few to make copies")
    if "data.num_workers" in draft.choices:  # chosen for the augmentation
        draft.choose("data.num_workers", 0, "there is no augmentation to compute")
    return True


def _can_look_for_copies(draft: Draft) -> bool:
    """Whether `early_stop: {metric: copies}` trains: what it refuses is planned without it."""
    measured, settings = draft.fingerprint, draft.config()
    data, image = settings.data, draft.image(settings)
    if measured.splits:
        validates = measured.splits.get("validation", 0) > 0
    else:
        validates = data.validation_fraction > 0
    subjects = measured.num_subjects or measured.num_images  # two to train, one to validate
    from_noise = not (data.source_channels or data.patches or data.inpainting)
    return (
        validates and subjects > 2 and from_noise and settings.training.privacy is None
        and draws_images(settings, image)
    )  # fmt: skip


def lacks_steps(draft: Draft) -> bool:
    """Whether a CPU has time for so few steps that more of them gain more than large batches.

    Of pictures of 64 x 64 and of volumes at any length that was tried (docs/recipes.md); small
    pictures cost so little that a long training has steps enough.
    """
    request = draft.request
    if draft.machine.is_gpu or request.goal == "compress" or request.recipe == "default":
        return False
    if draft.family is not RectifiedFlowConfig or draft.is_fixed("model.start"):
        return False
    if not is_small(draft):
        return True
    if request.hours:
        return request.hours <= _SHORT_HOURS
    return images_wanted(draft, None)[0] <= _SHORT_IMAGES


def is_small(draft: Draft) -> bool:
    """Whether pictures are so small that a long training of a CPU has steps enough."""
    _, size = lookup(draft.fixed, "data.size")
    sides = size if isinstance(size, list) else draft.along_axes(draft.fingerprint.shape.highest)
    return draft.rank == 2 and max(sides) <= _SMALL_PICTURE


def choose_recipe(draft: Draft) -> None:
    """The network on wavelets, a default whose reason a user may want to know.

    Measured on hands for 25 and 85 minutes on one core (docs/recipes.md): better images than those
    of a network without, by every measure but the spectrum.
    """
    if draft.family is not RectifiedFlowConfig:
        return
    small = is_small(draft) and lacks_steps(draft)
    share = "half" if small else {2: "a quarter", 3: "a twelfth"}[draft.rank]
    reason = f"on a CPU an image takes {share} of the time"
    if draft.choose("model.wavelet_levels", 1, reason) and small:
        draft.choose("model.refinement_channels", 8, "few voxels, short training")


def choose_autoguidance(draft: Draft) -> None:
    """Guidance by the weights of a quarter of the training, and how many steps it needs.

    A step of the sampler takes twice the time. Measured (docs/recipes.md): half the kernel distance
    of hands after 722, 2,025 and 3,915 steps, more precision after 14,040; nothing for six classes
    after 334; two thirds of the distance for volumes after 1,512. Of drawn shapes 63 of 64 were
    whole in place of 61 after 2,600 steps, and there was no gain after 578. Hands drawn in 10 steps
    were as good as in 20 after up to 3,915, and less good after 14,040.
    """
    if draft.request.goal != "generate" or not lacks_steps(draft):
        return
    if num_steps(draft) < _LEAST_STEPS_TO_GUIDE[is_small(draft)]:
        return
    if lookup(draft.fixed, "compute.strategy")[1] in ("fsdp", "deepspeed"):
        return  # which split the weights
    reason = "guided by its own weights of a quarter of the training"
    if draft.choose("model.autoguidance_from", 0.25, reason):
        strength = 2.0 if is_small(draft) or draft.rank == 3 else 1.75
        draft.choose("model.autoguidance", strength, "fewer odd images, at twice the time a step")
        if draft.rank == 2 and not is_small(draft) and num_steps(draft) < _SHORT_STEPS:
            reason = "hands were as good as in 20 after so short a training"
            draft.choose("model.num_sampling_steps", 10, reason)
