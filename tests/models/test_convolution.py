"""Convolutions on a CPU: gradients in bfloat16, and a single volume in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from synthcube.models.convolution import replace_kernels


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
    replace_kernels()
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
    replace_kernels()
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
def test_a_single_volume_in_float32_goes_to_onednn(
    memory_format: torch.memory_format, stride: int, bias: bool
) -> None:
    replace_kernels()
    torch.manual_seed(0)
    network = nn.Conv3d(8, 12, 3, stride, 1, bias=bias).to(memory_format=memory_format)
    reference = nn.Conv3d(8, 12, 3, stride, 1, bias=bias).double()
    reference.load_state_dict(network.state_dict())
    image = torch.randn(1, 8, 8, 10, 12).to(memory_format=memory_format).requires_grad_()
    exact = image.detach().double().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        output = network(image)
        output.square().sum().backward()
    expected = reference(exact)
    expected.square().sum().backward()
    operations = {event.key for event in recorded.key_averages()}
    assert {"aten::mkldnn_convolution", "aten::to_mkldnn"} <= operations
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    pairs = [(image, exact), *zip(network.parameters(), reference.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "size", "groups", "dtype"),
    [
        ((1, 1, 1), 16, 1, torch.float32),
        ((3, 1, 1), 16, 4, torch.float32),
        ((3, 3, 3), 4, 1, torch.float32),
        ((3, 3, 3), 8, 1, torch.float64),
    ],
)
def test_other_volumes_stay_where_they_were(
    kernel: tuple[int, int, int], size: int, groups: int, dtype: torch.dtype
) -> None:
    replace_kernels()
    network = nn.Conv3d(
        4, 4, kernel, padding=tuple(side // 2 for side in kernel), groups=groups
    ).to(dtype)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        network(torch.randn(1, 4, size, size, size, dtype=dtype)).sum().backward()
    assert not any("mkldnn" in event.key for event in recorded.key_averages())


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    replace_kernels()
    network = nn.Conv3d(4, 4, 3, padding=1)
    network.weight.requires_grad_(False)
    image = torch.randn(1, 4, 8, 8, 8, requires_grad=True)
    network(image).sum().backward()
    assert network.weight.grad is None
    assert image.grad is not None
    assert image.grad.layout == torch.strided
