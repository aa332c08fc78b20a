"""U-Nets around ResNet34 and VGG, FCN-ResNets and DeepLabV3+: sizes of the literature, any image, held resolution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_contract import (
    anisotropic,
    check_contract,
    check_file,
    check_gradients,
    check_he,
    check_names,
    check_onnx,
    check_padding,
    check_shapes,
    fresh,
    on_meta,
    parameters,
)
from torch import nn
from toys import ball

from autoseg.losses import deep_supervision, scale_targets
from autoseg.networks import NETWORKS, build, output_weights
from autoseg.networks.stages import hold_resolution

NAMES = ("resnet34_unet", "vgg_unet", "fcn_resnet50", "fcn_resnet101", "deeplabv3plus")


def small(name, dimension=2, **options):
    """The network of its paper with one block where it has many, and a few channels."""
    full = NETWORKS[name].spec(dimension, **options)
    changes = {"options": dict(full.options), "features": (4, 16, 18, 20, 24)}
    if name == "resnet34_unet":
        changes["options"]["decoder_features"] = (3, 4, 5, 6, 7)
        changes |= {"encoder_blocks": (1, 2, 1, 1, 1), "decoder_blocks": (1, 2, 1, 1, 1)}
    elif name == "vgg_unet":
        changes["options"]["decoder_features"] = (3, 4, 5)
        changes |= {"features": (4, 6, 8, 10), "strides": full.strides[:4], "kernels": full.kernels[:4]}
        changes |= {"encoder_blocks": (1, 2, 1, 1), "decoder_blocks": (1, 2, 1)}
    elif name == "deeplabv3plus":
        changes["options"] |= {"head_features": 5, "skip_features": 3}
        xception = changes["options"]["backbone"] == "xception65"
        changes["encoder_blocks"] = (2, 1, 1, 2, 2) if xception else (1, 1, 1, 2, 2)
    else:
        changes["encoder_blocks"] = (1, 1, 1, 2, 2)
    return replace(full, **changes)


# Where the deepest map has one voxel, a batch norm of two samples leaves no gradient to speak of.
@pytest.mark.parametrize(
    ("name", "dimension", "size", "options"),
    [
        ("resnet34_unet", 2, (37, 70), {}),
        ("resnet34_unet", 3, (9, 33, 20), {"norm": "instance"}),
        ("vgg_unet", 2, (21, 38), {}),
        ("vgg_unet", 3, (5, 11, 14), {"norm": "instance"}),
        ("fcn_resnet50", 2, (37, 70), {"dropout": 0.0, "output_stride": 32}),
        ("deeplabv3plus", 2, (37, 70), {"dropout": 0.0, "output_stride": 32}),
    ],
)
def test_any_size_any_edit_gradients_and_files(name, dimension, size, options):
    check_contract(name, dimension, spec=small(name, dimension, **options), size=size, **options)


@pytest.mark.parametrize(
    ("name", "dimension", "size", "options"),
    [
        ("resnet34_unet", 2, (37, 70), {"norm": "none", "activation": "elu"}),
        ("vgg_unet", 2, (13, 22), {"norm": "none", "activation": "elu"}),
        ("fcn_resnet50", 2, (13, 22), {}),
        ("fcn_resnet101", 3, (5, 11, 14), {"norm": "group", "activation": "leaky_relu"}),
        ("deeplabv3plus", 2, (13, 22), {}),
        ("deeplabv3plus", 3, (5, 11, 20), {"output_stride": 8, "rates": (1, 2)}),
        ("deeplabv3plus", 2, (13, 22), {"backbone": "resnet50"}),
    ],
)
def test_any_size_where_resolution_is_held(name, dimension, size, options):
    spec = small(name, dimension, **{"dropout": 0.0, **options})
    check_names(spec)
    for one in (spec, anisotropic(spec)):
        check_shapes(one, size)
        check_gradients(one, size)
    check_padding(spec, size)
    check_file(spec, size)


def resnet_parameters(blocks, bottleneck):
    """Of torchvision's ResNets without their last layer: 21 797 672 - 513 000, 25 557 032 - 2 049 000, ..."""
    inner = (64, 128, 256, 512)
    expansion = 4 if bottleneck else 1
    count, channels = 3 * 64 * 49 + 2 * 64, 64
    for width, repeats in zip(inner, blocks):
        out = width * expansion
        for place in range(repeats):
            if bottleneck:
                count += channels * width + 9 * width**2 + width * out + 2 * (2 * width + out)
            else:
                count += 9 * width * (channels + width) + 4 * width
            if place == 0 and channels != out:
                count += channels * out + 2 * out
            channels = out
    return count


