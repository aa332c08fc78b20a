"""Memory of a training step by arithmetic: how many numbers the convolutions of a network put out for one sample.

Activations kept for the backward pass fill a GPU, and they can be counted from the description of a network. Input
channels do not matter, deep supervision heads below the first are not counted. Source: nnU-Net's planning heuristic.
A network of another kind joins by a function of its own in `ACTIVATIONS`.
"""

import math
from collections.abc import Callable, Sequence

from autoseg.schema import NetworkSpec


def _stages(network: NetworkSpec, patch: Sequence[int]) -> list[int]:
    """Outputs of one convolution in each stage, highest resolution first."""
    edges, outputs = list(patch), []
    for stride, features in zip(network.strides, network.features):
        edges = [edge // step for edge, step in zip(edges, stride)]
        outputs.append(features * math.prod(edges))
    return outputs


def _decoder(network: NetworkSpec, stages: list[int], patch: Sequence[int], heads: int) -> int:
    """A transposed convolution and `decoder_blocks` convolutions a stage, and the head at full resolution."""
    return sum((blocks + 1) * outputs for blocks, outputs in zip(network.decoder_blocks, stages)) + heads * math.prod(
        patch
    )


def _unet(network: NetworkSpec, patch: Sequence[int], heads: int) -> int:
    stages = _stages(network, patch)
    encoder = sum(blocks * outputs for blocks, outputs in zip(network.encoder_blocks, stages))
    return encoder + _decoder(network, stages, patch, heads)


def _resenc(network: NetworkSpec, patch: Sequence[int], heads: int) -> int:
    stages = _stages(network, patch)
    encoder = stages[0] + sum(2 * blocks * outputs for blocks, outputs in zip(network.encoder_blocks, stages))
    # The shortcut of a stage's first block has a convolution where the block changes channels or size.
    before = (network.features[0], *network.features)
    for outputs, stride, old, new in zip(stages, network.strides, before, network.features):
        if old != new or math.prod(stride) > 1:
            encoder += outputs
    return encoder + _decoder(network, stages, patch, heads)


ACTIVATIONS: dict[str, Callable[[NetworkSpec, Sequence[int], int], int]] = {"unet": _unet, "resenc": _resenc}


def activations(network: NetworkSpec, patch: Sequence[int], heads: int) -> int:
    """Convolution outputs of `network` for one sample of `patch` voxels, with `heads` output channels.

    `patch` has as many entries as the network has dimensions. Raises ValueError that lists the networks known here.
    """
    if network.name not in ACTIVATIONS:
        raise ValueError(f"the memory of network {network.name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[network.name](network, patch, heads)
