"""Old weights: the imported model computes what monai-generative does, or there is none."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from generative.networks.nets import (
    VQVAE,
    AutoencoderKL,
    ControlNet,
    DiffusionModelUNet,
    MultiScalePatchDiscriminator,
    PatchDiscriminator,
)

from synthcube.models import artifact, legacy

UNET = {"channels": [8, 16], "num_res_blocks": 1, "attention_from": 1, "num_head_channels": 4,
        "num_norm_groups": 4, "num_sampling_steps": 3, "schedule": "linear",
        "prediction": "epsilon"}  # fmt: skip
VQ = {"channels": [8, 8], "num_res_layers": 1, "num_embeddings": 8, "embedding_dim": 4}
IDENTITY = ((2, 4, 1, 1), (2, 4, 1, 1, 0))


def scrambled(network: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    return network.eval()


def old_unet(rank: int) -> torch.nn.Module:
    return scrambled(DiffusionModelUNet(
        spatial_dims=rank, in_channels=1, out_channels=1, num_channels=(8, 16), num_res_blocks=1,
        attention_levels=(False, True), norm_num_groups=4, num_head_channels=(4, 4),
    ))  # fmt: skip


def old_vqvae(rank: int) -> torch.nn.Module:
    down, up = IDENTITY
    return scrambled(VQVAE(
        spatial_dims=rank, in_channels=1, out_channels=1, num_channels=(8, 8), num_res_layers=1,
        num_res_channels=(8, 8), downsample_parameters=(down, down), upsample_parameters=(up, up),
        num_embeddings=8, embedding_dim=4,
    ))  # fmt: skip


def old_autoencoder(rank: int) -> torch.nn.Module:
    return scrambled(AutoencoderKL(
        spatial_dims=rank, in_channels=1, out_channels=1, num_res_blocks=(1, 1),
        num_channels=(8, 16), attention_levels=(False, True), latent_channels=2, norm_num_groups=4,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    ))  # fmt: skip


KL = {"channels": [8, 16], "attention_from": 1, "latent_channels": 2, "num_norm_groups": 4}
OLD = {"ddpm": (old_unet, UNET), "vqvae": (old_vqvae, VQ), "autoencoder_kl": (old_autoencoder, KL)}


@pytest.fixture
def config(tmp_path: Path):
    def write(family: str, rank: int = 2, **changed: object) -> Path:
        path = tmp_path / f"{family}.yaml"
        section = {"name": family, **OLD[family][1], **changed}
        path.write_text(yaml.safe_dump({"model": section, "data": {"size": [16] * rank}}))
        return path

    return write


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("family", OLD)
def test_an_imported_model_computes_what_the_old_one_did(
    cli, family: str, rank: int, config, tmp_path: Path
) -> None:
    network = OLD[family][0](rank)
    torch.save(network.state_dict(), tmp_path / "old.pt")
    code, out, err = cli(
        "import", tmp_path / "old.pt", "--family", family, "-c", config(family, rank),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, err
    assert str(tmp_path / "model") in out
    assert "Same output as monai-generative within" in err
    family_module = artifact.load(tmp_path / "model").build(torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        ours, theirs = family_module.outputs_of(network, generator)
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    unused = {line.removeprefix("Not used: ") for line in err.splitlines() if "Not used" in line}
    assert unused == {name for name in network.state_dict() if "proj_attn" in name}


def test_an_imported_model_samples_in_its_own_intensities(cli, config, tmp_path: Path) -> None:
    torch.save(old_unet(2).state_dict(), tmp_path / "old.pt")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "ddpm", "-c", config("ddpm"),
        "-o", tmp_path / "model", "--model_range", 0, 1,
    )  # fmt: skip
    assert code == 0, err
    image = artifact.load(tmp_path / "model").image
    assert image.intensity_range == ((-255.0, 255.0),), "0 in the model is black, 1 is white"
    assert cli("infer", "-m", tmp_path / "model", "-o", tmp_path / "i", "-n", 2)[0] == 0


def test_the_prefix_of_a_wrapper(cli, config, tmp_path: Path) -> None:
    state = {f"model.{k}": v for k, v in old_vqvae(2).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "old.ckpt")
    code, _, err = cli(
        "import", tmp_path / "old.ckpt", "--family", "vqvae", "-c", config("vqvae"),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, err


def test_weights_that_do_not_fit_are_all_named(cli, config, tmp_path: Path) -> None:
    state = old_unet(2).state_dict()
    state["extra.weight"] = torch.zeros(3)
    del state["out.2.conv.bias"]
    torch.save(state, tmp_path / "old.pt")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "ddpm",
        "-c", config("ddpm", num_res_blocks=1), "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "extra.weight: our network has no such weight" in err
    assert "out.2.conv.bias: not in the checkpoint" in err
    assert not (tmp_path / "model").exists()


def test_another_shape_is_refused(cli, config, tmp_path: Path) -> None:
    torch.save(old_unet(2).state_dict(), tmp_path / "old.pt")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "ddpm", "-c", config("ddpm", channels=[8, 24]),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "in the checkpoint, (24," in err


def test_same_shapes_that_compute_something_else_are_refused(cli, config, tmp_path: Path) -> None:
    """MONAI's own loader copies layers that were never used, and says nothing."""
    network = old_unet(2)
    torch.save(network.state_dict(), tmp_path / "old.pt")
    command = ["--family", "ddpm", "-c", config("ddpm"), "-o", tmp_path / "model"]
    assert cli("import", tmp_path / "old.pt", *command)[0] == 0
    ours = artifact.load(tmp_path / "model").build(torch.device("cpu"))
    converted = legacy.converted(network.state_dict(), ours.network)
    wrong = dict(converted.state)
    name = next(key for key in wrong if key.endswith("out_proj.weight"))
    wrong[name] = network.state_dict()[name.replace(".attn.out_proj.", ".proj_attn.")]
    ours.network.load_state_dict(wrong)
    assert legacy.largest_difference(ours, converted) > 1e-3


