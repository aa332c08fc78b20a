"""Resampling against scikit-image, scipy and batchgenerators, against its own plain definition, and by hand."""

import inspect
import itertools
import math
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.transform import resize

import autoseg.resample
from autoseg.resample import is_separate, resample_argmax, resample_image, resample_labels, resample_logits
from autoseg.schema import Resampling

RULES = Resampling()
EVEN = (1.0, 1.0, 1.0)
SPACINGS = {None: EVEN, 0: (5.0, 1.0, 1.0), 1: (1.0, 5.0, 1.0), 2: (1.0, 1.0, 5.0)}

shapes = st.tuples(*[st.integers(1, 14)] * 3)
few = settings(max_examples=30, deadline=None)


def reference(channel, shape, order, apart, through_order=0):
    """One channel by scikit-image, slice by slice where an axis is apart, and scipy between the slices."""
    channel = channel.astype(float)
    if apart is None or channel.shape[0] == shape[0] == 1:
        return resize(channel, shape, order, mode="edge", anti_aliasing=False)
    slices = np.moveaxis(channel, apart, 0)
    plane = tuple(n for axis, n in enumerate(shape) if axis != apart)
    slices = np.stack([resize(s, plane, order, mode="edge", anti_aliasing=False) for s in slices])
    place = len(slices) / shape[apart] * (np.arange(shape[apart]) + 0.5) - 0.5
    where = np.meshgrid(place, *(np.arange(n) for n in plane), indexing="ij")
    slices = ndimage.map_coordinates(slices, where, order=through_order, mode="nearest")
    return np.moveaxis(slices, 0, apart)


def through(slices, size):
    """Index of the slice nearest to each of `size` new ones, in floating point as scipy has it."""
    return np.floor(slices / size * (np.arange(size) + 0.5)).astype(int).tolist()


def plain_labels(labels, shape, apart):
    """The rule as it is defined, voxel by voxel in fractions, and the voxels where labels tie."""
    readings = []  # for each axis, of each output: the inputs it reads with their weights, and the nearest of them
    for axis, (old, new) in enumerate(zip(labels.shape, shape)):
        if axis == apart:
            readings.append([({index: Fraction(1)}, index) for index in through(old, new)])
            continue
        places = (Fraction(old * (2 * i + 1), 2 * new) - Fraction(1, 2) for i in range(new))
        places = [min(max(place, Fraction(0)), Fraction(old - 1)) for place in places]
        ends = [{math.floor(place), math.ceil(place)} for place in places]
        readings.append(
            [({e: 1 - abs(p - e) for e in both}, math.floor(p + Fraction(1, 2))) for p, both in zip(places, ends)]
        )
    out, tied = np.zeros(shape, labels.dtype), np.zeros(shape, bool)
    for voxel in np.ndindex(*shape):
        reads = [reading[i] for reading, i in zip(readings, voxel)]
        weight = Counter()
        for corner in itertools.product(*(read.items() for read, _ in reads)):
            weight[labels[tuple(i for i, _ in corner)]] += math.prod(w for _, w in corner)
        largest = [label for label in weight if weight[label] == max(weight.values())]
        nearest = labels[tuple(near for _, near in reads)]
        out[voxel] = nearest if nearest in largest else min(largest)
        tied[voxel] = len(largest) > 1
    return out, tied


def batchgenerators_labels(labels, shape, apart):
    """Labels by batchgenerators, slice by slice where an axis is apart."""
    if apart is None:
        return resize_segmentation(labels, shape, 1)
    plane = tuple(n for axis, n in enumerate(shape) if axis != apart)
    slices = np.stack([resize_segmentation(s, plane, 1) for s in np.moveaxis(labels, apart, 0)])
    return np.moveaxis(slices[through(len(slices), shape[apart])], 0, apart)


by_largest_weight = pytest.mark.skipif(
    "seg_tiebreak" not in inspect.signature(resize_segmentation).parameters,
    reason="this batchgenerators still asks for half of the weight",
)


