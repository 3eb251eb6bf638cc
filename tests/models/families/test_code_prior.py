"""The transformer over codes: it sees the past alone, and draws what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube import config
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError
from synthcube.models.families.code_prior import CodePrior, CodePriorConfig, draw_codes
from synthcube.schema import Batch, Condition
from synthcube.tasks.train import train


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> DataModule:
    return DataModule(
        read_manifest(phantoms), config.build({}).data, batch_size=5, seed=0, cache=tmp_path / "c"
    )


@pytest.fixture
def prior(first_stage, data: DataModule) -> CodePrior:
    changed = {"first_stage": str(first_stage("vqvae")), "temperature": 1.0}
    settings = CodePriorConfig.tiny().model_copy(update=changed).resolved()
    torch.manual_seed(0)
    family = settings.build(data.image)
    family.fit_statistics(data.every_image(), data.rows("train"))
    return family


def test_codes_are_made_once_and_decode_to_the_reconstruction(prior, data: DataModule) -> None:
    batch = data.examples([4, 1])
    first = prior.first_stage.family
    codes = prior.compressed(batch)
    assert torch.equal(codes.long(), first.encode_codes(batch["image"]).flatten(1))
    shape = (2, *first.code_shape())
    images = first.decode_codes(codes.long().view(shape))
    torch.testing.assert_close(images, first.reconstruct(batch["image"]), rtol=0, atol=1e-6)


def test_a_code_depends_on_those_before_it_alone(prior: CodePrior) -> None:
    codes = torch.randint(8, (1, prior.length - 1))
    other = codes.clone()
    other[0, 5] = (codes[0, 5] + 1) % 8
    values = torch.zeros(1, 0)
    change = (prior.network(codes, values) - prior.network(other, values)).abs().amax(dim=2)[0]
    assert change[:6].max() == 0
    assert change[6] > 1e-4
    shorter = prior.network(codes[:, :3], values)
    torch.testing.assert_close(shorter, prior.network(codes, values)[:, :4])


def test_the_loss_is_the_mean_of_minus_log_probabilities(
    prior: CodePrior, data: DataModule
) -> None:
    prior.eval()
    batch = data.examples([0, 1, 2])
    terms = prior.loss(batch)
    codes = prior.compressed(batch).long()
    total = 0.0
    for row in codes:
        for place, code in enumerate(row):
            logits = prior.network(row[None, :place], torch.zeros(1, 0))[0, -1]
            total -= logits.log_softmax(0)[code].item()
    assert terms["loss"].item() == pytest.approx(total / codes.numel(), rel=1e-4)
    assert terms["perplexity"].item() == pytest.approx(math.exp(terms["loss"].item()))


def test_codes_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    drawn = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2), (1.0, 1), (1.0, 9)):
        codes = draw_codes(logits.expand(len(drawn), -1), drawn, temperature, top_k)
        expected = (logits / temperature).softmax(0)
        if top_k:
            kept = torch.zeros(4).scatter(0, logits.topk(min(top_k, 4)).indices, 1.0)
            expected = expected * kept / (expected * kept).sum()
        shares = torch.bincount(codes, minlength=4) / len(drawn)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
        assert torch.all(shares[expected == 0] == 0)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_possible_codes(draw: float) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 3.0, -math.inf]])
    code = draw_codes(logits, torch.tensor([draw], dtype=torch.float64), 1.0, None).item()
    assert code == (1 if draw == 0 else 2)


def test_sampling_with_top_1_is_greedy(prior: CodePrior, data: DataModule) -> None:
    prior.eval()
    prior.config = prior.config.model_copy(update={"top_k": 1})
    none = Condition(values=torch.zeros(2, 0), source=torch.zeros(2, 0))
    with torch.inference_mode():
        one, other = prior.sample([torch.Generator().manual_seed(i) for i in (0, 1)], none)
    assert torch.equal(one, other), "no draw matters"


def test_a_few_images_are_learned_by_heart(prior: CodePrior, data: DataModule) -> None:
    batch = data.examples([0, 1, 2, 3])
    trained = [weight for weight in prior.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    before = prior.loss(batch)["loss"].item()
    for _ in range(150):
        optimizer.zero_grad()
        prior.loss(batch)["loss"].backward()
        optimizer.step()
    after = prior.loss(batch)["loss"].item()
    # Four images: no more than log 4 nats in all can stay unknown, but for what is not learned.
    assert after < min(before / 2, 3 * math.log(4) / prior.length + 0.05)
    real = {tuple(row.tolist()) for row in prior.compressed(batch)}
    prior.eval()
    drawn: list[Any] = []
    prior.first_stage.family.decode_codes = lambda codes: drawn.append(codes) or codes.float()
    none = Condition(values=torch.zeros(8, 0), source=torch.zeros(8, 0))
    with torch.inference_mode():
        prior.sample([torch.Generator().manual_seed(i) for i in range(8)], none)
    written = [tuple(row.flatten().tolist()) for row in drawn[0]]
    assert sum(row in real for row in written) >= 4


def test_an_augmented_batch_is_encoded_anew(prior: CodePrior, data: DataModule) -> None:
    batch = data.examples([0, 1])
    turned = Batch(**{**batch, "image": batch["image"].flip(2), "augmented": True})
    expected = prior.first_stage.family.encode_codes(turned["image"]).flatten(1)
    assert torch.equal(prior.compressed(turned).long(), expected)


def test_an_autoencoder_without_codes_is_refused(
    tiny_config, first_stage, phantoms: Path, tmp_path: Path
) -> None:
    path = f"model.first_stage={first_stage('autoencoder_kl')}"
    with pytest.raises(ConfigError, match="trained autoencoder_kl; code_prior needs a vqvae"):
        train(tiny_config("code_prior"), phantoms, tmp_path / "run", overrides=[path])


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="dim 10 must be a multiple of num_heads 4"):
        CodePriorConfig(dim=10)