def test_the_resnet34_u_net_has_the_published_size():
    """24 436 369 parameters with one class in the common implementation (segmentation_models.pytorch).

    That has a head of 3 x 3 x 16 weights and a bias; here there are pointwise heads on all five levels.
    """
    network = on_meta(NETWORKS["resnet34_unet"].spec(2), 3, 1)
    assert parameters(network.encoder) == resnet_parameters((3, 4, 6, 3), bottleneck=False) == 21_284_672
    assert parameters(network.heads) == (16 + 32 + 64 + 128 + 256) + 5
    assert parameters(network) - parameters(network.heads) + 9 * 16 + 1 == 24_436_369


def vgg_tensors(widths, norm):
    """Names and shapes of the convolutional part as published: what is listed, "M" for a pooling, numbered through."""
    place, channels, tensors = 0, 3, {}
    for width in widths:
        if width != "M":
            tensors |= {f"features.{place}.weight": (width, channels, 3, 3), f"features.{place}.bias": (width,)}
            channels = width
            if norm:
                parts = ("weight", "bias", "running_mean", "running_var")
                tensors |= {f"features.{place + 1}.{part}": (width,) for part in parts}
                tensors[f"features.{place + 1}.num_batches_tracked"] = ()
            place += 1 + norm
        place += 1
    return tensors


