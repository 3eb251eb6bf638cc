"""A config and a list of images of GaNDLF-Synth, as they are in use, become ours."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from synthcube import config, reading
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError
from synthcube.migration import keys, optimizers, transforms
from synthcube.migration.project import Project, outcomes
from synthcube.migration.translation import Translation, translated
from synthcube.schema import ImageSpec
from synthcube.tasks import gandlf_config

# The keys that its code reads, sets, documents or ships in a YAML; "x.{a,b}" is x.a and x.b.
TOP = {
    "same": "model_config num_epochs early_stopping_config.monitor_mode compute.num_nodes "
    "compute.strategy dataloader_config.train.num_workers",
    "changed": "modality batch_size save_model_every_n_epochs inference_parameters.batch_size "
    "inference_parameters.n_images_to_generate early_stopping_config.monitor_value "
    "early_stopping_config.patience compute.num_devices compute.precision compute.strategy_config "
    "data_preprocessing.train data_preprocessing.val data_preprocessing.test "
    "data_preprocessing.inference data_augmentations.train dataloader_config.*.drop_last "
    "dataloader_config.train.shuffle",
    "none here": "metrics",
    "no effect": "data_augmentation data_augmentations.val data_augmentations.test "
    "data_augmentations.inference dataloader_config.*.pin_memory "
    "dataloader_config.*.prefetch_factor dataloader_config.*.persistent_workers "
    "dataloader_config.validation.num_workers dataloader_config.test.num_workers "
    "dataloader_config.inference.num_workers dataloader_config.val dataloader_config.infer "
    "train validation test infer patience in_memory verbose version metrics_config precision",
    "crashes": "data_postprocessing dataloader_config.*.batch_size",
}
MODEL = {
    "same": "model_name architecture losses.name optimizers.name optimizers.lr "
    "optimizers.generator optimizers.discriminator accumulate_grad_batches gradient_clip_val",
    "changed": "n_dimensions n_channels tensor_shape losses.* losses.generator.name "
    "losses.discriminator.name optimizers.* schedulers.type schedulers.* gradient_clip_algorithm "
    "output_shape save_eval_images_every_n_epochs n_fixed_images_to_generate "
    "fixed_latent_vector_seed",
    "no effect": "schedulers schedulers.generator schedulers.discriminator norm_type "
    "converter_type patience inference_parameters n_classes input_shape n_fixed_images_batch_size "
    "fixed_images_batch_size tesnor_shape amp grandient_clip_val",
    "crashes": "labeling_paradigm",
}
ARCHITECTURES = {
    "ddpm": {
        "same": "num_channels norm_num_groups",
        "changed": "num_res_blocks attention_levels num_head_channels num_train_timesteps "
        "num_eval_timesteps",
        "none here": "norm_eps",
        "no effect": "cross_attention_dropout transformer_num_layers upcast_attention",
        "crashes": "resblock_updown with_conditioning cross_attention_dim num_class_embeds "
        "out_channels",
    },
    "vqvae": {
        "same": "num_channels_upsample_downsample_layers num_embeddings embedding_dim "
        "loss_scaling_commitment_cost EMA_decay",
        "changed": "num_residual_layers num_residual_channels downsample_conv_parameters "
        "upsample_conv_parameters",
        "none here": "dropout epsilon",
    },
    "dcgan": {
        "same": "latent_vector_size leaky_relu_slope",
        "changed": "init_channels_generator growth_rate_generator init_channels_discriminator "
        "growth_rate_discriminator",
    },
    "stylegan": {
        "same": "latent_vector_size",
        "changed": "first_conv_channels progressive_layers_scaling_factors progressive_epochs "
        "gradient_penalty_weight",
        "none here": "intermediate_latent_size critic_squared_loss_weight default_forward_step",
        "no effect": "progressive_size_starting_value progressive_size_growth_factor alpha",
    },
}
_GAN = {
    "tensor_shape": [64, 64],
    "losses": {"generator": {"name": "bce"}, "discriminator": {"name": "bce"}},
    "optimizers": {
        "generator": {"name": "adam", "lr": 0.0002, "betas": [0, 0.99]},
        "discriminator": {"name": "sgd", "lr": 0.001},
    },
    "schedulers": {"generator": {"type": "step", "step_size": 3}},
    "save_eval_images_every_n_epochs": 10,
    "n_fixed_images_to_generate": 4,
}
_ONE = {
    "tensor_shape": [32, 32],
    "losses": {"name": "MSE"},
    "optimizers": {"name": "adam", "lr": 0.0001},
}
_OF_MODEL: dict[str, dict[str, Any]] = {
    "ddpm": {**_ONE, "architecture": {"num_channels": [32, 32], "num_res_blocks": [1, 1],
             "attention_levels": [False, True], "num_head_channels": [4, 8],
             "num_train_timesteps": 50, "num_eval_timesteps": 50}},
    "vqvae": {**_ONE, "architecture": {"num_channels_upsample_downsample_layers": [8, 16],
              "num_residual_layers": 2, "num_residual_channels": [8, 16],
              "downsample_conv_parameters": [[2, 4, 1, 1]] * 2,
              "upsample_conv_parameters": [[2, 4, 1, 1, 0]] * 2, "dropout": 0.0}},
    "dcgan": {**_GAN, "architecture": {"init_channels_generator": 64, "latent_vector_size": 16,
              "init_channels_discriminator": 8, "growth_rate_discriminator": 3}},
    "stylegan": {**_GAN, "architecture": {}},
}  # fmt: skip


def old(model: str, dims: int = 2, **changed: Any) -> dict[str, Any]:
    """A config as GaNDLF-Synth ships them."""
    section = deepcopy(_OF_MODEL[model]) | {
        "model_name": model, "n_dimensions": dims, "n_channels": 1,
        "labeling_paradigm": "unlabeled",
    }  # fmt: skip
    section["tensor_shape"] = section["tensor_shape"][:1] * dims
    values = {
        "modality": "rad", "num_epochs": 7, "batch_size": 2, "model_config": section,
        "data_preprocessing": {"train": {"resize": list(section["tensor_shape"])}},
        "compute": {"num_devices": 1},
    }  # fmt: skip
    for path, value in changed.items():
        place: Any = values
        *around, last = path.split("__")
        for name in around:
            place = place.setdefault(name, {})
        place[last] = value
    return values


def migrated(values: dict[str, Any], **settings: Any) -> Translation:
    text = reading.dump(values)
    parsed, lines = reading.parse(text, "old.yaml")
    return translated(parsed, lines, "old.yaml", **settings)


def refusals(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=r"old\.yaml cannot be migrated") as error:
        migrated(values)
    return "\n".join(error.value.faults)


def test_every_key_of_the_predecessor_is_known() -> None:
    tables = [(TOP, keys.TOP), (MODEL, keys.MODEL)]
    tables += [(listed, keys.ARCHITECTURE[name]) for name, listed in ARCHITECTURES.items()]
    counted: Counter[str] = Counter()
    for listed, table in tables:
        expected = {name: kind for kind, text in listed.items() for name in text.split()}
        assert {name: key.kind for name, key in table.items()} == expected
        counted.update(expected.values())
    assert counted == {"same": 25, "changed": 48, "none here": 7, "no effect": 42, "crashes": 8}
    assert counted.total() == 130
    said = [key for _, table in tables for key in table.values() if key.kind != "same"]
    assert all(key.text for key in said), "a reason, where it is not the same"


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_key_of_a_file_is_told_with_its_line(model: str) -> None:
    """A file with all keys that there are, and one that nobody knows."""
    values: dict[str, Any] = {"model_config": {"model_name": model}, "novel": 1}
    paths = [tuple("any" if part == "*" else part for part in path) for path in keys.keys_of(model)]
    deepest = [path for path in paths if not any(path == other[:-1] for other in paths)]
    for path in deepest:
        place = values
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place.setdefault(path[-1], 1)
    parsed, lines = reading.parse(reading.dump(values), "old.yaml")
    told = {one.key: one for one in outcomes(Project(parsed, lines))}
    for path in deepest:
        if path not in (("model_config",), ("model_config", "architecture")):
            assert f"{'.'.join(path)} (line {lines[path]})" in told
    assert told[f"novel (line {lines[('novel',)]})"].text == "GaNDLF-Synth never read it"
    assert {one.kind for one in told.values()} == {"same", "changed", "no effect", "refused"}
    assert all(one.text for one in told.values())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("model", ["ddpm", "vqvae", "dcgan"])
def test_the_new_config_loads_and_builds_the_model(model: str, dims: int, tmp_path: Path) -> None:
    translation = migrated(old(model, dims))
    path = tmp_path / "new.yaml"
    path.write_text(translation.text)
    settings = config.load(path)
    assert reading.read_yaml(path, ConfigError) == {"seed": 0, **translation.values}
    side = (64 if model == "dcgan" else 32,) * dims
    assert settings.data.size == side
    image = ImageSpec(
        size=side, channels=1, spacing_mm=(1.0, 1.0, 1.0), intensity_range=((0.0, 1.0),),
        affine=tuple(tuple(row) for row in torch.eye(4).tolist()), file_format="nii.gz",
    )  # fmt: skip
    assert settings.model.faults(image) == []
    with torch.device("meta"):
        assert sum(weight.numel() for weight in settings.model.build(image).parameters()) > 1000
    lines = translation.text.splitlines()
    values = [
        number for number, line in enumerate(lines) if line.startswith("  ") and "#" not in line
    ]
    assert all(lines[number - 1].lstrip().startswith("# ") for number in values), "a comment each"


def test_the_defaults_of_there_are_written_out() -> None:
    new = migrated(old("ddpm", batch_size=4, compute__num_devices=2, compute__num_nodes=3)).values
    assert new["training"] == {
        "max_epochs": 7, "batch_size": 24, "ema": None, "gradient_clip_norm": None,
        "sample_every_n_epochs": 0,
    }  # fmt: skip
    assert new["model"] == {
        "name": "ddpm", "channels": [32, 32], "num_res_blocks": 1, "num_head_channels": 8,
        "attention_from": 1, "num_norm_groups": 32, "attention_projection": False,
        "num_train_steps": 50, "schedule": "linear",
        "beta_start": 0.0001, "beta_end": 0.02, "prediction": "epsilon", "sampler": "ddpm",
        "variance": "fixed_small", "scheduler": None, "losses": [{"name": "mse"}],
        "optimizer": {"name": "adam", "lr": 0.0001, "weight_decay": 5e-5},
    }  # fmt: skip
    assert new["compute"] == {"num_devices": 2, "num_nodes": 3, "precision": "32"}
    assert new["data"] == {
        "preprocessing": [{"name": "resize", "target_shape": [32, 32, 1]}],
        "percentiles": [0.0, 100.0], "size": [32, 32], "validation_fraction": 0.0,
    }  # fmt: skip
    vqvae = migrated(old("vqvae", model_config__architecture={"num_residual_layers": 3})).values
    assert {
        "channels": [96, 96, 192], "num_res_layers": 3, "num_embeddings": 32, "embedding_dim": 64,
        "commitment_cost": 0.25, "codebook_decay": 0.5, "revive_below": 0.0,
    }.items() <= vqvae["model"].items()  # fmt: skip
    gan = migrated(old("dcgan")).values
    assert gan["training"]["sample_every_n_epochs"] == 10
    assert gan["training"]["num_sample_images"] == 4
    assert migrated(old("dcgan", 3)).values["training"]["sample_every_n_epochs"] == 0
    assert "weights start from N(0, 0.02) here" in migrated(old("dcgan")).text
    assert "scheduler" not in gan["model"], "it was never stepped, and none is the default"
    assert {
        "channels": [8, 16, 32, 64], "discriminator_channels": [8, 24, 72, 216],
        "latent_dim": 16, "negative_slope": 0.2, "adversarial_loss": "non_saturating",
        "smoothing": True,
        "optimizer": {"name": "adam", "lr": 0.0002, "betas": [0.0, 0.99], "weight_decay": 5e-5},
        "discriminator_optimizer": {"name": "sgd", "lr": 0.001, "momentum": 0.99,
                                    "nesterov": True, "weight_decay": 3e-5},
    }.items() <= gan["model"].items()  # fmt: skip


def test_modern_leaves_our_defaults_and_says_what_they_change() -> None:
    translation = migrated(old("ddpm"), modern=True)
    settings = config.build(translation.values)
    assert settings.training.ema
    assert settings.model.model_dump()["schedule"] == "cosine"
    assert settings.training.max_epochs == 7, "what the file says is kept"
    told = "\n".join(translation.left)
    assert 'model.schedule: "cosine" here, "linear" there: the noise schedule' in told
    assert 'training.ema: {"decay": 0.999} here, null there' in told
    assert "model.optimizer.weight_decay: none here, 5e-05 there: GaNDLF's default" in told
    assert "beta_start" not in told, "the same in both"
    assert all(f"# {line}" in translation.text for line in translation.left)
    assert not migrated(old("ddpm")).left


@pytest.mark.parametrize(
    ("model", "changed", "text"),
    [
        ("stylegan", {}, "another network here"),
        ("ddpm", {"model_config__model_name": "unet"}, "'unet' is none of ddpm, vqvae, dcgan"),
        ("ddpm", {"model_config__labeling_paradigm": "patient"}, "data.conditions"),
        ("ddpm", {"model_config__architecture__norm_eps": 1e-5}, "norm_eps (line 28): fixed"),
        ("ddpm", {"model_config__architecture__with_conditioning": True}, "TypeError"),
        ("ddpm", {"model_config__architecture__out_channels": 3}, "no loss fits"),
        ("ddpm", {"model_config__architecture__num_res_blocks": [1, 2]}, "have the same number"),
        ("ddpm", {"model_config__architecture__attention_levels": [True, False]}, "from the first"),
        ("ddpm", {"model_config__optimizers__name": "Adam"}, "did you mean adam?"),
        ("ddpm", {"model_config__optimizers": {"name": "adam"}}, "a learning rate is needed"),
        ("ddpm", {"model_config__losses__name": "plain_mean"}, "cannot work there either"),
        ("ddpm", {"model_config__schedulers": {"name": "exp"}}, "stops with a KeyError without"),
        ("ddpm", {"model_config__schedulers": {"type": "wcs"}}, "wcs: GaNDLF-Synth stops at it"),
        ("ddpm", {"model_config__schedulers": {"type": "step"}}, "a number above 0, not None"),
        ("ddpm", {"model_config__gradient_clip_val": 1.0,
                  "model_config__gradient_clip_algorithm": "value"}, "by their norm alone"),
        ("ddpm", {"data_postprocessing": {"cca": {}}}, "all four steps raised"),
        ("ddpm", {"data_preprocessing__val": {}}, "it differs from data_preprocessing.train"),
        ("ddpm", {"data_preprocessing__train__stain_normalizer": {}}, "a class of your own"),
        ("ddpm", {"data_augmentations__train": {"hed_transform": {}}}, "a class of your own"),
        ("ddpm", {"data_augmentations__train": {"flip": {}}}, "`probability` is not given"),
        ("ddpm", {"data_augmentations__train": {"noise": {"std": 1, "probability": 1}}}, "units"),
        ("ddpm", {"dataloader_config": {"train": {"batch_size": 3}}}, "TypeError"),
        ("ddpm", {"early_stopping_config": {"monitor_value": "ssim"}}, "'ssim' is not logged"),
        ("ddpm", {"modality": "ct"}, "knows rad and histo"),
        ("ddpm", {"batch_size": 0}, "1 or more is needed, not 0"),
        ("ddpm", {"compute": [1]}, "a mapping of keys is needed"),
        ("ddpm", {"compute__num_devices": "many"}, "no number of devices"),
        ("ddpm", {"compute__precision": "8"}, "it would become compute.precision"),
        ("ddpm", {"inference_parameters": {"n_images_to_generate": {0: 5}}}, "did not exist there"),
        ("vqvae", {"model_config__architecture__dropout": 0.1}, "no dropout"),
        ("vqvae", {"model_config__architecture__num_residual_channels": [8, 8]}, "here they are"),
        ("vqvae", {"model_config__architecture__num_residual_layers": 3}, "the number of levels"),
        ("dcgan", {"model_config__losses__generator__name": "mse"}, "give both the same"),
        ("dcgan", {"model_config__losses__generator__name": "l1"}, "no counterpart"),
        ("dcgan", {"model_config__tensor_shape": [72, 72],
                   "data_preprocessing": {}}, "multiples of 16"),
        ("dcgan", {"model_config__accumulate_grad_batches": 2}, "itself stops at it with a GAN"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_same_is_refused(model: str, changed: Any, text: str) -> None:
    assert text in refusals(old(model, **changed))


def test_every_fault_is_told_at_once_and_harmless_values_are_none() -> None:
    told = refusals(old("ddpm", batch_size=0, modality="ct", model_config__tensor_shape=[3]))
    assert {"batch_size", "modality", "model_config.tensor_shape"} == {
        line.partition(" ")[0] for line in told.splitlines()
    }
    values = old("ddpm", metrics=["ssim"], model_config__architecture__norm_eps=1e-6, bach_size=3)
    said = {one.key.partition(" ")[0]: (one.kind, one.text) for one in migrated(values).outcomes}
    assert said["metrics"][0] == "changed"
    assert said["model_config.architecture.norm_eps"][0] == "no effect"
    assert said["bach_size"] == (
        "no effect",
        "GaNDLF-Synth never read it; did you mean batch_size?",
    )
    assert said["model_config.optimizers.name"] == ("same", "model.optimizer.name")


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_builds_with_the_defaults_of_gandlf(name: str) -> None:
    section = {"name": name, "lr": 0.01, "betos": 3}
    translation = migrated(old("ddpm", model_config__optimizers=section))
    built = config.build(translation.values).model.optimizer
    optimizer = built.build([torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    expected = {"adam": 5e-5, "adamax": 5e-5, "adamw": 5e-5, "rprop": None, "ademamix": 0}
    assert group.get("weight_decay") == expected.get(name, 3e-5)
    assert group["lr"] == 0.01
    wrong = [one for one in translation.outcomes if "betos" in one.key]
    assert [one.kind for one in wrong] == ["no effect"]


def rates(section: Any, lr: float, epochs: int) -> list[float]:
    values = migrated(old("ddpm", model_config__schedulers=section,
                          model_config__optimizers={"name": "sgd", "lr": lr})).values  # fmt: skip
    model = config.build(values).model
    optimizer = model.optimizer.build([torch.nn.Parameter(torch.zeros(1))])
    assert model.scheduler
    built = model.scheduler.build(optimizer, 1000, epochs)
    assert built["interval"] == "epoch"
    keys = []
    for _ in range(epochs):
        keys.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built["scheduler"].step()
    return keys


def test_schedules_have_the_rates_of_there() -> None:
    falling = rates({"type": "triangle", "step_size": 4, "min_lr": 0.5, "max_lr": 2}, 0.1, 9)
    assert falling == pytest.approx([0.2, 0.1625, 0.125, 0.0875, 0.05, 0.0875, 0.125, 0.1625, 0.2])
    whole = rates({"type": "triangle_modified", "step_size": 4}, 0.1, 5)
    assert whole == pytest.approx([0.1, 0.05005, 0.0001, 0.05005, 0.1])
    assert rates("exp", 0.1, 3) == pytest.approx([0.1, 0.01, 0.001])
    assert rates({"type": "exponential", "gamma": 0.5}, 1.0, 3) == [1.0, 0.5, 0.25]
    assert rates({"type": "step", "step_size": 2}, 1.0, 4) == pytest.approx([1, 1, 0.1, 0.1])
    risen = rates({"type": "cosineannealing", "T_0": 2}, 0.0005, 3)
    assert risen == pytest.approx([0.0005, 0.00075, 0.0005]), "up to min_lr, 0.001"


def test_transforms_of_preprocessing_mean_what_they_did() -> None:
    steps = {
        "to_canonical": None, "resample": {"resolution": [2, 2, 1]}, "crop": [1, 1, 0],
        "threshold": {"min": 5, "max": 90}, "clip": {"min": 0, "max": 50}, "centercrop": [32, 32],
        "normalize": None, "normalize_positive": None, "rgba_to_rgb": None, "resiz": [3],
    }  # fmt: skip
    translation = migrated(old("ddpm", data_preprocessing={"train": steps, "val": steps}))
    assert translation.values["data"]["preprocessing"] == [
        {"name": "resample", "target": [2.0, 2.0, 1.0]},
        {"name": "crop", "cropping": [1, 1, 0]},
        {"name": "threshold", "threshold": 90.0, "above": False},
        {"name": "threshold", "threshold": 5.0},
        {"name": "clip", "out_min": 0.0, "out_max": 50.0},
        {"name": "centercrop", "target_shape": [32, 32, 1]},
    ]
    said = {one.key.split(".")[-1].split(" ")[0]: one for one in translation.outcomes}
    assert said["resiz"].text.endswith("did you mean resize?")
    assert said["normalize_positive"].kind == "no effect"
    assert said["normalize"].kind == "changed"
    ranges: list[tuple[Any, Any]] = [
        ({"clip": {"min": -100, "max": 300}}, {"intensity_range": [-100.0, 300.0]}),
        ({"normalize_div_by_255": None}, {"intensity_range": [-255.0, 255.0]}),
        ({"normalize_standardize": None}, {"intensity_range": [0.0, 255.0]}),
        ({"rescale": None}, {"percentiles": [0.0, 100.0]}),
        ({"rescale": {"in_min_max": [0, 9], "percentiles": [1, 99]}},
         {"intensity_range": [-9.0, 9.0], "percentiles": [1.0, 99.0]}),
        ({"rescale": {"in_min_max": [10, 20], "out_min_max": [-0.5, 0.5]}},
         {"intensity_range": [5.0, 25.0], "percentiles": [0.0, 100.0]}),
    ]  # fmt: skip
    for train, expected in ranges:
        data = migrated(old("ddpm", data_preprocessing={"train": train})).values["data"]
        assert data == {**expected, "size": [32, 32], "validation_fraction": 0.0}


def test_a_vqvae_sees_the_intensities_of_there() -> None:
    for train, seen, weight in (
        ({"clip": {"min": 0, "max": 255}}, [0.0, 255.0], 127.5**2),
        ({"rescale": None}, [0.0, 1.0], 0.25),
    ):
        values = old("vqvae", data_preprocessing={"train": train})
        model = migrated(values).values["model"]
        assert model["network_range"] == seen
        assert model["losses"] == [{"name": "mse", "weight": weight}]
        modern = migrated(values, modern=True).values["model"]
        assert "network_range" not in modern
        assert modern["losses"] == [{"name": "mse"}]
    assert "network_range" not in migrated(old("vqvae")).values["model"], "nobody knows"


def test_augmentation_is_in_units_of_here() -> None:
    train = {
        "flip": {"axis": [0, 1], "probability": 0.5},
        "rotate_90": {"axis": 3, "probability": 0.5},
        "noise": {"mean": 0, "std": [0, 10], "probability": 1},
        "noise_var": {"mean": 0, "std": None, "probability": 0.25},
        "elastic": {"patch_size": [20, 30, 1], "probability": 1},
        "motion": {"degrees": 5, "interpolation": "linear", "other": 1, "probability": 1},
        "anisotropic": {"axis": [1], "downsampling": 2, "probability": 1},
    }  # fmt: skip
    scaled = {"train": {"clip": {"min": 0, "max": 100}}}
    translation = migrated(
        old("ddpm", data_augmentations={"train": train, "val": train}, data_preprocessing=scaled)
    )
    assert translation.values["data"]["augmentation"] == [
        {"name": "flip", "axes": [0, 1], "p": 0.5},
        {"name": "rotate_90", "axis": 2, "p": 0.5},
        {"name": "noise", "mean": 0.0, "std": [0.0, 0.2], "p": 1.0},
        {"name": "noise_var", "std": [0.0, 0.015], "p": 0.25},
        {"name": "elastic", "num_control_points": [20, 30, 5], "locked_borders": 2,
         "max_displacement": [2.0, 3.0, 0.1], "p": 1.0},
        {"name": "motion", "degrees": 5, "image_interpolation": "linear", "p": 1.0},
        {"name": "anisotropic", "axes": [1], "downsampling": 2, "p": 1.0},
    ]  # fmt: skip
    kinds = {one.key.partition(" ")[0]: one.kind for one in translation.outcomes}
    assert kinds["data_augmentations.val"] == "no effect"
    assert kinds["data_augmentations.train.motion.other"] == "no effect"
    assert len(transforms.AUGMENTATIONS) == 16


def test_numbers_are_of_the_whole_training() -> None:
    values = old(
        "vqvae", save_model_every_n_epochs=3, compute__num_devices=[0, 2], compute__precision=16,
        early_stopping_config={"monitor_value": "reconstruction_loss", "monitor_mode": "min",
                               "patience": 10},
        inference_parameters={"batch_size": 3, "n_images_to_generate": 12},
    )  # fmt: skip
    new = migrated(values).values
    assert new["training"]["early_stop"] == {
        "metric": "train/reconstruction", "mode": "min", "patience": 4,
    }  # fmt: skip
    assert (new["training"]["batch_size"], new["training"]["validate_every_n_epochs"]) == (4, 3)
    assert new["compute"] == {"num_devices": 2, "precision": "16"}
    assert new["sampling"] == {"batch_size": 3, "num_images": 12}
    few = migrated(old("ddpm", model_config__architecture__num_eval_timesteps=10)).values["model"]
    assert (few["sampler"], few["num_sampling_steps"]) == ("ddim", 10)
    none = migrated(old("ddpm", model_config__architecture__num_train_timesteps=1)).values["model"]
    assert none["num_train_steps"] == 1000
    auto = migrated(old("ddpm", compute={"num_devices": "auto"}))
    assert "with several GPUs write that number times theirs" in auto.text


def old_project(folder: Path) -> tuple[Path, Path]:
    """An old YAML and its list of 12 images, with relative paths and channels from 1."""
    manifest = write_phantoms(folder / "phantoms", num=12, size=(32, 32))
    images = sorted(path for path in manifest.parent.rglob("*.png"))
    lines = ["Channel_2,Channel_1,Label,LabelMapping"]
    for number, image in enumerate(images):
        subject = folder / "raw" / f"p{number}"
        subject.mkdir(parents=True)
        for name in ("t1", "t2"):
            Image.open(image).save(subject / f"{name}.png")
        lines.append(f"raw/p{number}/t2.png,raw/p{number}/t1.png,{number},p{number}")
    (folder / "old.csv").write_text("\n".join(lines) + "\n")
    (folder / "old.yaml").write_text(reading.dump(old("vqvae", num_epochs=1)))
    return folder / "old.yaml", folder / "old.csv"


def test_a_project_is_migrated_checked_and_kept(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml_file, csv_file = old_project(tmp_path)
    before = (yaml_file.read_bytes(), csv_file.read_bytes())
    command = ("migrate", yaml_file, "-o", "to/new.yaml", "--csv", csv_file)
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert "batch_size (line 3): training.batch_size: 2: 2 of each process" in out
    assert "0 keys refused" in out
    assert "Channel_2, Channel_1 are counted from 0, in this order, as in training" in out
    assert "Next: synthcube check -c to/new.yaml -d to/new.csv" in out
    rows = (tmp_path / "to/new.csv").read_text().splitlines()
    assert rows[0] == "SubjectID,Channel_0,Channel_1"
    assert f"p3,{tmp_path}/raw/p3/t2.png,{tmp_path}/raw/p3/t1.png" in rows
    assert (yaml_file.read_bytes(), csv_file.read_bytes()) == before
    code, out, err = cli("check", "-c", "to/new.yaml", "-d", "to/new.csv")
    assert code == 0, err
    assert "size: 32 x 32, 2 channel(s)" in out
    assert "no validation images" in out
    assert cli(*command)[0] == 0, "what it wrote itself is written again"
    assert cli(*command, "--modern")[0] == 0
    edited = (tmp_path / "to/new.yaml").read_text() + "# mine\n"
    (tmp_path / "to/new.yaml").write_text(edited)
    code, out, err = cli(*command)
    assert code == 2
    assert "to/new.yaml is there, and is not what this command would write" in err
    assert (tmp_path / "to/new.yaml").read_text() == edited


def test_an_old_file_is_recognised_and_nothing_is_half_written(
    cli: Any, tmp_path: Path, phantoms: Path
) -> None:
    old_file, csv_file = tmp_path / "old one.yaml", tmp_path / "old.csv"
    old_file.write_text(reading.dump(old("stylegan")))
    told = f"synthcube migrate '{old_file}' -o NEW.yaml"
    for words in (("check",), ("train", "-o", tmp_path / "run")):
        code, _, err = cli(*words, "-c", old_file, "-d", phantoms)
        assert code == 2
        assert told in err
    csv_file.write_text("Channel_0,Label\na.png,masks/a.png\n,1\n")
    code, out, err = cli("migrate", old_file, "-o", tmp_path / "new.yaml", "--csv", csv_file)
    assert (code, out) == (2, "")
    assert "model_config.model_name (line" in err
    assert "another network here" in err
    assert "row 2, column Label: 'masks/a.png' is a path" in err
    assert "row 3, column Channel_0: the cell is empty" in err
    for output in (old_file, csv_file.with_suffix(".yaml")):
        assert cli("migrate", old_file, "-o", output, "--csv", csv_file)[0] == 2
    assert not (tmp_path / "new.yaml").exists()
    assert cli("migrate", csv_file, "-o", tmp_path / "new.yaml")[0] == 2
    old_file.write_text("training: {}\n")
    assert "no config of GaNDLF-Synth" in cli("migrate", old_file, "-o", tmp_path / "n.yaml")[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Channel_0\n/d/s1/a/x.png\n/d/s1/b/x.png\n/d/s2/a/x.png\n", ["s1", "s1", "s2"]),
        ("Channel_0,Label,LabelMapping\n/d/ill/s1/x.png,0,ill\n/d/well/s2/x.png,1,well\n",
         ["s1", "s2"]),
        ("SubjectID,Channel_0\nq,/d/x.png\nr,/d/y.png\n", ["q", "r"]),
        ("Channel_0\n/d/x.png\n/d/y.png\n", ["row-0", "row-1"]),
    ],
)  # fmt: skip
def test_the_subject_is_the_folder_of_a_patient(
    text: str, expected: list[str], tmp_path: Path
) -> None:
    from synthcube.data.tables import read_table
    from synthcube.migration import rows

    path = tmp_path / "old.csv"
    path.write_text(text)
    new = rows.translated(path, read_table(path), tmp_path)
    assert [row["SubjectID"] for row in new.rows] == expected
    assert ("Label" in new.rows[0]) == ("ill" in text)
    assert bool(new.changes) == ("SubjectID" not in text)


def test_volumes_that_are_turned_are_told_of(cli: Any, tmp_path: Path) -> None:
    turned = {"RAS": [0, 1, 2], "LPS": [0, 1, 2], "PIR": [1, 2, 0]}
    lines = ["Channel_0"]
    for axes, order in turned.items():
        signs = [1 if axis in "RAS" else -1 for axis in axes]
        affine = np.zeros((4, 4))
        affine[order, range(3)], affine[3, 3] = signs, 1
        assert "".join(nib.orientations.aff2axcodes(affine)) == axes
        path = tmp_path / axes / "a.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), "i2"), affine), path)
        lines.append(str(path))
    (tmp_path / "old.csv").write_text("\n".join([*lines, str(tmp_path / "gone.nii.gz")]))
    (tmp_path / "old.yaml").write_text(reading.dump(old("vqvae", 3)))
    words = ("migrate", tmp_path / "old.yaml", "-o", tmp_path / "new.yaml")
    code, out, err = cli(*words, "--csv", tmp_path / "old.csv")
    assert code == 0, err
    assert "1 of 3 volumes are stored as LPS, and turned to RAS: they are mirrored here" in out
    assert "1 of 3 volumes are stored as PIR, and turned to RAS: data.size is in the order" in out
    assert "along the axes of RAS+" in (tmp_path / "new.yaml").read_text()


REPEATED = """
modality: rad
batch_size: &size 2
num_epochs: 7
compute: {num_devices: 1}
data_preprocessing:
  train: &steps
    resize: [32, 32]
    rescale: {in_min_max: [0, 255], out_min_max: [-1, 1]}
  val: *steps
  test: {<<: *steps}
