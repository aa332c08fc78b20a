"""What every network of the table promises, as checks that take its name: shapes, padding, gradients, files, plans."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from io import BytesIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from autoseg.checkpoint import save_weights
from autoseg.losses import deep_supervision, scale_targets, scale_weights
from autoseg.model import network_in_file
from autoseg.networks import NETWORKS, build, output_scales, output_weights
from autoseg.records import from_json, to_json
from autoseg.schema import NetworkSpec

SIZES = {2: (13, 22), 3: (5, 11, 14)}
"""Of images: no edge is a multiple of what any network strides by."""
IN_CHANNELS, HEADS = 2, 3


def narrow(spec: NetworkSpec, features: Sequence[int] = (4, 6, 8)) -> NetworkSpec:
    """The first stages of `spec`, as many as there are `features`, of these widths."""
    stages = len(features)
    return replace(
        spec,
        features=tuple(features),
        strides=spec.strides[:stages],
        kernels=spec.kernels[:stages],
        encoder_blocks=spec.encoder_blocks[:stages],
        decoder_blocks=spec.decoder_blocks[: stages - 1],
    )


def anisotropic(spec: NetworkSpec) -> NetworkSpec:
    """`spec` as a planner writes it for thick slices: the first axis is pooled and convolved later than the others."""
    axes = spec.dimension
    strides = ((1,) * axes, (1, *(2,) * (axes - 1)), *spec.strides[2:])
    kernels = ((1, *(3,) * (axes - 1)), *spec.kernels[1:])
    return replace(spec, strides=strides, kernels=kernels)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(spec: NetworkSpec, in_channels: int = IN_CHANNELS, heads: int = HEADS) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(spec, in_channels, heads)


def fresh(spec: NetworkSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(spec, IN_CHANNELS, HEADS)


def check_contract(
    name: str, dimension: int, *, spec: NetworkSpec | None = None, size: Sequence[int] = (), **options: object
) -> None:
    """All checks on a narrow network called `name`, and on one for voxels that are not alike along all axes.

    spec: in place of the first three stages of its paper's; options: of `Architecture.spec`.
    """
    architecture = NETWORKS[name]
    assert dimension in architecture.dimensions
    assert architecture.source
    full = architecture.spec(dimension, **options)
    assert full.name == name
    assert from_json(NetworkSpec, to_json(full)) == full
    spec = spec or narrow(full)
    image_size = tuple(size) or SIZES[dimension]
    check_names(spec)
    if dimension == min(architecture.dimensions):  # of one definition
        check_edits(spec)
    check_shapes(spec, image_size)
    check_gradients(spec, image_size)
    check_padding(spec, image_size)
    check_file(spec, image_size)
    check_shapes(anisotropic(spec), image_size)
    check_gradients(anisotropic(spec), image_size)


def check_names(spec: NetworkSpec) -> None:
    """The tensors that transfer adapts are there, with the channels and heads where they should be."""
    network = on_meta(spec)
    tensors = network.state_dict()
    more = on_meta(spec, IN_CHANNELS + 1).state_dict()
    assert tensors.keys() == more.keys()
    first = {name for name, tensor in tensors.items() if tensor.shape != more[name].shape}
    assert first == {network.first_weight, *network.beside_first}
    for name in first:
        assert tensors[name].ndim == spec.dimension + 2
        assert (tensors[name].shape[1], more[name].shape[1]) == (IN_CHANNELS, IN_CHANNELS + 1)
    heads = [tensor for tensor_name, tensor in tensors.items() if tensor_name.startswith(network.heads_prefixes)]
    assert heads
    assert all(tensor.shape[0] == HEADS for tensor in heads)
    # So `model.network_with` can refuse a plan that asks for more than a file holds.
    assert sum(spec.encoder_blocks) + sum(spec.decoder_blocks) <= len(tensors)


def check_edits(spec: NetworkSpec) -> None:
    """Whatever a plan may say of a stage is heeded: another width, kernel or number of blocks makes another network."""
    count, axes = parameters(on_meta(spec)), spec.dimension
    kernel = (7 if (5,) * axes in spec.kernels else 5,) * axes
    for field, other in (("features", 9), ("kernels", kernel), ("encoder_blocks", 4), ("decoder_blocks", 4)):
        stated = getattr(spec, field)
        for stage in range(len(stated)):
            edited = replace(spec, **{field: (*stated[:stage], other, *stated[stage + 1 :])})
            assert parameters(on_meta(edited)) != count, f"{field}[{stage}] is not heeded"
    wider = replace(spec, strides=(*spec.strides[:-1], tuple(2 * step for step in spec.strides[-1])))
    assert on_meta(wider).divisor != on_meta(spec).divisor


def check_shapes(spec: NetworkSpec, size: Sequence[int]) -> None:
    """Logits of the size of the image, and all scales of the sizes of their targets; in training and evaluation."""
    network, image = fresh(spec), torch.randn(2, IN_CHANNELS, *size)
    assert len(network.scales) == 1 or NETWORKS[spec.name].deep_supervision
    if weights := output_weights(network):
        assert len(weights) == len(network.scales)
        assert sum(weights) == pytest.approx(1)
    elif len(network.scales) > 1:  # the halving, which leaves the last one out, is for outputs that shrink
        assert network.scales[-1] != network.scales[0]
    assert len(network.divisor) == spec.dimension
    targets = scale_targets(torch.zeros(2, *size), output_scales(network, spec))
    for mode in (True, False):
        network.train(mode)
        with torch.no_grad():
            assert network(image).shape == (2, HEADS, *size)
            outputs = network(image, all_scales=True)
        assert [tuple(one.shape) for one in outputs] == [(2, HEADS, *one.shape[1:]) for one in targets]
        assert all(torch.isfinite(one).all() for one in outputs)
    with torch.no_grad():
        assert torch.equal(network(image), network(image, all_scales=True)[0])


def check_gradients(spec: NetworkSpec, size: Sequence[int]) -> None:
    """Every parameter has a gradient, and a weight none that is zero, with the outputs weighed as in training.

    But for the head of an output that counts nothing; and a norm takes away what a bias before it adds.
    """
    network = fresh(spec, seed=1)
    where = {"position": 0.5 - torch.rand(2, spec.dimension)} if network.takes_position else {}
    outputs = network(torch.randn(2, IN_CHANNELS, *size), True, **where)
    weights = output_weights(network)
    noise = [torch.randn_like(one) for one in outputs]
    deep_supervision(lambda logits, target: (logits * target).sum(), outputs, noise, weights).backward()
    left_out = [f"heads.{k}." for k, weight in enumerate(weights or scale_weights(len(outputs))) if weight == 0]
    idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    expected = {name for name, _ in network.named_parameters() if name.startswith(tuple(left_out))}
    assert idle == expected, f"no gradient at all: {idle - expected}; one, though its output counts nothing: {expected}"
    still = {
        name
        for name, parameter in network.named_parameters()
        if name not in idle and not name.endswith("bias") and not parameter.grad.abs().sum() > 0
    }
    assert not still, f"the gradient is zero: {still}"


def check_padding(spec: NetworkSpec, size: Sequence[int]) -> None:
    """An image of any size gives what it gives when padded by hand with zeros behind its end."""
    network, image = fresh(spec).eval(), torch.randn(1, IN_CHANNELS, *size)
    gaps = [-edge % unit for edge, unit in zip(size, network.divisor)]
    assert any(gaps), "choose a size that has to be padded"
    padded = F.pad(image, [pad for gap in reversed(gaps) for pad in (0, gap)])
    with torch.no_grad():
        assert torch.equal(network(image), network(padded)[(..., *(slice(edge) for edge in size))])


def check_file(spec: NetworkSpec, size: Sequence[int]) -> None:
    """Saved, and made anew of the file and its plan, it gives the same logits."""
    network, image = fresh(spec, seed=2), torch.randn(2, IN_CHANNELS, *size)
    configuration = replace(toys.configuration(patch=tuple(size)), network=spec)
    plan = toys.plan(configuration, channels=("MR",) * IN_CHANNELS)
    with torch.no_grad():
        network(image)  # so that running statistics of norms are not those of a new network
        expected = network.eval()(image)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            save_weights(network, path)
            again = network_in_file(plan, configuration, path).eval()
            tensors = again.state_dict()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in network.state_dict().items())
            # Kernels may round otherwise where a tensor begins at another place in memory.
            torch.testing.assert_close(again(image), expected, rtol=1e-4, atol=1e-4)


def check_onnx(spec: NetworkSpec, size: Sequence[int]) -> None:
    """Exported to ONNX, the network in evaluation gives the same logits there; skipped where that is not installed."""
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    runtime = pytest.importorskip("onnxruntime")
    network, image = fresh(spec), torch.randn(1, IN_CHANNELS, *size)
    with torch.no_grad():
        network(torch.randn(2, IN_CHANNELS, *size))  # so that running statistics of norms are not those of a new one
        expected = network.eval()(image)
    file = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of parts of torch that will change
        torch.onnx.export(network, (image,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def check_he(network: nn.Module) -> int:
    """Convolutions with weights enough to tell have variance 2 / fan-in within 5 %; how many were looked at.

    What fan-in means is worked out by the layer itself: of ones, an output in the middle is the number of summands.
    """
    seen = 0
    for name, part in network.named_modules():
        transposed = isinstance(part, nn.ConvTranspose2d | nn.ConvTranspose3d)
        if (transposed or isinstance(part, nn.Conv2d | nn.Conv3d)) and part.weight.numel() >= 20_000:
            fan_in = summands(part) if transposed else prod(part.weight.shape[1:])
            assert abs(part.weight.var().item() * fan_in / 2 - 1) < 0.05, name
            seen += 1
    return seen


def summands(part: nn.Module) -> float:
    """Of how many inputs an output voxel far from the border is summed, on average over a period of the stride."""
    part = deepcopy(part)
    nn.init.ones_(part.weight)
    if part.bias is not None:
        nn.init.zeros_(part.bias)
    with torch.no_grad():
        out = part(torch.ones(1, part.in_channels, *(7,) * len(part.stride)))[0, 0]
    middle = [slice(edge // 2, edge // 2 + step) for edge, step in zip(out.shape, part.stride)]
    return out[tuple(middle)].mean().item()
