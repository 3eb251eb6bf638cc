"""Every key that a YAML of GaNDLF-Synth may hold: what it was, and what it is here.

A ``*`` in a key stands for any one name. A key that holds a whole section, such as the transforms
of a stage, is listed without what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["same", "changed", "none here", "no effect", "crashes"]
SAME: Kind = "same"
CHANGED: Kind = "changed"
NONE_HERE: Kind = "none here"
NO_EFFECT: Kind = "no effect"
CRASHES: Kind = "crashes"


@dataclass(frozen=True)
class Key:
    """What a key meant in GaNDLF-Synth, and the key that it becomes here.

    ``target`` is empty where there is none. ``harmless`` are the values of a key without a
    counterpart that change nothing, so that they need not be refused; None: every value is.
    """

    kind: Kind
    target: str = ""
    text: str = ""
    harmless: tuple[Any, ...] | None = ()


_ONE_PREPARATION = "one preparation serves all images here, so every stage must be as `train`"
_SPEED = "it changes the speed alone"
_NEVER_READ = "it was never read"
_DROPPED_UPSTREAM = "GaNDLF-Synth itself no longer reads it"
_NO_CONDITIONING = "it belongs to with_conditioning, which GaNDLF-Synth cannot build"
_NOT_STEPPED = (
    "the schedule of a GAN was built and never stepped: the learning rate was constant, and is; "
    "to have one, write model.scheduler and model.discriminator_scheduler"
)

TOP: Mapping[str, Key] = {
    "model_config": Key(SAME, "model"),
    "modality": Key(CHANGED, "", "the format follows the images: .png for 8-bit pictures, else "
                    ".nii.gz, never .tiff; alpha is dropped, so that RGBA has 3 channels"),
    "num_epochs": Key(SAME, "training.max_epochs"),
    "batch_size": Key(CHANGED, "training.batch_size", "there of each process, here of all of them "
                      "together; the incomplete last batch of an epoch is left out here"),
    "save_model_every_n_epochs": Key(
        CHANGED, "training.validate_every_n_epochs", "the best and the last checkpoint are kept"),
    "inference_parameters.batch_size": Key(
        CHANGED, "sampling.batch_size", "each batch made one image there"),
    "inference_parameters.n_images_to_generate": Key(
        CHANGED, "sampling.num_images", "really so many here, not one for each batch"),
    "early_stopping_config.monitor_value": Key(
        CHANGED, "training.early_stop.metric", "the metrics have other names"),
    "early_stopping_config.monitor_mode": Key(SAME, "training.early_stop.mode"),
    "early_stopping_config.patience": Key(
        CHANGED, "training.early_stop.patience", "counts validations, not epochs"),
    "metrics": Key(NONE_HERE, "", "nothing is measured while training: `synthcube evaluate` "
                   "compares the images with real ones", None),
    "compute.num_devices": Key(CHANGED, "compute.num_devices", "a number, or null for all"),
    "compute.num_nodes": Key(SAME, "compute.num_nodes"),
    "compute.precision": Key(CHANGED, "compute.precision", "the default was 32 there"),
    "compute.strategy": Key(SAME, "compute.strategy"),
    "compute.strategy_config": Key(
        CHANGED, "compute.strategy_config", "what SynthCube sets itself is refused"),
    "data_preprocessing.train": Key(CHANGED, "data", "done once here, and images become [-1, 1]"),
    "data_preprocessing.val": Key(CHANGED, "data", _ONE_PREPARATION),
    "data_preprocessing.test": Key(CHANGED, "data", _ONE_PREPARATION),
    "data_preprocessing.inference": Key(CHANGED, "data", _ONE_PREPARATION),
    "data_augmentation": Key(NO_EFFECT, "", "it was never applied (the key that was read is "
                             "data_augmentations); to switch it on, write data.augmentation"),
    "data_augmentations.train": Key(
        CHANGED, "data.augmentation", "images are in [-1, 1] here, and were not there"),
    "data_augmentations.val": Key(NO_EFFECT, "", "training alone was augmented"),
    "data_augmentations.test": Key(NO_EFFECT, "", "training alone was augmented"),
    "data_augmentations.inference": Key(NO_EFFECT, "", "training alone was augmented"),
    "data_postprocessing": Key(CRASHES, "", "all four steps raised an error; for images there is "
                               "sampling.postprocessing", ({}, None)),
    "dataloader_config.train.num_workers": Key(SAME, "data.num_workers"),
    "dataloader_config.validation.num_workers": Key(NO_EFFECT, "", "data.num_workers is for all"),
    "dataloader_config.test.num_workers": Key(NO_EFFECT, "", "data.num_workers is for all"),
    "dataloader_config.inference.num_workers": Key(NO_EFFECT, "", "data.num_workers is for all"),
    "dataloader_config.*.pin_memory": Key(NO_EFFECT, "", _SPEED),
    "dataloader_config.*.drop_last": Key(
        CHANGED, "", "a training leaves the incomplete last batch out, a validation never does"),
    "dataloader_config.*.batch_size": Key(CRASHES, "", "GaNDLF-Synth stops at it with a TypeError"),
    "dataloader_config.*.prefetch_factor": Key(NO_EFFECT, "", _SPEED),
    "dataloader_config.*.persistent_workers": Key(NO_EFFECT, "", _SPEED),
    "dataloader_config.train.shuffle": Key(
        CHANGED, "", "training images are always shuffled, by `seed`"),
    "dataloader_config.val": Key(NO_EFFECT, "", f"{_NEVER_READ}: the name was `validation`"),
    "dataloader_config.infer": Key(NO_EFFECT, "", f"{_NEVER_READ}: the name was `inference`"),
    "train": Key(NO_EFFECT, "", _NEVER_READ),
    "validation": Key(NO_EFFECT, "", _NEVER_READ),
    "test": Key(NO_EFFECT, "", _NEVER_READ),
    "infer": Key(NO_EFFECT, "", _NEVER_READ),
    "patience": Key(NO_EFFECT, "", f"{_NEVER_READ}; early_stopping_config.patience was"),
    "in_memory": Key(NO_EFFECT, "", _DROPPED_UPSTREAM),
    "verbose": Key(NO_EFFECT, "", _DROPPED_UPSTREAM),
    "version": Key(NO_EFFECT, "", _DROPPED_UPSTREAM),
    "metrics_config": Key(NO_EFFECT, "", _DROPPED_UPSTREAM),
    "precision": Key(NO_EFFECT, "", f"{_DROPPED_UPSTREAM}; compute.precision is read"),
}  # fmt: skip

MODEL: Mapping[str, Key] = {
    "model_name": Key(SAME, "model.name"),
    "labeling_paradigm": Key(CRASHES, "data.conditions", "only unlabeled models exist there; a "
                             "conditional one is trained here with data.conditions: "
                             "{Label: class}", ("unlabeled",)),
    "n_dimensions": Key(CHANGED, "", "follows from data.size and the images"),
    "n_channels": Key(CHANGED, "", "follows from the images; --channels of `synthcube import`"),
    "tensor_shape": Key(CHANGED, "data.size", "the size that preprocessing makes is taken first"),
    "architecture": Key(SAME, "model"),
    "losses.name": Key(SAME, "model.losses"),
    "losses.*": Key(CHANGED, "model.losses", "`weight` of a class is class_weights here"),
    "losses.generator.name": Key(CHANGED, "model.adversarial_loss", "one for both networks"),
    "losses.discriminator.name": Key(CHANGED, "model.adversarial_loss", "one for both networks"),
    "optimizers.name": Key(SAME, "model.optimizer.name"),
    "optimizers.lr": Key(SAME, "model.optimizer.lr"),
    "optimizers.*": Key(CHANGED, "model.optimizer", "the defaults of GaNDLF are written out"),
    "optimizers.generator": Key(SAME, "model.optimizer"),
    "optimizers.discriminator": Key(SAME, "model.discriminator_optimizer"),
    "schedulers.type": Key(CHANGED, "model.scheduler.name", "stepped once an epoch"),
    "schedulers.*": Key(CHANGED, "model.scheduler", "the arguments have other names"),
    "schedulers.generator": Key(NO_EFFECT, "", _NOT_STEPPED),
    "schedulers.discriminator": Key(NO_EFFECT, "", _NOT_STEPPED),
    "schedulers": Key(NO_EFFECT, "", _NOT_STEPPED),
    "accumulate_grad_batches": Key(SAME, "training.accumulate"),
    "gradient_clip_val": Key(SAME, "training.gradient_clip_norm"),
    "gradient_clip_algorithm": Key(CHANGED, "", "gradients are clipped by their norm"),
    "norm_type": Key(NO_EFFECT, "", "it was overwritten: dcgan had batch norm, the others none"),
    "converter_type": Key(NO_EFFECT, "", "it was chosen, and never used"),
    "patience": Key(NO_EFFECT, "", _NEVER_READ),
    "inference_parameters": Key(NO_EFFECT, "", "the section at the top level was read"),
    "n_classes": Key(NO_EFFECT, "", "it was stored, and never used"),
    "input_shape": Key(NO_EFFECT, "", _NEVER_READ),
    "output_shape": Key(CHANGED, "data.size", "must equal tensor_shape"),
    "save_eval_images_every_n_epochs": Key(
        CHANGED, "training.sample_every_n_epochs", "after epochs n, 2n, ..., without epoch 0"),
    "n_fixed_images_to_generate": Key(
        CHANGED, "training.num_sample_images", "one picture with all of them"),
    "n_fixed_images_batch_size": Key(NO_EFFECT, "", _NEVER_READ),
    "fixed_images_batch_size": Key(NO_EFFECT, "", "pictures are made in one batch here"),
    "fixed_latent_vector_seed": Key(CHANGED, "", "pictures follow `seed`"),
    "tesnor_shape": Key(NO_EFFECT, "", "a misspelt default, never read"),
    "amp": Key(NO_EFFECT, "", f"{_DROPPED_UPSTREAM}; compute.precision is read"),
    "grandient_clip_val": Key(NO_EFFECT, "", "misspelt: nothing was ever clipped by it"),
}  # fmt: skip

_DDPM: Mapping[str, Key] = {
    "num_channels": Key(SAME, "model.channels"),
    "num_res_blocks": Key(CHANGED, "model.num_res_blocks", "one number for all levels"),
    "attention_levels": Key(CHANGED, "model.attention_from", "the first level that attends"),
    "num_head_channels": Key(CHANGED, "model.num_head_channels", "one number for all levels"),
    "norm_num_groups": Key(SAME, "model.num_norm_groups"),
    "norm_eps": Key(NONE_HERE, "", "fixed at 1e-6", (1e-6,)),
    "resblock_updown": Key(CRASHES, "", "true raises a TypeError there", (False,)),
    "with_conditioning": Key(CRASHES, "", "true raises a TypeError there", (False,)),
    "cross_attention_dim": Key(CRASHES, "", _NO_CONDITIONING, (None,)),
    "cross_attention_dropout": Key(NO_EFFECT, "", _NO_CONDITIONING),
    "transformer_num_layers": Key(NO_EFFECT, "", _NO_CONDITIONING),
    "upcast_attention": Key(NO_EFFECT, "", _NO_CONDITIONING),
    "num_class_embeds": Key(CRASHES, "", "it raises a ValueError at the first step there; classes "
                            "are learned here with data.conditions: {Label: class}", (None,)),
    "out_channels": Key(CRASHES, "", "no loss fits another number of channels than the images'"),
    "num_train_timesteps": Key(CHANGED, "model.num_train_steps", "with schedule: linear and "
                               "prediction: epsilon, which are not the defaults here"),
    "num_eval_timesteps": Key(CHANGED, "model.sampler", "ddpm takes all steps of the training"),
}  # fmt: skip
_VQVAE: Mapping[str, Key] = {
    "num_channels_upsample_downsample_layers": Key(SAME, "model.channels"),
    "num_residual_layers": Key(CHANGED, "model.num_res_layers", "any number works here; there it "
                               "had to be that of the levels"),
    "num_residual_channels": Key(CHANGED, "", "residual units have the channels of their level"),
    "downsample_conv_parameters": Key(CHANGED, "", "fixed at [2, 4, 1, 1]: halves every side"),
    "upsample_conv_parameters": Key(CHANGED, "", "fixed at [2, 4, 1, 1, 0]: doubles every side"),
    "dropout": Key(NONE_HERE, "", "this network has no dropout", (0, 0.0)),
    "num_embeddings": Key(SAME, "model.num_embeddings"),
    "embedding_dim": Key(SAME, "model.embedding_dim"),
    "loss_scaling_commitment_cost": Key(SAME, "model.commitment_cost"),
    "EMA_decay": Key(SAME, "model.codebook_decay"),
    "epsilon": Key(NONE_HERE, "", "fixed at 1e-5", (1e-5,)),
}  # fmt: skip
_FINEST_FIRST = "a list here, finest level first"
_DCGAN: Mapping[str, Key] = {
    "latent_vector_size": Key(SAME, "model.latent_dim"),
    "init_channels_generator": Key(CHANGED, "model.channels", _FINEST_FIRST),
    "growth_rate_generator": Key(CHANGED, "model.channels", _FINEST_FIRST),
    "init_channels_discriminator": Key(CHANGED, "model.discriminator_channels", _FINEST_FIRST),
    "growth_rate_discriminator": Key(CHANGED, "model.discriminator_channels", _FINEST_FIRST),
    "leaky_relu_slope": Key(SAME, "model.negative_slope"),
}
_STYLEGAN_KEYS: Mapping[str, Key] = {
    "latent_vector_size": Key(SAME, "model.latent_dim"),
    "intermediate_latent_size": Key(NONE_HERE, "", "styles are as long as the latent"),
    "first_conv_channels": Key(CHANGED, "model.channels", _FINEST_FIRST),
    "progressive_layers_scaling_factors": Key(
        CHANGED, "model.channels", "one level for each; data.size is 4 * 2^(levels - 1)"),
    "progressive_epochs": Key(CHANGED, "model.stage_epochs", "one number for all sizes"),
    "progressive_size_starting_value": Key(NO_EFFECT, "", "another than 4 does not fit there"),
    "progressive_size_growth_factor": Key(NO_EFFECT, "", "another than 2 does not fit there"),
    "alpha": Key(NO_EFFECT, "", "each size fades in over half of its epochs here"),
    "gradient_penalty_weight": Key(
        CHANGED, "", "the penalty here is R1, model.r1_weight: another number"),
    "critic_squared_loss_weight": Key(NONE_HERE, "", "there is no drift term", None),
    "default_forward_step": Key(NONE_HERE, "", "images are always of the full size", None),
}  # fmt: skip
ARCHITECTURE: Mapping[str, Mapping[str, Key]] = {
    "ddpm": _DDPM, "vqvae": _VQVAE, "dcgan": _DCGAN, "stylegan": _STYLEGAN_KEYS,
}  # fmt: skip

_OF_GANS = {"losses.generator.name", "losses.discriminator.name", "optimizers.generator",
            "optimizers.discriminator", "schedulers.generator", "schedulers.discriminator",
            "schedulers"}  # fmt: skip
_OF_OTHERS = {"losses.name", "losses.*", "optimizers.name", "optimizers.lr", "optimizers.*",
              "schedulers.type", "schedulers.*"}  # fmt: skip


def keys_of(model: str) -> dict[tuple[str, ...], Key]:
    """Every key that counts for a model, as a path from the top level."""
    left_out = _OF_OTHERS if model in ("dcgan", "stylegan") else _OF_GANS
    paths = {tuple(name.split(".")): key for name, key in TOP.items()}
    for name, key in MODEL.items():
        path = ("model_config", *name.split("."))
        if name not in left_out:
            paths[path] = key
    for stage in ("data_preprocessing", "data_augmentations"):  # each transform is told of
        paths[stage, "train", "*"] = TOP[f"{stage}.train"]
    for name, key in ARCHITECTURE.get(model, {}).items():
        paths["model_config", "architecture", name] = key
    if model == "stylegan":  # this one stands beside the architecture
        paths["model_config", "default_forward_step"] = _STYLEGAN_KEYS["default_forward_step"]
    return paths
