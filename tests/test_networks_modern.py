"""MedNeXt and Primus: each against its paper and its authors' code, and what is asked of all networks."""

from dataclasses import replace

import pytest
import torch
from network_contract import (
    IN_CHANNELS,
    SIZES,
    anisotropic,
    check_contract,
    check_file,
    check_gradients,
    check_names,
    check_onnx,
    check_padding,
    check_shapes,
    fresh,
    narrow,
    on_meta,
    parameters,
)

from autoseg.networks import NETWORKS, build
from autoseg.networks.primus import decoder_widths, rotary_angles, rotated
from autoseg.records import from_json, to_json
from autoseg.schema import NetworkSpec


def paper(name, dimension=3, **options):
    return NETWORKS[name].spec(dimension, **options)


def count(name, **options):
    return parameters(on_meta(paper(name, **options), 1, 2))


SMALL_MEDNEXT = {d: replace(narrow(paper("mednext", d)), options={"expansion": (2, 3, 2)}) for d in (2, 3)}


@pytest.mark.parametrize("dimension", [2, 3])
def test_every_promise_is_kept_by_mednext(dimension):
    check_contract("mednext", dimension, spec=SMALL_MEDNEXT[dimension])


def small_primus(dimension):
    spec = paper("primus_v3", dimension, drop_path=0.0)
    options = spec.options | {"attention_heads": 2, "grid": (2, 3, 1)[:dimension]}
    return replace(spec, features=(4, 5, 6, 7, 24), encoder_blocks=(1, 1, 2, 1, 2), options=options)


@pytest.mark.parametrize("dimension", [2, 3])
def test_every_promise_is_kept_by_primus(dimension):
    # Its last stage is the transformer, so widths and strides are not as free as those of others.
    spec, size = small_primus(dimension), SIZES[dimension]
    assert from_json(NetworkSpec, to_json(spec)) == spec
    check_names(spec)
    for one in (spec, anisotropic(spec)):
        check_shapes(one, size)
        check_gradients(one, size)
    check_padding(spec, size)
    check_file(spec, size)


@pytest.mark.parametrize("spec", [SMALL_MEDNEXT[3], small_primus(3)], ids=["mednext", "primus"])
def test_onnx_gives_the_same(spec):
    check_onnx(spec, SIZES[3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))}, "not in it"),
        ({"strides": ((1, 1, 1),) * 5}, "strides before its last stage"),
        ({"decoder_blocks": (1, 2, 1, 1)}, "one everywhere"),
        ({"features": (4, 5, 6, 7, 25)}, "divides the features"),
    ],
)
def test_edits_that_primus_cannot_heed_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        on_meta(replace(small_primus(3), **change))


@pytest.mark.parametrize(
    "change",
    [
        {"features": (4, 5, 6, 9, 24)},
        {"features": (4, 5, 6, 7, 36)},
        {"encoder_blocks": (1, 2, 2, 1, 2)},
        {"encoder_blocks": (1, 1, 2, 1, 3)},
        {"kernels": ((3, 3, 3), (5, 3, 3), (3, 3, 3), (3, 3, 3), (1, 1, 1))},
        {"kernels": ((3, 3, 3),) * 5},
        {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))},
    ],
)
def test_other_edits_of_primus_are_heeded(change):
    assert parameters(on_meta(replace(small_primus(3), **change))) != parameters(on_meta(small_primus(3)))


def test_options_of_the_paper_can_be_others():
    spec = narrow(paper("mednext", norm="group", activation="relu", kernel=5, expansion=(1,)))
    check_shapes(spec, (5, 11, 14))
    check_padding(spec, (5, 11, 14))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mednext", {"expansion": (2, 3)}, "5 numbers or one"),
        ("mednext", {"expansion": (0,)}, "expansion"),
        ("primus_v3", {"attention_heads": 7}, "divides the features"),
        ("primus_v3", {"grid": (4, 4)}, "one number an axis"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, said):
    spec = paper(name)
    with pytest.raises(ValueError, match=said):
        on_meta(replace(spec, options=spec.options | options), 1, 2)


@pytest.mark.parametrize("name", ["mednext", "primus_v3"])
def test_an_unknown_size_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="choose one of S, B, M, L"):
        paper(name, size="huge")


# MedNeXt.


@pytest.mark.parametrize(
    ("size", "kernel", "millions"),
    [
        *(("S", 3, 5.6), ("B", 3, 10.5), ("M", 3, 17.6), ("L", 3, 61.8)),
        # The paper says 5.9 for S: 5.98 cut, not rounded.
        *(("S", 5, 6.0), ("B", 5, 11.0), ("M", 5, 18.3), ("L", 5, 63.0)),
    ],
)
def test_mednext_has_the_parameters_of_its_paper(size, kernel, millions):
    assert round(count("mednext", size=size, kernel=kernel) / 1e6, 1) == millions


