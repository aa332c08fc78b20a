"""Planning: against numbers recorded from nnU-Net's own planners, worked examples, and properties that always hold."""

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.labels import Labels
from autoseg.planners import PLANNERS, explain, plan
from autoseg.planners.fit import shrink
from autoseg.planners.memory import activations
from autoseg.planners.topology import topology
from autoseg.records import AutosegError, load_json, to_json
from autoseg.schema import CaseFingerprint, ChannelStats, Fingerprint, NetworkSpec, Plan

GOLDEN = json.loads((Path(__file__).parent / "golden" / "plans.json").read_text())["cases"]
PRESETS = list(PLANNERS)
STATS = ChannelStats(
    mean=40.0, median=38.0, std=30.0, minimum=-900.0, maximum=1200.0, percentile_00_5=-80.0, percentile_99_5=190.0
)


def labels(classes: int) -> Labels:
    """A background and `classes` - 1 foreground classes."""
    return Labels(names=("background", *(f"class{i}" for i in range(1, classes))), values=tuple(range(classes)))


def fingerprint(*groups, dimension=3, channels=("T1",), crop_ratio=1.0, stats=None) -> Fingerprint:
    """Groups of equal cases: (number, shape, spacing in mm)."""
    members = [(shape, spacing) for number, shape, spacing in groups for _ in range(number)]
    return Fingerprint(
        dataset="Dataset001_Toy",
        dimension=dimension,
        channel_names=channels,
        cases=tuple(
            CaseFingerprint(case=f"case{i:03}", shape=shape, spacing_mm=spacing, crop_ratio=crop_ratio)
            for i, (shape, spacing) in enumerate(members)
        ),
        intensities=(stats,) * len(channels),
    )


# Worked examples, and what nnU-Net decides.


EXAMPLES = {
    "hippocampus": ((260, (36, 50, 35), (1, 1, 1)), 3),
    "heart": ((20, (115, 320, 232), (1.37, 1.25, 1.25)), 2),
    "liver": ((131, (482, 512, 512), (1, 0.7676, 0.7676)), 3),
    "prostate": ((32, (20, 320, 320), (3.6, 0.625, 0.625)), 3),
    "brain": ((484, (138, 169, 138), (1, 1, 1)), 4),
}


@pytest.mark.parametrize(
    ("example", "preset", "patch", "batch", "planar_patch", "planar_batch"),
    [
        ("hippocampus", "unet", (40, 56, 40), 9, (56, 40), 366),
        ("hippocampus", "resenc_m", (40, 56, 40), 58, (56, 40), 1618),
        ("hippocampus", "resenc_l", (40, 56, 40), 178, (56, 40), 4554),
        ("hippocampus", "resenc_xl", (40, 56, 40), 183, (56, 40), 6711),
        ("heart", "unet", (80, 192, 160), 2, (320, 256), 40),
        ("heart", "resenc_m", (80, 192, 160), 2, (320, 256), 40),
        ("heart", "resenc_l", (112, 288, 224), 2, (320, 256), 113),
        ("heart", "resenc_xl", (128, 320, 256), 3, (320, 256), 166),
        ("liver", "unet", (128, 128, 128), 2, (512, 512), 12),
        ("liver", "resenc_m", (128, 128, 128), 2, (512, 512), 12),
        ("liver", "resenc_l", (192, 192, 192), 2, (512, 512), 35),
        ("liver", "resenc_xl", (224, 256, 224), 2, (512, 512), 52),
        ("prostate", "unet", (20, 320, 256), 2, (320, 320), 32),
        ("prostate", "resenc_m", (20, 256, 256), 2, (320, 320), 32),
        ("prostate", "resenc_l", (20, 320, 320), 5, (320, 320), 90),
        ("prostate", "resenc_xl", (20, 320, 320), 8, (320, 320), 133),
        ("brain", "unet", (128, 128, 128), 2, (192, 160), 105),
        ("brain", "resenc_m", (128, 128, 128), 2, (192, 160), 107),
        ("brain", "resenc_l", (160, 192, 160), 3, (192, 160), 301),
        ("brain", "resenc_xl", (160, 192, 160), 5, (192, 160), 444),
    ],
)
def test_known_datasets_give_the_known_patches_and_batches(example, preset, patch, batch, planar_patch, planar_batch):
    group, classes = EXAMPLES[example]
    made = plan(fingerprint(group), labels(classes), PLANNERS[preset])
    full, planar = made.configuration("3d_fullres"), made.configuration("2d")
    assert (full.patch, full.batch_size) == (patch, batch)
    assert (planar.patch, planar.batch_size) == (planar_patch, planar_batch)


