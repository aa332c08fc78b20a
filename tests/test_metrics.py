import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist

from autoseg.evaluation.metrics import METRICS, CaseScore, class_indices, joint_histogram, score_case, surface

EXAMPLES = settings(max_examples=25, deadline=None)
RNG_REGIONS = np.random.default_rng(17)
SPACING = (3.0, 0.7, 1.3)


def score(truth, prediction, spacing_mm=SPACING, tolerance_mm=1.0) -> CaseScore:
    (only,) = score_case("case", np.asarray(truth, np.uint8), np.asarray(prediction, np.uint8), spacing_mm,
                         {"organ": 1}, tolerance_mm)  # fmt: skip
    return only


def block(shape, *ranges):
    out = np.zeros(shape, np.uint8)
    out[tuple(slice(*r) for r in ranges)] = 1
    return out


def plain_surface(mask):
    """Surface voxels (n, 3) by erosion with a cross, in the slice alone for Z = 1."""
    cross = ndimage.generate_binary_structure(3, 1)
    if len(mask) == 1:
        cross[[0, 2]] = False
    return np.argwhere(mask & ~ndimage.binary_erosion(mask, cross, border_value=0))


def brute_force(truth, prediction, spacing_mm, tolerance_mm):
    """HD95, ASSD and surface Dice from all pairs of surface voxels."""
    pairs = cdist(plain_surface(truth) * spacing_mm, plain_surface(prediction) * spacing_mm)
    to_prediction, to_truth = pairs.min(1), pairs.min(0)
    both = np.concatenate([to_prediction, to_truth])
    hd95 = max(np.percentile(to_prediction, 95), np.percentile(to_truth, 95))
    return hd95, both.mean(), (both <= tolerance_mm).mean()


def assert_same(one: CaseScore, other: CaseScore, metrics) -> None:
    """Equal up to rounding, and undefined together."""
    for metric in metrics:
        a, b = getattr(one, metric), getattr(other, metric)
        assert a == b if a is None or b is None else a == pytest.approx(b, rel=1e-9, abs=1e-12), metric


