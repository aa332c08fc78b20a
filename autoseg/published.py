"""Weights that others have published for ResNets, VGGs and FCNs: tensors that are called as torchvision calls them.

A .pth or .pt file is a pickle: it is read as data (`weights_only=True`) and never executed. Nothing is fetched from the
net; a file that is not there is answered with where it can be got by hand.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoseg.checkpoint import read_weights
from autoseg.records import AutosegError

SUFFIXES = (".safetensors", ".pth", ".pt")
ADDRESS = "https://download.pytorch.org/models/"
FILES = {
    "resnet34_unet": "resnet34-b627a593.pth",
    "vgg_unet": "vgg16_bn-6c64b313.pth",
    "vgg_unet(depth=19)": "vgg19_bn-c79401a0.pth",
    "vgg_unet(norm=none)": "vgg16-397923af.pth",
    "fcn_resnet50": "fcn_resnet50_coco-1167a1af.pth",
    "fcn_resnet101": "fcn_resnet101_coco-7ecb50ca.pth",
    "deeplabv3plus(backbone=resnet50)": "resnet50-0676ba61.pth",
    "deeplabv3plus(backbone=resnet101)": "resnet101-63fe2227.pth",
    "deeplabv3plus(backbone=resnet152)": "resnet152-394f9c45.pth",
}
"""Network -> a file of weights at ADDRESS that it can begin with."""
WRAPPERS = ("state_dict", "model")
"""Names under which training programs keep the tensors of the network beside other things."""


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names that they have there, numbers in single precision.

    Raises AutosegError if the file is not there (with where to get published ones), damaged, or not weights alone.
    """
    if not path.is_file():
        files = "".join(f"\n  {network}: {ADDRESS}{file}" for network, file in FILES.items())
        raise AutosegError(
            f"{path} does not exist. Nothing is downloaded here; weights that others have published can be fetched by "
            f"hand and named by --pretrained:{files}\nor give a model file or a fold folder of your own"
        )
    if path.suffix == ".safetensors":
        try:
            content: Any = read_weights(path)
        except AutosegError:
            raise AutosegError(f"{path} is no whole file of safetensors; fetch it again") from None
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file that is none of torch's makes its reader stumble over
            raise AutosegError(
                f"{path} cannot be read as weights alone ({type(error).__name__}): it is damaged, or holds code beside "
                "tensors, which is never run; fetch it again, or save its state_dict with torch.save"
            ) from None
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise AutosegError(f"{path} holds no tensors by name; save the state_dict of a network in it")
    if all(name.startswith("module.") for name in found):  # as torch's DataParallel names them
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def network_of(tensors: Collection[str]) -> str | None:
    """The network, a key of FILES, whose encoder has tensors of these names; None if that cannot be told."""
    bare = {name.removeprefix("encoder.").removeprefix("backbone.") for name in tensors}
    depth = sum(f"layer3.{block}.conv1.weight" in bare for block in range(36))
    if "layer1.0.conv3.weight" in bare:
        resnet = {6: "resnet50", 23: "resnet101", 36: "resnet152"}.get(depth)
        if "classifier.4.weight" in bare and f"fcn_{resnet}" in FILES:
            return f"fcn_{resnet}"
        return resnet and f"deeplabv3plus(backbone={resnet})"
    if depth:
        return "resnet34_unet" if "layer1.2.conv1.weight" in bare and depth == 6 else None
    norms = {name.removesuffix("running_mean") for name in bare if name.endswith("running_mean")}
    layers = [name for name in bare if re.fullmatch(r"features\.\d+\.weight", name)]
    convolutions = [name for name in layers if name.removesuffix("weight") not in norms]
    said = {(13, 13): "", (16, 16): "(depth=19)", (13, 0): "(norm=none)"}.get((len(convolutions), len(norms)))
    return None if said is None else f"vgg_unet{said}"


def by_our_names(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """`tensors` with torchvision's names of an encoder replaced by those among `wanted`, the names of a network.

    An encoder is on its own there, or called `backbone`. How many batches a norm has seen, which older files leave
    out and no result depends on, is 0.
    """
    named = {}
    for name, tensor in tensors.items():
        ours = (name, f"encoder.{name}", f"encoder.{name.removeprefix('backbone.')}")
        named[next((one for one in ours if one in wanted), name)] = tensor
    for name in wanted:
        norm, _, last = name.rpartition(".")
        if last == "num_batches_tracked" and f"{norm}.running_mean" in named:
            named.setdefault(name, torch.zeros((), dtype=torch.long))
    return named
