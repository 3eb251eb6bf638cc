"""Convolutions that PyTorch computes wrongly or slowly on a CPU, sent to another of its kernels.

Seen with torch 2.13:

* Where an axis of the input is shorter than the kernel, such as 2 voxels under 3x3x3, oneDNN's
  bfloat16 kernel for the gradient of the weights reads and writes outside of its memory on CPUs
  with AVX-512: gradients are NaN or wrong, or the process dies. In 2D only an axis of 1 voxel under
  a stride of 2 meets it. float32 is right.
* In float32, a single small volume is unfolded instead of going to oneDNN, which takes two to three
  times as long: ConvParams::use_mkldnn in ATen/native/Convolution.cpp wants a batch of two, or
  20,480 values without those of the last axis.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")  # what it registers goes when it is deleted
_FEWEST_VOXELS = 512  # of the input; below it unfolding was as fast


@cache
def replace_kernels() -> None:
    """Compute such convolutions correctly and fast, in this process and from now on.

    It replaces PyTorch's CPU kernels of `slow_conv3d_forward` and `convolution_backward`, and so
    reaches every network, loss and library. A call costs about 30 microseconds more.
    """
    _replace_backward()
    _replace_forward()


def _replace_backward() -> None:
    operation = torch.ops.aten.convolution_backward.default
    kernel = torch.library.get_kernel(operation, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def backward(gradient: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> Any:
        sizes = zip(image.shape[2:], weight.shape[2:], strict=True)
        if image.dtype == torch.bfloat16 and any(size < kernel_size for size, kernel_size in sizes):
            tensors = (gradient.float(), image.float(), weight.float())
            gradients = kernel.call_boxed(keys, *tensors, *rest)
            return tuple(None if one is None else one.bfloat16() for one in gradients)
        if _unfolded(image, weight, *rest[1:7]):
            # Gradients and images in oneDNN's own layout always go to it.
            tensors = (gradient.to_mkldnn(), image.to_mkldnn(), weight)
            gradients = kernel.call_boxed(keys, *tensors, *rest)
            return tuple(
                one.to_dense() if one is not None and one.is_mkldnn else one for one in gradients
            )
        return kernel.call_boxed(keys, gradient, image, weight, *rest)

    _library.impl("convolution_backward", backward, "CPU")


def _replace_forward() -> None:
    operation = torch.ops.aten.slow_conv3d_forward.default
    kernel = torch.library.get_kernel(operation, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def forward(
        image: Tensor, weight: Tensor, kernel_size: Sequence[int], bias: Tensor | None,
        stride: Sequence[int], padding: Sequence[int],
    ) -> Any:  # fmt: skip
        if _is_faster_in_onednn(image, weight):
            return torch.mkldnn_convolution(image, weight, bias, padding, stride, (1, 1, 1), 1)
        return kernel.call_boxed(keys, image, weight, kernel_size, bias, stride, padding)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        _library.impl("slow_conv3d_forward", forward, "CPU")


def _is_faster_in_onednn(image: Tensor, weight: Tensor) -> bool:
    return (
        image.dtype == weight.dtype == torch.float32
        and math.prod(image.shape[2:]) >= _FEWEST_VOXELS
        and image.shape[1] == weight.shape[1]  # in groups, unfolding was as fast
        and max(weight.shape[-2:]) > 1
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def _unfolded(image: Tensor, weight: Tensor, *settings: Any) -> bool:
    """Whether PyTorch would unfold a volume that oneDNN convolves sooner."""
    if image.ndim != 5 or len(image) > 1 or not _is_faster_in_onednn(image, weight):
        return False
    backend = torch._C._select_conv_backend(image, weight, None, *settings)
    return bool(backend.name == "Slow3d")
