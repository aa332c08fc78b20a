"""Networks that began in 2D: each row's own check, sizes against the literature, and what all networks promise."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from network_contract import check_contract, check_he, check_onnx, narrow, on_meta, parameters
from torch import nn
from toys import ball

from autoseg.losses import deep_supervision
from autoseg.networks import NETWORKS, build, output_weights
from autoseg.networks.attention_unet import AttentionGate, attention_maps
from autoseg.networks.fc_densenet import DenseBlock, DenseOptions
from autoseg.networks.multires_unet import block_widths
from autoseg.networks.r2_unet import RecurrentLayer, RecurrentOptions
from autoseg.networks.segnet import pool, unpool
from autoseg.networks.unet_vanilla import DESAI

FAMILY = (
    "unet_vanilla",
    "attention_unet",
    "multires_unet",
    "r2_unet",
    "r2_attention_unet",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "segnet",
    "unetpp",
)


def small(name, dimension, features=(4, 6, 8), **options):
    """Three stages of the network; those of dense layers get few of them."""
    if not name.startswith("fc_densenet"):
        return narrow(NETWORKS[name].spec(dimension, **options), features)
    spec = narrow(NETWORKS[name].spec(dimension, first_features=5, **options), features)
    return replace(spec, encoder_blocks=(1, 2, 2), decoder_blocks=(2, 1))


def full(name, dimension=2, in_channels=3, heads=1, **options):
    """The network of its paper, without memory for its weights."""
    return on_meta(NETWORKS[name].spec(dimension, **options), in_channels, heads)


def weights(module, kinds=(nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", sorted({*FAMILY} - {"fc_densenet56", "fc_densenet67"}))  # all of one definition
def test_it_keeps_what_every_network_promises(name, dimension):
    check_contract(name, dimension, spec=small(name, dimension))


@pytest.mark.parametrize("name", FAMILY)
def test_the_network_of_the_paper_labels_every_pixel(name):
    assert full(name)(torch.empty(2, 3, 288, 288, device="meta")).shape == (2, 1, 288, 288)


@pytest.mark.parametrize(
    ("name", "dimension", "in_channels", "heads", "options", "count"),
    [
        ("unet_vanilla", 2, 1, 1, {}, 31_030_593),
        ("fc_densenet103", 2, 3, 11, {}, 9_322_091),  # 9.4 M in the paper
        ("fc_densenet67", 2, 3, 11, {}, 3_463_243),  # 3.5 M
        # 1.5 M in the paper, but 4 layers of 12 maps in each of 11 blocks give no more, whatever has a bias or not.
        ("fc_densenet56", 2, 3, 11, {}, 1_376_795),
        # VGG16's convolutions twice, as published: about 29.5 M.
        ("segnet", 2, 3, 12, {}, 29_441_996),
        # 9.04 M in the paper, whose convolutions have biases and no norm.
        ("unetpp", 2, 3, 1, {"norm": "none"}, 9_042_276),
        # The authors' code has 7 262 750: a norm more behind each concatenation, one count more for running means
        # and variances, and 285, not 284 channels where W/3 = 285.01 is rounded down at the bottom.
        ("multires_unet", 2, 3, 1, {}, 7_246_469),
        # The widespread one has 39 091 393 with a bias before each norm, of which there are 6 848.
        ("r2_unet", 2, 3, 1, {}, 39_091_393 - 6_848),
        # In the widespread one of 39 442 925 the gates have norms, and read the lower level after it was brought up,
        # at half of its width: 351 532 parameters, where those of the paper's formula have 523 204.
        ("r2_attention_unet", 2, 3, 1, {}, 39_442_925 - 6_848 - 351_532 + 523_204),
        # 34 878 573 likewise, with a gate on the finest skip, which has 6 209 of these.
        ("attention_unet", 2, 3, 1, {"gate_finest": True}, 34_878_573 - 6_848 - 351_532 + 523_204),
        ("attention_unet", 2, 3, 1, {}, 34_878_573 - 6_848 - 351_532 + 523_204 - 6_209),
    ],
)
def test_parameters_are_those_of_the_literature(name, dimension, in_channels, heads, options, count):
    assert parameters(full(name, dimension, in_channels, heads, **options)) == count


def test_below_its_gates_the_3d_attention_unet_is_the_unet_of_its_paper():
    network = full("attention_unet", 3, in_channels=1, heads=2)
    # 5.88 M in the paper, and 6.40 M with two grid gates a skip, where there is one here.
    assert weights(network.encoder) + weights(network.decoder) == 5_882_544
    assert len(network.scales) == 4
    assert len(full("attention_unet").scales) == 1


@pytest.mark.parametrize("name", FAMILY)
def test_convolutions_start_with_the_variance_of_he(name):
    spec = NETWORKS[name].spec(2)
    torch.manual_seed(11)
    if not name.startswith("fc_densenet"):
        spec = narrow(spec, (32, 64, 128))
    assert check_he(build(spec, 1, 2)) >= 3


@pytest.mark.parametrize("name", FAMILY)
def test_what_can_be_frozen_as_the_encoder_reads_the_image_and_gives_no_logits(name):
    network = on_meta(small(name, 2))
    assert network.first_weight.startswith(network.encoder_prefixes)
    frozen = [tensor for tensor in network.state_dict() if tensor.startswith(network.encoder_prefixes)]
    assert not any(tensor.startswith((*network.heads_prefixes, "decoder.", "ups.", "up.")) for tensor in frozen)


# --- unet_vanilla


def test_the_vanilla_unet_has_no_norm_and_drops_at_the_end_of_the_contracting_path():
    network = full("unet_vanilla", in_channels=1)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    dropping = [any(isinstance(part, nn.Dropout) for part in stage.modules()) for stage in network.encoder]
    assert dropping == [False, False, False, True, True]


@pytest.mark.parametrize(("dimension", "width", "widest"), [(2, 32, 1024), (3, 16, 512)])
def test_the_variant_of_desai_has_six_levels_with_one_norm_each(dimension, width, widest):
    spec = NETWORKS["unet_vanilla"].spec(dimension, **{**DESAI, "width": width})
    assert spec.features == tuple(width * 2**level for level in range(6))
    assert spec.features[-1] == widest
    network = on_meta(spec, 1, 1)
    assert network.divisor == (32,) * dimension
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert len(norms) == 6 + 5
    assert {up.kernel_size for up in network.ups} == {(3,) * dimension}
    size = (33, 70, 41)[:dimension]
    assert network(torch.empty(1, 1, *size, device="meta")).shape == (1, 1, *size)


def test_transposed_convolutions_of_any_kernel_fit_any_stride():
    spec = replace(small("unet_vanilla", 3, up_kernel=3), strides=((1, 1, 1), (1, 2, 4), (3, 1, 2)))
    assert build(spec, 1, 2).eval()(torch.zeros(1, 1, 4, 9, 17)).shape == (1, 2, 4, 9, 17)


# --- attention_unet


def test_a_gate_weighs_the_skip_by_one_map_between_0_and_1():
    torch.manual_seed(12)
    gate = AttentionGate(4, 6, (1, 2, 2))
    skip, below = torch.randn(2, 4, 3, 10, 14), torch.randn(2, 6, 3, 5, 7)
    coefficients = gate.attention(skip, below)
    assert coefficients.shape == (2, 1, 3, 10, 14)
    assert coefficients.min() > 0 and coefficients.max() < 1 and coefficients.std() > 0
    assert torch.equal(gate(skip, below), skip * coefficients)
    nn.init.zeros_(gate.attention.psi.weight)
    nn.init.zeros_(gate.attention.psi.bias)
    assert torch.equal(gate(skip, below), skip / 2)  # sigmoid(0)


def test_a_gate_follows_the_formula_by_hand():
    gate = AttentionGate(2, 1, (1, 2))
    values = {
        "of_skip.weight": [[[[1.0]], [[-1.0]]]],
        "of_below.weight": [[[[2.0]]]],
        "of_below.bias": [1.0],
        "psi.weight": [[[[0.5]]]],
        "psi.bias": [-1.0],
    }
    gate.attention.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    skip = torch.tensor([[[[3.0, 9.0]], [[1.0, 9.0]]]])  # a strided 1x1 convolution reads the first of two columns
    below = torch.tensor([[[[4.0]]]])
    # relu(3 - 1 + 2 * 4 + 1) = 11; sigmoid(0.5 * 11 - 1)
    torch.testing.assert_close(gate.attention(skip, below), torch.sigmoid(torch.full((1, 1, 1, 2), 4.5)))


@pytest.mark.parametrize(("name", "gates"), [("attention_unet", 2), ("r2_attention_unet", 3)])
@pytest.mark.parametrize("size", [(13, 22), (5, 11, 14)])
def test_attention_is_exported_as_maps_of_the_size_of_the_image(name, gates, size):
    torch.manual_seed(13)
    network = build(small(name, len(size), features=(4, 6, 8, 9)), 2, 3).eval()
    maps = attention_maps(network, torch.randn(2, 2, *size))
    assert [tuple(one.shape) for one in maps] == [(2, 1, *size)] * gates
    assert all(one.min() >= 0 and one.max() <= 1 for one in maps)
    assert maps[0].std() > 0


def test_a_network_without_gates_has_no_attention_to_export():
    with pytest.raises(ValueError, match="no attention gates"):
        attention_maps(on_meta(small("r2_unet", 2)), torch.empty(1, 2, 8, 8, device="meta"))


# --- multires_unet


def test_a_multires_block_gives_the_floors_of_a_sixth_a_third_and_a_half():
    assert block_widths(32, 1.67) == (8, 17, 26)  # W = 53.44
    assert block_widths(1, 1.67) == (1, 1, 1)
    network = full("multires_unet")
    given = [stage[-1][-1].end[1].num_features for stage in network.encoder]
    assert given == [8 + 17 + 26, 17 + 35 + 53, 35 + 71 + 106, 71 + 142 + 213, 142 + 285 + 427]
    assert [len(path) for path in network.joins] == [4, 3, 2, 1]


# --- r2_unet


def test_a_recurrent_layer_sees_its_input_and_its_own_output():
    options = RecurrentOptions(t=2, norm="none", activation="none")
    layer = RecurrentLayer(1, (1, 1), options)
    nn.init.constant_(layer.once[0].weight, 2.0)
    nn.init.zeros_(layer.once[0].bias)
    # y0 = 2x, y1 = 2 (x + 2x) = 6x, y2 = 2 (x + 6x) = 14x
    assert torch.equal(layer(torch.ones(1, 1, 3, 5)), torch.full((1, 1, 3, 5), 14.0))


@pytest.mark.parametrize("name", ["r2_unet", "r2_attention_unet"])
def test_recurrences_cost_no_parameters_but_change_the_output(name):
    outputs = []
    for t in (1, 2, 5):
        torch.manual_seed(14)
        network = build(small(name, 2, t=t), 1, 2).eval()
        outputs.append(network(torch.ones(1, 1, 9, 11)))
        assert parameters(network) == parameters(on_meta(small(name, 2), 1, 2))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_gates_are_all_that_r2_attention_unet_has_more(dimension):
    gated, plain = full("r2_attention_unet", dimension), full("r2_unet", dimension)
    assert parameters(gated) - parameters(plain) == parameters(gated.joins) > 0
    assert parameters(plain.joins) == 0


@pytest.mark.parametrize("t", [0, 9, 10**9])
def test_endless_recurrence_is_refused_by_name(t):
    spec = small("r2_unet", 2)
    with pytest.raises(ValueError, match=r"t: Input should be .* \(found"):
        on_meta(replace(spec, options={**spec.options, "t": t}))


# --- fc_densenet


@pytest.mark.parametrize(("name", "layers"), [("fc_densenet56", 56), ("fc_densenet67", 67), ("fc_densenet103", 103)])
def test_the_name_counts_the_convolutions(name, layers):
    network = full(name)
    assert sum(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in network.modules()) == layers
    if name == "fc_densenet103":
        assert network.heads[0].in_channels == 256


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_dense_layer_reads_all_before_it_and_changes_none_of_it(norm):
    torch.manual_seed(15)
    block = DenseBlock(3, 2, 2, (3, 1), DenseOptions(norm=norm, dropout=0.0))
    x = torch.randn(2, 3, 5, 7)
    before = x.clone()
    first = block[0](x.clone())
    expected = torch.cat((first, block[1](torch.cat((x, first), 1))), 1)
    assert torch.equal(block(x), expected)
    assert torch.equal(x, before)


# --- segnet


@pytest.mark.parametrize(("size", "stride"), [((4, 6), (2, 2)), ((3, 6), (1, 3)), ((4, 6, 2), (2, 3, 1))])
def test_unpooled_values_are_where_the_maxima_were(size, stride):
    torch.manual_seed(16)
    x = torch.randn(2, 3, *size)
    maxima, places = pool(x, stride)
    back = unpool(maxima, places, size)
    assert torch.equal(back[back != 0], x[back != 0])  # each value at its own place
    assert (back != 0).sum() == maxima.numel()
    reference = F.max_unpool2d if len(size) == 2 else F.max_unpool3d
    assert torch.equal(back, reference(maxima, places, stride, stride, output_size=size))


def test_unpooling_by_hand():
    x = torch.tensor([[[[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, 7.0, 6.0]]]])
    back = unpool(*pool(x, (2, 2)), (2, 4))
    assert back.tolist() == [[[[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]]]]


@pytest.mark.parametrize("dimension", [2, 3])
def test_segnet_pools_once_more_than_it_has_encoder_levels(dimension):
    spec = replace(small("segnet", dimension), encoder_blocks=(2, 1, 0))
    size = (5, 11, 14)[:dimension]
    assert build(spec, 1, 2).eval()(torch.zeros(1, 1, *size)).shape == (1, 2, *size)
    network = full("segnet")
    assert network.divisor == (32, 32)
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 2 * 13
    assert max(part.in_channels for part in convolutions) == 512  # no features are set side by side
    with pytest.raises(ValueError, match="encoder_blocks: every entry must be 1 or more"):
        on_meta(replace(spec, encoder_blocks=(2, 1, -1)))


# --- unetpp


def test_every_output_of_unetpp_has_the_size_of_the_image_the_deepest_first():
    network = build(small("unetpp", 2, features=(4, 5, 6, 7)), 1, 2).eval()
    assert network.scales == ((1, 1),) * 3
    assert sorted(network.nodes) == ["0_1", "0_2", "0_3", "1_1", "1_2", "2_1"]
    image = torch.randn(1, 1, 11, 13)
    with torch.no_grad():
        before = network(image, all_scales=True)
        for parameter in network.nodes["0_3"].parameters():
            parameter.zero_()
        after = network(image, all_scales=True)
    # Only the deepest reads this node.
    assert [torch.equal(one, other) for one, other in zip(before, after)] == [False, True, True]


def test_the_losses_of_the_outputs_of_unetpp_are_averaged():
    network = build(small("unetpp", 2, features=(4, 5, 6, 7, 8)), 1, 2)
    numbers = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([9.0])]
    loss = deep_supervision(lambda logits, target: logits.sum(), numbers, numbers, output_weights(network))
    assert loss.item() == pytest.approx(4.0)


# --- options


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"norm": "btch"}, "norm: choose one of batch"),
        ({"activation": "rlu"}, "activation: choose one of relu"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"nrm": "batch"}, "nrm"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name, option, said):
    spec = small(name, 2)
    with pytest.raises(ValueError, match=said):
        on_meta(replace(spec, options={**spec.options, **option}))


@pytest.mark.parametrize("name", FAMILY)
def test_norm_activation_and_dropout_may_be_stated(name):
    network = on_meta(small(name, 3, norm="instance", activation="gelu", dropout=0.25))
    made = [type(part).__name__ for part in network.modules()]
    assert "InstanceNorm" in made and "GELU" in made
    assert "BatchNorm3d" not in made and "ReLU" not in made
    assert {part.p for part in network.modules() if isinstance(part, nn.Dropout)} == {0.25}


@pytest.mark.parametrize("name", ["unetpp", "multires_unet"])
def test_stages_whose_parts_grow_with_their_square_are_bounded(name):
    spec = NETWORKS[name].spec(2)
    stages = 1000
    endless = replace(
        spec,
        features=(1,) * stages,
        strides=((1, 1),) * stages,
        kernels=((1, 1),) * stages,
        encoder_blocks=(1,) * stages,
        decoder_blocks=(1,) * (stages - 1),
    )
    with pytest.raises(ValueError, match="at most 12 stages"):
        on_meta(endless)


def test_a_kernel_of_transposed_convolutions_must_have_a_middle():
    spec = small("unet_vanilla", 2)
    with pytest.raises(ValueError, match="up_kernel: an odd number"):
        on_meta(replace(spec, options={**spec.options, "up_kernel": 4}))


# --- learning


def discs(count, seed):
    """Noisy images (count, 1, 24, 28) of a bright disc among dim ones, and the disc (count, 24, 28)."""
    random = torch.Generator().manual_seed(seed)
    images, masks = [], []
    for _ in range(count):
        centre = (6 + torch.rand(2, generator=random) * torch.tensor([12.0, 16.0])).tolist()
        other = (torch.rand(2, generator=random) * torch.tensor([24.0, 28.0])).tolist()
        mask = torch.from_numpy(ball((24, 28), centre, 5))
        dim = torch.from_numpy(ball((24, 28), other, 4)) & ~mask
        images.append(mask * 1.5 + dim * 0.7 + 0.3 * torch.randn(24, 28, generator=random))
        masks.append(mask)
    return torch.stack(images)[:, None].float(), torch.stack(masks).long()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_it_learns_a_disc_to_a_dice_of_0_9(name):
    torch.manual_seed(17)
    network = build(small(name, 2, features=(8, 12, 16)), 1, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for step in range(120):
        image, mask = discs(8, step)
        loss = F.cross_entropy(network(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, mask = discs(24, 10_000)
    with torch.no_grad():
        found = network.eval()(image).argmax(1)
    assert (2 * (found * mask).sum() / (found.sum() + mask.sum())).item() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("attention_unet", (13, 22)), ("segnet", (5, 11, 14))])
def test_onnx_gives_the_same_logits(name, size):
    check_onnx(small(name, len(size)), size)