def test_the_hippocampus_plan():
    made = plan(fingerprint((195, (36, 50, 35), (1, 1, 1))), labels(3), PLANNERS["unet"])
    assert [(c.name, c.patch, c.batch_size) for c in made.configurations] == [
        ("2d", (56, 40), 274),
        ("3d_fullres", (40, 56, 40), 7),
    ]
    assert made.axis_order == (0, 1, 2)
    assert made.configuration("2d").median_shape == (50, 35)
    assert made.configuration("2d").spacing_mm == (1, 1)


def test_coarse_slices_are_not_halved_until_voxels_are_isotropic():
    group, classes = EXAMPLES["prostate"]
    network = plan(fingerprint(group), labels(classes), PLANNERS["unet"]).configuration("3d_fullres").network
    in_plane, all_axes = (1, 2, 2), (2, 2, 2)
    assert network.strides == ((1, 1, 1), in_plane, in_plane, all_axes, all_axes, in_plane, in_plane)
    assert network.kernels == ((1, 3, 3), (1, 3, 3), *[(3, 3, 3)] * 5)
    assert network.features == (32, 64, 128, 256, 320, 320, 320)
    assert network.encoder_blocks == (2,) * 7
    assert network.decoder_blocks == (2,) * 6


@pytest.mark.parametrize("spec", GOLDEN, ids=[spec["name"] for spec in GOLDEN])
def test_plans_agree_with_the_recorded_planner(spec):
    """Deliberate differences are none here; those that there are have tests of their own below."""
    schemes = {"ZScoreNormalization": "zscore", "CTNormalization": "ct"}
    groups = [(group["count"], group["shape"], group["spacing_mm"]) for group in spec["groups"]]
    found = fingerprint(
        *groups,
        dimension=spec["dimension"],
        channels=tuple(spec["channels"]),
        crop_ratio=spec["crop_ratio"],
        stats=STATS,
    )
    for preset, expected in spec["expected"].items():
        made = plan(
            found,
            labels(spec["classes"]),
            PLANNERS[preset],
            gpu_memory_gb=spec["gpu_memory_gb"],
            spacing_mm=spec["spacing_mm"] and tuple(spec["spacing_mm"]),
        )
        assert made.axis_order == tuple(expected["axis_order"])
        assert [channel.scheme for channel in made.channels] == [schemes[name] for name in expected["schemes"]]
        assert [channel.masked for channel in made.channels] == expected["masked"]
        assert {c.name for c in made.configurations} == set(expected["configurations"])
        for name, numbers in expected["configurations"].items():
            ours = made.configuration(name)
            assert ours.spacing_mm == pytest.approx(numbers["spacing_mm"], rel=1e-12)
            assert list(ours.median_shape) == numbers["median_shape"]
            assert list(ours.patch) == numbers["patch"], (preset, name)
            assert ours.batch_size == numbers["batch_size"], (preset, name)
            assert ours.batch_dice == numbers["batch_dice"]
            assert ours.previous_stage == numbers["previous_stage"]
            for field in ("features", "strides", "kernels", "encoder_blocks", "decoder_blocks"):
                assert json.loads(json.dumps(getattr(ours.network, field))) == numbers[field], (preset, name, field)


# Memory.


def network(name, stages, dimension, features, blocks, decoder) -> NetworkSpec:
    return NetworkSpec(
        name=name,
        dimension=dimension,
        features=features,
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((3,) * dimension,) * stages,
        encoder_blocks=blocks,
        decoder_blocks=(decoder,) * (stages - 1),
    )


FEATURES = (32, 64, 128, 256, 320, 320)


def test_memory_of_networks_counted_once_by_hand():
    plain = network("unet", 6, 3, FEATURES, (2,) * 6, 2)
    residual = network("resenc", 6, 3, FEATURES, (1, 3, 4, 6, 6, 6), 1)
    planar = network("resenc", 7, 2, (32, 64, 128, 256, 512, 512, 512), (1, 3, 4, 6, 6, 6, 6), 1)
    assert activations(plain, (128, 128, 128), heads=3) == 452_796_416
    assert activations(residual, (128, 128, 128), heads=3) == 557_420_544
    assert activations(planar, (512, 512), heads=3) == 129_531_904


