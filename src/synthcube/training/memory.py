"""What a training will need, estimated before it starts."""

from __future__ import annotations

import torch

from synthcube.adversarial import AdversarialFamily
from synthcube.family import FamilyConfig
from synthcube.schema import Batch, Condition, ImageSpec

_STATES = 4  # gradient, two moments of Adam, moving average: each as large as trained weights


def training_bytes(
    config: FamilyConfig, image: ImageSpec, batch_size: int, *, mixed: bool, device: str
) -> tuple[int, int]:
    """Bytes of weights, and of a training step at that batch size.

    A real forward pass of one image tells what is kept for its backward pass; nothing else is
    measured, so treat it as a lower bound.
    """
    family = config.build(image)
    sizes = {each: each.numel() * each.element_size() for each in family.parameters()}
    weights = sum(sizes.values())
    trained = sum(size for each, size in sizes.items() if each.requires_grad)
    kept = 0
    seen: set[int] = set()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    batch = Batch(
        image=torch.zeros(1, image.channels, *image.size),
        label=torch.zeros(1, dtype=torch.int64),
        index=torch.zeros(1, dtype=torch.int64),
        augmented=False,
        condition=Condition(
            values=torch.zeros(1, len(image.conditions)),
            source=torch.zeros(1, len(image.source_channels), *image.size),
        ),
    )
    with (
        torch.autograd.graph.saved_tensors_hooks(count, torch.Tensor.detach),
        torch.autocast(device, torch.bfloat16, enabled=mixed),
    ):
        if isinstance(family, AdversarialFamily) and family.discriminator is not None:
            family.generator_loss(batch)  # through the discriminator too; `loss` is validated only
        else:
            family.loss(batch)
    return weights, weights + trained * _STATES + kept * batch_size
