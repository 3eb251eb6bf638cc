"""GaNDLF-Synth: its checkpoints become models that make its images, and its YAML says how.

The networks here mirror what it trains: plain convolutions, activations and dropouts among the
blocks, every weight of a VQVAE in the checkpoint twice.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from generative.networks.layers.vector_quantizer import EMAQuantizer, VectorQuantizer
from generative.networks.nets import DiffusionModelUNet
from monai.networks.blocks import Convolution
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from synthcube.data import images
from synthcube.models import artifact, gandlf
from synthcube.models.families.dcgan import DCGANConfig
from synthcube.schema import ImageSpec

NUM_STEPS = 20
CHANNELS = (8, 16)


def plain(network: nn.Module) -> nn.Module:
    """The network with bare convolutions in place of MONAI's."""
    for name, child in list(network.named_children()):
        setattr(network, name, child.conv if isinstance(child, Convolution) else plain(child))
    return network


def scrambled(network: nn.Module) -> nn.Module:
    """Layers that start at zero would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    return network.eval()


def old_ddpm(rank: int) -> nn.Module:
    return scrambled(plain(DiffusionModelUNet(
        spatial_dims=rank, in_channels=1, out_channels=1, num_channels=CHANNELS, num_res_blocks=1,
        attention_levels=(False, True), norm_num_groups=4, num_head_channels=(4, 4),
    )))  # fmt: skip


class Residual(nn.Module):
    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        layers = (conv(width, width, 3, 1, 1), nn.Dropout(0.0), nn.ReLU())
        self.residual_block = nn.Sequential(*layers, conv(width, width, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.residual_block(x))


class Part(nn.Module):
    """Encoder or decoder: a list of blocks under its own name."""

    def __init__(self, name: str, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.name = f"{name}_blocks"
        self.add_module(self.name, nn.ModuleList(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in getattr(self, self.name):
            x = block(x)
        return x


class OldVQVAE(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        transposed = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
        (a, b), code = CHANNELS, 4
        self.encoder = Part("encoder", [
            conv(1, a, 4, 2, 1), nn.ReLU(), Residual(conv, a), Residual(conv, a),
            conv(a, b, 4, 2, 1), nn.Dropout(0.0), nn.ReLU(), Residual(conv, b), Residual(conv, b),
            conv(b, code, 3, 1, 1),
        ])  # fmt: skip
        self.decoder = Part("decoder", [
            conv(code, b, 3, 1, 1), Residual(conv, b), Residual(conv, b),
            transposed(b, a, 4, 2, 1), nn.Dropout(0.0), nn.ReLU(),
            Residual(conv, a), Residual(conv, a), transposed(a, 1, 4, 2, 1),
        ])  # fmt: skip
        self.quantizer = VectorQuantizer(EMAQuantizer(rank, 8, code))
        self.full_module = nn.Sequential(self.encoder, self.quantizer, self.decoder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.quantizer(self.encoder(x))[1])


def old_vqvae(rank: int) -> nn.Module:
    """Its codes cover the latents, and its outputs the intensities, as those of a trained one."""
    network = scrambled(OldVQVAE(rank))
    image = torch.rand(4, 1, *[16] * rank) * 255
    with torch.no_grad():
        latents = network.encoder(image).movedim(1, -1).reshape(-1, 4)
        places = torch.linspace(0, len(latents) - 1, 8).long()
        network.quantizer.quantizer.embedding.weight.copy_(latents[places])
        last, output = network.decoder.decoder_blocks[-1], network(image)
        scale = 40 / output.std()
        last.weight.mul_(scale)
        last.bias.copy_((last.bias - output.mean()) * scale + 128)
    return network


NETWORKS = {"ddpm": old_ddpm, "vqvae": old_vqvae}
ARCHITECTURES = {
    "ddpm": {
        "num_channels": list(CHANNELS), "num_res_blocks": [1, 1],
        "attention_levels": [False, True], "num_head_channels": 4, "norm_num_groups": 4,
        "num_train_timesteps": NUM_STEPS, "num_eval_timesteps": NUM_STEPS,
    },
    "vqvae": {
        "num_channels_upsample_downsample_layers": list(CHANNELS), "num_residual_layers": 2,
        "num_residual_channels": list(CHANNELS), "num_embeddings": 8, "embedding_dim": 4,
        "downsample_conv_parameters": [[2, 4, 1, 1]] * 2,
        "upsample_conv_parameters": [[2, 4, 1, 1, 0]] * 2,
    },
}  # fmt: skip


def checkpoint(network: nn.Module, path: Path) -> Path:
    """As Lightning saves a run of GaNDLF-Synth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({
        "epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.1.3", "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"Checkpoint{'every': 1}": {}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.001}]}], "lr_schedulers": [],
    }, path)  # fmt: skip
    return path


