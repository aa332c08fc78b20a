"""Networks by name. A plan names one of the table, or a user's own as `package.module:Name`.

A network of your own is called with (spec, in_channels, heads) and gives a torch module whose
`forward(x, all_scales=False)` maps images (B, C, *spatial) to logits (B, heads, *spatial), or with `all_scales` to a
list of logits, highest resolution first, that shrink by `scales` of the module, or where it has none by
`spec.strides`; a list of one is allowed. With `output_weights`, a number an output, they count so in deep supervision.
With `encoder_prefixes`, what names of its encoder's parameters begin with, that can be frozen or have a rate of its
own. One with an attribute `takes_position` that is true is called with `position` too: where in its image each patch
lies, (B, axes) float32 from -1 to 1 along each axis, 0 in the middle. What is named has an attribute `dimensions`, as
(2,), if it is for 2D or 3D alone.
Naming a module imports it: a plan that does so is as trustworthy as the code beside it.
"""

import inspect
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_origin

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from autoseg.networks.attention_unet import ATTENTION_UNET
from autoseg.networks.base import Architecture
from autoseg.networks.deeplab import DEEPLABV3PLUS
from autoseg.networks.encoder_unet import RESNET34_UNET, VGG_UNET
from autoseg.networks.fc_densenet import FC_DENSENET56, FC_DENSENET67, FC_DENSENET103
from autoseg.networks.fcn import FCN_RESNET50, FCN_RESNET101
from autoseg.networks.mednext import MEDNEXT
from autoseg.networks.multires_unet import MULTIRES_UNET
from autoseg.networks.primus import PRIMUS_V3
from autoseg.networks.r2_unet import R2_ATTENTION_UNET, R2_UNET
from autoseg.networks.resenc import RESENC
from autoseg.networks.segnet import SEGNET
from autoseg.networks.strides import running
from autoseg.networks.unet import UNET
from autoseg.networks.unet3d import RELATIVE_UNET3D, SLICE_UNET3D, UNET3D, UNET3D_NOHIGHWAY
from autoseg.networks.unet_vanilla import UNET_VANILLA
from autoseg.networks.unetpp import UNETPP
from autoseg.networks.vnet import RELATIVE_VNET, SLICE_VNET, VNET
from autoseg.own import own
from autoseg.records import AutosegError, nearest, problems
from autoseg.schema import Dimension, NetworkSpec
from autoseg.settings import parse_call

__all__ = ["NETWORKS", "Architecture", "asked", "build", "options_of", "output_scales", "output_weights", "spec_of"]

NETWORKS: dict[str, Architecture] = {
    "unet": UNET,
    "resenc": RESENC,
    "unet_vanilla": UNET_VANILLA,
    "attention_unet": ATTENTION_UNET,
    "multires_unet": MULTIRES_UNET,
    "r2_unet": R2_UNET,
    "r2_attention_unet": R2_ATTENTION_UNET,
    "fc_densenet56": FC_DENSENET56,
    "fc_densenet67": FC_DENSENET67,
    "fc_densenet103": FC_DENSENET103,
    "segnet": SEGNET,
    "unetpp": UNETPP,
    "resnet34_unet": RESNET34_UNET,
    "vgg_unet": VGG_UNET,
    "fcn_resnet50": FCN_RESNET50,
    "fcn_resnet101": FCN_RESNET101,
    "deeplabv3plus": DEEPLABV3PLUS,
    "unet3d": UNET3D,
    "unet3d_nohighway": UNET3D_NOHIGHWAY,
    "relative_unet3d": RELATIVE_UNET3D,
    "slice_unet3d": SLICE_UNET3D,
    "vnet": VNET,
    "relative_vnet": RELATIVE_VNET,
    "slice_vnet": SLICE_VNET,
    "mednext": MEDNEXT,
    "primus_v3": PRIMUS_V3,
}


AS_ITS_SOURCE = "as its source"
"""What is shown for the value of an option that the source of a network decides; it may be stated too."""


