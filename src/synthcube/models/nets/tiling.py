"""The last layers of a decoder, tile by tile, with the result of running them at once.

Two things tell a tile from the whole. Near its border a convolution sees padding instead of the
neighbour: tiles overlap by as much as the convolutions reach, and the overlap is cut off. A group
norm sees the tile alone, which spoils its contrast: here the statistics of the whole are gathered
tile by tile, one norm after the other, because each depends on those before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from monai.networks.blocks import SpatialAttentionBlock, Upsample
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def decoded(decoder: nn.Module, x: torch.Tensor, max_voxels: int) -> torch.Tensor:
    """What MONAI's decoder makes of x, (B, c, *spatial) to (B, C, *larger).

    From the first upsampling to more than `max_voxels` on, its blocks run tile by tile, which
    takes as many passes as there are group norms in them, each up to its norm, and one more. Where
    such blocks attend to the whole image, all run at once.
    """
    blocks: Any = decoder.blocks
    split, voxels = len(blocks), math.prod(x.shape[2:])
    for index, block in enumerate(blocks):
        if isinstance(block, Upsample):
            voxels *= int(2 ** (x.ndim - 2))
            if voxels > max_voxels:
                split = index
                break
    last = blocks[split:]
    if not last or any(isinstance(block, SpatialAttentionBlock) for block in last):
        whole: torch.Tensor = decoder(x)
        return whole
    x = _run(blocks[:split], x)
    factor, halo = reach(last)
    side = int(max_voxels ** (1 / (x.ndim - 2))) // factor
    return _run_in_tiles(last, x, max(side, 4 * halo), halo, factor)


def reach(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """How much larger the blocks make an image, and how far they see, in voxels of their input."""
    factor, seen = 1, 0.0
    for block in blocks:
        if isinstance(block, Upsample):
            factor *= 2
        for layer in block.modules():
            if isinstance(layer, _CONVOLUTIONS) and max(layer.kernel_size) == 3:
                seen += 1 / factor
    return factor, math.ceil(seen)


class Window(NamedTuple):
    """A tile along one axis, [start, stop), of which [core_start, core_stop) is its own part."""

    start: int
    stop: int
    core_start: int
    core_stop: int


def windows(length: int, tile: int, halo: int) -> list[Window]:
    """Tiles along an axis, at most `tile` long with `halo` at both ends; their cores partition it.

    `tile` is more than twice `halo`.
    """
    if length <= tile:
        return [Window(0, length, 0, length)]
    number = math.ceil(length / (tile - 2 * halo))
    edges = [length * i // number for i in range(number + 1)]
    return [
        Window(max(0, low - halo), min(length, high + halo), low, high)
        for low, high in itertools.pairwise(edges)
    ]


class _Tile(tuple[Window, ...]):
    """A window along each axis; gives indices of tensors (B, C, *spatial)."""

    def cut(self) -> tuple[Any, ...]:
        """The tile, of the whole input."""
        return (..., *(slice(each.start, each.stop) for each in self))

    def core(self, factor: int) -> tuple[Any, ...]:
        """Its own part, of a whole that is `factor` times larger than the input."""
        return (..., *(slice(e.core_start * factor, e.core_stop * factor) for e in self))

    def core_of(self, made: torch.Tensor) -> torch.Tensor:
        """Its own part of what was made of the tile, of any size."""
        factor = made.shape[2] // (self[0].stop - self[0].start)
        inside = [
            slice((e.core_start - e.start) * factor, (e.core_stop - e.start) * factor) for e in self
        ]
        core: tuple[Any, ...] = (..., *inside)
        return made[core]


def _run(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def _run_in_tiles(
    blocks: Sequence[nn.Module], x: torch.Tensor, tile: int, halo: int, factor: int
) -> torch.Tensor:
    size = x.shape[2:]
    lines = [windows(length, tile, halo) for length in size]
    tiles = [_Tile(each) for each in itertools.product(*lines)]
    with _SharedNorms(blocks).applied() as norms:
        norms.gather(tiles, lambda each: _run(blocks, x[each.cut()]))
        whole = x.new_empty(())
        for each in tiles:
            made = each.core_of(_run(blocks, x[each.cut()]))
            if not whole.ndim:
                whole = made.new_empty(*made.shape[:2], *(side * factor for side in size))
            whole[each.core(factor)] = made
    return whole


class _GatheredError(Exception):
    """Ends the pass of a tile where its statistics are found."""


class _SharedNorms:
    """Makes the group norms of layers use the statistics of the whole image."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        layers = itertools.chain.from_iterable(block.modules() for block in blocks)
        self.norms = [each for each in layers if isinstance(each, nn.GroupNorm)]
        self._statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tile = _Tile()

    @contextmanager
    def applied(self) -> Iterator[_SharedNorms]:
        hooks = [norm.register_forward_pre_hook(self._stop) for norm in self.norms]
        hooks += [norm.register_forward_hook(self._normalised) for norm in self.norms]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def gather(self, tiles: Sequence[_Tile], run: Callable[[_Tile], torch.Tensor]) -> None:
        """Find the statistics of every norm, in the order in which they are used."""
        for _ in self.norms:
            found: list[Any] = []
            for self._tile in tiles:
                try:
                    run(self._tile)
                except _GatheredError as gathered:
                    found.append(gathered.args)
            norms, *sums = zip(*found, strict=True)
            count, total, squares = (sum(each) for each in sums)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            self._statistics[norms[0]] = (mean.float(), variance.float())

    def _stop(self, norm: Any, inputs: tuple[torch.Tensor]) -> None:
        if norm in self._statistics:
            return
        core = self._tile.core_of(inputs[0]).float()
        grouped = core.reshape(len(core), norm.num_groups, -1)
        variance, mean = (each.double() for each in torch.var_mean(grouped, dim=-1, correction=0))
        count = grouped.shape[-1]
        raise _GatheredError(norm, count, count * mean, count * (variance + mean.square()))

    def _normalised(self, norm: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        x = inputs[0]  # (B, C, *spatial)
        mean, variance = (
            each.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)
            for each in self._statistics[norm]
        )  # (B, C) each
        scale = norm.weight.float() * (variance + norm.eps).rsqrt()
        shift = norm.bias.float() - mean * scale
        scale, shift = (each.view(*each.shape, *[1] * (x.ndim - 2)) for each in (scale, shift))
        return (x.float() * scale + shift).to(output.dtype)
