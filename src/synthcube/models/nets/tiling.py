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
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from monai.networks.blocks import SpatialAttentionBlock, Upsample
from torch import Tensor, nn


def decode_in_tiles(decoder: nn.Module, x: Tensor, max_voxels: int) -> Tensor:
    """Output of MONAI's decoder for x: (B, c, *spatial) to (B, C, *larger).

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
        whole: Tensor = decoder(x)
        return whole
    x = nn.Sequential(*blocks[:split])(x)
    factor, halo = reach(last)
    side = int(max_voxels ** (1 / (x.ndim - 2))) // factor
    return _run_in_tiles(last, x, max(side, 4 * halo), halo, factor)


def reach(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """How much larger blocks make an image, and how far they see, in voxels of their input."""
    factor, radius = 1, 0.0
    for block in blocks:
        if isinstance(block, Upsample):
            factor *= 2
        for layer in block.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and max(layer.kernel_size) == 3:
                radius += 1 / factor
    return factor, math.ceil(radius)


class Window(NamedTuple):
    """A tile along one axis, [start, stop), whose core, [core_start, core_stop), is kept."""

    start: int
    stop: int
    core_start: int
    core_stop: int


def windows(length: int, tile: int, halo: int) -> list[Window]:
    """Tiles along an axis, at most `tile` long (more than twice `halo`), with `halo` at both ends;
    their cores partition it."""
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
        """Index of the tile in the whole input."""
        return (..., *(slice(window.start, window.stop) for window in self))

    def core(self, factor: int) -> tuple[Any, ...]:
        """Index of the core in a whole output that is `factor` times larger than the input."""
        return (..., *(slice(w.core_start * factor, w.core_stop * factor) for w in self))

    def core_of(self, output: Tensor) -> Tensor:
        """The core of an output, or of features of any size, for this tile."""
        factor = output.shape[2] // (self[0].stop - self[0].start)
        edges = [(w.core_start - w.start, w.core_stop - w.start) for w in self]
        inside: Any = (..., *(slice(low * factor, high * factor) for low, high in edges))
        return output[inside]


def _run_in_tiles(
    blocks: Sequence[nn.Module], x: Tensor, side: int, halo: int, factor: int
) -> Tensor:
    size, run = x.shape[2:], nn.Sequential(*blocks)
    axes = [windows(length, side, halo) for length in size]
    tiles = [_Tile(line) for line in itertools.product(*axes)]
    with _SharedNorms(blocks).applied() as norms:
        norms.gather(tiles, lambda tile: run(x[tile.cut()]))
        whole = x.new_empty(())
        for tile in tiles:
            core = tile.core_of(run(x[tile.cut()]))
            if not whole.ndim:
                whole = core.new_empty(*core.shape[:2], *(side * factor for side in size))
            whole[tile.core(factor)] = core
    return whole


class _GatheredError(Exception):
    """Ends the pass of a tile as soon as its statistics are known."""


class _SharedNorms:
    """Makes the group norms of layers use the statistics of the whole image."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        layers = itertools.chain.from_iterable(block.modules() for block in blocks)
        self.norms = [layer for layer in layers if isinstance(layer, nn.GroupNorm)]
        self._statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._tile = _Tile()

    @contextmanager
    def applied(self) -> Iterator[_SharedNorms]:
        with ExitStack() as stack:
            for norm in self.norms:
                stack.enter_context(norm.register_forward_pre_hook(self._stop))
                stack.enter_context(norm.register_forward_hook(self._normalised))
            yield self

    def gather(self, tiles: Sequence[_Tile], run: Callable[[_Tile], Tensor]) -> None:
        """Compute the statistics of every norm, in the order in which the norms are used."""
        for _ in self.norms:
            of_tiles: list[Any] = []
            for self._tile in tiles:
                try:
                    run(self._tile)
                except _GatheredError as gathered:
                    of_tiles.append(gathered.args)
            norms, *sums = zip(*of_tiles, strict=True)
            count, total, squares = (sum(terms) for terms in sums)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            self._statistics[norms[0]] = (mean.float(), variance.float())

    def _stop(self, norm: Any, inputs: tuple[Tensor]) -> None:
        if norm in self._statistics:
            return
        core = self._tile.core_of(inputs[0]).float()
        grouped = core.reshape(len(core), norm.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
        variance, mean, count = variance.double(), mean.double(), grouped.shape[-1]
        raise _GatheredError(norm, count, count * mean, count * (variance + mean.square()))

    def _normalised(self, norm: Any, inputs: tuple[Tensor], output: Tensor) -> Any:
        x = inputs[0]  # (B, C, *spatial)
        mean, variance = (
            statistic.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)
            for statistic in self._statistics[norm]
        )  # (B, C) each
        scale = norm.weight.float() * (variance + norm.eps).rsqrt()
        shift = norm.bias.float() - mean * scale
        shape = (*scale.shape, *[1] * (x.ndim - 2))
        return (x.float() * scale.view(shape) + shift.view(shape)).to(output.dtype)