def build(spec: NetworkSpec, in_channels: int, heads: int) -> nn.Module:
    """The network that `spec` describes, with fresh weights drawn from torch's global generator, on the CPU.

    Raises AutosegError for a name that is unknown, cannot be imported or is no network, and ValueError for a
    specification that does not fit the architecture.
    """
    if (known := architecture(spec.name)) is not None:
        return known.build(spec, in_channels, heads)
    make = own(spec.name, "network")
    try:
        network = make(spec, in_channels, heads)
    except AutosegError:
        raise
    except Exception as error:
        raise AutosegError(
            f"the network {spec.name} cannot be built of (spec, {in_channels} channels, {heads} heads): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise AutosegError(f"{spec.name} gave a {type(network).__name__}; it must give a torch.nn.Module")
    parameters = inspect.signature(network.forward).parameters.values()
    if not any(p.name == "all_scales" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise AutosegError(f"the network {spec.name} must take `all_scales`: def forward(self, x, all_scales=False)")
    return network


def architecture(name: str) -> Architecture | None:
    """The entry of the table; None for one of your own. Raises AutosegError that lists the ones there are."""
    if name in NETWORKS:
        return NETWORKS[name]
    if ":" not in name:
        raise AutosegError(
            f"unknown network {name!r}{nearest(name, NETWORKS)}; choose one of {', '.join(NETWORKS)}, or name your own "
            "as package.module:Name"
        )
    return None


def asked(text: str) -> tuple[str, Architecture | None, dict[str, Any]]:
    """Name, entry of the table (None: one of your own) and options of `name(key=value, ...)` as people write it.

    Raises AutosegError for a name that is unknown, for options that the network does not have, and for values of
    another kind; a number alone stands for a list of one.
    """
    name, options = parse_call(text)
    found = architecture(name)
    there = {} if found is None else {one.name: one for one in _options(found)}
    if odd := [option for option in options if option not in there]:
        raise AutosegError(f"the network {name} has no option {odd[0]!r}; it has {', '.join(there) or 'none'}")
    return name, found, {option: _typed(name, there[option], value) for option, value in options.items()}


def _typed(name: str, option: inspect.Parameter, value: Any) -> Any:
    kind = type(option.default) if option.annotation is option.empty else option.annotation
    if value == AS_ITS_SOURCE and option.default is None:
        return None
    if get_origin(kind) is Sequence and isinstance(value, int | float):
        value = [value]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Input should be ").partition(",")[0]
        raise AutosegError(f"the network {name}: {option.name} must be {said}, not {value!r}") from None


def options_of(found: Architecture) -> str:
    """What `name(key=value)` may state of an entry of the table, with the values that hold if it does not."""
    shown = (f"{one.name}={_as_asked(one.default)}" for one in _options(found))
    return ", ".join(shown) or "none"


def _options(found: Architecture) -> list[inspect.Parameter]:
    return [each for each in [*inspect.signature(found.spec).parameters.values()][1:] if each.name != "name"]


def _as_asked(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_asked, value))}]"
    return AS_ITS_SOURCE if value is None else str(value) or "''"


@lru_cache(maxsize=64)
def spec_of(text: str, dimension: Dimension) -> NetworkSpec:
    """The network of its source that `name(key=value, ...)` means.

    Raises AutosegError for one that is not known or not of that dimension, and for options that do not fit.
    """
    name, found, options = asked(text)
    if found is None:
        raise AutosegError(f"{name} is a network of your own, whose stages are known only in a plan")
    if dimension not in found.dimensions:
        raise AutosegError(f"{name} is no network for {dimension}D images")
    try:
        spec = found.spec(dimension, **options)
        # Much of a specification is only looked at where something is built of it.
        with torch.device("meta"):
            found.build(spec, spec.slices, 2)
    except ValidationError as error:
        raise AutosegError(f"{text}:\n{problems(error)}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AutosegError(f"{text}: {error}") from None
    return spec


def output_scales(network: nn.Module, spec: NetworkSpec) -> tuple[tuple[int, ...], ...]:
    """By how much each output of a network with `all_scales` is smaller than the image, highest resolution first.

    A network of one's own that does not say has a scale for every stage of `spec` but the last.
    """
    stated: tuple[tuple[int, ...], ...] | None = getattr(network, "scales", None)
    return running(spec.strides[:-1]) if stated is None else stated


def unnormed_width(network: nn.Module) -> int | None:
    """How many numbers the widest layer sums up of a network that does not normalise between layers; None if it does.

    Layers that normalise, torch's or others, are known by the names of their classes, as BatchNorm3d or RMSNorm.
    """
    if any(re.search(r"norm(\dd)?$", type(part).__name__, re.IGNORECASE) for part in network.modules()):
        return None
    summing = (part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear))
    return max((part.weight[0].numel() for part in summing), default=1)


def output_weights(network: nn.Module) -> tuple[float, ...]:
    """How much each output counts in deep supervision, as the network states it; (): `losses.scale_weights` says."""
    return tuple(getattr(network, "output_weights", ()))