def old_yaml(path: Path, family: str, rank: int = 2, **changed: object) -> Path:
    """`changed` are keys of the architecture; `transforms` are those of the training."""
    size = [16] * rank
    transforms = changed.pop("transforms", {"resize": size})
    path.write_text(json.dumps({  # which is YAML
        "model_config": {
            "model_name": family, "labeling_paradigm": "unlabeled", "n_channels": 1,
            "n_dimensions": rank, "tensor_shape": list(size), "losses": {"name": "mse"},
            "optimizers": {"name": "adam", "lr": 0.0001},
            "architecture": {**ARCHITECTURES.get(family, {}), **changed},
        },
        "modality": "rad", "num_epochs": 5, "batch_size": 1,
        "data_preprocessing": {"train": transforms},
    }))  # fmt: skip
    return path


@pytest.fixture
def imported(cli, tmp_path: Path):
    """Imports a network; returns (exit code, stderr, artifact or None)."""

    def run(family: str, rank: int = 2, *more: object, **changed: object):
        file = checkpoint(NETWORKS[family](rank), tmp_path / "old.ckpt")
        config = old_yaml(tmp_path / "old.yaml", family, rank, **changed)
        code, _, err = cli(
            "import", file, "--family", family, "-c", config, "-o", tmp_path / "model", *more
        )
        return code, err, artifact.load(tmp_path / "model") if code == 0 else None

    return run


def test_names_are_those_of_real_checkpoints() -> None:
    ddpm, vqvae = (set(NETWORKS[family](2).state_dict()) for family in ("ddpm", "vqvae"))
    assert {
        "conv_in.weight", "down_blocks.0.resnets.0.conv1.bias", "out.2.weight",
        "down_blocks.1.resnets.0.skip_connection.weight", "down_blocks.0.downsampler.op.weight",
        "up_blocks.0.upsampler.conv.weight", "middle_block.attention.to_q.weight",
    } <= ddpm  # fmt: skip
    assert {
        "encoder.encoder_blocks.9.weight", "decoder.decoder_blocks.8.bias",
        "encoder.encoder_blocks.7.residual_block.3.weight", "quantizer.quantizer.ema_w",
        "full_module.0.encoder_blocks.0.weight", "full_module.1.quantizer.embedding.weight",
    } <= vqvae  # fmt: skip
    assert not any(".conv.conv." in name for name in ddpm)
    default = DiffusionModelUNet(
        2,
        1,
        1,
        num_channels=(32, 64, 64, 64),
        num_head_channels=8,
        num_res_blocks=2,
        attention_levels=(False, False, True, True),
    )
    assert len(plain(default).state_dict()) == 378, "as counted in a real checkpoint"