def test_a_mednext_block_is_its_input_where_its_last_convolution_gives_nothing():
    network = fresh(SMALL_MEDNEXT[3])
    block = network.encoder[1][0]
    torch.nn.init.zeros_(block.compress.weight)
    torch.nn.init.zeros_(block.compress.bias)
    image = torch.randn(1, 6, 3, 5, 4)
    assert torch.equal(block(image), image)


def test_going_up_fills_the_first_planes_with_zeros_as_the_authors_do():
    up = fresh(anisotropic(SMALL_MEDNEXT[3])).up[0]  # strides by 1 x 2 x 2
    with torch.no_grad():
        out = up(torch.randn(1, 6, 3, 5, 4))
    assert out.shape == (1, 4, 3, 10, 8)
    assert out[..., 0, :].abs().max() == 0 == out[..., 0].abs().max()
    assert out[:, :, 0, 1:, 1:].abs().min() > 0


# Primus.


@pytest.mark.parametrize(
    ("size", "known"), [("S", 70_596_165), ("B", 148_578_165), ("M", 203_545_533), ("L", 386_688_645)]
)
def test_parameter_counts_are_those_of_dynamic_network_architectures_0_4_4(size, known):
    # For patches of 64 x 64 x 64; its authors state 70.6 million for S.
    assert count("primus_v3", size=size, grid=(8, 8, 8)) == known


def test_primus_gives_what_dynamic_network_architectures_0_4_4_gives():
    spec = NetworkSpec(
        name="primus_v3",
        dimension=3,
        features=(4, 6, 8, 10, 24),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
        kernels=((3, 3, 3),) * 4 + ((1, 1, 1),),
        encoder_blocks=(1, 1, 1, 1, 3),
        decoder_blocks=(1, 1, 1, 1),
        options={"attention_heads": 2, "grid": (2, 3, 1)},
    )
    network = build(spec, 2, 3).eval()
    for name, parameter in network.named_parameters():
        shape = parameter.shape if name != "head.weight" else parameter.transpose(0, 1).shape
        axes = parameter.ndim - (name == "places")
        wave = 0.3 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + axes)
        data = (wave + (1.0 if parameter.ndim == 1 else 0.0)).reshape(shape).float()
        parameter.data = data.transpose(0, 1) if name == "head.weight" else data
    network.projection_scales.data.fill_(0.3)
    count = 2 * 2 * 16 * 24 * 8
    image = torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.01).reshape(2, 2, 16, 24, 8).float()
    with torch.no_grad():
        logits = network(image)
    found = torch.stack((logits[0].mean(), logits[1].std(), logits.flatten()[7], logits.flatten()[-5]))
    torch.testing.assert_close(found, torch.tensor([1.2336, 0.4071, 0.9604, 1.8510]), atol=2e-4, rtol=0)


def test_rotated_features_tell_how_far_apart_tokens_are_and_no_more():
    torch.manual_seed(1)
    query, key = torch.randn(2, 14).double()
    angles = rotary_angles((4, 5), 3, torch.device("cpu")).double()
    assert angles.shape == (20, 12 // 2)
    turned = rotated(query.expand(20, 14), angles) @ rotated(key.expand(20, 14), angles).T
    turned = turned.reshape(4, 5, 4, 5)
    torch.testing.assert_close(turned[0, 1, 2, 4], turned[1, 0, 3, 3])
    torch.testing.assert_close(turned[0, 0, 0, 0], query @ key)
    assert abs(turned[0, 1, 2, 4] - turned[0, 1, 3, 4]) > 1e-6


def test_the_features_of_the_decoder_fall_in_a_geometric_row():
    # 396 to 2 x 2 in three steps: by (396 / 4) ** (1 / 3) = 4.626 each time, in multiples of 8.
    assert decoder_widths(396, 2, 3) == [396, 88, 16, 2]


def test_blocks_are_left_out_in_training_only():
    spec = replace(small_primus(2), options=small_primus(2).options | {"drop_path": 0.8})
    network, image = fresh(spec), torch.randn(1, IN_CHANNELS, 16, 24)
    assert [block.drop.p for block in network.blocks] == [0, 0.8]
    with torch.no_grad():
        assert len({network(image).sum().item() for _ in range(12)}) > 1
        assert len({network.eval()(image).sum().item() for _ in range(3)}) == 1


def test_primus_can_be_laid_out_with_channels_last():
    network = fresh(small_primus(3)).eval()
    image = torch.randn(1, IN_CHANNELS, 9, 10, 11)
    with torch.no_grad():
        expected = network(image)
        network.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(network(image.to(memory_format=torch.channels_last_3d)), expected)
