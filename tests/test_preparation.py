"""What a plan may ask for beside its defaults: normalisation, crops, echoes combined, a function of one's own.

All of it is part of the key of prepared cases, and undone exactly by prediction.
"""

import importlib
import itertools
import json
import linecache
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import NAME
from test_planners import STATS, fingerprint
from test_stale import put_fold
from toys import BALLS, LABELS, OBLIQUE, balls_dataset, configuration, grid, plan, write_balls
from typer.testing import CliRunner

from autoseg.bundle import ModelFile, Stage, unsound
from autoseg.cli import app
from autoseg.crops import centre_of_mass, describe, parse_crop
from autoseg.labels import UNSEEN, Labels
from autoseg.pipeline.parts import weigh_classes
from autoseg.pipeline.preparing import case_key
from autoseg.planners import PLANNERS, as_prepared, edited, explain, keep_edits, stamped, with_preparation
from autoseg.planners import plan as make_plan
from autoseg.preprocess import normalise_channel, prepare
from autoseg.readers import read_image, read_labels
from autoseg.records import AutosegError, from_json, load_json, to_json
from autoseg.restore import restore, restore_probabilities
from autoseg.schema import CaseFingerprint, ChannelNorm, Fingerprint, Fold, Plan, Preparation, Recipe, Run
from autoseg.store import write_case
from autoseg.volume import Grid, Volume, canonical_grid

BINARY = {"background": 0, "bone": 1}
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


def test_a_crop_without_content_stays_finite():
    image = np.zeros((5, 7, 11), np.float32)
    image[0, :2, :2] = image[4, 5:, 9:] = 5
    case = prepared(image, cropping("crop_to(size=[3, 3, 13])", masked=True))
    assert case.image.shape == (1, 3, 3, 13) and not case.image.any() and (case.labels == UNSEEN).all()


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
    image = numbered(*canonical.shape)
    labels = rng.integers(0, 3, canonical.shape).astype(np.int16)
    here = configuration(spacing_mm=tuple(canonical.spacing_mm[axis] for axis in order))
    made = cropping(*crops, axis_order=tuple(order), scheme="none")
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
    # What one crop has cut away, the next can only pad.
    kept = inside & np.isin(image, case.image)
    logits = np.stack([np.maximum(case.labels, 0) == i for i in range(3)]).astype(np.float32)
    assert np.array_equal(restore(logits, case.trace, LABELS, here), np.where(kept, labels, 0))
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
    labels = Labels.from_dataset(BINARY)
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
    done = CliRunner().invoke(app, [*command, "--crop", "margins(low=[0, 0, 17], high=[0, 0, 0])"])
    assert done.exit_code and "the crops cut every labelled voxel away from all 2 cases" in str(done.exception)
    train = ["train", "7", "2d", "all", "--workspace", str(tmp_path), "--epochs", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, train)
    assert "no training case of fold all has any foreground" in str(done.exception)
    assert "margins(low=[0, 0, 17], high=[0, 0, 0])" in str(done.exception)


# Echoes combined.


def test_echoes_are_combined_to_the_root_of_the_sum_of_their_squares():
    image = np.stack([numbered(5, 7, 11), -2 * numbered(5, 7, 11)])
    made = replace(plan(channels=("rss",), scheme="none"), preparation=Preparation(combined=("first", "second")))
    volume = Volume(array=image, grid=grid())
    found = prepare("a", volume, None, grid(), made, configuration()).image
    assert found.shape == (1, 5, 7, 11) and found.dtype == np.float32
    assert np.allclose(found[0], np.sqrt(5) * image[0])
    assert made.sources == ("first", "second") and made.in_channels(configuration()) == 1
    with pytest.raises(ValueError, match="1 channels, the plan expects 2"):
        prepare("a", Volume(array=image[:1], grid=grid()), None, grid(), made, configuration())
    with pytest.raises(ValueError, match="make one"):
        replace(made, channels=made.channels * 2)
    assert key(made) != key(replace(made, preparation=Preparation()))


