"""How a network uses where its patch lies: as one number, or channel by channel (FiLM).

`add` and `multiply` are those of the knee-cartilage study of Imperial College: the bottleneck is compressed to a few
numbers, these and the position give one scalar, and that is added to the first up-sampled map, or scales it. (There the
compressed maps are flattened; here they are averaged, so that patches of any size do.) A constant that is added is lost
where each sample is normalised by itself, as instance norm does, and batch norm in batches of one.

`film` is the stronger form (Perez et al., AAAI 2018): scale and shift of every channel, computed from the position, on
the result of every level of the decoder. No norm comes after the last of them. It is the default, since `add` does not
learn a phantom whose label only the place tells, where `film` does.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from autoseg.networks.blocks import CONVOLUTION

Mode = Literal["add", "multiply", "film"]

COMPRESSED = 8
"""Channels of the first two convolutions that compress the bottleneck; the study says that they are few."""

HIDDEN = 64
"""Numbers between the position and the scales and shifts."""


class Position(nn.Module):
    """Changes maps of a decoder by `position` (B, axes), in -1 to 1."""

    def enter(self, x: Tensor, bottom: Tensor, position: Tensor) -> Tensor:
        """The first up-sampled map `x` (B, C, *spatial), changed; `bottom` is what the encoder ended with."""
        return x

    def tune(self, x: Tensor, level: int, position: Tensor) -> Tensor:
        """The result `x` of level `level` of the decoder, changed."""
        return x


class ScalarPosition(Position):
    """One number a sample, between -1 and 1, that is added to a map or scales it by as much more or less."""

    def __init__(self, dimension: int, bottleneck: int, *, multiply: bool) -> None:
        super().__init__()
        self.multiply = multiply
        convolution, widths = CONVOLUTION[dimension], (bottleneck, COMPRESSED, COMPRESSED, 1)
        # Padded, as a bottleneck may be of a single voxel.
        self.compress = nn.Sequential(*(convolution(a, b, 3, 2, 1) for a, b in pairwise(widths)))
        self.describe = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU())
        self.decide = nn.Linear(4 + dimension, 1)

    def enter(self, x: Tensor, bottom: Tensor, position: Tensor) -> Tensor:
        """As `Position.enter`."""
        seen = self.describe(self.compress(bottom).flatten(2).mean(2))
        scalar = torch.tanh(self.decide(torch.cat((seen, position), 1)))
        scalar = scalar.reshape(-1, *(1,) * (x.ndim - 1))
        return x * (1 + scalar) if self.multiply else x + scalar


class FilmPosition(Position):
    """A scale and a shift for every channel of every level of a decoder; `widths` are the channels of the levels."""

    def __init__(self, dimension: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(dimension, HIDDEN), nn.ReLU())
        self.levels = nn.ModuleList(nn.Linear(HIDDEN, 2 * width) for width in widths)

    def tune(self, x: Tensor, level: int, position: Tensor) -> Tensor:
        """As `Position.tune`."""
        changes = self.levels[level](self.read(position))
        scale, shift = changes.reshape(len(x), -1, *(1,) * (x.ndim - 2)).chunk(2, 1)
        return x * (1 + scale) + shift


def position_of(mode: Mode, dimension: int, bottleneck: int, widths: Sequence[int]) -> Position:
    """The module for `mode`."""
    if mode == "film":
        return FilmPosition(dimension, widths)
    return ScalarPosition(dimension, bottleneck, multiply=mode == "multiply")
