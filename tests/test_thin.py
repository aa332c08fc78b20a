"""Slices down-sampled (`--thin 2`): image by the root of the sum of squares, labels by union, undone by prediction."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import NAME
from test_planners import STATS, fingerprint
from test_preparation import CROP, FACTS, key, numbered
from toys import LABELS, OBLIQUE, balls_dataset, configuration, grid, plan
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.cli.options import parse_thin
from autoseg.crops import parse_crop
from autoseg.labels import UNSEEN, Labels
from autoseg.pipeline.preparing import case_key
from autoseg.planners import PLANNERS, as_prepared, explain, thinning, with_preparation
from autoseg.planners import plan as make_plan
from autoseg.preprocess import prepare
from autoseg.records import AutosegError, load_json, to_json
from autoseg.restore import project, restore, restore_probabilities
from autoseg.schema import Plan, Preparation
from autoseg.store import read_case
from autoseg.volume import Grid, Volume, canonical_grid

Z, Y, X = (2, 1, 1), (1, 2, 1), (1, 1, 2)


def thin(factors, *crops, **more) -> Plan:
    asked = Preparation(thin=factors, crops=tuple(map(parse_crop, crops)))
    return replace(plan(**{"scheme": "none", **more}), preparation=asked)


def prepared(image, made, labels=None, spacing_mm=(3.0, 1.0, 0.5)):
    """An image (Z, Y, X) prepared without resampling."""
    stored, factors = grid(image.shape, spacing_mm), made.preparation.thin
    here = configuration(spacing_mm=tuple(mm * n for mm, n in zip(spacing_mm, factors)))
    volume = Volume(array=image[None].astype(np.float32), grid=stored)
    return prepare("a", volume, labels, stored, made, here), here


def test_numbers_by_hand():
    image = np.array([[[3, 6]], [[4, 8]], [[5, 1]]], np.float32)
    labels = np.array([[[0, 1]], [[1, 2]], [[0, 1]]], np.int16)
    case, _ = prepared(image, thin(Z), labels)
    # The last slice is alone, and counts as two like it.
    assert np.allclose(case.image[0], [[[5, 10]], [[5 * 2**0.5, 2**0.5]]])
    assert case.labels.tolist() == [[[1, 2]], [[0, 1]]]
    assert case.trace.shape == (2, 1, 2) and case.trace.original_spacing_mm == (6, 1, 0.5)
    thrice, _ = prepared(image, thin((3, 1, 1)), labels)
    assert np.allclose(thrice.image[0], [[[50**0.5, 101**0.5]]]) and thrice.labels.tolist() == [[[1, 2]]]
    constant, _ = prepared(np.full((7, 3, 5), -2.0), thin(Z))
    assert np.allclose(constant.image, 8**0.5), "no slice is darker than the others"
    both, _ = prepared(image, thin((2, 1, 2)))
    assert np.allclose(both.image[0, :, 0, 0], [(9 + 36 + 16 + 64) ** 0.5, (2 * 26) ** 0.5])


def test_of_several_classes_the_later_wins_and_nothing_labelled_is_lost():
    labels = Labels.from_dataset({"background": 0, "a": 5, "b": 3, "ignore": 9})
    pairs = {(UNSEEN, UNSEEN): UNSEEN, (UNSEEN, 0): 0, (0, 3): 3, (UNSEEN, 3): 3, (3, 1): 1, (2, 1): 2, (1, 0): 1}
    for pair, one in pairs.items():
        for order in (pair, pair[::-1]):
            assert labels.union(np.array(order, np.int16), [0], 0).tolist() == [one]
    whole = labels.union(np.array([[0, 1, 2, 0, 3]], np.int8), range(0, 5, 2), 1)
    assert whole.tolist() == [[1, 2, 3]] and whole.dtype == np.int8


def test_of_regions_the_value_in_most_of_them_wins():
    """Edema and necrosis in one voxel: it is tumour core, as necrosis is, whatever the order of the values."""
    labels = Labels.from_dataset({"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3})
    index = {value: i for i, value in enumerate(labels.stored)}
    for values, one in {(1, 2): 1, (2, 3): 3, (1, 3): 3, (0, 2): 2}.items():
        assert labels.union(np.array([index[value] for value in values]), [0], 0).tolist() == [index[one]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([(2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 1, 3), (9, 1, 1)]))
def test_a_union_keeps_every_labelled_voxel_and_adds_none(seed, factors):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 8, 3))
    labels = (rng.random(shape) < 0.2).astype(np.int16)
    case, here = prepared(1 + rng.random(shape), thin(factors), labels)
    assert case.labels.shape == tuple(-(-n // f) for n, f in zip(shape, factors))
    logits = np.stack([np.maximum(case.labels, 0) == i for i in range(3)]).astype(np.float32)
    back = restore(logits, case.trace, LABELS, here)
    assert back.shape == shape and (back[labels == 1] == 1).all()
    for place in itertools.product(*map(range, case.labels.shape)):
        own = tuple(slice(p * f, (p + 1) * f) for p, f in zip(place, factors))
        assert labels[own].max() == case.labels[place] and (back[own] == case.labels[place]).all()


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(5, 7), st.integers(6, 9), st.integers(5, 11)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)).filter(lambda factors: max(factors) > 1),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.lists(CROP, max_size=1),
    st.permutations([0, 1, 2]),
    st.integers(0, 5),
    st.integers(0, 7),
)
def test_prediction_is_inverted_onto_the_grid_of_the_file(shape, factors, border, crops, order, axes, flips):
    """Each thick voxel labels the voxels it was made of and no other, in every orientation, beside empty slices."""
    permutation = list(itertools.permutations(range(3)))[axes]
    signs = [1 if flips >> i & 1 else -1 for i in range(3)]
    direction = np.asarray(OBLIQUE)[:, permutation] * signs
    stored = Grid(shape=shape, spacing_mm=(3.0, 1.0, 0.5), direction=tuple(map(tuple, direction.tolist())))
    canonical = canonical_grid(stored)
    rng = np.random.default_rng(flips)
    content = np.zeros(canonical.shape, bool)
    content[border[0] : canonical.shape[0] - border[1]] = True
    image = np.where(content, numbered(*canonical.shape), 0).astype(np.float32)
    labels = np.where(content, rng.integers(0, 3, canonical.shape), 0).astype(np.int16)
    made = thin(factors, *crops, axis_order=tuple(order))
    spacing = [mm * f for mm, f in zip(canonical.spacing_mm, factors)]
    here = configuration(spacing_mm=tuple(spacing[axis] for axis in order))
    volume = Volume(array=image[None], grid=canonical)
    try:
        case = prepare("a", volume, labels, stored, made, here)
    except AutosegError as error:
        assert "leaves nothing" in str(error)
        return
    without = prepare("a", volume, None, stored, made, here)
    assert np.array_equal(case.image, without.image) and case.trace == without.trace
    assert case.image.shape[1:] == case.trace.shape == case.trace.cropped_shape

    # A number of its own for every thick voxel, on the way back.
    codes = np.arange(1, 1 + case.labels.size).reshape(case.labels.shape)
    many = Labels(names=tuple(map(str, range(codes.size + 1))), values=tuple(range(codes.size + 1)))
    back = restore(np.eye(codes.size + 1, dtype=np.float32)[codes].transpose(3, 0, 1, 2), case.trace, many, here)
    assert not back[~content].any(), "an empty slice takes no label from its neighbour"
    for code in np.unique(back[back > 0]):
        (place,) = np.argwhere(codes == code)
        own = back == code
        squares = np.square(image[own], dtype=np.float64).sum() * np.prod(factors) / own.sum()
        assert case.image[0][tuple(place)] == pytest.approx(squares**0.5, rel=1e-5)
        assert case.labels[tuple(place)] == labels[own].max()
    if not crops:
        assert (back[content] > 0).all()
    maps = restore_probabilities(np.zeros((3, *case.labels.shape), np.float32), case.trace, LABELS, here)
    assert np.allclose(maps.sum(0), 1) and np.array_equal(maps[0] < 1, back > 0)
    # What a later stage reads that takes labels in place of logits.
    logits = 9 * np.stack([np.maximum(case.labels, 0) == i for i in range(3)]).astype(np.float32)
    later = replace(here, previous_stage="3d_lowres", prior="labels")
    found = project(logits, case.trace, case.trace, LABELS, here, later)
    assert np.array_equal(found, np.maximum(case.labels, 0))


def test_crops_count_thick_slices():
    image = numbered(9, 3, 5)
    case, here = prepared(image, thin(Z, "margins(low=[1, 0, 0], high=[1, 0, 0])"))
    assert (case.trace.crop.start, case.trace.crop.stop) == ((2, 0, 0), (8, 3, 5))
    assert np.allclose(case.image[0], np.sqrt(image[2:8:2] ** 2 + image[3:8:2] ** 2))
    padded, here = prepared(image, thin(Z, "crop_to(size=[7, 0, 0])"))
    assert padded.trace.crop.start == (-2, 0, 0) and not padded.image[0, [0, 6]].any()
    back = restore(np.stack([np.zeros((7, 3, 5)), np.ones((7, 3, 5))]).astype(np.float32), padded.trace, LABELS, here)
    assert (back == 1).all() and back.shape == (9, 3, 5)


def test_a_function_of_ones_own_is_told_the_new_spacing(tmp_path, monkeypatch):
    (tmp_path / "told_of_spacing.py").write_text("def f(image, spacing_mm):\n    return image * 0 + spacing_mm[1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = replace(thin(Y), preparation=Preparation(thin=Y, function="told_of_spacing:f"))
    assert (prepared(numbered(3, 4, 5), made)[0].image == 2).all()


def test_it_is_part_of_the_key_and_others_have_the_key_they_had():
    assert len({key(plan()), key(thin(Z, scheme="zscore")), key(thin(X, scheme="zscore"))}) == 3
    cropped = replace(plan(), preparation=Preparation(crops=(parse_crop("crop_to(size=[2, 3, 4])"),)))
    assert case_key(cropped, cropped.configurations[0], FACTS) == "e933b2af2607d22af9f46f3d409e0749"
    assert '"thin"' in to_json(cropped)


def asked(facts, *numbers) -> Plan:
    preparation = Preparation(thin=thinning(numbers, facts))
    labels = Labels.from_dataset({"background": 0, "bone": 1})
    return with_preparation(make_plan(as_prepared(facts, preparation), labels, PLANNERS["unet"]), preparation, facts)


def test_the_planner_sees_thick_slices():
    facts = fingerprint((3, (384, 384, 161), (0.4, 0.4, 0.7)), stats=STATS)
    made = asked(facts, 2)
    assert made.preparation.thin == X and asked(facts, 1, 1, 2) == made
    full = made.configuration("3d_fullres")
    assert full.spacing_mm == pytest.approx((1.4, 0.4, 0.4)) and full.median_shape == (81, 384, 384)
    assert made.channels[0].stats is None, "statistics of single slices say nothing of thick ones"
    assert "1 x 1 x 2 voxels (Z, Y, X of the files) become one" in explain(made)
    assert asked(facts, 1, 1, 1) == make_plan(facts, made.labels, PLANNERS["unet"])


def test_what_cannot_be_thinned_is_refused():
    assert (parse_thin("2"), parse_thin("1,1,2"), parse_thin(None)) == ((2,), X, ())
    for text in ("0", "two", "1,2", "-2", "1,1,0"):
        with pytest.raises(AutosegError, match="--thin 2, or"):
            parse_thin(text)
    with pytest.raises(AutosegError, match=r"1 x 1 x 1 mm .* not clear which way slices lie; .* --thin 1,1,2"):
        asked(fingerprint((3, (36, 50, 35), (1, 1, 1))), 2)
    with pytest.raises(AutosegError, match="2D and have no slices"):
        asked(fingerprint((3, (1, 384, 384), (1, 0.4, 0.4)), dimension=2), 2, 1, 1)
    with pytest.raises(AutosegError, match=r"channel CT have a scale of their own \(ct\)"):
        asked(fingerprint((3, (36, 50, 35), (3, 1, 1)), channels=("T1", "CT"), stats=STATS), 2)


def test_from_the_command_line(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, cases=2)
    command = ["plan_and_preprocess", "-d", "7", "--workspace", str(tmp_path), "-c", "2d"]
    done = CliRunner().invoke(app, [*command, "--thin", "99,1,1"])
    assert done.exit_code and "voxels (Z, Y, X), of which one would be left along an axis" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--thin", "2"])
    assert done.exit_code == 0, done.output
    made = load_json(Plan, tmp_path / "prepared" / NAME / "default" / "plan.json")
    assert made.preparation.thin == Z
    trace = read_case(tmp_path / "prepared" / NAME / "default" / "2d", "p0_0").trace
    assert trace.thin == Z and trace.stored.shape[0] == 13 and trace.shape[0] == 7
    assert CliRunner().invoke(app, [*command, "--set", "preparation.thin=[2, 1, 1]"]).exit_code == 1
