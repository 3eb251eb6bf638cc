"""Dropout in the residual blocks of a U-Net: while it trains, and only then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import Tensor

from synthcube.models import registry
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.training.privacy import clipped_sum

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), file_format="png",
    affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)), intensity_range=((0, 255),),
)  # fmt: skip
CONDITION = Condition(values=torch.zeros(2, 0), source=torch.zeros(2, 0, 16, 16))


def family(name: str, dropout: float) -> Any:
    kind = registry.find(name)
    torch.manual_seed(0)
    return kind.model_validate(kind.tiny().model_dump() | {"dropout": dropout}).build(IMAGE)


@pytest.mark.parametrize("name", ["rectified_flow", "ddpm"])
def test_each_residual_block_leaves_out_that_share_of_its_features(name: str) -> None:
    network, plain = family(name, 0.5).network, family(name, 0.0).network
    assert network.state_dict().keys() == plain.state_dict().keys()
    network = copy.deepcopy(network)  # as the average of the weights is made
    shares: list[float] = []
    blocks = [block for block in network.modules() if isinstance(block, DiffusionUNetResnetBlock)]
    for block in blocks:
        block.conv2.register_forward_pre_hook(
            lambda _, inputs: shares.append((inputs[0] == 0).float().mean().item())
        )
    x_t, time = torch.randn(2, 1, 16, 16), torch.tensor([100.0, 900.0])

    def predicted(of: torch.nn.Module) -> Tensor:
        shares.clear()
        output: Tensor = of(x_t, time, CONDITION)
        return output

    predicted(network.train())
    assert len(shares) == len(blocks) > 4
    assert shares == pytest.approx([0.5] * len(blocks), abs=0.1)
    assert torch.equal(predicted(network.eval()), predicted(plain.eval()))
    assert max(shares, default=0.0) < 0.05


def test_a_private_training_takes_dropout() -> None:
    model = family("rectified_flow", 0.5).train()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)  # the last layers begin at zero
    batch = Batch(
        image=torch.randn(1, 1, 16, 16).expand(2, -1, -1, -1), label=torch.zeros(2).long(),
        index=torch.arange(2), augmented=False, condition=CONDITION,
    )  # fmt: skip
    total = clipped_sum(model, batch, clip_norm=1.0, draws=1, images_at_once=2)
    norm = torch.cat([gradient.flatten() for gradient in total.values()]).norm()
    assert 0 < norm <= 2
