"""The architectures of GaNDLF-Synth: ddpm, vqvae and dcgan; and why stylegan is none of ours."""

from __future__ import annotations

from typing import Any

from synthcube.migration.project import Path, Project

_ARCHITECTURE: Path = ("model_config", "architecture")
_HALVE, _DOUBLE = [2, 4, 1, 1], [2, 4, 1, 1, 0]

STYLEGAN = (
    "stylegan is another network here (styles modulate the convolutions, without AdaIN; R1 in "
    "place of the gradient penalty of a Wasserstein critic), so that no config trains what this "
    "one trained: start from `synthcube init stylegan`, with model.progressive: true to grow "
    "images as there"
)


def ddpm(project: Project) -> None:
    """The U-Net, the noise schedule and the sampler."""
    take(project, "num_channels", "model.channels", [32, 64, 64, 64])
    levels = _num_levels(project, "num_channels", 4)
    _one_for_all(project, "num_res_blocks", 2)
    _one_for_all(project, "num_head_channels", 8)
    _attention(project, levels)
    take(project, "norm_num_groups", "model.num_norm_groups", 32)
    text = "the layer after each attention was built, and never called"
    project.imply("model.attention_projection", False, text)
    _diffusion(project)


def _one_for_all(project: Project, name: str, default: int) -> None:
    value, target = project.architecture(name), f"model.{name}"
    if not isinstance(value, list):
        take(project, name, target, default)
        return
    counts = value
    if name == "num_head_channels":  # those of levels without attention, but the last, are unused
        attends = project.architecture("attention_levels", [False, False, True, True])
        last = len(value) - 1
        if isinstance(attends, list) and len(attends) == len(value):
            counts = [n for i, n in enumerate(value) if attends[i] or i == last]
    if len({*map(repr, counts)}) == 1:
        project.state(target, counts[0], f"architecture.{name}: one number for all levels")
    else:
        project.refuse((*_ARCHITECTURE, name), f"{value}: all levels have the same number here")


def _attention(project: Project, levels: int) -> None:
    path = (*_ARCHITECTURE, "attention_levels")
    value = project.get(*path)
    if value is None:
        project.imply("model.attention_from", 2, "the default of attention_levels")
        return
    if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
        project.refuse(path, f"a list of true and false is needed, not {value!r}")
        return
    first = value.index(True) if True in value else len(value)
    if len(value) != levels:
        project.refuse(path, f"{len(value)} of them for {levels} levels")
    elif not all(value[first:]):
        project.refuse(path, f"{value}: here every level from the first that attends does")
    else:
        project.state("model.attention_from", first, "architecture.attention_levels")


def _diffusion(project: Project) -> None:
    train_path = (*_ARCHITECTURE, "num_train_timesteps")
    steps = project.whole(train_path, 1000)
    if steps < 2:
        project.note(train_path, "1 step trains nothing: 1000 are written, the default of there")
        steps = 1000
    project.state("model.num_train_steps", steps, "architecture.num_train_timesteps")
    project.imply("model.schedule", "linear", "the noise schedule of MONAI's DDPMScheduler")
    project.imply("model.beta_start", 0.0001, "its first beta")
    project.imply("model.beta_end", 0.02, "its last beta")
    project.imply("model.prediction", "epsilon", "the network predicted the noise")
    eval_path = (*_ARCHITECTURE, "num_eval_timesteps")
    drawn = project.whole(eval_path, 1000)
    if drawn >= steps or drawn < 2:
        if drawn != steps and project.get(*eval_path) is not None:
            project.note(eval_path, f"{drawn} of {steps}: all steps are taken")
        project.imply("model.sampler", "ddpm", "images were drawn with every step of the training")
        project.imply("model.variance", "fixed_small", "the variance of its scheduler")
    else:
        text = f"ddim: with {drawn} of {steps} steps the sampler of there left noise in its images"
        project.note(eval_path, text)
        project.state("model.sampler", "ddim", f"architecture.num_eval_timesteps: {text}")
        project.state("model.num_sampling_steps", drawn, "architecture.num_eval_timesteps")


def vqvae(project: Project) -> None:
    """Encoder, decoder and codebook."""
    name = "num_channels_upsample_downsample_layers"
    channels = project.architecture(name, [96, 96, 192])
    take(project, name, "model.channels", [96, 96, 192])
    levels = _num_levels(project, name, 3)
    layers = project.whole((*_ARCHITECTURE, "num_residual_layers"), 3)
    take(project, "num_residual_layers", "model.num_res_layers", 3)
    if layers != levels:
        text = f"{layers}: GaNDLF-Synth stops where it is not the number of levels, {levels}"
        project.refuse((*_ARCHITECTURE, "num_residual_layers"), text)
    fixed: dict[str, tuple[Any, Any]] = {
        "num_residual_channels": (channels, [96, 96, 192]),
        "downsample_conv_parameters": ([_HALVE] * levels, [_HALVE] * 3),
        "upsample_conv_parameters": ([_DOUBLE] * levels, [_DOUBLE] * 3),
    }
    for key, (here, default) in fixed.items():
        there = project.architecture(key, default)
        if there != here:
            is_default = project.architecture(key) is None
            text = f"the default of there is {there}" if is_default else f"{there}"
            project.refuse((*_ARCHITECTURE, key), f"{text}: here they are {here}")
    take(project, "num_embeddings", "model.num_embeddings", 32)
    take(project, "embedding_dim", "model.embedding_dim", 64)
    take(project, "loss_scaling_commitment_cost", "model.commitment_cost", 0.25)
    take(project, "EMA_decay", "model.codebook_decay", 0.5)
    project.imply("model.revive_below", 0.0, "unused codes were never replaced")


def dcgan(project: Project) -> None:
    """Generator and discriminator."""
    take(project, "latent_vector_size", "model.latent_dim", 100)
    _levels(project, "generator", "model.channels", 512)
    _levels(project, "discriminator", "model.discriminator_channels", 64)
    take(project, "leaky_relu_slope", "model.negative_slope", 0.2)
    text = "the generator doubled 4 voxels a side to 64, enlarged the image and smoothed it"
    project.imply("model.smoothing", True, text)
    stated, shown = ("model_config", "tensor_shape"), ("model_config", "output_shape")
    if project.get(*shown) not in (None, project.get(*stated)):
        project.refuse(shown, "it must equal tensor_shape, or the discriminator does not fit")


def _levels(project: Project, part: str, target: str, default: int) -> None:
    first, growth = f"init_channels_{part}", f"growth_rate_{part}"
    start = project.whole((*_ARCHITECTURE, first), default)
    factor = project.whole((*_ARCHITECTURE, growth), 2)
    comment = f"architecture.{first} and {growth}, finest level first"
    if part == "discriminator":
        channels = [start * factor**level for level in range(4)]
    else:
        channels = [start // factor**level for level in (3, 2, 1, 0)]
        if channels[0] * factor**3 != start:
            text = f"{start} cannot be divided by {growth}, {factor}, three times"
            project.refuse((*_ARCHITECTURE, first), text)
    stated = {first, growth} & set(project.section(*_ARCHITECTURE))
    (project.state if stated else project.imply)(target, channels, comment)


def take(project: Project, name: str, target: str, default: Any) -> None:
    """Write a key of the architecture as it is, or its default of there."""
    value = project.architecture(name)
    if value is None:
        project.imply(target, default, f"the default of architecture.{name}")
    else:
        project.state(target, value, f"architecture.{name}")


def _num_levels(project: Project, name: str, default: int) -> int:
    value = project.architecture(name)
    return len(value) if isinstance(value, list) else default
