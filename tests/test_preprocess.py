"""prepare and restore: exact where no interpolation is involved, the same for every stored form, blind to labels."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from toys import LABELS, OBLIQUE, ball, configuration, grid, plan

from autoseg.labels import UNSEEN, Labels
from autoseg.preprocess import content_mask, crop_to_content, find_locations, normalise_channel, prepare, prepare_each
from autoseg.restore import project, restore, restore_probabilities
from autoseg.schema import ChannelNorm, ChannelStats
from autoseg.volume import Grid, Volume, canonical_grid

RNG = np.random.default_rng(5)


def one_hot(indices: np.ndarray) -> np.ndarray:
    return np.stack([indices == i for i in range(LABELS.count)]).astype(np.float32)


def test_an_all_zero_image_is_kept_whole():
    volume = Volume(array=np.zeros((1, 5, 7, 11), np.float32), grid=grid())
    cropped = crop_to_content("a", volume, np.zeros((5, 7, 11), np.int16), grid())
    assert cropped.image.shape == (1, 5, 7, 11)
    assert cropped.ratio == 1
    assert not cropped.labels.any()
    prepared = prepare("a", volume, None, grid(), plan(), configuration())
    assert np.isfinite(prepared.image).all()


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 7, 11), (2, 3, 1)])
def test_content_fills_holes_as_scipy_does(shape):
    for seed in range(12):
        image = (np.random.default_rng(seed).random((2, *shape)) < 0.45).astype(np.float32)
        mask = (image != 0).any(0)
        flat = [n == 1 for n in shape]
        expected = (
            ndimage.binary_fill_holes(mask.squeeze()).reshape(shape) if any(flat) else ndimage.binary_fill_holes(mask)
        )
        assert np.array_equal(content_mask(image), expected)


def test_crop_marks_background_outside_the_content_but_keeps_foreground():
    image = np.zeros((1, 5, 7, 11), np.float32)
    image[0, 1:4, 2:5, 3:9] = 5
    image[0, 1, 2, 3] = 0  # outside the content, inside the box
    image[0, 2, 3, 5] = 0  # a hole inside
    labels = np.zeros((5, 7, 11), np.int16)
    labels[1, 2, 4] = 2
    cropped = crop_to_content("a", Volume(array=image, grid=grid()), labels, grid())
    assert cropped.crop.start == (1, 2, 3)
    assert cropped.crop.stop == (4, 5, 9)
    assert cropped.ratio == 54 / 385
    assert cropped.labels[0, 0, 0] == UNSEEN
    assert cropped.labels[1, 1, 2] == 0
    assert cropped.labels[0, 0, 1] == 2
    labels[1, 2, 3] = 1
    assert crop_to_content("a", Volume(array=image, grid=grid()), labels, grid()).labels[0, 0, 0] == 1


def test_normalisation_by_hand():
    x = np.array([[[0, 2, 4, 10]]], np.float32)
    stats = ChannelStats(mean=3, median=3, std=2, minimum=0, maximum=10, percentile_00_5=1, percentile_99_5=5)

    def norm(scheme, masked=False):
        return ChannelNorm(channel="c", scheme=scheme, masked=masked, stats=stats)

    assert np.allclose(normalise_channel(x, norm("zscore"), None), (x - 4) / np.sqrt(14))
    mask = np.array([[[False, True, True, False]]])
    assert normalise_channel(x, norm("zscore", True), mask).tolist() == [[[0, -1, 1, 10]]]
    assert normalise_channel(x, norm("ct"), None).tolist() == [[[-1, -0.5, 0.5, 1]]]
    assert np.allclose(normalise_channel(x, norm("rescale"), None), x / 10)
    assert np.allclose(normalise_channel(x, norm("rgb"), None), x / 255)
    assert normalise_channel(x, norm("none"), None) is x
    with pytest.raises(ValueError, match="8-bit"):
        normalise_channel(x - 1, norm("rgb"), None)


@pytest.mark.parametrize("scheme", ["zscore", "rescale"])
def test_a_constant_channel_stays_finite(scheme):
    norm = ChannelNorm(channel="c", scheme=scheme, masked=False, stats=None)
    assert not normalise_channel(np.full((2, 3, 5), 7, np.float32), norm, None).any()


def test_huge_intensities_keep_their_precision():
    x = RNG.normal(1.7e6, 3, (5, 7, 11)).astype(np.float32)
    norm = ChannelNorm(channel="c", scheme="zscore", masked=False, stats=None)
    wanted = (x.astype(np.float64) - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
    assert np.abs(normalise_channel(x, norm, None) - wanted).max() < 0.05


def test_the_image_does_not_depend_on_the_labels():
    image = np.where(ball((9, 11, 13), (4, 5, 6), 4), RNG.random((9, 11, 13)) + 1, 0).astype(np.float32)[None]
    volume, labels = Volume(array=image, grid=grid((9, 11, 13))), np.ones((9, 11, 13), np.int16)
    made = plan(masked=True)
    with_labels = prepare("a", volume, labels, grid((9, 11, 13)), made, configuration(spacing_mm=(2.0, 1.0, 1.0)))
    without = prepare("a", volume, None, grid((9, 11, 13)), made, configuration(spacing_mm=(2.0, 1.0, 1.0)))
    assert np.array_equal(with_labels.image, without.image)
    assert not without.locations


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(2, 9), st.integers(2, 11)),
    st.permutations([0, 1, 2]),
    st.integers(0, 5),
    st.integers(0, 7),
)
def test_restore_undoes_prepare_where_nothing_is_interpolated(shape, order, axes, flips):
    """At the case's own spacing, for every plan order and stored orientation, with a border to crop away."""
    permutation = list(itertools.permutations(range(3)))[axes]
    signs = [1 if flips >> i & 1 else -1 for i in range(3)]
    direction = np.asarray(OBLIQUE)[:, permutation] * signs
    stored = Grid(shape=shape, spacing_mm=(3.0, 1.0, 0.5), direction=tuple(map(tuple, direction.tolist())))
    canonical = canonical_grid(stored)
    rng = np.random.default_rng(flips)
    image = np.pad(rng.random(tuple(n - 1 for n in canonical.shape)) + 1, [(0, 1)] * 3).astype(np.float32)
    labels = np.where(image > 0, rng.integers(0, 3, canonical.shape), 0).astype(np.int16)
    made = plan(axis_order=tuple(order))
    spacing = tuple(canonical.spacing_mm[axis] for axis in order)
    here = configuration(spacing_mm=spacing)
    case = prepare("a", Volume(array=image[None], grid=canonical), labels, stored, made, here)
    logits = one_hot(np.maximum(np.asarray(case.labels), 0))
    assert np.array_equal(restore(logits, case.trace, LABELS, here), labels)
    maps = restore_probabilities(100 * logits, case.trace, LABELS, here)
    assert np.array_equal(maps.argmax(0), labels)
    assert np.allclose(maps.sum(0), 1)


