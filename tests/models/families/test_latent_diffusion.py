"""Two stages: what is kept of the first one, and that nothing changes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from synthcube import config
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ArtifactError, ConfigError, SynthCubeError
from synthcube.models import artifact
from synthcube.models.families.latent_diffusion import DiffusionObjective, LatentDiffusionConfig
from synthcube.schema import Batch, ConditionSpec, ImageSpec
from synthcube.tasks.check import check
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train
from synthcube.training import checkpoints

AGE = ConditionSpec(name="Age", kind="number", low=0, high=1)


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> DataModule:
    return DataModule(
        read_manifest(phantoms), config.build({}).data, batch_size=5, seed=0, cache=tmp_path / "c"
    )


@pytest.fixture
def resolved(first_stage) -> LatentDiffusionConfig:
    path = str(first_stage("autoencoder_kl"))
    return LatentDiffusionConfig.tiny().model_copy(update={"first_stage": path}).resolved()


def begun(settings: LatentDiffusionConfig, data: DataModule) -> Any:
    family = settings.build(data.image)
    family.fit_statistics(data.every_image(), data.rows("train"))
    return family.train()


def first_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def test_latents_are_made_once_and_are_those_of_each_image(resolved, data: DataModule) -> None:
    family = begun(resolved, data)
    trained = artifact.load(Path(resolved.first_stage)).build(torch.device("cpu"))
    batch = data.examples([3, 0, 7])
    expected = trained.encode(batch["image"])
    torch.testing.assert_close(family.compressed(batch), expected, rtol=0, atol=1e-6)
    other = Batch(**{**batch, "image": -batch["image"]})
    assert torch.equal(family.compressed(other), family.compressed(batch)), "by their index"
    augmented = Batch(**{**other, "augmented": True})
    torch.testing.assert_close(family.compressed(augmented), trained.encode(other["image"]))


def test_training_latents_have_mean_0_and_spread_1(resolved, data: DataModule) -> None:
    family = begun(resolved, data)
    latents = family.normalised(family.compressed(data.examples(data.rows("train"))))
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, rel=1e-5)
    with_others = family.normalised(family.compressed(data.examples(range(12))))
    assert abs(with_others.std().item() - 1) > 1e-4, "validation images are not measured"


def test_sampling_undoes_the_scaling(
    resolved, data: DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that gives the latents of real images gives those images as autoencoded."""
    family = begun(resolved, data)
    images = data.examples([0, 1])["image"]
    latents = family.normalised(family.compress(images))
    monkeypatch.setattr("synthcube.models.samplers.integrate", lambda *_: latents)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    generated = family.sample(generators, data.examples([0, 1])["condition"])
    expected = family.first_stage.family.reconstruct(images)
    torch.testing.assert_close(generated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augmentation", ["[]", "[{name: RandomFlip, axes: [0]}]"])
def test_training_leaves_the_first_stage_bit_identical(
    augmentation: str, tiny_config, first_stage, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    before = first_weights(first_stage("autoencoder_kl"))
    train(
        tiny_config("latent_diffusion"), phantoms, run,
        overrides=[f"data.augmentation={augmentation}"],
    )  # fmt: skip
    for path in (run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt"):
        content = checkpoints.load(path)
        for state in ("state_dict", "current_model_state"):
            for name, value in before.items():
                kept = content[state][f"first_stage.family.{name}"]
                assert torch.equal(kept, value), f"{path.name} {state} {name}"
        ours, theirs = (
            content[state]["first_stage.family." + next(iter(before))]
            for state in ("state_dict", "current_model_state")
        )
        assert ours.data_ptr() == theirs.data_ptr(), "it is saved once"
        optimizer = content["optimizer_states"][0]["param_groups"]
        averaged = content["state_dict"]
        trained = [name for name in averaged if name.startswith("network.")]
        assert sum(len(group["params"]) for group in optimizer) == len(trained)


def test_the_artifact_needs_no_first_stage(
    tiny_config, first_stage, phantoms: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(first_stage("autoencoder_kl"), tmp_path / "first")
    run = tmp_path / "run"
    train(tiny_config("latent_diffusion"), phantoms, run, overrides=[f"model.first_stage={first}"])
    infer(InferRequest(run, tmp_path / "one", num_images=2))
    shutil.rmtree(first)
    infer(InferRequest(run, tmp_path / "other", num_images=2))
    one, other = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / name / "images").iterdir())]
        for name in ("one", "other")
    )
    assert len(one) == 2
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ArtifactError, match="there is no such folder"):
        train(tiny_config("latent_diffusion"), phantoms, tmp_path / "again",
              overrides=[f"model.first_stage={first}"])  # fmt: skip


