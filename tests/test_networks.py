"""Networks: the published ones number for number, memory arithmetic against the real thing, errors for people."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoseg.losses import scale_targets
from autoseg.networks import NETWORKS, build, unnormed_width
from autoseg.networks.blocks import SLOPE, ConvBlock, InstanceNorm, ResidualBlock
from autoseg.networks.strides import running, total
from autoseg.planners.memory import activations
from autoseg.records import AutosegError
from autoseg.schema import NetworkSpec


def cubic_spec(name="unet", *, dimension=3, features=(32, 64, 128, 256), blocks=None, decoder_blocks=2):
    """A specification whose stages all stride by 2 and convolve with 3."""
    stages = len(features)
    return NetworkSpec(
        name=name,
        dimension=dimension,
        features=features,
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((3,) * dimension,) * stages,
        encoder_blocks=blocks or (2,) * stages,
        decoder_blocks=(decoder_blocks,) * (stages - 1),
    )


ANISOTROPIC = NetworkSpec(
    name="unet",
    dimension=3,
    features=(4, 6, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    encoder_blocks=(2, 1, 2),
    decoder_blocks=(2, 1),
)
ANISOTROPIC_RESIDUAL = NetworkSpec(
    name="resenc",
    dimension=3,
    features=(4, 6, 6, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 1)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    encoder_blocks=(1, 3, 2, 2),
    decoder_blocks=(1, 1, 2),
)
FLAT_RESIDUAL = cubic_spec("resenc", dimension=2, features=(4, 6, 8), blocks=(1, 2, 2), decoder_blocks=1)

SIX_STAGES = (32, 64, 128, 256, 320, 320)
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)


def on_meta(spec, in_channels=1, heads=3):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(spec, in_channels, heads)


class RMSNorm3D(nn.Module):
    """One's own, by its name alone."""


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sequential(nn.BatchNorm2d(3))), None),
        (nn.Sequential(nn.Conv2d(1, 3, 3), RMSNorm3D()), None),
        (nn.Sequential(nn.Conv2d(7, 3, 3), nn.PReLU(), nn.Conv2d(6, 4, (5, 3), groups=2), nn.Linear(11, 2)), 63),
        (nn.Sequential(nn.ReLU(), nn.Linear(11, 2)), 11),
        (nn.ReLU(), 1),
        (on_meta(cubic_spec()), None),
        # Its blocks are called ConvNormAct, and normalise only where `norm` says so.
        (on_meta(NETWORKS["vnet"].spec(2)), 256 * 5**2),
        (on_meta(NETWORKS["vnet"].spec(3)), 256 * 5**3),
        (on_meta(NETWORKS["mednext"].spec(3)), None),
    ],
)
def test_layers_that_normalise_are_found_or_else_the_widest_one(network, expected):
    assert unnormed_width(network) == expected


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("spec", "in_channels", "heads", "count"),
    [
        (cubic_spec(), 1, 3, 5_603_177),
        (cubic_spec(dimension=2), 1, 3, 1_928_489),
        (cubic_spec(features=SIX_STAGES), 1, 3, 31_196_399),
        (
            cubic_spec("resenc", features=SIX_STAGES, blocks=RESIDUAL_BLOCKS, decoder_blocks=1),
            1,
            3,
            102_350_575,
        ),
        (ANISOTROPIC, 2, 3, 6_922),
        (ANISOTROPIC_RESIDUAL, 2, 3, 22_415),
        (FLAT_RESIDUAL, 1, 2, 5_264),
    ],
)
def test_parameter_counts_are_those_of_dynamic_network_architectures_0_4_4(spec, in_channels, heads, count):
    assert parameters(on_meta(spec, in_channels, heads)) == count


def fill(network):
    """Weights that depend on nothing but the shape of each parameter."""
    for parameter in network.parameters():
        wave = 0.3 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + parameter.ndim)
        parameter.data = (wave + (1.0 if parameter.ndim == 1 else 0.0)).reshape(parameter.shape).float()


@pytest.mark.parametrize(
    ("spec", "in_channels", "heads", "size", "recorded"),
    [
        (ANISOTROPIC, 2, 3, (6, 12, 20), [[1.0507, 0.9087, 1.0112, -0.2455], [1.245, 1.0178, 0.2119, 3.352]]),
        (
            ANISOTROPIC_RESIDUAL,
            2,
            3,
            (6, 16, 12),
            [[1.0501, 0.9067, 0.4517, -1.3585], [1.2449, 1.0376, 1.5601, 3.1415], [1.2455, 0.8752, 1.4303, 1.161]],
        ),
        (FLAT_RESIDUAL, 1, 2, (20, 12), [[1.293, 1.4381, -1.7225, 1.6733], [0.8171, 0.5569, 1.261, 0.694]]),
    ],
)
def test_output_at_every_scale_is_that_of_dynamic_network_architectures_0_4_4(spec, in_channels, heads, size, recorded):
    network = build(spec, in_channels, heads)
    fill(network)
    count = 2 * in_channels * math.prod(size)
    image = torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.01).reshape(2, in_channels, *size).float()
    with torch.no_grad():
        scales = network(image, all_scales=True)
    found = [[part.item() for part in (y[0].mean(), y[1].std(), y.flatten()[7], y.flatten()[-5])] for y in scales]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), atol=2e-4, rtol=0)