def test_regions_are_resampled_as_logits_and_painted_afterwards():
    labels = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "ignore": 9})
    here, onto = configuration(spacing_mm=(2.0, 1.3, 0.8)), configuration("b", spacing_mm=(3.0, 2.0, 1.1))
    made, stored = replace(plan(here, onto), labels=labels), grid((7, 11, 13))
    image = np.zeros((1, 7, 11, 13), np.float32)
    image[:, 1:6, 2:9, 1:12] = RNG.random((5, 7, 11)) + 1
    marked = (image[0] > 0) * RNG.integers(0, 4, image.shape[1:]).astype(np.int16)
    case, other = (
        prepare("a", Volume(array=image, grid=stored), marked, stored, made, wanted) for wanted in (here, onto)
    )
    logits = RNG.normal(0, 3, (2, *case.trace.shape)).astype(np.float32)
    maps = restore_probabilities(logits, case.trace, labels, here)
    inside = np.zeros(stored.shape, bool)
    inside[case.trace.crop.slices()] = True
    assert not maps[:, ~inside].any(), "outside the crop there is no region"
    found = restore(logits, case.trace, labels, here)
    assert found.dtype == np.int16
    assert np.array_equal(found, np.where(maps[1] > 0.5, 2, np.where(maps[0] > 0.5, 1, 0)))
    projected = project(logits, case.trace, other.trace, labels, here, onto)
    assert projected.shape == other.trace.shape
    assert set(np.unique(projected)) == {0, 1, 2}


