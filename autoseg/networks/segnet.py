"""SegNet (Badrinarayanan et al., arXiv:1511.00561, PAMI 2017): a decoder that remembers where each maximum was.

The encoder is that of VGG16, with batch norm. Pooling keeps the place of each maximum, and the decoder puts values back
to these places, leaving zeros between for its convolutions to fill. No features cross over. The network pools once
more than it has encoder levels: the lowest stage of its specification has no blocks, only what was pooled.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import initialise_he
from autoseg.networks.pooled import convolutions, first_weight, halving_spec
from autoseg.networks.strides import total
from autoseg.networks.unet import check_spec
from autoseg.schema import Dimension, NetworkSpec

MAX_POOL: dict[int, Any] = {2: F.max_pool2d, 3: F.max_pool3d}


def pool(x: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, C, *spatial) -> maxima (B, C, *spatial / stride), and where each was: its place in the flattened channel."""
    maxima, places = MAX_POOL[len(stride)](x, tuple(stride), tuple(stride), return_indices=True)
    return maxima, places


def unpool(maxima: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """Values back to their places in zeros (B, C, *size); for windows that do not overlap, as those of `pool`."""
    # As torch's max_unpool, and also in half precision, compiled, and in ONNX.
    zeros = maxima.new_zeros((*maxima.shape[:2], prod(size)))
    return zeros.scatter(2, places.flatten(2), maxima.flatten(2)).reshape(*maxima.shape[:2], *size)


class SegNet(Network):
    """`spec.encoder_blocks[i]` convolutions in stage i, none at the bottom; `spec.decoder_blocks[i]` in level i.

    The last convolution of a decoder level leads to the width of the level above, that of the finest to the logits.
    Raises ValueError for a specification that does not fit.
    """

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        blocks = spec.encoder_blocks
        check_spec(spec if blocks[-1:] != (0,) else replace(spec, encoder_blocks=(*blocks[:-1], 1)))
        options = read_options(Options, spec)
        self.divisor, self.scales = total(spec.strides), ((1,) * spec.dimension,)
        self.strides = spec.strides[1:]
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        channels, bottom = in_channels, len(spec.features) - 1
        for number, (features, count) in enumerate(zip(spec.features, spec.encoder_blocks)):
            widths = [channels, *(features,) * count]
            if number == bottom:  # values go back to places in the stage above, so there are as many channels
                widths[-1] = channels
            stage = convolutions(widths, spec.kernels[number], options)
            if options.dropout and number > bottom - 3:
                stage.append(nn.Dropout(options.dropout))
            self.encoder.append(stage)
            channels = widths[-1]
        for number, count in enumerate(spec.decoder_blocks):
            widths = [spec.features[number]] * count
            # The head is the last convolution of the finest level.
            self.decoder.append(
                convolutions([*widths, *spec.features[max(number - 1, 0) : number]], spec.kernels[number], options)
            )
        kernel = spec.kernels[0]
        conv = CONVOLUTION[spec.dimension]
        self.heads = nn.ModuleList([conv(spec.features[0], heads, kernel, padding=tuple(k // 2 for k in kernel))])
        self.first_weight = first_weight(self)
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; one scale."""
        remembered = []
        for stage, stride in zip(self.encoder, self.strides):
            x = stage(x)
            size = x.shape[2:]
            x, places = pool(x, stride)
            remembered.append((places, size))
        x = self.encoder[-1](x)
        for number in reversed(range(len(self.decoder))):
            x = self.decoder[number](unpool(x, *remembered.pop()))
        return [self.heads[0](x)]


def segnet_spec(
    dimension: Dimension,
    *,
    width: int = 64,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """The convolutions of VGG16: 2, 2, 3, 3, 3 of them, `width` features doubled up to eightfold."""
    blocks = (2, 2, 3, 3, 3)
    return halving_spec(
        "segnet",
        dimension,
        tuple(width * factor for factor in (1, 2, 4, 8, 8, 8)),
        {"norm": norm, "activation": activation, "dropout": dropout},
        encoder_blocks=(*blocks, 0),
        decoder_blocks=blocks,
    )


SEGNET = Architecture(build=SegNet, spec=segnet_spec, source="Badrinarayanan et al., PAMI 2017")