def test_memory_of_two_stages_by_hand():
    # 4 x 6 = 24 voxels above, 2 x 3 = 6 below. Encoder 2 * 5 * 24 + 1 * 7 * 6, decoder (1 + 1) * 5 * 24, heads 3 * 24.
    small = network("unet", 2, 2, (5, 7), (2, 1), 1)
    assert activations(small, (4, 6), heads=3) == 240 + 42 + 240 + 72
    # Stem 120, blocks of two convolutions 2 * 2 * 120 + 2 * 1 * 42, one shortcut 42, decoder and heads as above.
    assert activations(replace(small, name="resenc"), (4, 6), heads=3) == 120 + 480 + 84 + 42 + 240 + 72


def test_an_unknown_network_lists_the_known_ones():
    with pytest.raises(ValueError, match="unet, resenc"):
        activations(network("transformer", 2, 2, (5, 7), (2, 1), 1), (4, 6), heads=3)


# Topology.


@pytest.mark.parametrize(
    ("spacing", "size", "patch", "strides"),
    [
        ((1, 1, 1), (7, 7, 7), (7, 7, 7), []),  # nothing has 8 voxels
        ((1, 1), (7.5, 8), (8, 8), []),  # the only long axis has less than 12
        ((1, 1), (5, 12), (5, 12), [(1, 2)]),
        ((1, 1), (8, 8), (8, 8), [(2, 2)]),
        ((2, 1), (40, 17), (40, 20), [(1, 2), (2, 2), (2, 1)]),  # 40, 40, 20, 10 and 17, 9, 5, 5
        ((1.99, 1), (16, 17), (16, 20), [(2, 2), (2, 2)]),
    ],
)
def test_axes_are_halved_while_long_and_fine(spacing, size, patch, strides):
    found = topology(spacing, size, min_edge=4)
    assert found.strides == ((1,) * len(size), *strides)
    assert found.patch == patch
    assert found.kernels[-1] == (3,) * len(size)


# Which grid, which configurations.


def test_an_empty_fingerprint_is_refused():
    with pytest.raises(AutosegError, match="no cases"):
        plan(fingerprint(), labels(2), PLANNERS["unet"])


@pytest.mark.parametrize("gpu_memory_gb", [0.0, 1.9, 80.1, math.nan, math.inf])
def test_memory_out_of_range_is_refused(gpu_memory_gb):
    with pytest.raises(AutosegError, match="2 to 80 GB"):
        plan(fingerprint((3, (20, 30, 40), (1, 1, 1))), labels(2), PLANNERS["unet"], gpu_memory_gb=gpu_memory_gb)


@pytest.mark.parametrize("spacing_mm", [(1, 1), (1, 0, 1), (1, -1, 1), (1, math.nan, 1), (math.inf, 1, 1)])
def test_a_spacing_that_is_none_is_refused(spacing_mm):
    with pytest.raises(AutosegError, match="three positive numbers"):
        plan(fingerprint((3, (20, 30, 40), (1, 1, 1))), labels(2), PLANNERS["unet"], spacing_mm=spacing_mm)


def test_thick_slices_take_the_tenth_percentile():
    thick = fingerprint((8, (10, 200, 200), (9.0, 1.0, 1.0)), (3, (20, 200, 200), (5.0, 1.0, 1.0)))
    made = plan(thick, labels(2), PLANNERS["unet"])
    assert made.configuration("3d_fullres").spacing_mm == (5, 1, 1)
    # Long enough along the coarse axis, the median stays.
    long = fingerprint((8, (90, 200, 200), (9.0, 1.0, 1.0)), (3, (90, 200, 200), (5.0, 1.0, 1.0)))
    assert plan(long, labels(2), PLANNERS["unet"]).configuration("3d_fullres").spacing_mm == (9, 1, 1)


