"""Gradients of small convolutions in bfloat16 on a CPU, which PyTorch computes wrongly.

Where an axis of the input is shorter than the kernel, such as 2 voxels under 3x3x3, oneDNN's
bfloat16 kernel for the gradient of the weights reads and writes outside of its memory: gradients
are NaN or wrong, or the process dies. In 2D only an axis of 1 voxel under a stride of 2 meets it.
Seen with torch 2.13 on CPUs with AVX-512; float32 is right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")  # what it registers goes when it is deleted


@cache
def correct_small_gradients() -> None:
    """Compute gradients of such convolutions in float32, in this process and from now on.

    It replaces PyTorch's CPU kernel of `convolution_backward`, and so reaches every network, loss
    and library. Such images are tiny, and a call costs about 30 microseconds more.
    """
    operation = torch.ops.aten.convolution_backward.default
    kernel = torch.library.get_kernel(operation, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def backward(gradient: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> Any:
        sizes = zip(image.shape[2:], weight.shape[2:], strict=True)
        if image.dtype == torch.bfloat16 and any(size < kernel_size for size, kernel_size in sizes):
            tensors = (gradient.float(), image.float(), weight.float())
            gradients = kernel.call_boxed(keys, *tensors, *rest)
            return tuple(None if one is None else one.bfloat16() for one in gradients)
        return kernel.call_boxed(keys, gradient, image, weight, *rest)

    _library.impl("convolution_backward", backward, "CPU")
