"""Gradients of convolutions in bfloat16 on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synthcube.models.convolution import correct_small_gradients


def fill_free_memory_with_nan() -> None:
    """So that a kernel that reads memory which it did not write is seen."""
    for size in (64, 256, 1024, 4096, 16384, 65536, 262144, 1048576):
        for tensor in [torch.full((size,), float("nan")) for _ in range(8)]:
            del tensor


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((2, 2, 2), 3, 1),
        ((2, 4, 8), 3, 1),
        ((4, 1, 8), 3, 2),
        ((2, 2, 1), 3, 2),
        ((4, 4, 4), 5, 1),
        ((4, 4, 4), 7, 1),
        ((3, 3, 3), 3, 1),
        ((6, 6, 6), 3, 2),
    ],
)
def test_gradients_of_small_volumes_are_those_of_float64(
    layer: type[nn.Conv3d], memory_format: torch.memory_format, size: tuple[int, ...],
    kernel: int, stride: int,
) -> None:  # fmt: skip
    correct_small_gradients()
    torch.manual_seed(0)
    network = layer(16, 16, kernel, stride, kernel // 2).to(memory_format=memory_format)
    reference = layer(16, 16, kernel, stride, kernel // 2).double()
    reference.load_state_dict(network.state_dict())
    image = torch.randn(2, 16, *size, requires_grad=True)
    for _ in range(2):
        network.zero_grad()
        image.grad = None
        fill_free_memory_with_nan()
        with torch.autocast("cpu", torch.bfloat16):
            output = network(image)
        direction = torch.randn(output.shape)
        output.backward(direction.to(output.dtype))
        exact = image.detach().double().requires_grad_()
        reference.zero_grad()
        reference(exact).backward(direction.double())
        assert exact.grad is not None
        assert image.grad is not None
        pairs = [(image.grad, exact.grad)]
        pairs += [
            (ours.grad, theirs.grad)
            for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True)
        ]
        for ours, theirs in pairs:
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours.double(), theirs, atol=0.02 * scale, rtol=0)


def test_narrow_pictures_with_a_stride() -> None:
    correct_small_gradients()
    torch.manual_seed(0)
    network, image = nn.Conv2d(16, 16, 3, 2, 1), torch.randn(1, 16, 8, 1)
    for _ in range(4):
        network.zero_grad()
        fill_free_memory_with_nan()
        with torch.autocast("cpu", torch.bfloat16):
            network(image).float().square().sum().backward()
        assert network.weight.grad is not None
        # No voxel lies under the first and the last column of the kernel.
        assert torch.equal(network.weight.grad[..., [0, 2]], torch.zeros(16, 16, 3, 2))