def test_the_cascade_reads_the_prepared_cases_and_the_network_of_full_resolution():
    group, classes = EXAMPLES["liver"]
    made = plan(fingerprint(group), labels(classes), PLANNERS["unet"])
    assert [c.name for c in made.configurations] == ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    full, low, cascade = (made.configuration(f"3d_{part}") for part in ("fullres", "lowres", "cascade_fullres"))
    assert (cascade.previous_stage, cascade.prepared) == ("3d_lowres", "3d_fullres")
    assert cascade == replace(full, name=cascade.name, previous_stage=low.name)
    assert (full.prepared, low.prepared) == ("3d_fullres", "3d_lowres")
    assert (full.batch_dice, low.batch_dice) == (True, False)
    assert math.prod(low.patch) / math.prod(low.median_shape) >= 0.25


def test_2d_images_need_no_through_plane_spacing():
    photographs = fingerprint((40, (1, 300, 200), (1.0, 0.5, 0.8)), dimension=2)
    made = plan(photographs, labels(2), PLANNERS["unet"])
    assert [c.name for c in made.configurations] == ["2d"]
    assert made.axis_order == (0, 1, 2)
    thick = replace(photographs, cases=tuple(replace(c, spacing_mm=(777.0, 0.5, 0.8)) for c in photographs.cases))
    other = plan(thick, labels(2), PLANNERS["unet"])
    assert other == made
    assert "777" not in explain(other)


def test_2d_images_can_have_a_spacing_of_their_own():
    photographs = fingerprint((40, (1, 300, 200), (1.0, 0.5, 0.8)), dimension=2)
    planar = plan(photographs, labels(2), PLANNERS["unet"], spacing_mm=(9.0, 1.0, 0.4)).configuration("2d")
    assert planar.spacing_mm == (1, 0.4)
    assert planar.median_shape == (150, 400)


# Normalisation.


def test_channels_are_normalised_by_name_and_masked_where_much_is_cropped():
    names = ("ct", "NoNorm", "zscore", "rescale_to_0_1", "RGB_to_0_1", "T1")
    for crop_ratio, masked in ((0.74, True), (0.75, False)):
        found = fingerprint((3, (20, 30, 40), (1, 1, 1)), channels=names, crop_ratio=crop_ratio, stats=STATS)
        channels = plan(found, labels(2), PLANNERS["unet"]).channels
        assert [c.scheme for c in channels] == ["ct", "none", "zscore", "rescale", "rgb", "zscore"]
        assert [c.masked for c in channels] == [False, False, masked, False, False, masked]
        assert [c.channel for c in channels] == list(names)
        assert all(c.stats == STATS for c in channels)


@pytest.mark.parametrize(
    ("name", "said"), [("CT scan", True), ("abdomen_ct", True), ("CBCT", True), ("CT", False), ("T1ct", False)]
)
def test_a_name_that_is_nearly_ct_is_pointed_at(name, said):
    made = plan(fingerprint((3, (20, 30, 40), (1, 1, 1)), channels=(name,), stats=STATS), labels(2), PLANNERS["unet"])
    (reason,) = (one for one in made.reasons if one.decision == f"normalisation of {name}")
    assert ("call it 'CT'" in reason.outcome) == said
    assert made.channels[0].scheme == ("ct" if name == "CT" else "zscore")


def test_without_foreground_only_ct_cannot_be_planned():
    group = (3, (20, 30, 40), (1, 1, 1))
    assert plan(fingerprint(group), labels(2), PLANNERS["unet"]).channels[0].stats is None
    with pytest.raises(AutosegError, match=r"'CT'.*no case has foreground"):
        plan(fingerprint(group, channels=("CT",)), labels(2), PLANNERS["unet"])


# Where the plan is deliberately another than nnU-Net's.


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 7, 7), (3, 4, 11), (2, 7, 9)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (4.0, 3.0, 0.5)])
def test_tiny_images_still_get_a_network_that_downsamples(shape, spacing):
    """nnU-Net plans a single stage there, which has no decoder to learn from."""
    made = plan(fingerprint((4, shape, spacing)), labels(2), PLANNERS["unet"])
    for configuration in made.configurations:
        assert len(configuration.network.strides) >= 2
        assert max(configuration.patch) <= 12


def test_an_axis_finer_than_its_only_voxel_keeps_that_voxel():
    """Made coarser for the low resolution, nnU-Net would round the single voxel to none and divide by it."""
    made = plan(fingerprint((9, (332, 1489, 1), (1.1, 1.0, 0.25))), labels(3), PLANNERS["resenc_m"])
    assert made.configuration("3d_lowres").median_shape[-1] == 1