VGG16 = [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
VGG19 = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


@pytest.mark.parametrize(
    ("options", "widths", "count"),
    [
        ({}, VGG16, 14_714_688 + 2 * 4224),  # of the 138 357 544 of the whole; norms of 4224 channels
        ({"depth": 19}, VGG19, 20_024_384 + 2 * 5504),
        ({"norm": "none"}, VGG16, 14_714_688),
    ],
)
def test_vgg_encoders_have_the_published_tensors(options, widths, count):
    encoder = on_meta(NETWORKS["vgg_unet"].spec(2, **options), 3, 1).encoder
    found = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert found == vgg_tensors(widths, norm="norm" not in options)
    assert parameters(encoder) == count


def test_only_depths_of_the_paper_are_known():
    with pytest.raises(ValueError, match="depth: choose one of 16, 19, found 13"):
        NETWORKS["vgg_unet"].spec(2, depth=13)


@torch.no_grad()
def test_a_vgg_keeps_what_lies_before_each_pooling():
    network = fresh(small("vgg_unet", norm="none"), seed=3)
    encoder, image = network.encoder, torch.randn(1, 2, 16, 24)
    maps = encoder(image)
    assert [tuple(one.shape[1:]) for one in maps] == [(4, 16, 24), (6, 8, 12), (8, 4, 6), (8, 2, 3)]
    weights = [encoder.features[place] for place in (0, 3, 5, 8)]
    first = F.conv2d(image, weights[0].weight, weights[0].bias, padding=1).relu()
    torch.testing.assert_close(maps[0], first)
    x = F.max_pool2d(first, 2)
    for conv in weights[1:3]:
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
    torch.testing.assert_close(maps[1], x)
    torch.testing.assert_close(maps[-1], F.max_pool2d(maps[-2], 2))


@pytest.mark.parametrize(
    ("name", "blocks", "count"),
    [("fcn_resnet50", (3, 4, 6, 3), 35_322_218), ("fcn_resnet101", (3, 4, 23, 3), 54_314_346)],
)
def test_fcn_resnets_have_the_published_size(name, blocks, count):
    """With 21 classes and the auxiliary head; torchvision states these numbers."""
    network = on_meta(NETWORKS[name].spec(2), 3, 21)
    assert parameters(network.encoder) == resnet_parameters(blocks, bottleneck=True)
    heads = [9 * wide * wide // 4 + 2 * wide // 4 + 21 * wide // 4 + 21 for wide in (2048, 1024)]
    assert parameters(network.classifier) == heads[0]
    assert parameters(network) == parameters(network.encoder) + sum(heads) == count
    assert on_meta(NETWORKS[name].spec(2, auxiliary=False), 3, 21).aux_classifier is None


@pytest.mark.parametrize(
    ("backbone", "blocks", "count"),
    [
        ("resnet50", (3, 4, 6, 3), 23_508_032),
        ("resnet101", (3, 4, 23, 3), 42_500_160),
        ("resnet152", (3, 8, 36, 3), 60_192_808 - 2_049_000),  # torchvision's, less the layer of its 1000 classes
    ],
)
def test_the_residual_backbones_of_deeplab_have_the_published_size(backbone, blocks, count):
    network = on_meta(NETWORKS["deeplabv3plus"].spec(2, backbone=backbone), 3, 21)
    assert parameters(network.encoder) == resnet_parameters(blocks, bottleneck=True) == count


def test_deeplab_has_the_published_size():
    """41 258 213 numbers in the common Keras version, which counts the running statistics of its norms too."""
    network = on_meta(NETWORKS["deeplabv3plus"].spec(2), 3, 21)
    statistics = sum(buffer.numel() for buffer in network.buffers() if buffer.ndim)
    assert parameters(network) + statistics == 41_258_213
    assert parameters(network) == 41_055_413
    middle = network.encoder.stages[2][1]  # three separable convolutions of 728 channels, norms after each half
    assert parameters(middle) == 3 * (728 * 9 + 728**2 + 4 * 728)
    assert len(network.encoder.stages[2]) == 17


def test_the_keys_of_the_encoder_are_those_of_torchvision():
    names = set(on_meta(NETWORKS["fcn_resnet50"].spec(2), 3, 21).state_dict())
    for name in (
        "encoder.conv1.weight", "encoder.bn1.running_mean", "encoder.layer1.0.downsample.0.weight",
        "encoder.layer1.0.downsample.1.weight", "encoder.layer3.5.conv3.weight", "encoder.layer4.2.bn3.bias",
        "classifier.0.weight", "classifier.1.running_var", "classifier.4.bias", "aux_classifier.4.weight",
    ):  # fmt: skip
        assert name in names
    # A stem of 6 tensors, 16 blocks of 18, 4 projections of 6, two heads of 8.
    assert len(names) == 6 + 16 * 18 + 4 * 6 + 2 * 8


def test_resolution_is_held_and_dilation_takes_over():
    strides = ((2, 2), (1, 2), (2, 2), (2, 2), (2, 2))
    assert hold_resolution(strides, 8) == (
        ((2, 2), (1, 2), (2, 2), (2, 1), (1, 1)),
        ((1, 1), (1, 1), (1, 1), (1, 2), (2, 4)),
    )
    assert hold_resolution(strides, 32) == (strides, ((1, 1),) * 5)


def dilations(network):
    return {
        name: part.dilation[0]
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1
    }


def test_fcn_dilates_as_torchvision_does():
    """The first block of a stage that was not allowed to stride still sees its neighbours as they are."""
    network = on_meta(NETWORKS["fcn_resnet50"].spec(2))
    found = dilations(network)
    assert [found[f"encoder.layer3.{block}.conv2"] for block in range(6)] == [1, 2, 2, 2, 2, 2]
    assert [found[f"encoder.layer4.{block}.conv2"] for block in range(3)] == [2, 4, 4]
    maps = network.encoder(torch.empty(2, 2, 64, 96, device="meta"))
    assert [tuple(one.shape[1:]) for one in maps] == [
        (64, 32, 48), (256, 16, 24), (512, 8, 12), (1024, 8, 12), (2048, 8, 12),
    ]  # fmt: skip


def by_definition(tensors, x, strides, dilations):
    """The last map of a ResNet in evaluation, computed from its tensors alone; strides and dilations of its layers.

    Its blocks have two convolutions, or three of which the middle one strides; the first of a layer has the dilation
    of the layer before.
    """

    def layer(x, conv, norm, stride=1, dilation=1):
        weight = tensors[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        mean, variance, scale, shift = (
            tensors[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    x = F.max_pool2d(layer(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for number, (stride, dilation) in enumerate(zip(strides, dilations), 1):
        block = 0
        while (name := f"layer{number}.{block}") + ".conv1.weight" in tensors:
            first = block == 0
            gap = (1, *dilations)[number - 1] if first else dilation
            step, short = stride if first else 1, x
            if f"{name}.downsample.0.weight" in tensors:
                short = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", step)
            parts = [1, 2, 3] if f"{name}.conv3.weight" in tensors else [1, 2]
            for part in parts:
                strided = part == (2 if len(parts) == 3 else 1)
                wide = tensors[f"{name}.conv{part}.weight"].shape[-1] > 1
                x = layer(x, f"{name}.conv{part}", f"{name}.bn{part}", step if strided else 1, gap if wide else 1)
                x = (x + short).relu() if part == parts[-1] else x.relu()
            block += 1
    return x


@pytest.mark.parametrize(
    ("name", "strides", "dilations"),
    [("resnet34_unet", (1, 2, 2, 2), (1, 1, 1, 1)), ("fcn_resnet50", (1, 2, 1, 1), (1, 1, 2, 4))],
)
@torch.no_grad()
def test_encoders_compute_what_a_resnet_is_defined_to(name, strides, dilations):
    spec = replace(small(name), encoder_blocks=(1, 2, 3, 2, 3))
    network = fresh(spec)
    network(torch.randn(4, 2, 64, 96))  # so that running statistics are not those of a new network
    encoder, image = network.encoder.double().eval(), torch.randn(1, 2, 64, 96, dtype=torch.float64)
    expected = by_definition(encoder.state_dict(), image, strides, dilations)
    torch.testing.assert_close(encoder(image)[-1], expected)
    assert expected.shape[2:] == (64 // (4 * np.prod(strides)), 96 // (4 * np.prod(strides)))


@pytest.mark.parametrize(
    ("output_stride", "rates", "middle", "last"), [(16, (6, 12, 18), 1, 2), (8, (12, 24, 36), 2, 4)]
)
def test_deeplab_rates_and_output_stride(output_stride, rates, middle, last):
    network = on_meta(NETWORKS["deeplabv3plus"].spec(2, output_stride=output_stride))
    found = dilations(network)
    assert found["encoder.stages.2.5.units.0.1.0"] == middle
    assert found["encoder.stages.3.1.units.2.1.0"] == last
    assert tuple(found[f"pyramid.branches.{n}.1.0"] for n in (1, 2, 3)) == rates
    assert network.divisor == (output_stride,) * 2
    early, deep = (network.encoder(torch.empty(2, 2, 64, 96, device="meta"))[n] for n in (1, -1))
    assert early.shape[1:] == (256, 16, 24)
    assert deep.shape[1:] == (2048, 64 // output_stride, 96 // output_stride)


def test_deeplab_takes_rates_and_has_no_transposed_convolution():
    network = on_meta(NETWORKS["deeplabv3plus"].spec(2, rates=[2, 4, 6], dropout=0.5))
    assert tuple(dilations(network)[f"pyramid.branches.{n}.1.0"] for n in (1, 2, 3)) == (2, 4, 6)
    assert network.pyramid.project[1].p == 0.5
    kinds = {type(part).__name__ for part in network.modules()}
    assert not any("Transpose" in kind for kind in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_size_of_a_lopsided_grey_image(name):
    network = build(small(name), 1, 5).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 97, 131)).shape == (1, 5, 97, 131)


def test_one_sample_trains_and_the_mean_of_the_pyramid_learns():
    """A batch norm of one number would be refused; the mean of a sample is spread before it."""
    network = fresh(small("deeplabv3plus"))
    network(torch.randn(1, 2, 32, 48)).square().mean().backward()
    assert network.pyramid.mean.weight.grad is not None
    statistics = network.pyramid.mean_norm[0].running_mean
    network(torch.randn(3, 2, 32, 48))
    assert not torch.equal(statistics, torch.zeros_like(statistics))


def test_deep_supervision_gives_the_auxiliary_head_half_the_weight():
    """As torchvision's training does, scaled to a sum of 1."""
    network, image = fresh(small("fcn_resnet50", dropout=0.0)), torch.randn(2, 2, 24, 40)
    logits, auxiliary = network(image, all_scales=True)
    assert logits.shape == auxiliary.shape
    targets = scale_targets(torch.zeros(2, 24, 40), network.scales)
    weights = output_weights(network)
    found = deep_supervision(lambda given, target: given.square().mean(), (logits, auxiliary), targets, weights)
    torch.testing.assert_close(found, (2 * logits.square().mean() + auxiliary.square().mean()) / 3)


def test_one_output_without_the_auxiliary_head():
    network = fresh(small("fcn_resnet50", auxiliary=False))
    assert network.scales == ((1, 1),)
    assert [tuple(one.shape) for one in network(torch.randn(2, 2, 9, 17), all_scales=True)] == [(2, 3, 9, 17)]


def test_convolutions_start_as_he_says():
    assert check_he(fresh(replace(small("resnet34_unet"), features=(4, 5, 6, 40, 60)))) >= 2


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("resnet34_unet", {"features": (4, 5)}, "three or more"),
        ("resnet34_unet", {"kernels": ((7, 7),) * 4}, "kernels: 5 entries"),
        ("resnet34_unet", {"decoder_blocks": (1, 1, 1, 1)}, "decoder_blocks: 5 entries"),
        ("resnet34_unet", {"options": {"decoder_features": (3, 4)}}, "decoder_features needs 5"),
        ("vgg_unet", {"strides": ((2, 2),) * 4}, "the first stage keeps full resolution"),
        ("vgg_unet", {"encoder_blocks": (1, 2, 1)}, "encoder_blocks: 4 entries"),
        ("vgg_unet", {"options": {"decoder_features": (3, 4, 5, 6)}}, "decoder_features needs 3"),
        ("fcn_resnet50", {"decoder_blocks": (10**9,)}, "decoder_blocks: 0 entries"),
        ("fcn_resnet50", {"encoder_blocks": (1, 1, 0, 1, 1)}, "1 or more"),
        ("fcn_resnet50", {"kernels": ((4, 4), *((3, 3),) * 4)}, "odd"),
        ("fcn_resnet50", {"strides": ((2,), *((2, 2),) * 4)}, "2 positive numbers"),
        ("fcn_resnet50", {"strides": ((2, 10**6), *((2, 2),) * 4)}, "at most 8"),
        ("fcn_resnet50", {"strides": ((8, 8),) * 5}, "at most 1024"),
        ("fcn_resnet50", {"options": {"output_stride": 0}}, "output_stride"),
        ("fcn_resnet50", {"options": {"dropout": 1.5}}, "dropout"),
        ("fcn_resnet50", {"options": {"auxiliary": 3}}, "auxiliary"),
        ("fcn_resnet50", {"options": {"norm": "bach"}}, "norm: choose one of batch"),
        ("fcn_resnet50", {"options": {"width": 3}}, "width"),
        ("deeplabv3plus", {"options": {"rates": (6, 10**9)}}, "rates"),
        ("deeplabv3plus", {"options": {"rates": (1,) * 9}}, "rates"),
        ("deeplabv3plus", {"options": {"backbone": "vgg"}}, "xception65"),
        ("deeplabv3plus", {"options": {"skip_features": 0}}, "skip_features"),
        ("deeplabv3plus", {"encoder_blocks": (2, 1, 1, 2, 1)}, "the exit has two blocks"),
    ],
)
def test_a_wrong_specification_is_refused(name, change, said):
    with pytest.raises(ValueError, match=said):
        build(replace(small(name), **change), 1, 2)


def test_an_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match="resnet101"):
        NETWORKS["deeplabv3plus"].spec(2, backbone="vgg16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fcn_resnet101"])
def test_onnx_gives_the_same_logits(name):
    check_onnx(small(name, dropout=0.0), (37, 70))


def discs(count, seed):
    """Noisy images (count, 1, 40, 56) of a bright disc beside a dim one, and the disc (count, 40, 56)."""
    random = np.random.default_rng(seed)
    bright, dim = (
        np.stack([ball((40, 56), random.uniform((8, 8), (32, 48)), 9) for _ in range(count)]) for _ in range(2)
    )
    image = bright * 1.5 + (dim & ~bright) * 0.7 + random.normal(0, 0.3, bright.shape)
    return torch.from_numpy(image[:, None]).float(), torch.from_numpy(bright).long()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fcn_resnet101"])
def test_it_learns_a_disc_to_a_dice_of_0_9(name):
    torch.manual_seed(17)
    options = {"rates": (1, 2)} if name == "deeplabv3plus" else {}  # its last maps are 3 x 4 voxels here
    spec = small(name, **options)
    wider = {"head_features": 16, "skip_features": 8} if options else {}
    features = (16, 24, 32, 40, 48)[: len(spec.features)]
    network = build(replace(spec, features=features, options={**spec.options, **wider}), 1, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(200):
        image, mask = discs(8, step)
        outputs = network(image, all_scales=True)
        targets = scale_targets(mask, network.scales)
        loss = deep_supervision(F.cross_entropy, outputs, targets, output_weights(network))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, mask = discs(24, 10_000)
    with torch.no_grad():
        found = network.eval()(image).argmax(1)
    assert (2 * (found * mask).sum() / (found.sum() + mask.sum())).item() >= 0.9