@pytest.mark.parametrize("rank", [2, 3])
def test_an_imported_ddpm_draws_the_images_that_gandlf_drew(imported, rank: int) -> None:
    code, err, model = imported("ddpm", rank)
    assert code == 0, err
    assert model.config["model"]["schedule"] == "linear"
    assert model.config["model"]["prediction"] == "epsilon"
    family, network = model.build(torch.device("cpu")), old_ddpm(rank)
    empty = {"values": torch.zeros(1, 0), "source": torch.zeros(1, 0, *[16] * rank)}
    x_t = torch.randn(1, 1, *[16] * rank)
    with torch.inference_mode():
        for step in (0, 7, NUM_STEPS - 1):
            time = torch.tensor([step])
            ours, theirs = family.network(x_t, time, empty), network(x_t, time)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        ours = family.sample([torch.Generator().manual_seed(3)], empty)
        theirs = drawn_by_gandlf(network, rank, torch.Generator().manual_seed(3))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def drawn_by_gandlf(network: nn.Module, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Ancestral sampling: Ho et al., algorithm 2, with images limited to [-1, 1] on the way."""
    beta = torch.linspace(1e-4, 0.02, NUM_STEPS)
    kept = torch.cumprod(1 - beta, 0)
    x_t = torch.randn(1, *[16] * rank, generator=generator)[None]
    for step in reversed(range(NUM_STEPS)):
        before = kept[step - 1] if step else torch.tensor(1.0)
        noise = network(x_t, torch.tensor([step]))
        x_0 = ((x_t - (1 - kept[step]).sqrt() * noise) / kept[step].sqrt()).clamp(-1, 1)
        x_t = (before.sqrt() * beta[step] * x_0 + (1 - beta[step]).sqrt() * (1 - before) * x_t) / (
            1 - kept[step]
        )
        if step:
            variance = beta[step] * (1 - before) / (1 - kept[step])
            x_t = x_t + variance.sqrt() * torch.randn(x_t.shape, generator=generator)
    return x_t


def test_the_reference_is_monais_scheduler() -> None:
    """Which GaNDLF-Synth calls with its defaults."""
    network = old_ddpm(2)
    scheduler = DDPMScheduler(NUM_STEPS)
    scheduler.set_timesteps(NUM_STEPS)
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(1, 16, 16, generator=generator)[None]
    with torch.inference_mode():
        for step in scheduler.timesteps:
            x_t = scheduler.step(network(x_t, step[None]), int(step), x_t, generator)[0]
        expected = drawn_by_gandlf(network, 2, torch.Generator().manual_seed(3))
    torch.testing.assert_close(expected, x_t, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_an_imported_vqvae_reconstructs_raw_intensities_as_gandlf_did(imported, rank: int) -> None:
    code, err, model = imported("vqvae", rank, "--model_range", 0, 255)
    assert code == 0, err
    assert "Not used: full_module (" in err
    assert model.image.intensity_range == ((0.0, 255.0),)
    family, network = model.build(torch.device("cpu")), old_vqvae(rank)
    raw = torch.rand(2, 1, *[16] * rank, generator=torch.Generator().manual_seed(1)) * 255
    with torch.inference_mode():
        torch.testing.assert_close(family.network(raw)[0], network(raw), rtol=1e-5, atol=1e-5)
        theirs = network(raw).clamp(0, 255)
        assert ((theirs > 0) & (theirs < 255)).float().mean() > 0.9
        ours = (family.reconstruct(raw / 127.5 - 1) + 1) * 127.5
    assert (theirs[0] - theirs[1]).abs().max() > 10, "it depends on the image"
    # GaNDLF-Synth adds its large latents to the codes and subtracts them: rounding.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=255 * 1e-4)


def test_files_go_through_an_imported_vqvae_in_their_own_intensities(
    cli, imported, tmp_path: Path
) -> None:
    code, err, _ = imported("vqvae", 2, transforms={"clip": {"min": 0, "max": 255}})
    assert code == 0, err
    raw = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1)).mul(255).round()
    (tmp_path / "data").mkdir()
    images.write_image(tmp_path / "data" / "a.png", raw, torch.eye(4).numpy())
    out = tmp_path / "out"
    assert cli("infer", "-m", tmp_path / "model", "-d", tmp_path / "data", "-o", out)[0] == 0
    (file,) = (out / "images").iterdir()
    with torch.inference_mode():
        theirs = old_vqvae(2)(raw[None])[0].clamp(0, 255)
    ours = images.read_image([file]).tensor[..., 0].float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.51)


@pytest.mark.parametrize(
    ("family", "transforms", "more", "ends", "file_format"),
    [
        ("ddpm", {"resize": [16, 16]}, (), (-1, 1), "nii.gz"),
        ("ddpm", {"resize": [16, 16, 1], "rescale": None}, (), (-1, 1), "nii.gz"),
        ("ddpm", {"rescale": {"in_min_max": [0, 80]}}, (), (-80, 80), "nii.gz"),
        ("ddpm", {"normalize_standardize": None}, (), (0, 255), "png"),
        ("ddpm", {"normalize_div_by_255": None}, (), (-255, 255), "png"),
        ("ddpm", {"normalize": None}, ("--set", "data.intensity_range=[5,9]"), (5, 9), "nii.gz"),
        ("vqvae", {"clamp": {"min": -1000, "max": 400}}, (), (-1000, 400), "nii.gz"),
        ("vqvae", {"normalize": {}}, ("--model_range", -3, 3), (-3, 3), "nii.gz"),
        ("vqvae", {"rescale": {"out_min_max": [0, 9]}}, (), (0, 9), "nii.gz"),
    ],
)  # fmt: skip
def test_intensities_are_those_that_the_network_saw(
    imported, family: str, transforms: dict, more: tuple, ends: tuple, file_format: str
) -> None:
    """`ends` stand for -1 and 1 in our model."""
    code, err, model = imported(family, 2, *more, transforms=transforms)
    assert code == 0, err
    assert model.image.intensity_range == (ends,)
    assert model.image.file_format == file_format


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        ({}, "no transform scaled the intensities of the files"),
        ({"normalize": {}, "rescale": {}}, "normalize gave each image other intensities"),
    ],
)
def test_unknown_intensities_of_a_vqvae_are_asked_for(
    imported, transforms: dict, said: str
) -> None:
    code, err, _ = imported("vqvae", transforms=transforms)
    assert code == 2
    assert f"{said}. Give the lowest and highest value that the network saw" in err


def test_a_ddpm_that_saw_other_intensities_says_so(imported) -> None:
    code, err, _ = imported("ddpm", transforms={"clip": {"min": 0, "max": 1000}})
    assert code == 0
    assert "outside -1 to 1. Images come out from -1 to 1, as GaNDLF-Synth's did" in err
    code, err, _ = imported("ddpm", 2, "--model_range", 0, 1000)
    assert code == 2
    assert "model_range 0,1000: two numbers from -1 to 1, in order; a ddpm makes no others" in err


def test_fewer_steps_are_taken_by_ddim(imported) -> None:
    code, err, model = imported("ddpm", num_eval_timesteps=5)
    assert code == 0, err
    assert model.config["model"]["sampler"] == "ddim"
    assert model.config["model"]["num_sampling_steps"] == 5


OURS = {
    "name": "ddpm", "channels": list(CHANNELS), "num_res_blocks": 1, "attention_from": 1,
    "num_head_channels": 4, "num_norm_groups": 4,
}  # fmt: skip


@pytest.fixture
def with_our_config(cli, tmp_path: Path):
    """Imports a state dict with a YAML of SynthCube and these keys of the model."""

    def run(file: Path, **keys: object) -> tuple[int, str]:
        config = tmp_path / "ours.yaml"
        config.write_text(json.dumps({"model": {**OURS, **keys}, "data": {"size": [16, 16]}}))
        code, _, err = cli(
            "import", file, "--family", "ddpm", "-c", config, "-o", tmp_path / "model"
        )
        return code, err

    return run


def test_a_schedule_that_is_not_gandlfs_is_refused_or_set(with_our_config, tmp_path: Path) -> None:
    file = checkpoint(old_ddpm(2), tmp_path / "old.ckpt")
    code, err = with_our_config(file, schedule="cosine", prediction="v", beta_end=0.02)
    assert code == 2
    assert "model.prediction v: GaNDLF-Synth trained with epsilon" in err
    assert "model.schedule cosine: GaNDLF-Synth trained with linear" in err
    assert not (tmp_path / "model").exists()
    code, err = with_our_config(file, schedule="linear")
    assert code == 0, err
    assert "As GaNDLF-Synth trained every DDPM: model." in err
    model = artifact.load(tmp_path / "model").config["model"]
    assert {key: model[key] for key in gandlf.DIFFUSION} == gandlf.DIFFUSION


def test_a_schedule_that_nobody_states_is_asked_for(with_our_config, tmp_path: Path) -> None:
    """Its name is in no checkpoint of monai-generative either."""
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_channels=CHANNELS, num_res_blocks=1,
        attention_levels=(False, True), norm_num_groups=4, num_head_channels=(4, 4),
    )  # fmt: skip
    torch.save(network.state_dict(), tmp_path / "old.pt")
    code, err = with_our_config(tmp_path / "old.pt", schedule="linear")
    assert code == 2
    assert "a wrong guess makes noise" in err
    assert "model.prediction is needed, epsilon unless" in err
    assert "model.schedule is needed" not in err


def test_the_newest_checkpoint_of_a_model_folder_is_taken(cli, tmp_path: Path) -> None:
    config, folder = old_yaml(tmp_path / "old.yaml", "ddpm"), tmp_path / "run"
    logs = folder / "training_logs"
    checkpoint(old_ddpm(2), logs / "version_10" / "checkpoints" / "epoch=9-step=40.ckpt")
    for place in (
        "version_9/checkpoints/epoch=99-step=9.ckpt",
        "version_10/checkpoints/epoch=8-step=90.ckpt",
    ):
        (logs / place).parent.mkdir(parents=True, exist_ok=True)
        (logs / place).write_bytes(b"older")
    command = ("import", folder, "--family", "ddpm", "-c", config, "-o")
    code, _, err = cli(*command, tmp_path / "a")
    assert code == 0, err
    assert "version_10/checkpoints/epoch=9-step=40.ckpt" in err
    first = checkpoint(old_ddpm(2), folder / "checkpoints" / "epoch=3-step=40.ckpt")
    (folder / "checkpoints" / "last.ckpt").symlink_to(first.name)
    code, _, err = cli(*command, tmp_path / "b")
    assert code == 0, err
    assert "checkpoints/last.ckpt" in err
    shards = tmp_path / "shards" / "checkpoints" / "last.ckpt"
    shards.mkdir(parents=True)
    for place, said in (
        (shards.parent.parent, "DeepSpeed's shards"),
        (logs / "version_9", "be read"),
    ):
        code, _, err = cli("import", place, "--family", "ddpm", "-c", config, "-o", tmp_path / "c")
        assert code == 2
        assert said in err
    (tmp_path / "empty").mkdir()
    code, _, err = cli("import", tmp_path / "empty", *command[2:], tmp_path / "c")
    assert code == 2
    assert "is a folder without a checkpoint: none of checkpoints/last.ckpt" in err


def test_what_an_old_yaml_has_and_we_have_not_is_named_at_once(imported) -> None:
    code, err, _ = imported(
        "ddpm", attention_levels=[True, False], num_res_blocks=[1, 2], norm_eps=1e-5,
        resblock_updown=True, num_head_channels=[2, 4, 8], transforms={"resize": [16]},
    )  # fmt: skip
    assert code == 2
    for said in (
        "attention_levels [True, False]: only the coarsest levels can attend here",
        "num_res_blocks [1, 2]: all must be equal", "norm_eps 1e-05: SynthCube has only 1e-06",
        "resblock_updown True: SynthCube has only False",
        "num_head_channels [2, 4, 8]: 2 whole numbers are needed",
        "resize [16]: 2 whole numbers are needed",
    ):  # fmt: skip
        assert said in err
    code, err, _ = imported(
        "vqvae", num_residual_channels=[8, 8], downsample_conv_parameters=[[2, 3, 1, 1]] * 2,
        embedding_dim="4",
    )  # fmt: skip
    assert code == 2
    assert "num_residual_channels [8, 8]: SynthCube has only [8, 16]" in err
    assert "downsample_conv_parameters [[2, 3, 1, 1], [2, 3, 1, 1]]: SynthCube has only" in err
    assert "embedding_dim 4: a whole number above 0 is needed" in err


def test_what_does_not_belong_together_is_refused(cli, tmp_path: Path) -> None:
    file = checkpoint(old_ddpm(2), tmp_path / "old.ckpt")
    for family, of_yaml, more, said in (
        ("ddpm", "vqvae", (), "describes a vqvae of GaNDLF-Synth: give --family vqvae"),
        ("vqvae", "vqvae", (), "holds a ddpm of GaNDLF-Synth: give --family"),
        ("ddpm", "ddpm", ("--channels", 3), "--channels 3: "),
        ("ddpm", "stylegan", (), "model_name stylegan: GaNDLF-Synth's StyleGAN is another network"),
        ("ddpm", "wgan", (), "model_name wgan: ddpm, vqvae, dcgan can be imported"),
    ):
        config = old_yaml(tmp_path / "old.yaml", of_yaml)
        code, _, err = cli(
            "import", file, "--family", family, "-c", config, "-o", tmp_path / "model", *more
        )
        assert code == 2
        assert said in err
    assert not (tmp_path / "model").exists()


class OldDCGAN(nn.Module):
    """Generator and discriminator with few channels."""

    def __init__(self, rank: int, side: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
        layers: dict[str, nn.Module] = {"conv1t": up(6, 16, 4, bias=False)}
        for number, (wide, narrow) in enumerate(((16, 8), (8, 4), (4, 2), (2, 1)), start=1):
            layers |= {f"norm{number}": norm(wide), f"relu{number}": nn.ReLU()}
            layers[f"conv{number + 1}t"] = up(wide, narrow, 4, 2, 1, bias=False)
        mode = {2: "bilinear", 3: "trilinear"}[rank]
        layers |= {
            "upsample": nn.Upsample([side] * rank, mode=mode, align_corners=True),
            "conv1_smooth": conv(1, 128, 4, padding="same", bias=False),
            "norm1_smooth": norm(128), "relu1_smooth": nn.ReLU(),
            "conv2_smooth": conv(128, 1, 3, padding="same", bias=False), "tanh": nn.Tanh(),
        }  # fmt: skip
        self.generator = nn.Module()
        self.generator.feature_extractor = nn.Sequential(OrderedDict(layers))
        layers = {"conv1": conv(1, 2, 4, 2, 1, bias=False), "leaky_relu1": nn.LeakyReLU(0.2)}
        for number, (narrow, wide) in enumerate(((2, 4), (4, 8), (8, 16)), start=2):
            layers[f"conv{number}"] = conv(narrow, wide, 4, 2, 1, bias=False)
            layers |= {f"norm{number}": norm(wide), f"leaky_relu{number}": nn.LeakyReLU(0.2)}
        layers |= {"conv5": conv(16, 1, 4, bias=False), "flatten": nn.Flatten()}
        self.discriminator = nn.Module()
        self.discriminator.feature_extractor = nn.Sequential(OrderedDict(layers))
        linear = {"linear1": nn.Linear((side // 16 - 3) ** rank, 1), "sigmoid": nn.Sigmoid()}
        self.discriminator.classifier = nn.Sequential(OrderedDict(linear))


def old_dcgan(rank: int, side: int = 80) -> nn.Module:
    """With statistics that were followed, and images that are neither black nor white."""
    network = scrambled(OldDCGAN(rank, side)).train()
    generate = network.generator.feature_extractor
    with torch.no_grad():
        for _ in range(2):
            generate(torch.randn(2, 6, *[1] * rank))
        generate.conv2_smooth.weight.mul_(0.4)
    return network.eval()


NETWORKS["dcgan"] = old_dcgan
ARCHITECTURES["dcgan"] = {
    "latent_vector_size": 6, "init_channels_generator": 16, "init_channels_discriminator": 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("rank", "side"), [(2, 80), pytest.param(3, 64, marks=pytest.mark.slow)])
def test_an_imported_dcgan_makes_and_judges_images_as_gandlf_did(
    imported, rank: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "dcgan", partial(old_dcgan, side=side))
    code, err, model = imported("dcgan", rank, transforms={"resize": [side] * rank})
    assert code == 0, err
    assert "Same output as GaNDLF-Synth within" in err
    assert model.image.intensity_range == ((0.0, 1.0),), "as its files had them"
    family, network = model.build(torch.device("cpu")), old_dcgan(rank, side)
    latent = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    images_of_two = torch.randn(2, 1, *[side] * rank, generator=torch.Generator().manual_seed(4))
    empty = {"values": torch.zeros(1, 0), "source": torch.zeros(1, 0, *[side] * rank)}
    with torch.inference_mode():
        ours = family.sample([torch.Generator().manual_seed(3)], empty)
        theirs = network.generator.feature_extractor(latent.view(1, 6, *[1] * rank))
        logits = family.discriminator(images_of_two, torch.zeros(2, 0))
        judged = network.discriminator.train()
        features = judged.feature_extractor(images_of_two)
        expected = judged.classifier.linear1(features).squeeze(1)
    assert 0.02 < theirs.std() < 0.9
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_dcgan_that_does_not_fit_is_refused(cli, imported, tmp_path: Path) -> None:
    code, err, _ = imported("dcgan", transforms={"resize": [96, 96]})
    assert code == 2
    assert "discriminator.head.weight: (1, 4) in the checkpoint, (1, 576) in the config" in err
    state = torch.load(tmp_path / "old.ckpt", weights_only=True)["state_dict"]
    del state["model.generator.feature_extractor.norm1_smooth.bias"]
    torch.save({"state_dict": {**state, "model.extra": torch.ones(1)}}, tmp_path / "old.ckpt")
    old_yaml(tmp_path / "old.yaml", "dcgan", transforms={"resize": [80, 80]})
    command = ("--family", "dcgan", "-c", tmp_path / "old.yaml", "-o", tmp_path / "model")
    code, _, err = cli("import", tmp_path / "old.ckpt", *command)
    assert code == 2
    assert "generator.smooth.2.bias: not in the checkpoint" in err
    assert "extra: our network has no such weight" in err
    plain_config = {"model": {"name": "dcgan"}, "data": {"size": [80, 80]}}
    (tmp_path / "old.yaml").write_text(json.dumps(plain_config))
    code, _, err = cli("import", tmp_path / "old.ckpt", *command)
    assert code == 2
    assert "generator.smooth.1.weight: our network has no such weight" in err


def test_a_generator_that_smooths_makes_other_sizes_than_its_levels() -> None:
    config = DCGANConfig.model_validate({**DCGANConfig.tiny().model_dump(), "smoothing": True})
    image = ImageSpec(
        size=(24, 36), channels=1, spacing_mm=(1, 1, 1), affine=torch.eye(4).tolist(),
        intensity_range=((0, 1),), file_format="nii.gz",
    )  # fmt: skip
    assert not config.faults(image)
    assert config.build(image).generator(torch.randn(2, 8), torch.zeros(2, 0)).shape[2:] == (24, 36)


def test_a_stylegan_is_refused_with_the_reason(cli, tmp_path: Path) -> None:
    state = {"model.generator.starting_cte": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    (tmp_path / "c.yaml").write_text("data: {size: [16, 16]}\n")
    code, _, err = cli(
        "import", tmp_path / "old.ckpt", "--family", "stylegan", "-c", tmp_path / "c.yaml",
        "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "StyleGAN is another network than SynthCube's" in err


class Trained:
    """A class of its own, as a checkpoint with hyperparameters would hold."""


def test_damaged_checkpoints_are_one_clear_error(cli, tmp_path: Path) -> None:
    file = checkpoint(old_vqvae(2), tmp_path / "old.ckpt")
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)["state_dict"]
    config = old_yaml(tmp_path / "old.yaml", "vqvae", transforms={"rescale": None})

    def refused(said: str) -> None:
        code, _, err = cli(
            "import", file, "--family", "vqvae", "-c", config, "-o", tmp_path / "model"
        )
        assert code == 2
        assert said in err
        assert not (tmp_path / "model").exists()

    file.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    torch.save({"state_dict": state, "hyper_parameters": Trained()}, file)
    refused("SynthCube runs no code from a checkpoint")
    name = "model.full_module.2.decoder_blocks.8.bias"
    torch.save({"state_dict": {**state, name: state[name] + 1}}, file)
    refused("full_module.2.decoder_blocks.8.bias: not the same as in decoder")
    torch.save(
        {
            "state_dict": {
                k: v for k, v in state.items() if k != "model.encoder.encoder_blocks.9.bias"
            }
        },
        file,
    )
    refused("encoder_blocks.9.bias: not the same as in encoder")