def cells(shape, count):
    """Labels 0 to count - 1 of `shape`: each voxel that of the nearest of `count` random centres."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    centres = np.random.default_rng(5).permutation(voxels.reshape(-1, 3))[:count]
    return ((voxels[..., None, :] - centres) ** 2).sum(-1).argmin(-1)


def test_labels_without_foreground_stay_empty():
    for value in (0, -1, 3):
        found = resample_labels(np.full((5, 7, 11), value, np.int8), EVEN, EVEN, (9, 4, 13), RULES)
        assert found.shape == (9, 4, 13) and found.dtype == np.int8
        assert (found == value).all()


def test_no_classes_but_background():
    found = resample_argmax(np.zeros((1, 5, 7, 11), np.float16), EVEN, EVEN, (9, 4, 13), RULES)
    assert found.dtype == np.int16 and found.shape == (9, 4, 13) and not found.any()


def test_unchanged_shape_returns_the_input():
    image = np.random.default_rng(0).standard_normal((2, 5, 7, 11)).astype(np.float32)
    labels = np.arange(385).reshape(5, 7, 11)
    assert resample_image(image, EVEN, (2.0, 1.0, 1.0), (5, 7, 11), RULES) is image
    assert resample_labels(labels, EVEN, EVEN, (5, 7, 11), RULES) is labels
    assert resample_image(image.astype(np.float64), EVEN, EVEN, (5, 7, 11), RULES).dtype == np.float32


@pytest.mark.parametrize(
    ("current", "target", "axis"),
    [
        (EVEN, EVEN, None),
        ((3.0, 1.0, 1.0), EVEN, None),  # three times is not more than three times
        ((3.1, 1.0, 1.0), EVEN, 0),
        ((1.0, 1.0, 4.0), (4.0, 1.0, 1.0), 2),  # the current spacing speaks first
        (EVEN, (1.0, 4.0, 1.0), 1),
        ((0.24, 1.25, 1.25), EVEN, None),  # two coarse axes
        ((0.24, 1.25, 1.25), (5.0, 1.0, 1.0), None),
    ],
)
def test_axis_apart(current, target, axis):
    assert is_separate(current, target) == axis


def test_axis_apart_follows_the_threshold():
    assert is_separate((2.5, 1.0, 1.0), EVEN, threshold=2.0) == 0


def test_linear_by_hand():
    found = resample_logits(np.array([[[[0.0, 1.0]]]]), EVEN, EVEN, (1, 1, 4), RULES)
    np.testing.assert_array_equal(found[0, 0, 0], [0, 0.25, 0.75, 1])


def test_nearest_slices_by_hand():
    slices = np.arange(4.0).reshape(1, 4, 1, 1) * np.ones((1, 4, 5, 7))
    coarse = (5.0, 1.0, 1.0)
    assert resample_image(slices, coarse, EVEN, (6, 5, 7), RULES)[0, :, 0, 0].tolist() == [0, 1, 1, 2, 3, 3]
    assert resample_image(slices, coarse, EVEN, (2, 5, 7), RULES)[0, :, 0, 0].tolist() == [1, 3]


@few
@given(shapes, shapes, st.sampled_from([None, 0, 1, 2]), st.sampled_from([0, 1, 2, 3]), st.integers(0, 9))
def test_images_agree_with_scikit_image(old, new, apart, order, seed):
    image = np.random.default_rng(seed).normal(3, 2, (2, *old)).astype(np.float32)
    rules = Resampling(image_order=order)
    found = resample_image(image, SPACINGS[apart], EVEN, new, rules)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    for channel, result in zip(image, found):
        np.testing.assert_allclose(result, reference(channel, new, order, apart), atol=2e-5)


@few
@given(shapes, shapes, st.sampled_from([None, 0, 1, 2]), st.integers(0, 9))
def test_logits_agree_with_scikit_image(old, new, apart, seed):
    logits = np.random.default_rng(seed).normal(0, 9, (2, *old)).astype(np.float16)
    found = resample_logits(logits, SPACINGS[apart], EVEN, new, RULES)
    for logit, result in zip(logits, found):
        np.testing.assert_allclose(result, reference(logit, new, 1, apart), atol=2e-5)


@pytest.mark.parametrize("through_order", [1, 3])
def test_smooth_interpolation_between_slices(through_order):
    image = np.random.default_rng(1).standard_normal((1, 7, 11, 5)).astype(np.float32)
    rules = Resampling(through_plane_order=through_order)
    for new in ((13, 8, 9), (4, 8, 9)):
        found = resample_image(image, SPACINGS[0], EVEN, new, rules)[0]
        np.testing.assert_allclose(found, reference(image[0], new, 3, 0, through_order), atol=1e-5)


def test_long_axes_agree_though_their_matrix_is_a_band():
    image = np.random.default_rng(2).standard_normal((1, 2, 3, 611)).astype(np.float32)
    for size in (977, 250):
        found = resample_image(image, EVEN, EVEN, (2, 3, size), RULES)[0]
        np.testing.assert_allclose(found, reference(image[0], (2, 3, size), 3, None), atol=1e-5)


def test_values_recorded_from_nnunet():
    image = (np.arange(24).reshape(1, 2, 3, 4) ** 2 % 17).astype(np.float32)
    expected = [
        [[3.6623, 2.7712, 1.6033, 5.1615, 11.4062], [14.645, 12.7191, 12.6707, 10.2538, 4.7519]],
        [[5.7063, 10.5956, 10.1416, 5.4929, 4.0488], [6.5799, 10.8849, 9.7226, 4.3656, 2.3374]],
        [[5.7063, 10.5956, 10.1416, 5.4929, 4.0488], [6.5799, 10.8849, 9.7226, 4.3656, 2.3374]],
    ]
    found = resample_image(image, (5.0, 1.0, 1.0), (3.0, 1.0, 1.0), (3, 2, 5), RULES)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_splines_are_clipped_to_the_channel_or_to_the_slice():
    step = np.zeros((1, 2, 5, 11), np.float32)
    step[..., 5:] = 1
    step[0, 1] *= 7
    joint = resample_image(step, EVEN, EVEN, (2, 5, 31), RULES)
    apart = resample_image(step, SPACINGS[0], EVEN, (2, 5, 31), RULES)
    assert joint.min() == 0 and joint.max() == 7
    assert joint[0, 0].max() > 1  # within the range of the channel the spline may overshoot
    assert apart[0, 0].max() == 1 and apart[0, 1].max() == 7


def test_single_slice_has_no_through_plane_axis():
    image = np.random.default_rng(3).standard_normal((1, 1, 13, 7)).astype(np.float32)
    found = resample_image(image, (1.0, 5.0, 1.0), EVEN, (1, 20, 9), RULES)
    np.testing.assert_allclose(found[0], reference(image[0], (1, 20, 9), 3, None), atol=1e-5)


def test_operators_are_not_changed_by_use():
    image = np.random.default_rng(4).standard_normal((1, 5, 7, 11)).astype(np.float32)
    before = image.copy()
    first = resample_image(image, EVEN, EVEN, (7, 5, 13), RULES)
    again = resample_image(image, EVEN, EVEN, (7, 5, 13), RULES)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)


def test_label_rule_by_hand():
    def resampled(labels, shape):
        return resample_labels(np.array(labels), EVEN, EVEN, shape, RULES)

    assert resampled([[[2, 5]]], (1, 1, 4)).ravel().tolist() == [2, 2, 5, 5]
    assert resampled([[[-1, -1], [-1, 4]]], (1, 1, 1)).item() == -1
    # 0.36 of label 1, 0.4 of label 2 at two corners, 0.24 of label 3: none has one half, and the nearest is 1.
    assert resampled([[[1, 2], [3, 2]]], (1, 10, 10))[0, 4, 4] == 2


def test_label_ties_by_hand():
    def at_the_centre(labels):
        return resample_labels(np.array(labels), EVEN, EVEN, (1, 1, 1), RULES).item()

    assert at_the_centre([[[2, 5]]]) == 5 and at_the_centre([[[5, 2]]]) == 2  # of two equally near the later
    assert at_the_centre([[[1, 2], [3, 4]]]) == 4
    assert at_the_centre([[[3, 2], [2, 1]], [[1, 1], [2, 3]]]) == 1  # 1 and 2 tie, the nearest is 3: the smallest
    row = resample_labels(np.array([[[9, 4, 4, 9]]]), EVEN, EVEN, (1, 1, 2), RULES)
    assert row.ravel().tolist() == [4, 9]


@few
@given(shapes, shapes, st.sampled_from([None, 0, 1, 2]), st.integers(1, 6), st.integers(0, 9))
def test_labels_follow_the_plain_rule(old, new, apart, classes, seed):
    labels = np.random.default_rng(seed).integers(-1, classes, old).astype(np.int16)
    found = resample_labels(labels, SPACINGS[apart], EVEN, new, RULES)
    expected, _ = plain_labels(labels, new, None if old[0] == new[0] == 1 else apart)
    assert found.dtype == labels.dtype
    np.testing.assert_array_equal(found, expected)


@by_largest_weight
@few
@given(
    st.tuples(*[st.sampled_from([(3, 6), (5, 20), (7, 7), (8, 4), (12, 3)])] * 3),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_labels_agree_with_batchgenerators_down_to_ties(sizes, apart, classes, seed):
    # Between such sizes floating point is exact too, and every tie is one for both.
    old, new = zip(*sizes)
    labels = np.random.default_rng(seed).integers(-1, classes, old).astype(np.int16)
    found = resample_labels(labels, SPACINGS[apart], EVEN, new, RULES)
    np.testing.assert_array_equal(found, batchgenerators_labels(labels, new, apart))


@by_largest_weight
@pytest.mark.parametrize("apart", [None, 0, 1, 2])
def test_labels_agree_with_batchgenerators_but_for_rounding(apart):
    labels, shape = cells((11, 14, 17), 40).astype(np.int8), (15, 9, 23)
    found = resample_labels(labels, SPACINGS[apart], EVEN, shape, RULES)
    expected, tied = plain_labels(labels, shape, apart)
    theirs = batchgenerators_labels(labels, shape, apart)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[~tied], theirs[~tied])


@pytest.mark.parametrize("first", [0, 56])
def test_two_hundred_labels_in_one_byte(first):
    labels = (cells((17, 29, 23), 200) + first).astype(np.uint8)
    assert len(np.unique(labels)) == 200
    found = resample_labels(labels, EVEN, EVEN, (23, 19, 31), RULES)
    np.testing.assert_array_equal(found, plain_labels(labels, (23, 19, 31), None)[0])


def test_labels_beyond_one_piece_of_work(monkeypatch):
    labels = np.random.default_rng(6).integers(0, 4, (9, 13, 11)).astype(np.int32) * 100_000
    whole = resample_labels(labels, EVEN, EVEN, (14, 10, 17), RULES)
    monkeypatch.setattr(autoseg.resample, "SLAB_VOXELS", 300)
    monkeypatch.setattr(autoseg.resample, "POINTS", 7)
    np.testing.assert_array_equal(resample_labels(labels, EVEN, EVEN, (14, 10, 17), RULES), whole)
    assert set(np.unique(whole)) <= set(np.unique(labels))


def test_labels_of_other_orders():
    labels = np.array([[[1, 2, 3, 4]]])
    nearest = resample_labels(labels, EVEN, EVEN, (1, 1, 6), Resampling(label_order=0))
    assert nearest.ravel().tolist() == [1, 2, 2, 3, 4, 4]
    between = resample_labels(
        labels.reshape(4, 1, 1) * np.ones((1, 2, 2), int),
        SPACINGS[0],
        EVEN,
        (8, 3, 3),
        Resampling(through_plane_order=1),
    )
    assert between[:, 1, 1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(ValueError, match="order 0 or 1, not 3"):
        resample_labels(labels, EVEN, EVEN, (1, 1, 6), Resampling(label_order=3))


def toy_logits(classes, shape, seed, values):
    """`values` names what they look like: `smooth`, `ties` (few distinct numbers) or `close` (one rounding apart)."""
    rng = np.random.default_rng(seed)
    if values == "ties":
        return rng.integers(0, 3, (classes, *shape)).astype(np.float16)
    if values == "close":
        return np.where(rng.random((classes, *shape)) < 0.5, np.float32(1.1), np.nextafter(np.float32(1.1), 2))
    return ndimage.gaussian_filter(rng.normal(0, 9, (classes, *shape)), (0, 2, 2, 2)).astype(np.float32)


@few
@given(
    shapes,
    shapes,
    st.sampled_from([None, 0, 1, 2]),
    st.integers(1, 6),
    st.sampled_from(["smooth", "ties", "close"]),
    st.integers(0, 9),
)
@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_argmax_equals_the_argmax_of_resampled_logits(dense_share, old, new, apart, classes, values, seed):
    logits = toy_logits(classes, old, seed, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoseg.resample, "DENSE_SHARE", dense_share)
        patch.setattr(autoseg.resample, "SLAB_VOXELS", 200)
        patch.setattr(autoseg.resample, "POINTS", 11)
        found = resample_argmax(logits, SPACINGS[apart], EVEN, new, RULES)
    expected = resample_logits(logits, SPACINGS[apart], EVEN, new, RULES).argmax(0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "rules", [Resampling(logit_order=3), Resampling(through_plane_order=3), Resampling(logit_order=0)]
)
def test_argmax_of_other_orders(rules):
    logits = toy_logits(4, (5, 7, 11), 0, "smooth")
    found = resample_argmax(logits, SPACINGS[0], EVEN, (8, 9, 10), rules)
    np.testing.assert_array_equal(found, resample_logits(logits, SPACINGS[0], EVEN, (8, 9, 10), rules).argmax(0))


def test_argmax_takes_any_memory_layout():
    logits = np.asfortranarray(toy_logits(3, (5, 7, 11), 1, "smooth"))
    found = resample_argmax(logits, EVEN, EVEN, (8, 9, 10), RULES)
    np.testing.assert_array_equal(found, resample_logits(logits, EVEN, EVEN, (8, 9, 10), RULES).argmax(0))


def test_memory_of_argmax_does_not_grow_with_the_classes():
    def peak(classes):
        logits = toy_logits(classes, (24, 26, 22), 2, "smooth").astype(np.float16)
        tracemalloc.start()
        resample_argmax(logits, EVEN, EVEN, (96, 104, 88), RULES)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # fills the caches of operators
    few_classes, many_classes = peak(4), peak(40)
    assert many_classes < 1.5 * few_classes
    assert many_classes < 0.25 * 40 * 96 * 104 * 88 * 4
