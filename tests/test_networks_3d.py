"""The 3D U-Net, the V-Net and their variants: each against its paper, and what is asked of all networks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_contract import (
    HEADS,
    IN_CHANNELS,
    anisotropic,
    check_contract,
    check_file,
    check_gradients,
    check_he,
    check_onnx,
    check_padding,
    check_shapes,
    fresh,
    narrow,
    on_meta,
    parameters,
)
from toys import ball

from autoseg.inference import predict_logits
from autoseg.networks import NETWORKS, build
from autoseg.networks.vnet import Stage

VOLUMETRIC = ("unet3d", "unet3d_nohighway", "relative_unet3d", "vnet", "relative_vnet")
SLICES = ("slice_unet3d", "slice_vnet")


def paper(name, dimension=3, **options):
    return NETWORKS[name].spec(dimension, **options)


def meta(name, in_channels=1, heads=2, dimension=3, **options):
    return on_meta(paper(name, dimension, **options), in_channels, heads)


# What is asked of every network.


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", VOLUMETRIC)
def test_every_promise_is_kept(name, dimension):
    check_contract(name, dimension)


@pytest.mark.parametrize("name", ["relative_unet3d", "vnet"])
def test_onnx_gives_the_same(name):
    check_onnx(narrow(paper(name)), (5, 11, 14))


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("reduce", ["mean", "sum", "centre"])
def test_every_promise_is_kept_on_slices(name, reduce):
    # These checks feed two channels: one slice of each. (More slices: see below.)
    spec = narrow(paper(name, 2, context=1, reduce=reduce))
    for one in (spec, anisotropic(spec)):
        check_shapes(one, (13, 22))
        check_gradients(one, (13, 22))
    check_padding(spec, (13, 22))
    check_file(spec, (13, 22))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet3d", {"norm": "instance", "activation": "leaky_relu", "dropout": 0.2, "widen": False, "first_kernel": 5}),
        ("vnet", {"size": "small", "width": 4}),
        ("relative_vnet", {"size": "small", "width": 4, "position": "multiply", "norm": "group"}),
    ],
)
def test_options_of_the_papers_can_be_others(name, options):
    spec = narrow(paper(name, **options))
    check_shapes(spec, (5, 11, 14))
    check_padding(spec, (5, 11, 14))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("unet3d", {"norm": "layer"}, "norm: choose one of"),
        ("unet3d", {"position": "add"}, "position"),
        ("unet3d", {"dropout": 1.5}, "dropout"),
        ("unet3d", {"first_kernel": 4}, "odd"),
        ("relative_unet3d", {"position": "here"}, "position"),
        ("relative_unet3d", {"position": "add", "norm": "instance"}, "would not notice its place"),
        ("vnet", {"noise": -1.0}, "noise"),
        ("vnet", {"down_activation": "tanh"}, "down_activation: choose one of"),
        ("slice_vnet", {"context": 4}, "odd"),
        ("slice_unet3d", {"reduce": "median"}, "reduce"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, said):
    spec = paper(name, NETWORKS[name].dimensions[-1])
    with pytest.raises(ValueError, match=said):
        on_meta(replace(spec, options=spec.options | options), 5, 2)


@pytest.mark.parametrize("name", ["unet3d", "relative_vnet"])
def test_an_unknown_size_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="choose one of"):
        paper(name, size="huge")


# The 3D U-Net.


def test_the_3d_unet_has_the_parameters_of_its_paper():
    # "The architecture has 19069955 parameters in total", of three channels and classes, with biases in place of the
    # batch norm that the paper adds: that has scale and offset for each of 2336 features, where there was a bias.
    assert parameters(meta("unet3d", 3, 3, norm="none")) == 19_069_955
    assert parameters(meta("unet3d", 3, 3)) == 19_069_955 + 2_336


def test_the_3d_unet_of_desai_has_five_poolings_and_16_to_512_features():
    spec = paper("unet3d", stages=6, width=16, widen=False)
    assert spec.features == (16, 32, 64, 128, 256, 512)
    network = on_meta(spec, 1, 2)
    assert network.divisor == (32, 32, 32)
    assert network.encoder[0][0][0].out_channels == 16
    for size in ((32, 288, 288), (20, 70, 33)):
        assert network(torch.empty(1, 1, *size, device="meta")).shape == (1, 2, *size)


@pytest.mark.parametrize("name", ["unet3d", "vnet"])
@pytest.mark.parametrize(("size", "multipliers"), [("tiny", (1, 2)), ("small", (1, 2, 4)), ("large", (1, 2, 4, 8, 16))])
def test_the_sizes_of_the_knee_study(name, size, multipliers):
    spec = paper(name, size=size)
    assert tuple(features // spec.features[0] for features in spec.features) == multipliers
    network = on_meta(spec, 1, 2)
    assert network.divisor == (2 ** (len(multipliers) - 1),) * 3
    edges = {"large": 5}.get(size, 3)
    assert network.state_dict()[network.first_weight].shape[2:] == (edges,) * 3
    for edge in ((64, 64, 64), (160, 160, 160), (240, 240, 160), (160, 160, 5)):
        assert network(torch.empty(1, 1, *edge, device="meta")).shape == (1, 2, *edge)


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
@pytest.mark.parametrize("name", ["relative_unet3d", "relative_vnet", "unet3d_nohighway"])
def test_the_variants_take_the_sizes_of_the_knee_study(name, size):
    network = meta(name, size=size)
    for edge in ((64, 64, 64), (160, 160, 160), (240, 240, 160), (160, 160, 5)):
        assert network(torch.empty(1, 1, *edge, device="meta")).shape == (1, 2, *edge)


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
@pytest.mark.parametrize("name", ["slice_unet3d", "slice_vnet"])
def test_a_slab_gives_its_middle_slice(name, size):
    network = meta(name, 5, 2, dimension=2, size=size)
    assert network(torch.empty(1, 5, 160, 160, device="meta")).shape == (1, 2, 160, 160)


@pytest.mark.parametrize(
    ("spec", "in_channels", "seen"),
    [
        (narrow(paper("unet3d"), (24, 40, 60)), 1, 6),
        (narrow(paper("vnet"), (16, 40, 64)), 1, 6),
        (narrow(paper("slice_unet3d", 2), (24, 40, 80)), 5, 6),
    ],
)
def test_convolutions_start_as_he_has_it(spec, in_channels, seen):
    torch.manual_seed(8)
    assert check_he(build(spec, in_channels, 2)) >= seen


def test_without_highways_all_that_is_known_of_the_image_goes_through_the_bottleneck():
    spec = narrow(paper("unet3d_nohighway"))
    network = fresh(spec).eval()
    network.encoder[-1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    with torch.no_grad():
        logits = network(torch.randn(1, IN_CHANNELS, 5, 11, 14))
    assert logits.std() == 0
    # The U-Net with highways still sees the image.
    whole = fresh(replace(spec, name="unet3d")).eval()
    whole.encoder[-1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    with torch.no_grad():
        assert whole(torch.randn(1, IN_CHANNELS, 5, 11, 14)).std() > 0


def test_the_3d_unet_without_highways_lacks_their_weights_only():
    # Of each decoder level the weights for the features of the skip: 256, 128 and 64 of them, 27 voxels.
    skips = 27 * (256 * 256 + 128 * 128 + 64 * 64)
    assert parameters(meta("unet3d")) - parameters(meta("unet3d_nohighway")) == skips


# The V-Net.


def test_a_stage_whose_convolutions_give_nothing_is_the_identity():
    network = fresh(narrow(paper("vnet")))
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    assert len(stages) == 5
    for stage in stages[1:]:
        for parameter in stage.convs.parameters():
            torch.nn.init.zeros_(parameter)
        image = torch.randn(2, stage.features, 3, 5, 4)
        assert torch.equal(stage(image), image)


def test_the_first_stage_repeats_the_channels_of_the_image():
    network = build(replace(narrow(paper("vnet")), features=(5, 6, 8)), 2, 2)
    stage = network.encoder[0][1][0]
    for parameter in stage.convs.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.randn(1, 2, 3, 5, 4)
    assert torch.equal(stage(image), image[:, [0, 1, 0, 1, 0]])


def test_the_vnet_has_the_parameters_of_its_paper():
    # Figure 2 of the paper by hand: convolutions of 125 voxels, 1, 2, 3, 3, 3 down with 16 to 256 features and 3, 3, 2,
    # 1 up with twice the features of the level, one with 8 voxels between levels, a bias and a slope for each feature.
    widths = (16, 32, 64, 128, 256)
    down = 125 * (1 * 16 + 2 * 32**2 + 3 * 64**2 + 3 * 128**2 + 3 * 256**2)
    up = 125 * (3 * 256**2 + 3 * 128**2 + 2 * 64**2 + 1 * 32**2)
    between = 8 * (16 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 8 * (256 * 128 + 256 * 64 + 128 * 32 + 64 * 16)
    convolved = 1 * 16 + 2 * 32 + 3 * 64 + 3 * 128 + 3 * 256 + 3 * 256 + 3 * 128 + 2 * 64 + 1 * 32
    each = 2 * (convolved + sum(widths[1:]) + sum(widths[:-1]))
    head = 32 * 2 + 2
    assert parameters(meta("vnet")) == down + up + between + each + head == 65_175_314


def test_the_vnet_of_45_6_million_parameters_is_one_of_fewer_convolutions():
    # The figure that is often stated is that of a well-known implementation (1, 2, 3, 2 down after the first stage,
    # 2, 2, 1, 1 up, batch norm), which has another 5 x 5 x 5 convolution in its head: 11 thousand parameters more.
    spec = replace(paper("vnet", norm="batch"), encoder_blocks=(1, 1, 2, 3, 2), decoder_blocks=(1, 1, 2, 2))
    assert parameters(on_meta(spec, 1, 2)) == 45_592_370


def test_the_vnet_of_the_knee_study():
    network = build(paper("vnet", size="tiny", width=3), 1, 2)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("BatchNorm3d") > 0 < kinds.count("SELU")
    assert kinds.count("Dropout3d") == 3
    image = torch.zeros(2, 1, 4, 6, 8)
    noisy = network.encoder[0][0]
    assert noisy(image).std() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(noisy.eval()(image), image)


# They learn.


def dice_learnt(name, **options):
    """After some steps on two noisy images of 16 x 24 with bright single voxels: of those, as Dice."""
    torch.manual_seed(9)
    dots = (torch.rand(2, 16, 24) < 0.1).long()
    image = (dots + 0.1 * torch.randn(2, 16, 24))[:, None].expand(-1, IN_CHANNELS, -1, -1)
    network = fresh(narrow(paper(name, 2, **options)))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(image)[:, :2], dots).backward()
        optimizer.step()
    with torch.no_grad():
        found = network(image)[:, :2].argmax(1)
    return (2 * (found * dots).sum() / (found + dots).sum()).item()


def test_without_highways_fine_detail_is_learnt_less_well():
    with_them, without = dice_learnt("unet3d"), dice_learnt("unet3d_nohighway")
    print(f"Dice of single voxels with highways {with_them:.3f}, without {without:.3f}")
    assert with_them > 0.95
    assert without < with_them - 0.05


@pytest.mark.parametrize(("name", "options"), [("vnet", {}), ("vnet", {"size": "small"}), ("relative_unet3d", {})])
def test_fine_detail_is_learnt(name, options):
    assert dice_learnt(name, **options) > 0.95


SIZE = (12, 14, 16)


def balls(count, seed):
    """Noisy volumes (count, 1, *SIZE) of a bright ball beside a dim one, and the ball (count, *SIZE)."""
    random = np.random.default_rng(seed)
    images, masks = np.empty((count, 1, *SIZE), np.float32), np.empty((count, *SIZE), np.int64)
    for image, mask in zip(images, masks):
        mask[:] = ball(SIZE, random.uniform(4, np.array(SIZE) - 5), 4)
        dim = ball(SIZE, random.uniform(0, SIZE), 3) & (mask == 0)
        image[0] = 1.5 * mask + 0.7 * dim + random.normal(0, 0.3, SIZE)
    return torch.from_numpy(images), torch.from_numpy(masks)


@pytest.mark.slow
@pytest.mark.parametrize("name", VOLUMETRIC)
def test_it_learns_a_ball_to_a_dice_of_0_9(name):
    torch.manual_seed(17)
    # Without highways all detail goes through the bottleneck, so that is not far down.
    features = (6, 12) if name == "unet3d_nohighway" else (6, 8, 12)
    network = build(narrow(paper(name), features), 1, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=80)
    for step in range(80):
        image, mask = balls(4, step)
        loss = F.cross_entropy(network(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    image, mask = balls(12, 10_000)
    with torch.no_grad():
        found = network.eval()(image).argmax(1)
    assert (2 * (found * mask).sum() / (found.sum() + mask.sum())).item() >= 0.9


# Told of the place.


@pytest.mark.parametrize("position", ["add", "multiply", "film"])
@pytest.mark.parametrize("name", ["relative_unet3d", "relative_vnet"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_another_place_gives_other_logits(name, position, dimension):
    assert NETWORKS[name].build(narrow(paper(name, dimension)), 1, 2).takes_position
    network = fresh(narrow(paper(name, dimension, position=position)), seed=4).eval()
    size = (5, 11, 14)[:dimension]
    image = torch.randn(1, IN_CHANNELS, *size).repeat(3, *(1,) * (dimension + 1))
    places = torch.tensor([[0.0] * 3, [-1.0, 0.5, 0.25], [-1.0, 0.5, 0.75]])[:, :dimension]
    with torch.no_grad():
        logits = network(image, position=places)
        centred = network(image)
    assert logits.shape == (3, HEADS, *size)
    torch.testing.assert_close(logits[0], centred[0])
    for one, other in ((0, 1), (0, 2)) + (((1, 2),) if dimension == 3 else ()):
        assert (logits[one] - logits[other]).abs().max() > 1e-4


@pytest.mark.parametrize("position", ["add", "multiply", "film"])
def test_the_gradient_reaches_what_reads_the_place(position):
    network = fresh(narrow(paper("relative_unet3d", position=position)), seed=1)
    places = torch.tensor([[-0.5, 1.0, 0.25], [0.75, -1.0, 0.5]])
    logits = network(torch.randn(2, IN_CHANNELS, 5, 11, 14), position=places)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [*network.position.parameters()]
    for parameter in network.position.parameters():
        assert parameter.grad.abs().sum() > 0


def test_a_scalar_is_added_to_the_first_map_or_scales_it():
    bottom, x, place = torch.randn(1, 8, 2, 3, 2), torch.randn(1, 6, 4, 6, 4), torch.zeros(1, 3)
    for position, changed in (("add", lambda s: x + s), ("multiply", lambda s: x * (1 + s))):
        unit = build(narrow(paper("relative_unet3d", position=position)), 1, 2).position
        torch.nn.init.zeros_(unit.decide.weight)
        torch.nn.init.constant_(unit.decide.bias, 0.5)
        torch.testing.assert_close(unit.enter(x, bottom, place), changed(math.tanh(0.5)))


def test_a_place_of_another_shape_is_refused():
    network = on_meta(narrow(paper("relative_vnet")))
    with pytest.raises(ValueError, match="position"):
        network(torch.empty(2, IN_CHANNELS, 4, 4, 4, device="meta"), position=torch.empty(2, 2, device="meta"))


def learnt_share(name):
    """Of voxels that are right after some steps on patches of one texture, labelled 1 in the right half of an image."""
    sides = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    places = torch.stack((torch.zeros(4), sides), 1)
    target = (sides > 0).long()[:, None, None].expand(4, 4, 6)
    network = fresh(narrow(paper(name, 2), features=(4, 6)), seed=2)
    texture = torch.randn(1, IN_CHANNELS, 4, 6).expand(4, -1, -1, -1)
    told = {"position": places} if network.takes_position else {}
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(texture, **told)[:, :2], target).backward()
        optimizer.step()
    with torch.no_grad():
        return (network(texture, **told)[:, :2].argmax(1) == target).float().mean().item()


@pytest.mark.parametrize("name", ["unet3d", "vnet"])
def test_where_only_the_place_tells_the_label_only_the_relative_network_learns_it(name):
    assert learnt_share(f"relative_{name}") > 0.95
    assert learnt_share(name) == 0.5


# Of a few slices.


def test_slices_come_one_after_another_for_each_channel():
    network = build(narrow(paper("slice_unet3d", 2, context=3)), 6, 2)
    seen = []
    network.inner.encoder[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    volume = torch.randn(2, 2, 3, 8, 12)
    network(volume.flatten(1, 2))
    assert torch.equal(seen[0], volume)


@pytest.mark.parametrize("name", ["slice_unet3d", "slice_vnet"])
def test_a_network_of_slices_is_the_3d_network_without_strides_between_them(name):
    spec = narrow(paper(name, 2, context=5))
    inner = build(spec, 5, 2).inner
    assert inner.divisor == (1, 4, 4)
    assert inner.state_dict()[inner.first_weight].shape[1:] == (1, *(spec.kernels[0][0],) * 3)


@pytest.mark.parametrize("reduce", ["mean", "sum", "centre"])
def test_logits_of_the_slices_become_those_of_one(reduce):
    torch.manual_seed(3)
    network = build(narrow(paper("slice_vnet", 2, reduce=reduce)), 5, 2).eval()
    image = torch.randn(1, 5, 8, 12)
    with torch.no_grad():
        each = network.inner(image[:, None])
        expected = {"mean": each.mean(2), "sum": each.sum(2), "centre": each[:, :, 2]}[reduce]
        torch.testing.assert_close(network(image), expected)


def test_each_slice_of_an_image_is_predicted_from_its_neighbours():
    network = build(narrow(paper("slice_unet3d", 2, context=3)), 2 * 3, HEADS).eval()
    image = torch.randn(2, 4, 8, 12)
    logits = predict_logits([network], image, patch=(8, 12), heads=HEADS, context=3)
    beyond = F.pad(image, (0, 0, 0, 0, 1, 1))  # zeros before the first slice and after the last
    with torch.no_grad():
        expected = torch.cat([network(beyond[:, k : k + 3].flatten(0, 1)[None]) for k in range(4)])
    torch.testing.assert_close(logits, expected.transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_each_window_of_an_image_is_told_its_place():
    network = fresh(narrow(paper("relative_vnet", 2, position="film"))).eval()
    image = torch.randn(IN_CHANNELS, 1, 8, 24)
    logits = predict_logits([network], image, patch=(8, 12), heads=HEADS, step=1.0)
    left, right = image[:, 0, :, :12], image[:, 0, :, 12:]
    with torch.no_grad():
        # The windows lie side by side and do not overlap.
        expected = network(torch.stack((left, right)), position=torch.tensor([[0.0, -1.0], [0.0, 1.0]]))
    torch.testing.assert_close(logits[:, 0], torch.cat((expected[0], expected[1]), 2), atol=1e-5, rtol=1e-4)


def test_channels_that_are_no_slices_are_refused():
    with pytest.raises(ValueError, match="sees 5 slices of each channel; 7 input channels"):
        build(narrow(paper("slice_unet3d", 2)), 7, 2)
    with pytest.raises(ValueError, match="its dimension is 2"):
        build(replace(narrow(paper("unet3d")), name="slice_unet3d"), 5, 2)