def test_a_pickle_with_code_is_not_run(cli, config, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "old.pt").write_bytes(pickle.dumps({"weights": Evil()}))
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "vqvae", "-c", config("vqvae"),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "SynthCube runs no code from a checkpoint" in err
    assert not (tmp_path / "ran").exists()


def test_a_family_without_counterpart(cli, tmp_path: Path) -> None:
    torch.save(old_unet(2).state_dict(), tmp_path / "old.pt")
    (tmp_path / "c.yaml").write_text("data: {size: [16, 16]}\n")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "rectified_flow", "-c", tmp_path / "c.yaml",
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "rectified_flow has no counterpart in monai-generative" in err


def judged(norm: str = "batch") -> dict[str, object]:
    return {"adversarial_weight": 0.01, "discriminator_channels": 4, "discriminator_norm": norm}


def old_discriminator(rank: int, norm: str = "BATCH", **settings: object) -> torch.nn.Module:
    """With statistics that were followed, and scales that are not one."""
    described = {"num_channels": 4, "in_channels": 1, "num_layers_d": 2, "norm": norm} | settings
    network = scrambled(PatchDiscriminator(spatial_dims=rank, **described)).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 1, *[16] * rank) * 2 + 1)
    return network.eval()


@pytest.fixture
def with_discriminator(cli, config, tmp_path: Path):
    """Imports a vqvae, or an autoencoder_kl, with these weights of its discriminator."""

    def imported(state: dict, family: str = "vqvae", rank: int = 2, **changed: object):
        torch.save(OLD[family][0](rank).state_dict(), tmp_path / "old.pt")
        torch.save(state, tmp_path / "judge.pt")
        return cli(
            "import", tmp_path / "old.pt", "--family", family, "-o", tmp_path / "model",
            "-c", config(family, rank, **(changed or judged())),
            "--discriminator", tmp_path / "judge.pt",
        )  # fmt: skip

    return imported


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("family", ["vqvae", "autoencoder_kl"])
def test_an_imported_discriminator_judges_as_the_old_one_did(
    with_discriminator, family: str, rank: int, norm: str, tmp_path: Path
) -> None:
    network = old_discriminator(rank, norm.upper())
    code, _, err = with_discriminator(network.state_dict(), family, rank, **judged(norm))
    assert code == 0, err
    assert err.count("Same output as monai-generative within") == 2
    assert "Not used: 0" not in err
    model = artifact.load(tmp_path / "model")
    assert model.metrics["imported_discriminator_difference"] < 1e-5
    ours = model.build(torch.device("cpu")).discriminator
    image = torch.randn(3, 1, *[16] * rank, generator=torch.Generator().manual_seed(5))
    for output, theirs in zip(ours(image), network(image), strict=True):
        assert theirs.std() > 0.01
        torch.testing.assert_close(output, theirs, rtol=0, atol=1e-5)
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }


