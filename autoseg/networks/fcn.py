"""Fully convolutional networks on dilated ResNets (Long et al., CVPR 2015; He et al., CVPR 2016), as torchvision's.

The encoder shrinks by 8 and is dilated from there on; a small head predicts at that scale and is enlarged linearly.
While training an auxiliary head on the last stage but one predicts too; in deep supervision it has half the weight of
the other, as in torchvision. Names of tensors are torchvision's, with `encoder` in place of `backbone`.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, Share, read_options
from autoseg.networks.parts import ConvNormAct, initialise_he, same_size
from autoseg.networks.resnet import EXPANSION, ResNet
from autoseg.networks.stages import OutputStride, check_stages, hold_resolution
from autoseg.networks.strides import total
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class FCNOptions(Options):
    """What beside its stages makes an FCN."""

    output_stride: OutputStride = 8
    auxiliary: bool = True
    """Whether there is a second head, for training."""
    dropout: Share = 0.1


class FCN(Network):
    """`encoder` of bottleneck blocks, `classifier` on its last stage, `aux_classifier` on the one before."""

    first_weight = "encoder.conv1.weight"
    heads_prefixes = ("classifier.4.", "aux_classifier.4.")

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_stages(spec, levels=0)
        options = read_options(FCNOptions, spec)
        norm, activation = options.norm, options.activation
        strides, dilations = hold_resolution(spec.strides, options.output_stride)
        self.divisor = total(strides)
        whole = (1,) * spec.dimension
        self.scales = (whole, whole) if options.auxiliary else (whole,)
        self.output_weights = (2 / 3, 1 / 3) if options.auxiliary else (1.0,)
        self.encoder = ResNet(spec, in_channels, strides, dilations, bottleneck=True, norm=norm, activation=activation)

        def head(channels: int, kernel: Sequence[int]) -> nn.Sequential:
            inner = max(1, channels // EXPANSION)
            reduce = ConvNormAct(channels, inner, kernel, norm=norm, activation=activation)
            return nn.Sequential(*reduce, nn.Dropout(options.dropout), CONVOLUTION[spec.dimension](inner, heads, 1))

        self.classifier = head(spec.features[-1], spec.kernels[-1])
        self.aux_classifier = head(spec.features[-2], spec.kernels[-2]) if options.auxiliary else None
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> Sequence[Tensor]:
        """As `Network.scales_of`: the logits, and those of the auxiliary head."""
        *_, earlier, last = self.encoder(x)
        logits = same_size(self.classifier(last), x)
        if not all_scales or self.aux_classifier is None:
            return [logits]
        return [logits, same_size(self.aux_classifier(earlier), x)]


def fcn_resnet50_spec(
    dimension: Dimension,
    *,
    output_stride: OutputStride = 8,
    auxiliary: bool = True,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.1,
) -> NetworkSpec:
    """3, 4, 6 and 3 blocks of 256, 512, 1024 and 2048 channels after the stem."""
    return NetworkSpec(
        name="fcn_resnet50",
        dimension=dimension,
        features=(64, 256, 512, 1024, 2048),
        strides=((2,) * dimension,) * 5,
        kernels=((7,) * dimension, *((3,) * dimension,) * 4),
        encoder_blocks=(1, 3, 4, 6, 3),
        decoder_blocks=(),
        options=asdict(
            FCNOptions(
                output_stride=output_stride, auxiliary=auxiliary, norm=norm, activation=activation, dropout=dropout
            )
        ),
    )


def fcn_resnet101_spec(
    dimension: Dimension,
    *,
    output_stride: OutputStride = 8,
    auxiliary: bool = True,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.1,
) -> NetworkSpec:
    """As `fcn_resnet50_spec`, with 23 blocks in the last stage but one."""
    shallow = fcn_resnet50_spec(
        dimension, output_stride=output_stride, auxiliary=auxiliary, norm=norm, activation=activation, dropout=dropout
    )
    return replace(shallow, name="fcn_resnet101", encoder_blocks=(1, 3, 4, 23, 3))


SOURCE = "Long et al., CVPR 2015, on the residual networks of He et al., CVPR 2016"
FCN_RESNET50 = Architecture(build=FCN, spec=fcn_resnet50_spec, source=SOURCE, deep_supervision=True)
FCN_RESNET101 = Architecture(build=FCN, spec=fcn_resnet101_spec, source=SOURCE, deep_supervision=True)
