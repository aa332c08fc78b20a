"""Plans for networks asked for by name: strides that follow the voxels, patches and batches that fit the memory."""

import math
from dataclasses import replace

import pytest
import toys
from test_planners import fingerprint, labels

from autoseg.needs import NetworkNeeds
from autoseg.networks.footprint import needs_of
from autoseg.planners import PLANNERS, explain, plan
from autoseg.planners.asked import USABLE, adapted, largest_batch
from autoseg.records import AutosegError

FIVE = (4, 6, 8, 10, 12)


def needs(a_voxel=1000, dimensions=(2, 3), least=1, **more) -> NetworkNeeds:
    """A network of five levels that needs so many bytes a voxel."""
    return NetworkNeeds(
        name="toy(levels=5)",
        dimensions=dimensions,
        spec=lambda dimension: toys.network(dimension, FIVE),
        divisors=lambda spec: tuple(math.prod(steps) for steps in zip(*spec.strides)),
        smallest=lambda spec: tuple(least * math.prod(steps) for steps in zip(*spec.strides)),
        bytes=lambda spec, patch, batch: a_voxel * math.prod(patch) * batch,
        **more,
    )


def planned(asked, group=(20, (36, 50, 35), (1, 1, 1)), memory=2.0, **more):
    return plan(fingerprint(group, **more), labels(3), PLANNERS["unet"], gpu_memory_gb=memory, needs=asked, name="toy")


def test_axes_wait_until_voxels_are_alike():
    made = adapted(toys.network(3, FIVE), (3.6, 0.625, 0.625), (20, 320, 256), 4)
    assert made.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert made.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert made.features == FIVE


def test_short_axes_are_not_strided_and_levels_stay():
    made = adapted(toys.network(3, FIVE), (1, 1, 1), (5, 16, 40), 4)
    assert made.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1))


def test_what_is_alike_along_all_axes_stays_as_it_is():
    spec = toys.network(2, FIVE)
    assert adapted(spec, (0.5, 0.5), (320, 320), 4) == spec


def test_patch_and_batch_fit_the_memory_and_fill_it():
    made = planned(needs(a_voxel=4000), (200, (128, 300, 250), (1, 0.8, 0.8)))
    usable = 2 * 2**30 * USABLE
    for configuration in made.configurations:
        step = 4000 * math.prod(configuration.patch)
        assert step * configuration.batch_size <= usable
        divisors = [math.prod(steps) for steps in zip(*configuration.network.strides)]
        assert not any(edge % divisor for edge, divisor in zip(configuration.patch, divisors))
    assert made.network == "toy(levels=5)"
    assert step * 3 > usable
    assert [c.name for c in made.configurations] == ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    assert len({c.network.name for c in made.configurations}) == 1
    assert "toy(levels=5), 5 stages" in explain(made)


def test_a_batch_is_no_larger_than_the_rule_on_coverage():
    made = planned(needs(a_voxel=1)).configuration("3d_fullres")
    assert made.patch == (40, 56, 40)
    assert made.batch_size == max(2, round(20 * 36 * 50 * 35 * 0.05 / (40 * 56 * 40)))


def test_a_patch_is_no_smaller_than_the_network_takes():
    """An image of 36 x 50 x 35 voxels is halved three times; the network wants 6 x 8 or more along each axis."""
    assert planned(needs(least=6)).configuration("3d_fullres").patch == (48, 56, 48)


@pytest.mark.parametrize(("dimensions", "names"), [((2,), ["2d"]), ((3,), ["3d_fullres"])])
def test_networks_of_one_dimension_give_configurations_of_it(dimensions, names):
    assert [c.name for c in planned(needs(dimensions=dimensions)).configurations] == names


def test_a_3d_network_is_refused_for_slices():
    with pytest.raises(AutosegError, match=r"toy\(levels=5\) is a 3D network"):
        planned(needs(dimensions=(3,)), (20, (1, 50, 35), (1, 1, 1)), dimension=2)


def test_a_network_of_ones_own_takes_the_stages_of_the_preset():
    own = replace(needs(), name="mine:Net", spec=None)
    made = planned(own).configuration("3d_fullres")
    as_preset = plan(fingerprint((20, (36, 50, 35), (1, 1, 1))), labels(3), PLANNERS["unet"]).configuration(
        "3d_fullres"
    )
    assert made.network == replace(as_preset.network, name="mine:Net")
    assert made.patch == as_preset.patch


@pytest.mark.parametrize("preset", ["unet", "resenc_m"])
def test_the_networks_of_the_presets_have_their_levels_whatever_preset_stands_beside(preset):
    """36 x 50 x 35 voxels are halved three times; levels that stride no more would only cost weights."""
    data = fingerprint((20, (36, 50, 35), (1, 1, 1)))
    asked = replace(needs_of(PLANNERS[preset].network, 1, 3), bytes=lambda spec, patch, batch: math.prod(patch) * batch)
    as_preset = plan(data, labels(3), PLANNERS[preset])
    for beside in PLANNERS.values():
        for one in plan(data, labels(3), beside, needs=asked).configurations:
            assert one.network == as_preset.configuration(one.name).network
            assert one.patch == as_preset.configuration(one.name).patch


def test_levels_that_are_stated_stay():
    made = planned(needs_of("unet(stages=6)", 1, 3)).configuration("3d_fullres")
    assert made.network.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def test_what_can_never_fit_is_refused_with_its_number():
    with pytest.raises(AutosegError, match=r"needs .* GiB for 2 patches of .* voxels \(2d\), its smallest"):
        planned(needs(a_voxel=10**9))


@pytest.mark.parametrize(("allowed", "batch"), [(100, 3), (119, 3), (120, 4), (10**6, 50)])
def test_the_largest_batch_that_fits(allowed, batch):
    # 20 bytes, and 25 a sample; a little more than in proportion.
    assert largest_batch(lambda samples: 20 + 25 * samples + (samples > 3) * 0, allowed, 2, 50) == batch


@pytest.mark.parametrize("told", [True, False])
def test_a_network_that_is_told_its_place_sees_no_mirror_images(told):
    made = planned(needs(told_place=lambda spec: told))
    assert {one.mirror_axes for one in made.configurations} == {() if told else None}
    assert ("3d_fullres: mirror images" in {reason.decision for reason in made.reasons}) == told


def test_patches_too_short_to_be_halved_are_padded():
    spec = toys.network(3, FIVE)
    assert adapted(spec, (1, 1, 1), (6, 6, 6), 4) == spec


def test_learnt_positions_are_those_of_the_tokens_of_the_patch():
    asked = replace(
        needs(), spec=lambda dimension: replace(toys.network(dimension, FIVE), options={"grid": (16,) * dimension})
    )
    for made in planned(asked).configurations:
        divisors = [math.prod(steps) for steps in zip(*made.network.strides)]
        assert made.network.options["grid"] == tuple(edge // unit for edge, unit in zip(made.patch, divisors))
