"""StyleGAN against closed forms: its layers, its penalties, how it grows and what it follows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from synthcube import reading
from synthcube.errors import ConfigError
from synthcube.models.adversarial import (
    AdversarialFamily,
    path_lengths,
    r1_penalty,
    sliced_wasserstein,
)
from synthcube.models.families.stylegan import StyleGAN, StyleGANConfig
from synthcube.models.nets.style import (
    Blur,
    EqualizedConv,
    EqualizedLinear,
    Growth,
    ModulatedConv,
    doubled,
    halved,
    minibatch_std,
)
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec
from synthcube.tasks.train import train
from synthcube.training import checkpoints

EACH_RANK = Path(__file__).parents[2] / "each_rank.py"
CONV = {2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def image_spec(*size: int, **extra: Any) -> ImageSpec:
    eye = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    return ImageSpec(
        size=size, channels=1, spacing_mm=(1.0, 1.0, 1.0), affine=eye,
        intensity_range=((0.0, 255.0),), file_format="nii.gz", **extra,
    )  # fmt: skip


def condition(number: int, values: torch.Tensor | None = None) -> Condition:
    values = torch.zeros(number, 0) if values is None else values
    return Condition(values=values, source=torch.zeros(number, 0, 16, 16))


def batch(image: torch.Tensor, values: torch.Tensor | None = None) -> Batch:
    number = len(image)
    return Batch(
        image=image,
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.arange(number),
        condition=condition(number, values),
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noisy(model: StyleGAN, strength: float) -> StyleGAN:
    with torch.no_grad():
        for layer in model.generator.layers:
            layer.noise_strength.fill_(strength)
    return model


@pytest.mark.parametrize("double", [False, True], ids=["same size", "doubled"])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_modulated_convolution_is_one_with_weights_of_its_own_for_each_image(
    rank: int, demodulate: bool, double: bool
) -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(rank, 5, 7, 6, demodulate=demodulate, double=double)
    x, w = torch.randn(3, 5, *(6, 4, 5)[:rank]), torch.randn(3, 6)
    styles = w @ conv.style.weight.T / math.sqrt(6) + 1
    expected = []
    for image, style in zip(x, styles, strict=True):
        weight = conv.weight / math.sqrt(5 * 3**rank) * style.view(1, 5, *(1,) * rank)
        if demodulate:
            norm = weight.flatten(1).norm(dim=1).view(7, *(1,) * (rank + 1))
            weight = weight / norm
        if double:
            spread_out = TRANSPOSED[rank](image[None], weight.transpose(0, 1), stride=2)
            expected.append(Blur(rank, padding=1, gain=2)(spread_out))
        else:
            expected.append(CONV[rank](image[None], weight, padding=1))
    torch.testing.assert_close(conv(x, w), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_demodulated_output_of_unit_input_has_unit_variance() -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(2, 16, 24, 8)
    convolved = conv(torch.randn(4, 16, 64, 64), 3 * torch.randn(4, 8))[..., 1:-1, 1:-1]
    spreads = convolved.std(dim=(2, 3))
    assert spreads.shape == (4, 24)
    torch.testing.assert_close(spreads, torch.ones(4, 24), rtol=0, atol=0.05)


def test_equalised_layers_scale_standard_normal_weights_by_their_inputs() -> None:
    torch.manual_seed(0)
    linear, slow = EqualizedLinear(400, 300), EqualizedLinear(400, 300, rate=0.01)
    conv = EqualizedConv(2, 16, 64, kernel=3)
    assert linear.weight.detach().std() == pytest.approx(1, abs=0.01)
    assert slow.weight.detach().std() == pytest.approx(100, abs=1)
    assert conv.weight.detach().std() == pytest.approx(1, abs=0.02)
    x = torch.randn(50, 400)
    torch.testing.assert_close(linear(x), x @ linear.weight.T / 20, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slow(x), x @ slow.weight.T / 2000, rtol=1e-4, atol=1e-5)
    image = torch.randn(1, 16, 8, 8)
    expected = functional.conv2d(image, conv.weight / 12, padding=1)
    torch.testing.assert_close(conv(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_doubling_is_zeros_between_voxels_and_the_blur(rank: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(6, 5, 4)[:rank])
    zeros = torch.zeros(2, 3, *(2 * side for side in x.shape[2:]))
    zeros[(slice(None), slice(None), *(slice(None, None, 2),) * rank)] = x
    inner = (slice(None), slice(None), *(slice(2, -2),) * rank)
    blurred = Blur(rank, padding=2, gain=2)(zeros)[(slice(None), slice(None), *(slice(-1),) * rank)]
    torch.testing.assert_close(blurred[inner], doubled(x)[inner])


@pytest.mark.parametrize(("number", "size"), [(8, 4), (6, 3), (7, 7), (1, 1), (2, 2), (10, 5)])
def test_the_spread_of_a_group_is_its_mean_standard_deviation(number: int, size: int) -> None:
    x = torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    spread = minibatch_std(x, group_size=4)
    assert spread.shape == (number, 1, 4, 4)
    for first in range(number // size):
        group = x[first :: number // size]
        assert len(group) == size
        expected = (group.var(dim=0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(spread[first :: number // size], expected.expand(size, 1, 4, 4))


def test_r1_of_a_linear_discriminator_is_the_squared_length_of_its_weights() -> None:
    slope = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = torch.randn(5, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(lambda x: x.flatten(1) @ slope.flatten(), images)
    torch.testing.assert_close(penalty, slope.square().sum(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(penalty, slope)
    torch.testing.assert_close(gradient, 2 * slope)
    curved = r1_penalty(lambda x: x.square().flatten(1).sum(dim=1) / 2, images)
    torch.testing.assert_close(curved, images.square().flatten(1).sum(dim=1).mean())


def test_path_length_of_a_linear_generator() -> None:
    styles = torch.randn(4, 3, 9, requires_grad=True)
    torch.manual_seed(5)
    lengths = path_lengths(lambda w: 2 * w.sum(dim=(1, 2)).view(4, 1, 1, 1), styles)
    torch.manual_seed(5)
    expected = 2 * torch.randn(4, 1, 1, 1).abs().flatten() * math.sqrt(9)
    torch.testing.assert_close(lengths, expected)


def test_penalties_come_every_few_steps_weighted_by_as_many() -> None:
    torch.manual_seed(0)
    config = StyleGANConfig(channels=(8, 8), latent_dim=8, r1_weight=3.0, r1_every=4,
                            path_length_weight=2.0, path_length_every=2)  # fmt: skip
    model = config.build(image_spec(16, 16))
    examples = batch(torch.randn(4, 1, 16, 16).clamp(-1, 1))
    model._step = 4
    generated = model.generator_loss(examples)[1].detach()
    terms = model.discriminator_loss(examples, generated)
    model._step = 5
    plain = model.discriminator_loss(examples, generated)
    assert set(plain) == {"loss"}
    torch.testing.assert_close(terms["loss"], plain["loss"] + 3 / 2 * 4 * terms["r1"])
    assert set(model.generator_loss(examples)[0]) == {"loss"}
    model._step = 6
    assert set(model.generator_loss(examples)[0]) == {"loss", "path_length_penalty"}
    making, judging = model.optimizer_configs()
    assert making.lr == pytest.approx(2e-3 * 2 / 3)
    assert judging.lr == pytest.approx(2e-3 * 4 / 5)
    assert (judging.model_extra or {})["betas"] == pytest.approx([0.0, 0.99 ** (4 / 5)])


def test_noise_has_no_strength_at_the_start_and_its_learned_one_later() -> None:
    torch.manual_seed(0)
    model = StyleGANConfig.tiny().build(image_spec(16, 16)).eval()
    w = torch.randn(1, model.generator.num_styles, 8)
    shapes = model.generator.noise_shapes(1)
    assert shapes == [(1, 8, 8), (1, 16, 16), (1, 16, 16)]
    noises = [torch.randn(1, *shape) for shape in shapes]
    silent = [torch.zeros(1, *shape) for shape in shapes]
    full = Growth(1, 1.0)
    with torch.inference_mode():
        assert torch.equal(model.generator(w, noises, full), model.generator(w, silent, full))
        noisy(model, 0.5)
        assert not torch.equal(model.generator(w, noises, full), model.generator(w, silent, full))
        halves = [noise / 2 for noise in noises]
        one = model.generator(w, noises, full)
        torch.testing.assert_close(noisy(model, 1.0).generator(w, halves, full), one)


def test_truncation_draws_styles_to_their_mean() -> None:
    torch.manual_seed(0)
    sharp = StyleGANConfig.tiny().build(image_spec(16, 16))
    for _ in range(3):
        sharp.generator_loss(batch(torch.zeros(4, 1, 16, 16)))
    mean = sharp.w_mean.clone()
    assert mean.abs().max() > 0.1
    images = {}
    for truncation in (0.0, 0.5, 1.0):
        model = sharp.config.model_copy(update={"truncation": truncation}).build(sharp.image)
        model.load_state_dict(sharp.state_dict())
        with torch.inference_mode():
            images[truncation] = model.eval().sample(generators(1, 2, 3), condition(3))
    styles = mean.expand(1, model.generator.num_styles, -1)
    silent = [torch.zeros(1, *shape) for shape in model.generator.noise_shapes(1)]
    with torch.inference_mode():
        expected = model.generator(styles, silent, Growth(1, 1.0)).clamp(-1, 1)
    torch.testing.assert_close(images[0.0], expected.expand(3, -1, -1, -1))
    assert 0 < images[0.5].std(dim=0).mean() < images[1.0].std(dim=0).mean()


def test_the_mean_style_is_that_of_many_seeds() -> None:
    torch.manual_seed(0)
    model = StyleGANConfig.tiny().build(image_spec(16, 16))
    for step in range(400):
        model._step = step
        model._styles(torch.zeros(32, 0))
    many = model.mapping(torch.randn(20000, 8), torch.zeros(20000, 0))
    torch.testing.assert_close(model.w_mean, many.mean(dim=0), rtol=0, atol=0.08)


def test_mixed_images_change_style_once() -> None:
    torch.manual_seed(0)
    config = StyleGANConfig(channels=(8, 8, 8), latent_dim=8, style_mixing=0.5)
    styles = config.build(image_spec(16, 16))._styles(torch.zeros(2000, 0))
    changes = (styles[:, 1:] != styles[:, :-1]).any(dim=2).sum(dim=1)
    assert set(changes.tolist()) == {0, 1}
    assert changes.float().mean() == pytest.approx(0.5, abs=0.04)
    plain = config.model_copy(update={"style_mixing": 0.0}).build(image_spec(16, 16))
    same = plain._styles(torch.zeros(5, 0))
    assert torch.equal(same, same[:, :1].expand_as(same))


def test_growing_fades_every_size_in_from_0_to_1() -> None:
    config = StyleGANConfig(channels=(8, 8, 8), progressive=True, stage_epochs=4)
    assert [config.growth(epoch) for epoch in (0, 3.9, 4, 5, 6, 7.9, 8, 8.5, 10, 99)] == [
        (0, 1), (0, 1), (1, 0), (1, 0.5), (1, 1), (1, 1), (2, 0), (2, 0.25), (2, 1), (2, 1),
    ]  # fmt: skip
    assert config.growing_epochs == 10
    assert StyleGANConfig(channels=(8, 8, 8)).growth(0) == (2, 1)


@pytest.mark.parametrize("size", [(16, 16), (16, 8, 24)])
def test_a_size_at_alpha_0_is_the_one_before(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = StyleGANConfig(channels=(8, 8, 8), latent_dim=8, progressive=True)
    model = noisy(config.build(image_spec(*size)), 0.3)
    w = torch.randn(2, model.generator.num_styles, 8)
    noises = [torch.randn(2, *shape) for shape in model.generator.noise_shapes(2)]
    before = model.generator(w, noises, Growth(1, 1.0))
    assert before.shape == (2, 1, *(side // 2 for side in size))
    torch.testing.assert_close(model.generator(w, noises, Growth(2, 0.0)), doubled(before))
    after = model.generator(w, noises, Growth(2, 1.0))
    between = model.generator(w, noises, Growth(2, 0.25))
    torch.testing.assert_close(between, torch.lerp(doubled(before), after, 0.25))
    image, values = torch.randn(2, 1, *size), torch.zeros(2, 0)
    judged = model.discriminator(image, values, Growth(2, 0.0))
    torch.testing.assert_close(
        judged, model.discriminator(halved(image), values, Growth(1, 1.0)), rtol=1e-4, atol=1e-5
    )
    real = config.shrunk(image, Growth(1, 1.0))
    torch.testing.assert_close(real, halved(image))
    torch.testing.assert_close(config.shrunk(image, Growth(2, 0.0)), doubled(real))


def grown_config(tmp_path: Path, **extra: Any) -> Path:
    model = StyleGANConfig.tiny().model_dump(mode="json") | {
        "progressive": True, "stage_epochs": 4, "r1_every": 2, "path_length_weight": 1.0,
        "path_length_every": 3,
    }  # fmt: skip
    training = {"max_epochs": 6, "batch_size": 4, "sample_every_n_epochs": 0, **extra}
    path = tmp_path / "grown.yaml"
    sections = {"model": model, "training": training, "compute": {"precision": "32"}}
    path.write_text(reading.dump(sections), encoding="utf-8")
    return path


def test_a_run_resumed_in_the_middle_of_a_fade_ends_bit_for_bit(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    config = grown_config(tmp_path)
    train(config, phantoms, tmp_path / "straight")
    assert "images are enlarged" not in caplog.text

    def stop(family: StyleGAN) -> None:
        family.trainer.should_stop = family.current_epoch == 4
        AdversarialFamily.on_train_epoch_end(family)

    with monkeypatch.context() as patch:
        patch.setattr(StyleGAN, "on_train_epoch_end", stop)
        train(config, phantoms, tmp_path / "stopped")
    stopped = checkpoints.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    stage, alpha = stopped["state_dict"]["grown"].tolist()
    assert (stage, alpha) == (1, 0.5)
    assert "images are enlarged" in caplog.text
    train(config, phantoms, tmp_path / "stopped")
    one, other = (
        checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt")
        for name in ("straight", "stopped")
    )
    assert one["state_dict"]["grown"].tolist() == [1, 1]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())
    assert one["state_dict"]["path_length"] != 0


def test_enlarged_images_never_pass_for_the_best() -> None:
    torch.manual_seed(0)
    config = StyleGANConfig(channels=(8, 8, 8), latent_dim=8, progressive=True)
    model = config.build(image_spec(16, 16)).eval()
    examples = batch(torch.ones(4, 1, 16, 16))
    for growth, missing in (((0, 1), 2), ((1, 0.25), 1.75), ((2, 0.5), 0.5), ((2, 1), 0)):
        model.grown.copy_(torch.tensor(growth))
        with torch.inference_mode():
            terms = model.loss(examples)
            generated = model.sample(generators(0, 1, 2, 3), examples["condition"])
        assert generated.shape == (4, 1, 16, 16)
        torch.testing.assert_close(terms["loss"] - terms["sliced_wasserstein"],
                                   torch.tensor(2.0 * missing))  # fmt: skip
    assert sliced_wasserstein(-examples["image"], examples["image"]) < 2


def test_a_training_too_short_to_grow_is_refused(phantoms: Path, tmp_path: Path) -> None:
    config = grown_config(tmp_path, max_epochs=5)
    with pytest.raises(ConfigError, match=r"max_epochs 5: .* the full size after 6 epochs"):
        train(config, phantoms, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_grow_alike_to_the_bit(phantoms: Path, tmp_path: Path, forks) -> None:
    forks.script_together(
        EACH_RANK, grown_config(tmp_path), phantoms, tmp_path / "run", "compute.num_devices=2"
    )
    first, second = (load_file(tmp_path / "run" / f"rank_{i}.safetensors") for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_cannot_be_translated() -> None:
    (fault,) = StyleGANConfig.tiny().faults(image_spec(16, 16, source_channels=(0,)))
    assert fault.startswith("data.source_channels [0]: stylegan makes images out of noise")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "class"])
def test_conditions_are_followed_after_a_short_training(kind: str) -> None:
    """Flat images, as bright as their number says, or dark and bright by class."""
    torch.manual_seed(0)
    spec = ConditionSpec(name="Brightness", kind=kind, classes=("dark", "bright"), high=1)
    image = image_spec(8, 8, conditions=(spec,))
    model = StyleGANConfig(channels=(16, 16), latent_dim=16, num_mapping_layers=2).build(image)
    judge = list(model.discriminator.parameters())
    makers = [*model.mapping.parameters(), *model.generator.parameters()]
    optimizers = [torch.optim.Adam(weights, 2e-3, (0.0, 0.99)) for weights in (makers, judge)]
    for step in range(400):
        model._step = step
        known = torch.rand(16, 1) * 2 - 1 if kind == "number" else torch.randint(2, (16, 1)).float()
        level = 0.6 * (known if kind == "number" else 2 * known - 1)
        real = level.view(-1, 1, 1, 1) + 0.05 * torch.randn(16, 1, 8, 8)
        examples = batch(real, known)
        terms, generated = model.generator_loss(examples)
        optimizers[0].zero_grad()
        terms["loss"].backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        model.discriminator_loss(examples, generated.detach())["loss"].backward()
        optimizers[1].step()
    wanted = torch.tensor([[-1.0], [0.0], [1.0]]) if kind == "number" else torch.eye(2)[:, 1:]
    levels = 0.6 * (wanted if kind == "number" else 2 * wanted - 1)
    with torch.inference_mode():
        for value, level in zip(wanted, levels, strict=True):
            generated = model.eval().sample(
                generators(*range(32)), condition(32, value.expand(32, 1))
            )
            assert generated.mean() == pytest.approx(float(level), abs=0.2)