def convolution_outputs(spec, patch, heads):
    """Numbers that the convolutions of the real network put out for one sample, seen by hooks.

    A shortcut counts once, as in the published rule, also where it only averages and has no convolution.
    """
    network, seen = on_meta(spec, 2, heads), []
    for name, module in network.named_modules():
        shortcut = name.endswith("shortcut") and len(module) > 0
        upward = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
        block = isinstance(module, ConvBlock) and "shortcut" not in name
        if shortcut or upward or block or name.startswith("heads."):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    network(torch.empty(1, 2, *patch, device="meta"))
    return sum(seen)


@pytest.mark.parametrize(
    ("spec", "patch", "known"),
    [
        (cubic_spec(features=SIX_STAGES), (128, 128, 128), 452_796_416),
        (cubic_spec("resenc", features=SIX_STAGES, blocks=RESIDUAL_BLOCKS, decoder_blocks=1), (128,) * 3, 557_420_544),
        (
            cubic_spec(
                "resenc",
                dimension=2,
                features=(32, 64, 128, 256, 512, 512, 512),
                blocks=(1, 3, 4, 6, 6, 6, 6),
                decoder_blocks=1,
            ),
            (512, 512),
            129_531_904,
        ),
        (ANISOTROPIC, (6, 12, 20), None),
        (ANISOTROPIC_RESIDUAL, (6, 16, 12), None),
    ],
)
def test_the_planner_counts_the_activations_that_the_network_has(spec, patch, known):
    counted = convolution_outputs(spec, patch, 3)
    assert counted == activations(spec, patch, 3)
    assert known is None or counted == known


@pytest.mark.parametrize(("spec", "size"), [(ANISOTROPIC, (6, 12, 20)), (ANISOTROPIC_RESIDUAL, (6, 16, 12))])
def test_all_scales_are_listed_from_the_highest_resolution_down(spec, size):
    scales = on_meta(spec, 2, 5)(torch.empty(2, 2, *size, device="meta"), all_scales=True)
    expected, edges = [], size
    for stride in spec.strides[:-1]:
        edges = tuple(edge // step for edge, step in zip(edges, stride))
        expected.append((2, 5, *edges))
    assert [tuple(scale.shape) for scale in scales] == expected


def test_without_all_scales_the_output_is_the_first_of_them():
    torch.manual_seed(3)
    network, image = build(FLAT_RESIDUAL, 1, 2), torch.randn(2, 1, 20, 12)
    assert torch.equal(network(image), network(image, all_scales=True)[0])


@pytest.mark.parametrize("spec", [ANISOTROPIC, ANISOTROPIC_RESIDUAL])
def test_every_parameter_learns_except_what_starts_behind_a_zero(spec):
    torch.manual_seed(4)
    network = build(spec, 2, 3)
    scales = network(torch.randn(2, 2, 6, 16, 12), all_scales=True)
    sum(scale.square().mean() for scale in scales).backward()
    idle = {name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0}
    # The zero scale of a residual block's last norm keeps gradients from the layers before it, for one step.
    behind = {name for name in idle if ".first." in name or ".second.conv." in name}
    # A norm takes away whatever constant the convolution before it adds.
    assert idle - behind <= {name for name in idle if name.endswith("conv.bias")}


def test_merging_with_a_skip_equals_convolving_the_concatenation_gradients_included():
    torch.manual_seed(5)
    block = ConvBlock(7, 3, (3, 1, 3)).double()
    below, skip = (torch.randn(2, n, 5, 7, 11, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    merged, joined = block(below, skip), block(torch.cat((below, skip), 1))
    torch.testing.assert_close(merged, joined)
    weight = torch.randn_like(merged)
    wanted = [below, skip, *block.parameters()]
    for ours, reference in zip(
        torch.autograd.grad((merged * weight).sum(), wanted), torch.autograd.grad((joined * weight).sum(), wanted)
    ):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_instance_norm_is_that_of_torch(kind):
    torch.manual_seed(6)
    ours, reference = InstanceNorm(3), kind(3, affine=True)
    for norm in (ours, reference):
        norm.weight.data, norm.bias.data = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([1.0, 0.0, 3.0])
    image = 50 + 9 * torch.randn(2, 3, *((5, 7) if kind is nn.InstanceNorm2d else (5, 7, 11)))
    torch.testing.assert_close(ours(image), reference(image), atol=1e-4, rtol=1e-4)


def test_a_fresh_residual_block_is_its_shortcut():
    block = ResidualBlock(2, 2, (3, 3), (2, 1))
    image = torch.arange(2 * 4 * 3.0).reshape(1, 2, 4, 3) - 6
    average = (image[:, :, ::2] + image[:, :, 1::2]) / 2
    torch.testing.assert_close(block(image), torch.where(average > 0, average, SLOPE * average))


def test_convolutions_start_kaiming_normal_without_bias():
    torch.manual_seed(7)
    network = build(cubic_spec(), 1, 3)
    weight = network.encoder[1][1].conv.weight  # 64 channels in, 27 voxels
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1 + SLOPE**2) / (64 * 27)), rel=0.01)
    assert network.heads[0].bias.abs().max() == 0 == network.up[0].bias.abs().max()


