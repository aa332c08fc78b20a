"""What a plan may ask for beside its defaults: normalisation, crops, echoes combined, a function of one's own.

All of it is part of the key of prepared cases, and undone exactly by prediction.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import NAME
from test_planners import fingerprint
from toys import LABELS, OBLIQUE, balls_dataset, configuration, grid, plan
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.crops import centre_of_mass, describe, parse_crop
from autoseg.labels import UNSEEN, Labels
from autoseg.pipeline.data import case_key
from autoseg.planners import PLANNERS, as_prepared, edited, explain, keep_edits, stamped, with_preparation
from autoseg.planners import plan as make_plan
from autoseg.preprocess import normalise_channel, prepare, restore, restore_probabilities
from autoseg.records import AutosegError, from_json, load_json, to_json
from autoseg.schema import CaseFingerprint, ChannelNorm, Plan, Preparation
from autoseg.volume import Grid, Volume, canonical_grid

RNG = np.random.default_rng(8)
FACTS = CaseFingerprint(case="a", shape=(5, 7, 11), spacing_mm=(3.0, 1.0, 0.5), crop_ratio=1.0, content_hash="a")


def norm(scheme="zscore", masked=False, **more) -> ChannelNorm:
    return ChannelNorm(channel="MR", scheme=scheme, masked=masked, stats=None, **more)


def key(made) -> str:
    return case_key(made, made.configurations[0], FACTS)


# Normalisation.


def test_min_max_after_z_score_by_hand():
    x = np.array([[[0, 2, 4, 10]]], np.float32)
    assert np.allclose(normalise_channel(x, norm("zscore_minmax"), None), x / 10)
    inside = np.array([[[False, True, True, False]]])
    found = normalise_channel(x, norm("zscore_minmax", masked=True), inside)
    assert np.allclose(found, [[[0, 0, 1, 10]]]), "outside the content voxels stay as they are"
    constant = np.full((2, 3, 5), 7, np.float32)
    assert not normalise_channel(constant, norm("zscore_minmax"), None).any()
    assert not normalise_channel(constant, norm(outliers=3.0), None).any()


def test_a_spike_becomes_the_mean_and_the_rest_has_mean_0_and_deviation_1():
    x = RNG.normal(50, 4, (5, 7, 11)).astype(np.float32)
    x[2, 3, 4] = 5000
    found = normalise_channel(x, norm(outliers=3.0), None)
    before = np.float32(x.mean(dtype=np.float64))
    replaced = np.where(x == 5000, before, x)
    assert np.allclose(found, (replaced - replaced.mean()) / replaced.std(), atol=1e-4)
    assert abs(found.mean()) < 1e-5 and found.std() == pytest.approx(1, abs=1e-5)
    assert normalise_channel(x, norm("none", outliers=3.0), None)[2, 3, 4] == before
    assert normalise_channel(x, norm("none", outliers=100.0), None).max() == 5000, "no voxel is so far away"


def test_outliers_of_a_masked_channel_are_those_of_the_content():
    x = np.array([[[0, 10, 12, 14, 12, 40, 0, 0]]], np.float32)
    found = normalise_channel(x, norm("none", masked=True, outliers=1.5), x > 0)
    assert found.tolist() == [[[0, 10, 12, 14, 12, pytest.approx(17.6), 0, 0]]]


def test_outliers_change_the_key_of_prepared_cases_and_none_leaves_it_as_it_was():
    plain = plan()
    assert key(plain) == "d1ac95337d0dfa751c2258cbda16d20b", "as before there were such rules"
    assert key(replace(plain, channels=(norm(outliers=3.0),))) != key(plain)


def test_a_rule_for_outliers_edited_in_the_plan_is_kept():
    made = stamped(plan(), plan())
    mine = replace(made, channels=(norm(outliers=4.0),))
    assert edited(mine) == {"channels"}
    assert keep_edits(mine, plan())[0].channels == (norm(outliers=4.0),)


# Crops.


def cropping(*crops, **more) -> Plan:
    return replace(plan(**more), preparation=Preparation(crops=tuple(map(parse_crop, crops))))


def prepared(image, made, labels=None):
    """An image (Z, Y, X) prepared at its own spacing."""
    stored = grid(image.shape)
    return prepare(
        "a", Volume(array=image[None].astype(np.float32), grid=stored), labels, stored, made, configuration()
    )


def numbered(*shape):
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_crop_to_a_fixed_size_is_centred_and_pads_what_is_smaller():
    seed = parse_crop("crop_to(size=[160, 288, 288])")
    assert (seed.extent((160, 384, 384)), seed.start((160, 384, 384), None)) == ((160, 288, 288), (0, 48, 48))
    image, marked = numbered(5, 7, 4), np.ones((5, 7, 4), np.int16)
    case = prepared(image, cropping("crop_to(size=[2, 0, 9])", scheme="none"), marked)
    assert (case.trace.crop.start, case.trace.crop.stop) == ((1, 0, -3), (3, 7, 6))
    expected = np.pad(image[1:3], ((0, 0), (0, 0), (3, 2)))
    assert np.array_equal(case.image[0], expected)
    assert np.array_equal(case.labels, np.where(expected > 0, 1, UNSEEN))


def test_a_crop_around_the_centre_of_mass_is_moved_by_its_offset_and_stays_inside():
    image = np.zeros((5, 12, 16), np.float32)
    image[1:4, 3:6, 8:11] = 6
    assert centre_of_mass(image[None]) == (2, 4, 9)
    assert centre_of_mass(image[None] - 7) == (2, 4, 9), "counted from the lowest value"
    assert centre_of_mass(np.stack([image * 100, 0 * image])) == (2, 4.75, 8.25), "a constant channel has the middle"
    whole = image + 1
    crop = "crop_around_mass(size=[0, 5, 6], offset=[0, {}, {}])"
    for offset, start in {(0, 0): (0, 2, 7), (3, -2): (0, 5, 5), (-9, 20): (0, 0, 10), (9, -20): (0, 7, 0)}.items():
        case = prepared(whole, cropping(crop.format(*offset), scheme="none"))
        assert case.trace.crop.start == start
        assert np.array_equal(case.image[0], whole[:, start[1] : start[1] + 5, start[2] : start[2] + 6])


def test_margins_are_cut_away_and_a_case_that_has_no_more_is_refused():
    made = cropping("margins(low=[4, 0, 1], high=[4, 2, 0])", scheme="none")
    assert made.preparation.crops[0].extent((80, 5, 3)) == (72, 3, 2)
    image = numbered(11, 7, 5)
    assert np.array_equal(prepared(image, made).image[0], image[4:7, :5, 1:])
    with pytest.raises(
        AutosegError, match=r"margins\(low=\[4, 0, 1\], high=\[4, 2, 0\]\) leaves nothing of an image of 8"
    ):
        prepared(image[:8], made)
    with pytest.raises(AutosegError, match="nothing of the image but what was padded"):
        prepared(image, cropping("crop_to(size=[0, 0, 25])", "margins(low=[0, 0, 20], high=[0, 0, 0])"))


def test_crops_follow_each_other_and_the_crop_to_content():
    image = np.pad(numbered(9, 9, 9), 2)
    made = cropping("margins(low=[1, 1, 1], high=[1, 1, 1])", "crop_to(size=[3, 3, 11])", scheme="none")
    case = prepared(image, made)
    assert (case.trace.crop.start, case.trace.crop.stop) == ((5, 5, 1), (8, 8, 12))
    # What was cut away does not come back as padding.
    assert np.array_equal(case.image[0], np.pad(image[5:8, 5:8, 3:10], ((0, 0), (0, 0), (2, 2))))


def test_an_image_is_normalised_after_the_crop_and_before_it_is_padded():
    image = np.zeros((5, 7, 11), np.float32)
    image[:, :, 4:7] = RNG.normal(30, 5, (5, 7, 3))
    image[0, 0, 0] = image[-1, -1, -1] = 1e-3  # so that the content is everything
    cropped = prepared(image, cropping("crop_to(size=[0, 0, 3])")).image
    assert np.allclose(cropped[0], (image[:, :, 4:7] - image[:, :, 4:7].mean()) / image[:, :, 4:7].std(), atol=1e-4)
    assert abs(image.mean() - image[:, :, 4:7].mean()) > 15, "the empty border would have moved the mean"
    padded = prepared(image[:, :, 4:7], cropping("crop_to(size=[0, 0, 9])")).image
    assert np.array_equal(padded[..., 3:6], cropped) and not padded[..., :3].any() and not padded[..., 6:].any()


CROP = st.one_of(
    st.builds("crop_to(size=[{}, {}, {}])".format, *[st.integers(0, 14)] * 3),
    st.builds(
        "crop_around_mass(size=[{}, {}, {}], offset=[{}, {}, {}])".format,
        *[st.integers(0, 14)] * 3, *[st.integers(-6, 6)] * 3,
    ),
    st.builds("margins(low=[{}, {}, {}], high=[{}, {}, {}])".format, *[st.integers(0, 1)] * 6),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(5, 7), st.integers(6, 9), st.integers(5, 11)),
    st.lists(CROP, min_size=1, max_size=2),
    st.permutations([0, 1, 2]),
    st.integers(0, 5),
    st.integers(0, 7),
)
def test_restore_undoes_every_crop_exactly(shape, crops, order, axes, flips):
    """For every plan order and stored orientation: what was inside comes back to its voxels, all else is background."""
    permutation = list(itertools.permutations(range(3)))[axes]
    signs = [1 if flips >> i & 1 else -1 for i in range(3)]
    direction = np.asarray(OBLIQUE)[:, permutation] * signs
    stored = Grid(shape=shape, spacing_mm=(3.0, 1.0, 0.5), direction=tuple(map(tuple, direction.tolist())))
    canonical = canonical_grid(stored)
    rng = np.random.default_rng(flips)
    image = rng.random(canonical.shape).astype(np.float32) + 1
    labels = rng.integers(0, 3, canonical.shape).astype(np.int16)
    here = configuration(spacing_mm=tuple(canonical.spacing_mm[axis] for axis in order))
    made = cropping(*crops, axis_order=tuple(order))
    try:
        case = prepare("a", Volume(array=image[None], grid=canonical), labels, stored, made, here)
    except AutosegError as error:
        assert "leaves nothing" in str(error)
        return
    without = prepare("a", Volume(array=image[None], grid=canonical), None, stored, made, here)
    assert np.array_equal(case.image, without.image) and case.trace == without.trace
    assert case.image.shape[1:] == case.trace.shape == case.trace.cropped_shape
    inside = np.zeros(canonical.shape, bool)
    inside[case.trace.crop.within(canonical.shape).slices()] = True
    logits = np.stack([np.maximum(case.labels, 0) == i for i in range(3)]).astype(np.float32)
    assert np.array_equal(restore(logits, case.trace, LABELS, here), np.where(inside, labels, 0))
    maps = restore_probabilities(100 * logits, case.trace, LABELS, here)
    assert maps.shape == (3, *canonical.shape) and np.allclose(maps.sum(0), 1)
    assert (maps[0][~inside] == 1).all()


def test_what_is_no_crop_is_refused():
    for text, reason in {
        "crop(size=[1, 2, 3])": "choose one of crop_to, crop_around_mass, margins",
        "crop_to(size=[2, 3])": "three numbers",
        "crop_to(size=[2, 3, -1])": "size.2",
        "crop_to(sizes=[1, 2, 3])": "sizes",
        "margins(low=[1, 2, 3])": "high",
    }.items():
        with pytest.raises(AutosegError, match=reason):
            parse_crop(text)
    for text in ("crop_to(size=[160, 288, 0])", "crop_around_mass(size=[2, 3, 4], offset=[50, -20, 0])"):
        assert describe(parse_crop(text)) == text
    made = cropping("crop_to(size=[160, 288, 0])", "margins(low=[0, 0, 1], high=[0, 0, 0])")
    assert from_json(Plan, to_json(made)) == made
    assert len({key(plan()), key(made), key(cropping("crop_to(size=[160, 288, 0])"))}) == 3


def planned(facts, *crops) -> Plan:
    preparation = Preparation(crops=tuple(map(parse_crop, crops)))
    labels = Labels.from_dataset({"background": 0, "bone": 1})
    return with_preparation(make_plan(as_prepared(facts, preparation), labels, PLANNERS["unet"]), preparation, facts)


def test_the_planner_plans_for_what_the_crops_leave():
    facts = fingerprint((3, (160, 384, 384), (0.7, 0.4, 0.4)), (2, (150, 200, 400), (0.7, 0.4, 0.4)))
    assert planned(facts) == make_plan(facts, planned(facts).labels, PLANNERS["unet"])
    made = planned(facts, "crop_to(size=[160, 96, 288])")
    full = made.configuration("3d_fullres")
    assert full.median_shape == (160, 96, 288) and all(p <= n for p, n in zip(full.patch, (160, 96, 288)))
    assert "median image 160 x 96 x 288 voxels" in explain(made) and "crop_to(size=[160, 96, 288])" in explain(made)
    with pytest.raises(AutosegError, match=r"case000 of Dataset001_Toy: margins.*leaves nothing.*give smaller"):
        planned(facts, "margins(low=[80, 0, 0], high=[80, 0, 0])")
    flat = fingerprint((3, (1, 384, 384), (1, 0.4, 0.4)), dimension=2)
    assert planned(flat, "crop_to(size=[0, 96, 160])").configuration("2d").median_shape == (96, 160)
    with pytest.raises(AutosegError, match="give 0 as its first number"):
        planned(flat, "crop_to(size=[4, 96, 160])")


def test_labels_that_a_crop_loses_are_counted_in_a_warning(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, cases=2)
    command = ["plan_and_preprocess", "-d", "7", "--workspace", str(tmp_path), "-c", "2d"]
    done = CliRunner().invoke(app, [*command, "--crop", "crop_to(size=[0, 20, 19])"])
    assert done.exit_code == 0 and "warning: the crops" not in done.output
    done = CliRunner().invoke(app, [*command, "--crop", "crop_to(size=[0, 0, 9])"])
    assert done.exit_code == 0, done.output
    assert "warning: the crops cut labels away from 2 of the cases prepared now, most from p0_" in done.output
    made = load_json(Plan, tmp_path / "prepared" / NAME / "default" / "plan.json")
    assert made.preparation.crops == (parse_crop("crop_to(size=[0, 0, 9])"),)
