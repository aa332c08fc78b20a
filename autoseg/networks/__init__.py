"""Networks by name. A plan names one of the table, or a user's own as `package.module:Name`.

A network of your own is called with (spec, in_channels, heads) and gives a torch module whose
`forward(x, all_scales=False)` maps images (B, C, *spatial) to logits (B, heads, *spatial), or with `all_scales` to a
list of logits, highest resolution first, that shrink by `scales` of the module, or where it has none by
`spec.strides`; a list of one is allowed. One with an attribute `takes_position` that is true is called with `position`
too: where in its image each patch lies, (B, axes) float32 from -1 to 1 along each axis, 0 in the middle. Naming a
module imports it: a plan that does so is as trustworthy as the code beside it.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate

from torch import nn

from autoseg.networks.base import Architecture
from autoseg.networks.resenc import RESENC
from autoseg.networks.unet import UNET
from autoseg.records import AutosegError
from autoseg.schema import NetworkSpec

__all__ = ["NETWORKS", "Architecture", "build", "output_scales"]

NETWORKS: dict[str, Architecture] = {"unet": UNET, "resenc": RESENC}


def build(spec: NetworkSpec, in_channels: int, heads: int) -> nn.Module:
    """The network that `spec` describes, with fresh weights drawn from torch's global generator, on the CPU.

    Raises AutosegError for a name that is unknown, cannot be imported or is no network, and ValueError for a
    specification that does not fit the architecture.
    """
    if spec.name in NETWORKS:
        return NETWORKS[spec.name].build(spec, in_channels, heads)
    if ":" not in spec.name:
        raise AutosegError(
            f"unknown network {spec.name!r}; choose one of {', '.join(NETWORKS)}, or name your own as "
            "package.module:Name"
        )
    network = _own(spec.name)(spec, in_channels, heads)
    if not isinstance(network, nn.Module):
        raise AutosegError(f"{spec.name} gave a {type(network).__name__}; it must give a torch.nn.Module")
    parameters = inspect.signature(network.forward).parameters.values()
    if not any(p.name == "all_scales" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise AutosegError(f"the network {spec.name} must take `all_scales`: def forward(self, x, all_scales=False)")
    return network


def output_scales(network: nn.Module, spec: NetworkSpec) -> tuple[tuple[int, ...], ...]:
    """By how much each output of a network with `all_scales` is smaller than the image, highest resolution first.

    A network of one's own that does not say has a scale for every stage of `spec` but the last.
    """
    stated: tuple[tuple[int, ...], ...] | None = getattr(network, "scales", None)
    if stated is not None:
        return stated
    steps = accumulate(spec.strides[:-1], lambda total, stride: tuple(t * s for t, s in zip(total, stride)))
    return tuple(steps)


def _own(name: str) -> Callable[[NetworkSpec, int, int], object]:
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise AutosegError(
            f"the network {name!r} cannot be imported ({error}); is its folder on PYTHONPATH, its package installed?"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise AutosegError(f"the module {module_name!r} has no class or function {attribute!r}")
    return found