def test_labels_of_the_stage_before_are_brought_on_as_label_files_are_prepared():
    """Of imported cascades: as if the first stage had written a file, and the second one read it."""
    stored, here = grid((9, 14, 11), (2.0, 1.0, 1.3)), configuration("low", (3.1, 1.9, 1.7))
    later = configuration("full", (2.6, 0.8, 1.2), previous_stage="low", prior="labels")
    made = plan(here, later, axis_order=(1, 0, 2))
    image = Volume(array=RNG.random((1, 9, 14, 11), np.float32) + 1, grid=stored)
    low, full = (prepare("a", image, None, stored, made, wanted) for wanted in (here, later))
    logits = RNG.normal(0, 3, (3, *low.trace.shape)).astype(np.float32)
    written = restore(logits, low.trace, LABELS, here)
    found = project(logits, low.trace, full.trace, LABELS, here, later)
    assert np.array_equal(found, prepare("a", image, written, stored, made, later).labels)
    by_logits = project(logits, low.trace, full.trace, LABELS, here, replace(later, prior="logits"))
    assert found.shape == by_logits.shape and not np.array_equal(found, by_logits)


def test_restore_comes_close_where_spacing_changes():
    shape = (12, 31, 33)
    labels = ball((shape[0] * 3, *shape[1:]), (17, 15, 16), 11)[1::3].astype(np.int16)
    image = (labels + RNG.normal(0, 0.1, shape) + 5).astype(np.float32)[None]
    here, stored = configuration(spacing_mm=(1.7, 1.3, 0.8)), grid(shape, (3.0, 1.0, 1.0))
    case = prepare("a", Volume(array=image, grid=stored), labels, stored, plan(), here)
    assert case.image.shape == (1, 21, 24, 41)
    back = restore(one_hot(np.asarray(case.labels)), case.trace, LABELS, here)
    dice = 2 * (back & labels).sum() / (back.sum() + labels.sum())
    assert dice > 0.97


def test_several_configurations_from_one_crop_equal_one_by_one():
    image = Volume(array=RNG.random((2, 5, 7, 11), np.float32) + 1, grid=grid())
    labels = RNG.integers(0, 3, (5, 7, 11)).astype(np.int16)
    fine = configuration(spacing_mm=(1.5, 1.0, 1.0))
    flat = configuration("2d", spacing_mm=(0.7, 0.7), patch=(6, 8))
    made = plan(fine, flat, channels=("a", "b"))
    cropped = crop_to_content("x", image, labels, grid())
    for one, wanted in zip(prepare_each(cropped, made, [fine, flat]), (fine, flat)):
        alone = prepare("x", image, labels, grid(), made, wanted)
        assert np.array_equal(one.image, alone.image)
        assert one.trace == alone.trace
    assert one.trace.spacing_mm == (3.0, 0.7, 0.7)
    assert one.image.shape == (2, 5, 10, 8)
    with pytest.raises(ValueError, match="2 channels, the plan expects 1"):
        next(prepare_each(cropped, plan(), [fine]))


THREE = Labels.from_dataset({"background": 0, "a": 1, "b": 2, "c": 3})


def test_locations_are_of_their_class_distinct_and_bounded():
    labels = np.zeros((40, 40, 40), np.int16)
    labels[:30] = 1
    labels[35, 3, 4:9] = 2
    found = find_locations(labels, THREE)
    assert sorted(found) == [1, 2]
    assert len(found[1]) == 10_000
    assert len(np.unique(found[1], axis=0)) == 10_000
    assert (labels[tuple(found[1].T)] == 1).all()
    assert found[2].tolist() == [[35, 3, x] for x in range(4, 9)]
    assert np.array_equal(find_locations(labels, LABELS)[1], found[1])