def test_any_size_is_padded_behind_and_cut_back():
    network = build(ANISOTROPIC, 2, 3).eval()
    image = torch.randn(1, 2, 3, 13, 17)
    padded = F.pad(image, (0, 3, 0, 3, 0, 1))  # the total stride is 2 x 4 x 4
    with torch.no_grad():
        full, lower = network(image, all_scales=True)
        expected, expected_lower = network(padded, all_scales=True)
    assert torch.equal(full, expected[..., :3, :13, :17])
    # Lower voxels whose centre, voxel 1 of 2, lies in the image.
    assert torch.equal(lower, expected_lower[..., :3, :6, :8])


def test_every_scale_fits_its_target_at_any_size():
    network = build(ANISOTROPIC, 1, 3).eval()
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, 1, 9, 11), all_scales=True)
    targets = scale_targets(torch.zeros(1, 1, 9, 11), network.scales)
    assert [tuple(one.shape[2:]) for one in outputs] == [tuple(one.shape[1:]) for one in targets]


def test_strides_multiply_axis_by_axis():
    assert total(ANISOTROPIC_RESIDUAL.strides) == (2, 8, 4)
    assert running(ANISOTROPIC_RESIDUAL.strides) == ((1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 8, 4))
    assert running(((2, 2),)) == ((2, 2),)
    assert running(()) == total(()) == ()


def test_a_wrong_number_of_axes_is_said():
    with pytest.raises(ValueError, match="3 spatial axes"):
        on_meta(ANISOTROPIC, 2)(torch.empty(1, 2, 8, 8, device="meta"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": (4,)}, "two stages"),
        ({"kernels": ((3, 3, 3),) * 2}, "kernels: 3 entries"),
        ({"decoder_blocks": (1, 2, 1)}, "decoder_blocks: 2 entries"),
        ({"strides": ((2, 2, 2), (1, 2, 2), (2, 2, 2))}, "full resolution"),
        ({"strides": ((1, 1), (2, 2), (2, 2))}, "3 positive numbers"),
        ({"kernels": ((1, 3, 4), (3, 3, 3), (3, 3, 3))}, "odd"),
        ({"encoder_blocks": (2, 0, 2)}, "1 or more"),
    ],
)
@pytest.mark.parametrize(
    "name", [name for name, own in NETWORKS.items() if max(own.spec(own.dimensions[0]).strides[0]) == 1]
)
def test_a_wrong_specification_is_refused(name, change, said):
    with pytest.raises(ValueError, match=said):
        build(replace(ANISOTROPIC, name=name, **change), 1, 2)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AutosegError, match="choose one of unet, resenc"):
        build(replace(ANISOTROPIC, name="unett"), 1, 2)


OWN = """
from torch import nn

class Pointwise(nn.Module):
    def __init__(self, spec, in_channels, heads):
        super().__init__()
        self.head = nn.Conv3d(in_channels, heads, 1)

    def forward(self, x, all_scales=False):
        return [self.head(x)] if all_scales else self.head(x)

class Deaf(Pointwise):
    def forward(self, x):
        return self.head(x)

def number(spec, in_channels, heads):
    return 7

constant = 7
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's on the path."""
    (tmp_path / "own_networks_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks_of_a_test"


def test_a_network_of_ones_own_is_built_by_module_and_name(own_module):
    network = build(replace(ANISOTROPIC, name=f"{own_module}:Pointwise"), 2, 3)
    assert network(torch.zeros(1, 2, 5, 7, 11)).shape == (1, 3, 5, 7, 11)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}:Missing", "no class or function 'Missing'"),
        ("{}:constant", "no class or function 'constant'"),
        ("{}:number", "must give a torch.nn.Module"),
        ("{}:Deaf", "all_scales"),
        ("{}_elsewhere:Pointwise", "cannot be imported"),
        (":Pointwise", "cannot be imported"),
    ],
)
def test_a_network_of_ones_own_that_does_not_work_is_explained(own_module, name, said):
    with pytest.raises(AutosegError, match=said):
        build(replace(ANISOTROPIC, name=name.format(own_module)), 2, 3)


@pytest.mark.parametrize("name", ["unet", "segnet", "r2_unet", "fc_densenet56", "mednext", "attention_unet"])
def test_strides_that_no_tensor_shows_are_limited(name):
    spec = NETWORKS[name].spec(2)
    strides = (*spec.strides[:-2], (4096, 4096), spec.strides[-1])
    with pytest.raises(ValueError, match="strides: at most 8"):
        on_meta(replace(spec, strides=strides), 1)