def test_a_discriminator_in_a_wrapper(with_discriminator) -> None:
    state = {f"module.{k}": v for k, v in old_discriminator(2).state_dict().items()}
    code, _, err = with_discriminator(state)
    assert code == 0, err


def multi_scale() -> torch.nn.Module:
    return MultiScalePatchDiscriminator(
        num_d=2, num_layers_d=2, spatial_dims=2, num_channels=4, in_channels=1, norm="BATCH",
        minimum_size_im=64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "changed", "said"),
    [
        (old_discriminator, judged("instance"), "norm to batch"),
        (partial(old_discriminator, norm="INSTANCE"), judged(), "norm to instance"),
        (old_discriminator, {"adversarial_weight": 0.0}, "adversarial_weight is 0"),
        (partial(old_discriminator, num_layers_d=1), judged(), "1.conv.weight: not in the"),
        (partial(old_discriminator, bias=True), judged(), "0.conv.bias: our network has no such"),
        (
            partial(old_discriminator, kernel_size=6, padding=2), judged(),
            "(4, 1, 6, 6) in the checkpoint, (4, 1, 4, 4) in the config",
        ),
        (
            lambda rank: multi_scale(), judged(),
            "discriminator_1.1.adn.N.bias: our network has no such weight",
        ),
    ],
)  # fmt: skip
def test_a_discriminator_that_does_not_fit_is_refused(
    with_discriminator, build, changed: dict, said: str, tmp_path: Path
) -> None:
    code, _, err = with_discriminator(build(rank=2).state_dict(), **changed)
    assert code == 2
    assert said in err
    assert not (tmp_path / "model").exists()


def test_an_untrained_discriminator_is_not_saved_in_silence(cli, config, tmp_path: Path) -> None:
    torch.save(old_vqvae(2).state_dict(), tmp_path / "old.pt")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "vqvae", "-c", config("vqvae", **judged()),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "give them with --discriminator, or set model.adversarial_weight to 0" in err


def test_a_diffusion_has_no_discriminator(with_discriminator) -> None:
    code, _, err = with_discriminator(old_discriminator(2).state_dict(), "ddpm", **UNET)
    assert code == 2
    assert "this family trains without one" in err


@pytest.mark.parametrize("prefix", ["", "controlnet."])
def test_a_controlnet_is_named_as_one(cli, config, prefix: str, tmp_path: Path) -> None:
    network = ControlNet(
        spatial_dims=2, in_channels=1, num_channels=(8, 16), num_res_blocks=1,
        attention_levels=(False, True), norm_num_groups=4, num_head_channels=(4, 4),
        conditioning_embedding_num_channels=(8,),
    )  # fmt: skip
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "old.pt")
    code, _, err = cli(
        "import", tmp_path / "old.pt", "--family", "ddpm", "-c", config("ddpm"),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "a ControlNet, a network that SynthCube does not have" in err
    assert "data.source_channels" in err
    assert not (tmp_path / "model").exists()
