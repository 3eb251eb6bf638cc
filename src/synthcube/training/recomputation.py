"""Activation checkpointing: what a block of a network makes inside is computed again backwards.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.models.first_stage import FirstStage

WRAPPED = "_checkpoint_wrapped_module."


def recompute_blocks(family: Family) -> int:
    """Wrap every block of the networks of `family`; returns how many.

    Blocks are the modules that a network has in a row (elements of a ModuleList or Sequential),
    with two weighted layers at least and no such row inside; and all others of these classes.
    Modules that keep something beside weights are left out: it would be moved twice in a step.

    Raises:
        ConfigError: there is no block.
    """
    kinds = tuple({type(each) for each in _rows(family) if _is_block(each)})
    wrapped = 0
    for parent in list(_trained_modules(family)):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds) and not any(True for _ in child.buffers()):
                setattr(parent, name, checkpoint_wrapper(child))
                wrapped += 1
    if not wrapped:
        raise ConfigError(
            f"compute.activation_checkpointing is true, but {family.config.name} has no blocks "
            "whose inside could be computed again: leave it out, and lower training.batch_size "
            "with training.accumulate to save memory."
        )
    return wrapped


def plain_name(name: str) -> str:
    """The name of a weight as it is without wrappers around blocks."""
    return name.replace(WRAPPED, "")


def _trained_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all inside, but for first stages, which have no backward pass."""
    if isinstance(module, FirstStage):
        return
    yield module
    for child in module.children():
        yield from _trained_modules(child)


def _rows(family: Family) -> Iterator[nn.Module]:
    for module in _trained_modules(family):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from module.children()


def _is_block(module: nn.Module) -> bool:
    inner = list(module.modules())[1:]
    weighted = [each for each in inner if any(w.ndim > 1 for w in each.parameters(recurse=False))]
    has_row = any(isinstance(each, (nn.ModuleList, nn.ModuleDict)) for each in inner)
    return len(weighted) > 1 and not has_row and type(module).forward is not nn.Module.forward
