"""Strides of the stages of a network, in all: what an image is padded to, and how much smaller each stage is."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

Strides = Sequence[Sequence[int]]


def total(strides: Strides) -> tuple[int, ...]:
    """Product of all strides, axis by axis: by how much the last stage is smaller than the image."""
    return tuple(prod(steps) for steps in zip(*strides))


def running(strides: Strides) -> tuple[tuple[int, ...], ...]:
    """By how much each stage is smaller than the image, axis by axis; the last one by `total`."""
    return tuple(accumulate(map(tuple, strides), lambda done, step: tuple(map(mul, done, step))))