@st.composite
def pairs(draw, classes=1):
    """Truth and prediction with labels 0 to `classes`, noisy or blobby, of one lopsided shape; and a spacing."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(2, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = draw(st.sampled_from([0.0, 1.0]))
    out = []
    for _ in range(2):
        fields = ndimage.gaussian_filter(rng.standard_normal((classes + 1, *shape)), (0, smooth, smooth, smooth))
        out.append(fields.argmax(0).astype(np.uint8))
    spacing = tuple(draw(st.floats(0.2, 5.0)) for _ in range(3))
    return out[0], out[1], spacing


# Empty masks


def test_both_empty_is_undefined_and_says_so():
    found = score(np.zeros((3, 5, 7)), np.zeros((3, 5, 7)))
    assert found.undefined == "truth and prediction empty"
    assert (found.tp, found.fp, found.fn, found.tn) == (0, 0, 0, 105)
    for metric in ("dice", "iou", "surface_dice", "hd95_mm", "assd_mm", "volume_error_relative"):
        assert getattr(found, metric) is None, metric
    assert found.volume_truth_ml == found.volume_prediction_ml == found.volume_error_ml == 0


def test_an_empty_truth_is_a_false_alarm():
    found = score(np.zeros((3, 5, 7)), block((3, 5, 7), (0, 2), (1, 3), (1, 2)), spacing_mm=(5.0, 5.0, 10.0))
    assert found.undefined == "truth empty"
    assert (found.dice, found.iou, found.surface_dice) == (0, 0, 0)
    assert found.hd95_mm is found.assd_mm is found.volume_error_relative is None
    assert (found.tp, found.fp, found.fn, found.tn) == (0, 4, 0, 101)
    assert found.volume_truth_ml == 0
    assert found.volume_prediction_ml == found.volume_error_ml == pytest.approx(1.0)  # 4 voxels of 250 mm3


def test_an_empty_prediction_is_a_miss():
    found = score(block((3, 5, 7), (0, 2), (1, 3), (1, 2)), np.zeros((3, 5, 7)), spacing_mm=(5.0, 5.0, 10.0))
    assert found.undefined == "prediction empty"
    assert (found.dice, found.iou, found.surface_dice, found.volume_error_relative) == (0, 0, 0, -1)
    assert found.hd95_mm is found.assd_mm is None
    assert (found.tp, found.fp, found.fn, found.tn) == (0, 0, 4, 101)
    assert found.volume_error_ml == pytest.approx(-1.0)


# Shapes worked by hand


def test_identical_masks_are_perfect():
    mask = block((5, 7, 11), (1, 4), (2, 6), (3, 9))
    found = score(mask, mask, tolerance_mm=0.0)
    assert (found.dice, found.iou, found.surface_dice) == (1, 1, 1)
    assert (found.hd95_mm, found.assd_mm, found.volume_error_relative, found.undefined) == (0, 0, 0, None)


def test_a_bar_shifted_by_one_voxel():
    # Four voxels in X, one voxel thick, so all are surface; 3 of 4 overlap. One voxel of each has distance 1.3 mm.
    truth, prediction = block((3, 5, 9), (1, 2), (2, 3), (2, 6)), block((3, 5, 9), (1, 2), (2, 3), (3, 7))
    found = score(truth, prediction, tolerance_mm=1.29)
    assert (found.tp, found.fp, found.fn, found.tn) == (3, 1, 1, 130)
    assert found.dice == pytest.approx(6 / 8)
    assert found.iou == pytest.approx(3 / 5)
    # The directed distances are 0, 0, 0, 1.3; rank 0.95 * 3 = 2.85 lies 0.85 of the way from 0 to 1.3.
    assert found.hd95_mm == pytest.approx(0.85 * 1.3)
    assert found.assd_mm == pytest.approx(2 * 1.3 / 8)
    assert found.surface_dice == pytest.approx(6 / 8)
    assert score(truth, prediction, tolerance_mm=1.3).surface_dice == 1


def test_two_points_apart_along_each_axis():
    for axis, spacing in enumerate(SPACING):
        truth, prediction = np.zeros((7, 7, 7), np.uint8), np.zeros((7, 7, 7), np.uint8)
        truth[1, 1, 1] = 1
        there = [1, 1, 1]
        there[axis] = 5
        prediction[tuple(there)] = 1
        found = score(truth, prediction)
        assert found.hd95_mm == found.assd_mm == pytest.approx(4 * spacing)
        assert (found.dice, found.surface_dice, found.volume_error_relative) == (0, 0, 0)


def test_hd95_is_the_larger_of_the_two_directions():
    # Truth: one point. Prediction: that point and one 10 voxels off. Directed: 0 and (0, 10), whose 95th is 9.5.
    truth, prediction = block((1, 1, 12), (0, 1), (0, 1), (0, 1)), block((1, 1, 12), (0, 1), (0, 1), (0, 1))
    prediction[0, 0, 10] = 1
    assert score(truth, prediction, (1.0, 1.0, 2.0)).hd95_mm == pytest.approx(19)
    assert score(prediction, truth, (1.0, 1.0, 2.0)).hd95_mm == pytest.approx(19)


def test_only_the_shell_of_a_solid_block_is_surface():
    mask = block((7, 7, 7), (1, 6), (1, 6), (1, 6))
    assert surface(mask).sum() == 5**3 - 3**3
    assert not surface(mask)[2:5, 2:5, 2:5].any()


def test_beyond_the_edge_of_the_image_lies_background():
    full = np.ones((5, 5, 5), np.uint8)
    assert surface(full).sum() == 5**3 - 3**3
    assert np.array_equal(surface(full), ~block((5, 5, 5), (1, 4), (1, 4), (1, 4)).astype(bool))


def test_two_classes_that_touch_have_a_surface_between_them():
    labels = np.ones((5, 5, 10), np.uint8)
    labels[:, :, 5:] = 2
    assert surface(labels)[2, 2].tolist() == [True, False, False, False, True, True, False, False, False, True]


def test_in_2d_the_slice_has_no_surface_of_its_own():
    truth, prediction = block((1, 7, 9), (0, 1), (1, 6), (1, 6)), block((1, 7, 9), (0, 1), (1, 6), (2, 7))
    assert surface(truth).sum() == 5**2 - 3**2
    found = score(truth, prediction, (99.0, 1.0, 2.0))
    expected = brute_force(truth > 0, prediction > 0, (99.0, 1.0, 2.0), 1.0)
    assert (found.hd95_mm, found.assd_mm, found.surface_dice) == pytest.approx(expected)
    assert found.volume_truth_ml is found.volume_prediction_ml is found.volume_error_ml is None
    assert found.volume_error_relative == 0 and found.undefined is None


def test_a_distance_equal_to_the_tolerance_is_within_it():
    truth, prediction = np.zeros((1, 1, 9), np.uint8), np.zeros((1, 1, 9), np.uint8)
    truth[..., 1] = prediction[..., 4] = 1
    assert 4 * 0.1 - 1 * 0.1 > 0.3  # rounding errors that must not matter
    assert score(truth, prediction, (1.0, 1.0, 0.1), tolerance_mm=0.3).surface_dice == 1
    assert score(truth, prediction, (1.0, 1.0, 0.1), tolerance_mm=0.29).surface_dice == 0


# Values and classes


def test_classes_come_by_name_and_value_and_the_rest_is_nobodys():
    truth = np.array([[[0, 7, 7, 200, -3]], [[0, 0, 0, 0, 0]]], np.int16)
    prediction = np.array([[[7, 7, 0, 200, 200]], [[0, 0, 0, 0, 0]]], np.int16)
    lesion, organ = score_case("c", truth, prediction, (1.0, 1.0, 1.0), {"background": 0, "lesion": 200, "organ": 7})
    assert (lesion.label, lesion.tp, lesion.fp, lesion.fn, lesion.tn) == ("lesion", 1, 1, 0, 8)
    assert (organ.label, organ.tp, organ.fp, organ.fn, organ.tn) == ("organ", 1, 1, 1, 7)
    assert lesion.case == "c"


def test_class_indices_follow_the_order_of_the_values():
    assert class_indices(np.array([0, 5, -2, 9]), (9, -2)).tolist() == [0, 0, 2, 1]
    assert class_indices(np.array([True, False]), (1,)).tolist() == [1, 0]
    assert class_indices(np.array([0, 1, 2], np.uint16), (1, 2)).tolist() == [0, 1, 2]
    many = np.arange(400).reshape(4, 100)
    assert np.array_equal(class_indices(many, range(1, 400)), many)


@EXAMPLES
@given(pairs(classes=3))
def test_one_pass_counts_are_those_of_boolean_masks(pair):
    truth, prediction, _ = pair
    joint = joint_histogram(truth, prediction, 4)
    for t in range(4):
        for p in range(4):
            assert joint[t, p] == np.sum((truth == t) & (prediction == p))


def test_arrays_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        score(np.zeros((3, 5, 7)), np.zeros((3, 5, 6)))
    with pytest.raises(ValueError, match="one shape"):
        score(np.zeros((5, 7)), np.zeros((5, 7)))
    with pytest.raises(ValueError, match="integers"):
        score_case("c", np.zeros((3, 5, 7)), np.zeros((3, 5, 7), int), SPACING, {"organ": 1})


# Against all pairs, and symmetries


@settings(max_examples=60, deadline=None)
@given(pairs(classes=3), st.floats(0.0, 6.0))
def test_distances_agree_with_all_pairs_of_surface_voxels(pair, tolerance_mm):
    truth, prediction, spacing_mm = pair
    labels = {"a": 1, "b": 2, "c": 3}
    for found, value in zip(score_case("case", truth, prediction, spacing_mm, labels, tolerance_mm), labels.values()):
        mine, theirs = truth == value, prediction == value
        assert found.tp == np.sum(mine & theirs) and found.tn == np.sum(~mine & ~theirs)
        if not (mine.any() and theirs.any()):
            assert found.undefined is not None
            continue
        hd95_mm, assd_mm, surface_dice = brute_force(mine, theirs, spacing_mm, tolerance_mm * (1 + 1e-9))
        assert found.hd95_mm == pytest.approx(hd95_mm, rel=1e-9, abs=1e-12)
        assert found.assd_mm == pytest.approx(assd_mm, rel=1e-9, abs=1e-12)
        assert found.surface_dice == pytest.approx(surface_dice)


def test_distances_agree_with_full_distance_maps():
    rng = np.random.default_rng(3)
    truth, prediction = ((ndimage.gaussian_filter(rng.standard_normal((23, 31, 29)), 2) > 0.03) for _ in range(2))
    found = score(truth, prediction, tolerance_mm=2.0)
    edges = [surface(mask.astype(np.uint8)) for mask in (truth, prediction)]
    maps = [ndimage.distance_transform_edt(~edge, sampling=SPACING) for edge in edges]
    directed = maps[1][edges[0]], maps[0][edges[1]]
    assert found.hd95_mm == pytest.approx(max(np.percentile(d, 95) for d in directed))
    assert found.assd_mm == pytest.approx(np.concatenate(directed).mean())
    assert found.surface_dice == pytest.approx((np.concatenate(directed) <= 2.0).mean())


@EXAMPLES
@given(pairs(classes=2))
def test_swapping_truth_and_prediction_swaps_what_it_should(pair):
    truth, prediction, spacing_mm = pair
    there = score_case("c", truth, prediction, spacing_mm, {"a": 1, "b": 2})
    back = score_case("c", prediction, truth, spacing_mm, {"a": 1, "b": 2})
    for one, other in zip(there, back):
        assert (one.fp, one.fn, one.tp, one.tn) == (other.fn, other.fp, other.tp, other.tn)
        assert_same(one, other, ("dice", "iou", "surface_dice", "hd95_mm", "assd_mm"))


@EXAMPLES
@given(pairs(), st.permutations([0, 1, 2]), st.lists(st.booleans(), min_size=3, max_size=3))
def test_axis_order_flips_and_memory_order_do_not_matter(pair, order, flips):
    truth, prediction, spacing_mm = pair
    if 1 in truth.shape:  # which axis is the thin one decides whether an image is 2D
        order, flips = [0, 1, 2], [False, *flips[1:]]
    flipped = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    moved = score_case(
        "c",
        np.asfortranarray(truth.transpose(order)[flipped]),
        prediction.transpose(order)[flipped].astype(np.int32),
        [spacing_mm[axis] for axis in order],
        {"organ": 1},
    )[0]
    still = score(truth, prediction, spacing_mm)
    assert (moved.tp, moved.fp, moved.fn) == (still.tp, still.fp, still.fn)
    assert_same(moved, still, METRICS)


@EXAMPLES
@given(pairs())
def test_padding_with_background_changes_only_the_true_negatives(pair):
    truth, prediction, spacing_mm = pair
    z = 0 if len(truth) == 1 else 2
    margin = ((z, z), (3, 1), (0, 2))
    plain = score(truth, prediction, spacing_mm)
    padded = score(np.pad(truth, margin), np.pad(prediction, margin), spacing_mm)
    assert_same(padded, plain, METRICS)
    assert padded.tn > plain.tn


# Regions and ignored voxels.


def test_regions_are_scored_as_their_masks():
    truth, prediction = RNG_REGIONS.integers(0, 4, (2, 5, 7, 11))
    classes = {"whole": (1, 2, 3), "core": (2, 3), "rim": 1}
    found = score_case("c", truth, prediction, SPACING, classes, 1.0)
    assert [score.label for score in found] == ["whole", "core", "rim"]
    for score, values in zip(found, ((1, 2, 3), (2, 3), (1,))):
        masks = [np.isin(array, values).astype(np.uint8) for array in (truth, prediction)]
        (alone,) = score_case("c", *masks, SPACING, {score.label: 1}, 1.0)
        assert score == alone


@pytest.mark.parametrize("classes", [{"a": 1, "b": 2}, {"whole": (1, 2), "b": 2}])
def test_ignored_voxels_count_nowhere(classes):
    truth, prediction = RNG_REGIONS.integers(0, 3, (2, 5, 7, 11))
    ignored = RNG_REGIONS.random(truth.shape) < 0.3
    found = score_case("c", np.where(ignored, 9, truth), prediction, SPACING, classes, 1.0, ignore=9)
    other = RNG_REGIONS.integers(0, 3, truth.shape)
    assert found == score_case("c", np.where(ignored, 9, truth), np.where(ignored, other, prediction), SPACING,
                               classes, 1.0, ignore=9)  # fmt: skip
    plain = score_case("c", np.where(ignored, 0, truth), np.where(ignored, 0, prediction), SPACING, classes, 1.0)
    for score, cut in zip(found, plain):
        assert score.tp + score.fp + score.fn + score.tn == (~ignored).sum()
        assert (score.tp, score.fp, score.fn) == (cut.tp, cut.fp, cut.fn)
        assert (score.dice, score.hd95_mm, score.surface_dice) == (cut.dice, cut.hd95_mm, cut.surface_dice)


def test_a_case_of_ignored_voxels_alone_is_undefined():
    truth = np.full((5, 7, 11), 9)
    (score,) = score_case("c", truth, np.ones_like(truth), SPACING, {"a": 1}, ignore=9)
    assert (score.tn, score.dice, score.undefined) == (0, None, "truth and prediction empty")
