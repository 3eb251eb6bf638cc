"""Old weights: the imported model computes what monai-generative does, or there is none."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from generative.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet

from synthcube import artifact, legacy

UNET = {"channels": [8, 16], "num_res_blocks": 1, "attention_from": 1, "num_head_channels": 4,
        "num_norm_groups": 4, "num_sampling_steps": 3}  # fmt: skip
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


def test_wrappers_prefixes_and_repeated_weights(cli, config, tmp_path: Path) -> None:
    """As a Lightning checkpoint has them, and GaNDLF-Synth's, which lists weights twice."""
    state = {f"model.{k}": v for k, v in old_vqvae(2).state_dict().items()}
    twice = {f"model.inner.{k.removeprefix('model.')}": v for k, v in state.items()}
    torch.save({"epoch": 3, "state_dict": {**state, **twice}}, tmp_path / "old.ckpt")
    code, _, err = cli(
        "import", tmp_path / "old.ckpt", "--family", "vqvae", "-c", config("vqvae"),
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, err
    assert err.count("Not used: model.inner.") == len(state)


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
    found = legacy.converted(network.state_dict(), ours.network)
    wrong = dict(found.state)
    name = next(key for key in wrong if key.endswith("out_proj.weight"))
    wrong[name] = network.state_dict()[name.replace(".attn.out_proj.", ".proj_attn.")]
    ours.network.load_state_dict(wrong)
    assert legacy.largest_difference(ours, found) > 1e-3


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