dataloader_config:
  train: &loader {num_workers: 0, pin_memory: yes}
  validation: {<<: *loader, shuffle: off}
inference_parameters: {batch_size: *size, n_images_to_generate: 4}
model_config:
  model_name: ddpm
  n_dimensions: 2
  n_channels: 1
  tensor_shape: [32, 32]
  losses: {name: mse}
  optimizers: {name: adam, lr: 0.0001}
  architecture: {num_channels: [32, 32], num_res_blocks: 1, attention_levels: [no, yes]}
"""


def test_anchors_aliases_and_merge_keys_of_old_files_are_read(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(REPEATED)
    assert reading.parse(REPEATED, "f", as_pyyaml=True)[0] == yaml.safe_load(REPEATED)
    code, out, err = cli("migrate", path, "-o", tmp_path / "new.yaml")
    assert code == 0, err
    assert "data_preprocessing.val (line 10)" in out
    new = config.load(tmp_path / "new.yaml")
    assert new.data.intensity_range == (0, 255)
    assert new.model.model_dump()["attention_from"] == 1
    read_by_import = gandlf_config.read(path)
    assert read_by_import
    assert read_by_import.values["model"]["attention_from"] == 1
    for words in (("check",), ("train", "-o", tmp_path / "run")):
        code, _, err = cli(*words, "-c", path, "-d", tmp_path)
        assert code == 2
        assert f"synthcube migrate {path} -o NEW.yaml" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [z]\n" + "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 9)}]\n"
                                 for i in range(1, 12)).replace("*b0", "*a"), "more than 10000"),
        ("a: &a [1]\nb: [" + "*a, " * 6000 + "]\n", "line 2: aliases stand for more than 10000"),
        ("a: &a {b: *a}", r"line 1: \*a stands for nothing above it"),
        ("a: *b", r"\*b stands for nothing above it"),
        ("<<: 3", "a merge key .* needs a mapping"),
        ("a: &a [" * 15 + "1" + "]" * 15 + "\n" + "b: [[[[[[[[*a]]]]]]]]", "more than 20 deep"),
    ],
)  # fmt: skip
def test_aliases_have_a_bound(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reading.parse(text, "old.yaml", as_pyyaml=True)


def test_merge_keys_give_way_as_in_pyyaml() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {z: 3, <<: [*a, *b], w: 3}\nd: {<<: *a}\n"
    value, lines = reading.parse(text, "f", as_pyyaml=True)
    assert value == yaml.safe_load(text)
    assert list(value["c"]) == list(yaml.safe_load(text)["c"]), "the order counts for transforms"
    assert lines["c", "x"] == 3
    value["d"]["x"] = 9
    assert value["a"]["x"] == 1, "a copy"


ODD: tuple[Any, ...] = (None, [], {}, "x", -1, 0, True, [1], 2**63, {"a": 1}, float("inf"), [[0]])


@pytest.mark.parametrize("model", ["ddpm", "vqvae", "dcgan"])
def test_odd_values_are_faults_and_never_crash(model: str) -> None:
    extra: dict[str, Any] = {
        "schedulers": {"type": "triangle_modified", "step_size": 2},
        "early_stopping_config": {"monitor_value": "loss", "patience": 2},
        "train": {"resize": [32, 32], "clip": {"min": 0, "max": 4}, "crop": [1, 1, 1],
                  "rescale": {"out_min_max": [0, 1]}},
        "augmented": {"elastic": {"patch_size": [8, 8], "probability": 1},
                      "noise": {"std": 1, "mean": 0, "probability": 1},
                      "swap": {"patch_size": [4, 4], "probability": 1},
                      "rotate_90": {"axis": 1, "probability": 1}},
    }  # fmt: skip
    values = old(
        model, data_preprocessing={"train": extra["train"]}, save_model_every_n_epochs=2,
        data_augmentations={"train": extra["augmented"]}, model_config__n_dimensions=2,
        early_stopping_config=extra["early_stopping_config"], metrics=["a"],
        model_config__schedulers=extra["schedulers"], inference_parameters={"batch_size": 1},
        dataloader_config={"train": {"num_workers": 0}}, compute={"strategy": "ddp"},
    )  # fmt: skip
    _, lines = reading.parse(reading.dump(values), "old.yaml")
    places = [place for place in lines if place and isinstance(place[-1], str)]
    refused = 0
    for turn, place in enumerate(places):
        for odd in ODD[turn % 3 :: 3]:  # each place a third of them
            changed = deepcopy(values)
            around: Any = changed
            for name in place[:-1]:
                around = around[name]
            around[place[-1]] = odd
            try:
                translated(changed, lines, "old.yaml")
            except ConfigError:
                refused += 1
    assert refused > len(places)