def test_another_first_stage_does_not_continue_a_run(
    tiny_config, first_stage, phantoms: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    path = tiny_config("latent_diffusion")
    train(path, phantoms, run)
    shutil.copytree(first_stage("autoencoder_kl"), moved)
    train(path, phantoms, run, overrides=[f"model.first_stage={moved}", "training.max_epochs=3"])
    other = tmp_path / "other"
    train(tiny_config("autoencoder_kl", "first.yaml"), phantoms, other, overrides=["seed=7"])
    with pytest.raises(ConfigError, match="trained with another config") as caught:
        train(path, phantoms, run, overrides=[f"model.first_stage={other}"])
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "model.first_stage_sha256"
    ]


def test_a_recorded_hash_must_be_met(resolved) -> None:
    assert resolved.first_stage_sha256.startswith("tensors:")
    assert resolved.resolved() == resolved
    wrong = resolved.model_copy(update={"first_stage_sha256": "0" * 64})
    with pytest.raises(ConfigError, match=r"and model\.first_stage_sha256 is 0000"):
        wrong.resolved()


def test_what_cannot_be_a_first_stage_is_explained(
    tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    path = tiny_config("latent_diffusion")
    none = ["model.first_stage=''"]
    with pytest.raises(ConfigError, match="a trained autoencoder_kl is needed"):
        train(path, phantoms, tmp_path / "a", overrides=none)
    with pytest.raises(ConfigError, match="a trained autoencoder_kl is needed"):
        check(path, phantoms, overrides=none)
    assert not (tmp_path / "a").exists()
    train(tiny_config("rectified_flow", "flow.yaml"), phantoms, tmp_path / "flow")
    with pytest.raises(ConfigError, match="this is a trained rectified_flow; latent_diffusion"):
        train(path, phantoms, tmp_path / "b", overrides=[f"model.first_stage={tmp_path / 'flow'}"])
    with pytest.raises(SynthCubeError, match="first_stage"):
        check(path, tmp_path / "nowhere", overrides=["model.first_stage=''"])


def test_images_that_do_not_fit_are_explained(resolved, data: DataModule) -> None:
    image = data.image

    def fault(settings: LatentDiffusionConfig, **changed: Any) -> str:
        (fault,) = settings.faults(image.model_copy(update=changed))
        return fault

    assert resolved.faults(image) == []
    assert "was trained on images of [16, 16]" in fault(resolved, size=(32, 32))
    assert "trained on 1" in fault(resolved, channels=3)
    assert "makes images out of noise alone" in fault(resolved, source_channels=(0,))
    deep = resolved.model_copy(update={"channels": (8,) * 5})
    assert fault(deep).startswith(
        "latents of data.size [16, 16] [8, 8]: every side must be a multiple of 16"
    )
    wide = resolved.objective.model_validate({"losses": [{"name": "SSIMLoss"}]})
    unfit = resolved.model_copy(update={"objective": wide})
    assert fault(unfit).startswith("model.objective.losses: SSIMLoss cannot compare")


@pytest.mark.parametrize(
    "objective",
    [
        "{name: diffusion, sampler: ddpm, num_train_steps: 20, variance: learned}",
        "{name: diffusion, min_snr_gamma: 5, num_sampling_steps: 3, losses: [{name: l1}]}",
        "{name: flow, sampler: heun, num_sampling_steps: 2}",
    ],
)
def test_every_process_trains_and_samples(
    objective: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(
        tiny_config("latent_diffusion"), phantoms, run,
        overrides=[f"model.objective={objective}", "training.max_epochs=1"],
    )  # fmt: skip
    infer(InferRequest(run, tmp_path / "out", num_images=1))
    saved = yaml.safe_load((run / "artifact" / "config.yaml").read_text())["model"]
    assert saved["first_stage_config"]["name"] == "autoencoder_kl"
    assert saved["first_stage_image"]["size"] == [16, 16]


def test_keys_of_the_other_process_are_refused() -> None:
    model = {"name": "latent_diffusion", "objective": {"name": "flow", "schedule": "cosine"}}
    with pytest.raises(ConfigError) as caught:
        config.build({"model": model})
    assert caught.value.faults[0].startswith("model.objective.schedule: unknown key; known: ")
    assert "time_mean" in caught.value.faults[0]


def test_latents_are_not_clipped_while_they_are_drawn() -> None:
    """The exact denoiser of latents spread beyond [-1, 1] keeps their spread."""
    objective = DiffusionObjective(sampler="ddpm", prediction="x_0")
    process = objective.process(2, bounded=False)
    kept = process.noise_schedule.alphas_cumprod

    def exact(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        signal, noise = kept[time.long()].sqrt(), (1 - kept[time.long()]).sqrt()
        signal, noise = signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)
        return 4 * signal * x_t / (4 * signal**2 + noise**2)

    generator = torch.Generator().manual_seed(0)
    noise_only = torch.randn(1, 1, 100, 100, generator=generator)
    generated = objective.draw(exact, noise_only, [generator], bounded=False)
    assert generated.std().item() == pytest.approx(2, rel=0.04)


def test_meta_shapes_need_no_weights() -> None:
    image = ImageSpec(
        size=(16, 16, 16), channels=1, spacing_mm=(1, 1, 1),
        affine=((1.0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        intensity_range=((0.0, 1.0),), file_format="nii.gz", conditions=(AGE,),
    )  # fmt: skip
    family = LatentDiffusionConfig.tiny().build(image)
    assert family.latent.size == (8, 8, 8)
    assert family.latent.channels == 2
    assert len(family.first_stage.family.image.conditions) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "first_epochs"),
    # Blurred codes cost samples of code_prior 15% of their contrast after 15 epochs, 6% after 50.
    [("latent_diffusion", 15), ("code_prior", 50)],
)
def test_samples_resemble_the_data(
    family: str, first_epochs: int, tiny_config, tmp_path: Path
) -> None:
    """Mean and spread over all voxels, and how bright the brightest are, as of the phantoms."""
    from synthcube.data.phantom import write_phantoms
    from synthcube.models import registry

    images = write_phantoms(tmp_path / "data", num=400, size=(16, 16)).parent
    common = ["training.batch_size=16", "training.sample_every_n_epochs=0",
              "training.ema.decay=0.98", "training.validate_every_n_epochs=10",
              "training.log_every_n_steps=1000", "model.optimizer.lr=0.004"]  # fmt: skip
    first = registry.find(family).needs
    wider = {
        "autoencoder_kl": ["model.channels=[16,32]"],
        "vqvae": ["model.channels=[16,32]", "model.num_embeddings=32", "model.embedding_dim=8"],
        "latent_diffusion": ["model.channels=[32,32]", "model.objective.num_sampling_steps=20"],
        "code_prior": ["model.dim=32", "model.num_layers=2", "model.temperature=1.0"],
    }
    for name, run, epochs in ((first, "first", first_epochs), (family, "second", 30)):
        place = [f"model.first_stage={tmp_path / 'first'}"] if run == "second" else []
        train(
            tiny_config(name, f"{run}.yaml"), images, tmp_path / run,
            overrides=[*common, *wider[name], *place, f"training.max_epochs={epochs}"],
        )  # fmt: skip
    infer(InferRequest(tmp_path / "second", tmp_path / "out", num_images=64))
    real, generated = (
        np.stack([np.asarray(Image.open(path).convert("L")) / 255.0 for path in paths])
        for paths in (images.glob("*.png"), (tmp_path / "out" / "images").glob("*.png"))
    )
    assert generated.mean() == pytest.approx(real.mean(), rel=0.15)
    assert generated.std() == pytest.approx(real.std(), rel=0.15)
    assert np.median(generated.max(axis=(1, 2))) == pytest.approx(
        np.median(real.max(axis=(1, 2))), rel=0.15
    )
    share, shown = ((images > 0.4).mean(axis=(1, 2)) for images in (real, generated))
    assert shown.std() == pytest.approx(share.std(), rel=0.4), "small shapes and large ones"