def test_slices_far_thicker_than_the_patch_keep_one_voxel():
    made = plan(fingerprint((9, (4, 500, 500), (999.0, 0.05, 0.05))), labels(2), PLANNERS["unet"])
    assert made.configuration("3d_fullres").patch[0] == 1


def test_every_step_of_shrinking_saves_voxels():
    """A step along the last axis would round the first one up, to 96 x 56 x 112: nnU-Net takes it."""
    spacing, median = (7.1728, 0.35312, 5.976), (285.0, 88.0, 892.0)
    shape = topology(spacing, (88, 64, 106), min_edge=4)
    assert shape.patch == (88, 64, 106)
    smaller = shrink(shape, spacing, median, PLANNERS["unet"])
    assert math.prod(smaller.patch) < 88 * 64 * 106


def test_what_can_never_fit_is_refused():
    greedy = replace(PLANNERS["unet"], spatial=replace(PLANNERS["unet"].spatial, activations=1000.0))
    with pytest.raises(AutosegError, match="more GPU memory"):
        plan(fingerprint((3, (20, 30, 40), (1, 1, 1))), labels(2), greedy)


# Properties.


edges = st.integers(1, 700)
spacings = st.floats(0.15, 9.0)
shapes = st.tuples(edges, edges, edges)
voxels = st.tuples(spacings, spacings, spacings)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), shapes, voxels), min_size=1, max_size=4),
    st.sampled_from([2, 5, 120]),
    st.sampled_from(PRESETS),
    st.floats(2.0, 80.0),
)
def test_any_fingerprint_gives_a_plan_that_holds_together(tmp_path_factory, groups, classes, preset, gpu_memory_gb):
    rules = PLANNERS[preset]
    made = plan(fingerprint(*groups), labels(classes), rules, gpu_memory_gb=gpu_memory_gb)
    for configuration in made.configurations:
        network, budget = configuration.network, rules.budget(configuration.dimension)
        strides = [math.prod(steps) for steps in zip(*network.strides)]
        assert all(edge % step == 0 for edge, step in zip(configuration.patch, strides))
        assert len(network.features) == len(network.strides) == len(network.kernels) == len(network.encoder_blocks) >= 2
        assert len(network.decoder_blocks) == len(network.strides) - 1
        assert set(network.strides[0]) == {1}
        assert max(network.features) <= budget.max_features
        assert configuration.batch_size >= 2
        allowed = budget.activations * gpu_memory_gb / rules.reference_gb
        needed = activations(network, configuration.patch, classes) / budget.batch
        assert needed * budget.must_fit <= allowed * (1 + 1e-9)
        # Half a sample more than fits, where rounding goes up; never fewer than two.
        assert needed * (configuration.batch_size - 0.5) <= allowed * (1 + 1e-9) or configuration.batch_size == 2
        assert len(configuration.spacing_mm) == len(configuration.patch) == configuration.dimension
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(to_json(made))
    assert load_json(Plan, path) == made


def moved(values, order):
    return tuple(values[axis] for axis in order)


@settings(max_examples=30, deadline=None)
@given(st.tuples(shapes, voxels).filter(lambda s: len(set(s[1])) == 3), st.sampled_from(PRESETS))
def test_where_the_coarsest_axis_lies_does_not_matter(case, preset):
    shape, spacing = case
    coarse = spacing.index(max(spacing))
    first, second = (axis for axis in range(3) if axis != coarse)
    expected = plan(fingerprint((20, shape, spacing)), labels(3), PLANNERS[preset])
    for place in range(3):
        order = [first, second]
        order.insert(place, coarse)
        turned = fingerprint((20, moved(shape, order), moved(spacing, order)))
        made = plan(turned, labels(3), PLANNERS[preset])
        assert made.axis_order[0] == place
        assert made.configurations == expected.configurations


@pytest.mark.parametrize("spacing", [(1.0, 1.3, 1.7), (4.0, 0.8, 1.1)])
def test_turning_an_image_turns_its_plan(spacing):
    shape = (50, 71, 94)
    expected = plan(fingerprint((20, shape, spacing)), labels(3), PLANNERS["unet"]).configuration("3d_fullres")
    for order in permutations(range(3)):
        made = plan(fingerprint((20, moved(shape, order), moved(spacing, order))), labels(3), PLANNERS["unet"])
        full = made.configuration("3d_fullres")
        back = [full.spacing_mm.index(value) for value in expected.spacing_mm]
        assert moved(full.patch, back) == expected.patch
        assert tuple(moved(stride, back) for stride in full.network.strides) == expected.network.strides
        assert tuple(moved(kernel, back) for kernel in full.network.kernels) == expected.network.kernels
        assert full.batch_size == expected.batch_size


