"""Penalties on how fast a network changes, which need gradients of gradients.

R1: Mescheder et al., "Which Training Methods for GANs do actually Converge?" (ICML 2018). Path
length: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def squared_slope(
    judge: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor
) -> torch.Tensor:
    """R1: squared gradient of the logits (B,) by the images, averaged over the images.

    Without autocast: differentiated twice, bfloat16 has too few digits.
    """
    with torch.autocast(image.device.type, enabled=False):
        real = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
    return slope.square().flatten(1).sum(dim=1).mean()


def slope_lengths(
    make: Callable[[torch.Tensor], torch.Tensor], styles: torch.Tensor
) -> torch.Tensor:
    """(B,) lengths of the gradient of images by their styles (B, L, dim), in random directions."""
    with torch.autocast(styles.device.type, enabled=False):
        image = make(styles)
        direction = torch.randn_like(image) / math.sqrt(math.prod(image.shape[2:]))
        (slope,) = torch.autograd.grad((image * direction).sum(), styles, create_graph=True)
    return slope.square().sum(dim=2).mean(dim=1).sqrt()