def test_combined_channels_are_normalised_as_one():
    preparation = Preparation(combined=("CT", "T2"))
    facts = fingerprint((3, (36, 50, 35), (1, 1, 1)), channels=("CT", "T2"), stats=STATS)
    made = with_preparation(
        make_plan(as_prepared(facts, preparation), Labels.from_dataset(BINARY), PLANNERS["unet"]), preparation, facts
    )
    assert [(c.channel, c.scheme, c.stats) for c in made.channels] == [("rss", "zscore", None)]
    assert "rss of CT, T2" in explain(made)
    with pytest.raises(AutosegError, match="have one channel, MR, and there is nothing to combine it with"):
        as_prepared(fingerprint((3, (36, 50, 35), (1, 1, 1)), channels=("MR",)), Preparation(combined=("MR",)))
    for channels in (("MR",), ("a", "b", "c")):
        with pytest.raises(AutosegError, match=f"have the channels {', '.join(channels)}"):
            as_prepared(fingerprint((3, (36, 50, 35), (1, 1, 1)), channels=channels), preparation)


# A function of one's own, and all of it from raw images to predictions.

OWN = """
import numpy as np
def doubled(image, spacing_mm):
    assert image.dtype == np.float32 and image.flags.c_contiguous and len(spacing_mm) == 3
    image *= 2
    return image + spacing_mm[2]
def smaller(image, spacing_mm):
    return image[..., 1:]
def wild(image, spacing_mm):
    return image / 0
def alone(image):
    return image
nothing = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Name of a module with functions of one's own."""
    (tmp_path / "steps_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "steps_of_mine"
    sys.modules.pop("steps_of_mine", None)


def test_a_function_of_ones_own_changes_the_image_before_it_is_normalised(mine):
    own = replace(plan(scheme="none"), preparation=Preparation(function=f"{mine}:doubled"))
    image = numbered(5, 7, 11)
    assert np.array_equal(prepared(image, own).image[0], 2 * image + 0.5)
    assert np.array_equal(image, numbered(5, 7, 11)), "its input is a copy"
    for name, reason in {
        f"{mine}:smaller": r"of shape \(1, 5, 7, 10\) for an image of shape \(1, 5, 7, 11\)",
        f"{mine}:wild": "not finite",
        f"{mine}:alone": r"called with \(image \(C, Z, Y, X\), spacing_mm\), failed: TypeError: alone\(\) takes 1",
        f"{mine}:nothing": "no class or function 'nothing'",
        "no_such_module_anywhere:f": "cannot be imported",
        "doubled": "write package.module:name",
    }.items():
        with pytest.raises(AutosegError, match=reason), np.errstate(divide="ignore"):
            prepared(image, replace(own, preparation=Preparation(function=name)))


def test_what_an_earlier_state_of_the_function_prepared_is_prepared_again(mine, tmp_path):
    own = replace(plan(), preparation=Preparation(function=f"{mine}:doubled"))
    before = key(own)
    assert key(own) == before != key(plan())
    (tmp_path / f"{mine}.py").write_text(OWN.replace("*= 2", "*= 3.0"))
    sys.modules.pop(mine)
    importlib.invalidate_caches()
    linecache.clearcache()
    assert key(own) != before


def test_a_function_is_remembered_and_taken_back(mine, tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, cases=2)
    command = ["plan_and_preprocess", "-d", "7", "--workspace", str(tmp_path), "-c", "2d"]
    for more, function in (([f"{mine}:doubled"], f"{mine}:doubled"), ([], f"{mine}:doubled"), ([""], None), ([], None)):
        sets = [part for value in more for part in ("--set", f"preparation.function={value}")]
        done = CliRunner().invoke(app, [*command, *sets], catch_exceptions=False)
        assert done.exit_code == 0
        made = load_json(Plan, tmp_path / "prepared" / NAME / "default" / "plan.json")
        assert made.preparation.function == function


def test_a_model_file_with_a_function_or_an_endless_crop_is_refused():
    def refused(preparation):
        return unsound(
            ModelFile(
                autoseg_version="0", created="2026-01-01", stages=(Stage(configuration="3d_fullres", folds=(0,)),),
                plan=replace(plan(), preparation=preparation),
            )
        )  # fmt: skip

    assert refused(Preparation()) is None
    assert "holds no code" in refused(Preparation(function="os:system"))
    assert "is none" in refused(Preparation(crops=(parse_crop("crop_to(size=[0, 65536, 65536])"),)))
    assert refused(Preparation(crops=(parse_crop("margins(low=[9, 9, 9], high=[9, 9, 9])"),))) is None


def test_all_of_it_from_raw_images_to_predictions_on_their_own_grids(mine, tmp_path):
    """A network that was hardly trained: what counts is that training and prediction see the same grid."""
    raw = tmp_path / "raw" / NAME
    for seed in range(2):
        write_balls(raw, f"c{seed}", seed, channels=2)
        write_balls(raw, f"x{seed}", seed, split="Ts", channels=2)
    facts = {"channel_names": {"0": "one", "1": "two"}, "labels": BALLS, "numTraining": 2, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(facts))
    place = ["--workspace", str(tmp_path)]
    asked = [
        "--crop",
        "crop_around_mass(size=[9, 12, 25])",
        "--combine",
        "rss",
        "--set",
        f"preparation.function={mine}:doubled",
    ]
    small = [f"configurations.3d_fullres.{field}" for field in ("patch=[8, 8, 8]", "network.features=[3, 4]")]
    shallow = [
        "strides=[[1, 1, 1], [2, 2, 2]]",
        "kernels=[[3, 3, 3], [3, 3, 3]]",
        "encoder_blocks=[1, 1]",
        "decoder_blocks=[1]",
    ]
    small += [f"configurations.3d_fullres.network.{field}" for field in shallow]
    changes = [part for field in (*small, "configurations.3d_fullres.batch_size=2") for part in ("--set", field)]

    def run(*command):
        done = CliRunner().invoke(app, [*map(str, command), *place])
        assert done.exit_code == 0, done.output
        return done.output

    run("plan_and_preprocess", "-d", 7, "-c", "3d_fullres", *asked, *changes)
    steps = ["--set", "steps_per_epoch=2", "--set", "validation_steps=1", "--set", "tune=false"]
    run("train", 7, "3d_fullres", "all", "--epochs", 1, "--device", "cpu", *steps)
    run("predict", "-i", raw / "imagesTs", "-o", tmp_path / "out", "--no-tta", "--device", "cpu")
    for name in ("x0", "x1"):
        labels, stored = read_labels(tmp_path / "out" / f"{name}.nii.gz")
        image, own = read_image([raw / "imagesTs" / f"{name}_000{c}.nii.gz" for c in (0, 1)], channels=2)
        assert stored.agrees(own) and labels.array.shape[1:] == own.shape
        made = load_json(Plan, tmp_path / "prepared" / NAME / "default" / "plan.json")
        case = prepare("a", image, None, own, made, made.configuration("3d_fullres"))
        assert case.trace.crop.shape == (9, 12, 25)
        outside = np.ones(image.grid.shape, bool)
        outside[case.trace.crop.within(outside.shape).slices()] = False
        assert outside.any() and not labels.array[0][outside].any()
    assert CliRunner().invoke(app, ["export", "-o", str(tmp_path / "m.autoseg"), *place]).exit_code == 1


def test_losses_weigh_classes_by_what_the_crops_leave(tmp_path):
    shape, asked = (6, 8, 10), Preparation(crops=(parse_crop("crop_to(size=[4, 4, 5])"),))
    labels = np.zeros(shape, np.int16)
    labels[2, 3, 4:6], labels[3, 3, 4] = 1, 2
    made = replace(plan(), preparation=asked)
    image = Volume(array=np.ones((1, *shape), np.float32), grid=grid(shape))
    write_case(tmp_path, prepare("a", image, labels, grid(shape), made, made.configurations[0]), key="a")
    facts = [replace(FACTS, case=name, voxels={0: 477, 1: 2, 2: 1}) for name in ("a", "locked away")]
    counted = Fingerprint(dataset=NAME, dimension=3, channel_names=("MR",), cases=tuple(facts), intensities=(None,))
    run = load_json(Run, put_fold(tmp_path / "runs", made, "3d_fullres") / "run.json")
    run = replace(run, cases=Fold(train=("a",), val=()), recipe=Recipe(loss="dice+0.5*weighted_ce"))
    assert weigh_classes(run, tmp_path, counted) == pytest.approx((2 / 77, 1, 2)), "of 80 voxels"
    whole = (2 / 477, 1, 2)
    assert weigh_classes(replace(run, plan=plan()), tmp_path, counted) == pytest.approx(whole)
    for loss in ("dice_ce", "weighted_ce(weights=[1,2,5])"):  # nobody asks, nothing is read
        unread = replace(run, recipe=Recipe(loss=loss))
        assert weigh_classes(unread, tmp_path / "nowhere", counted) == pytest.approx(whole)