def test_more_memory_never_plans_less():
    group, classes = EXAMPLES["heart"]
    sizes = [2, 4, 8, 16, 32, 64, 80]
    for preset in PRESETS:
        plans = [plan(fingerprint(group), labels(classes), PLANNERS[preset], gpu_memory_gb=size) for size in sizes]
        work = [[c.batch_size * math.prod(c.patch) for c in made.configurations if c.name == "2d"] for made in plans]
        patches = [math.prod(made.configuration("3d_fullres").patch) for made in plans]
        assert work == sorted(work)
        assert patches == sorted(patches)
        assert patches[0] < patches[-1]


# Reasons.


def test_every_decision_has_its_reason():
    group, classes = EXAMPLES["liver"]
    made = plan(fingerprint(group, channels=("CT", "PET"), stats=STATS), labels(classes), PLANNERS["unet"])
    decisions = [reason.decision for reason in made.reasons]
    assert decisions == [
        *("target spacing", "axis order", "normalisation of CT", "normalisation of PET"),
        *(f"2d: {part}" for part in ("patch", "network", "batch size")),
        *(f"3d_fullres: {part}" for part in ("patch", "network", "batch size")),
        "3d_lowres",
        *(f"3d_lowres: {part}" for part in ("patch", "network", "batch size")),
        *("3d_cascade_fullres", "batch Dice"),
    ]
    said = {reason.decision: reason.outcome for reason in made.reasons}
    assert said["3d_fullres: patch"].startswith("128 x 128 x 128 voxels after ")
    assert said["3d_fullres: batch size"] == "2"
    assert said["batch Dice"] == "pooled in 2d, 3d_fullres, 3d_cascade_fullres"


@pytest.mark.parametrize(
    ("group", "decision", "outcome"),
    [
        ((20, (36, 50, 35), (1, 1, 1)), "3d_lowres", "not needed"),
        ((40, (190, 214, 214), (1, 1, 1)), "3d_lowres", "not worth it"),
        ((20, (1, 500, 350), (1, 1, 1)), "3d_fullres", "no 3D configuration"),
        ((20, (36, 50, 35), (1, 1, 1)), "2d: patch", "nothing to shrink"),
    ],
)
def test_what_is_not_planned_has_a_reason_too(group, decision, outcome):
    made = plan(fingerprint(group), labels(3), PLANNERS["unet"])
    (reason,) = (reason for reason in made.reasons if reason.decision == decision)
    assert outcome in reason.outcome


@pytest.mark.parametrize(("cases", "said"), [(2, "less than 1 patch"), (18, "1 patch"), (60, "2 patches")])
def test_a_share_of_a_small_dataset_is_said_in_words(cases, said):
    """Images of 36 x 50 x 35 voxels and patches of 40 x 56 x 40: of 18 cases, 5 % of the voxels are 0.63 patches."""
    made = plan(fingerprint((cases, (36, 50, 35), (1, 1, 1))), labels(3), PLANNERS["unet"])
    (reason,) = (reason for reason in made.reasons if reason.decision == "3d_fullres: batch size")
    assert reason.inputs.endswith(f", 5% of the dataset is {said}")


def test_explain_tells_every_decision_in_readable_lines():
    group, classes = EXAMPLES["liver"]
    made = plan(fingerprint(group), labels(classes), PLANNERS["resenc_l"], name="mine")
    text = explain(made)
    assert text.startswith("Plan 'mine' for Dataset001_Toy: preset resenc_l, 24 GB of GPU memory\n")
    assert all(f"{reason.decision}: {reason.outcome}" in text for reason in made.reasons)
    row = next(line for line in text.splitlines() if line.startswith("3d_fullres "))
    assert " ".join(row.split()) == "3d_fullres 192 x 192 x 192 2 1 x 0.7676 x 0.7676"
    assert "  rule: " in text
    assert "  from: " in text
