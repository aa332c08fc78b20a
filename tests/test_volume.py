"""Grids, boxes and the 48 axis orders and flips of one volume."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from autoseg.volume import (
    Box,
    Grid,
    Volume,
    bounding_box,
    canonical_axes,
    canonical_grid,
    cut,
    from_canonical,
    mismatch,
    paste,
    to_canonical,
)

SHAPE = (5, 7, 11)
STRAIGHT = np.eye(3)
STORED = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
"""(order of the columns, signs): every way to store one volume."""


def make_grid(direction=STRAIGHT, shape=SHAPE, spacing_mm=(3.0, 1.5, 0.5), origin_mm=(10.0, -20.0, 30.0), dimension=3):
    rows = tuple(tuple(row) for row in np.asarray(direction, float).tolist())
    return Grid(shape=shape, spacing_mm=spacing_mm, origin_mm=origin_mm, direction=rows, dimension=dimension)


def store(array, grid, columns, signs):
    """The same voxels with (x, y, z) axes in the order `columns`, reversed where a sign is negative."""
    axes = [2 - columns[2 - i] for i in range(3)]
    flips = [i for i in range(3) if signs[2 - i] < 0]
    corner = np.zeros(4)
    corner[3] = 1
    for x, sign in zip(columns, signs):
        corner[x] = array.shape[2 - x] - 1 if sign < 0 else 0
    return np.flip(array.transpose(axes), flips), Grid(
        shape=tuple(array.shape[a] for a in axes),
        spacing_mm=tuple(grid.spacing_mm[a] for a in axes),
        origin_mm=tuple((grid.affine() @ corner)[:3].tolist()),
        direction=tuple(tuple(r) for r in (np.asarray(grid.direction)[:, list(columns)] * signs).tolist()),
    )


def same_grid(first, second, tolerance=1e-6):
    return first.shape == second.shape and np.allclose(first.affine(), second.affine(), rtol=0, atol=tolerance)


def test_bounding_box_of_an_empty_mask_is_everything():
    assert bounding_box(np.zeros(SHAPE, bool)) == Box(start=(0, 0, 0), stop=SHAPE)


def test_bounding_box_by_hand():
    mask = np.zeros(SHAPE, bool)
    mask[1, 2, 10] = mask[3, 2, 4] = True
    box = bounding_box(mask)
    assert box == Box(start=(1, 2, 4), stop=(4, 3, 11))
    assert box.shape == (3, 1, 7)
    assert mask[box.slices()].sum() == 2


@given(
    st.lists(st.tuples(st.integers(-6, 8), st.integers(1, 9)), min_size=3, max_size=3),
    st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_cut_equals_padding_everything_then_slicing(edges, channels):
    array = np.random.default_rng(0).integers(1, 9, (channels, 4, 5, 6))
    box = Box(start=tuple(a for a, _ in edges), stop=tuple(a + n for a, n in edges))
    padded = np.pad(array, ((0, 0), *((20, 20),) * 3), constant_values=-7)
    expected = padded[(slice(None), *(slice(20 + a, 20 + b) for a, b in zip(box.start, box.stop)))]
    np.testing.assert_array_equal(cut(array, box, -7), expected)


def test_cut_copies():
    array = np.zeros((1, *SHAPE))
    cut(array, Box(start=(0, 0, 0), stop=SHAPE), 0)[:] = 1
    assert not array.any()


def test_paste_undoes_cut():
    array = np.random.default_rng(1).normal(size=(2, *SHAPE))
    box = Box(start=(1, 0, 3), stop=(4, 7, 9))
    back = paste(cut(array, box, 0), box, SHAPE, fill=-1)
    np.testing.assert_array_equal(back[box.slices()], array[box.slices()])
    assert (back == -1).sum() == 2 * (5 * 7 * 11 - 3 * 7 * 6)


def test_a_volume_refuses_an_array_that_does_not_fit_its_grid():
    with pytest.raises(ValueError, match="does not fit"):
        Volume(array=np.zeros((1, 7, 5, 11)), grid=make_grid())


def test_affine_by_hand():
    quarter = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    corner = make_grid(quarter).affine() @ (2, 1, 4, 1)
    # x index 2 at 0.5 mm goes along world y, y index 1 at 1.5 mm along world -x, z index 4 at 3 mm along z.
    np.testing.assert_allclose(corner[:3], (10 - 1.5, -20 + 1.0, 30 + 12.0))


DIRECTIONS = {
    "straight": np.eye(3),
    "oblique": Rotation.from_euler("zyx", (20, -13, 31), degrees=True).as_matrix(),
    "tie": Rotation.from_euler("z", 45, degrees=True).as_matrix(),
    "oblique tie": (
        Rotation.from_euler("z", 45, degrees=True) * Rotation.from_euler("x", 17, degrees=True)
    ).as_matrix(),
    "triple tie": Rotation.from_rotvec(np.pi / 3 * np.ones(3) / np.sqrt(3)).as_matrix(),
    "mirrored": Rotation.from_euler("zyx", (20, -13, 31), degrees=True).as_matrix() @ np.diag((1, 1, -1)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_every_stored_form_reaches_the_same_canonical_volume(name, noise):
    rng = np.random.default_rng(2)
    array = rng.integers(0, 1000, SHAPE)
    forms = []
    for columns, signs in STORED:
        direction = DIRECTIONS[name] + rng.normal(0, noise, (3, 3)) if noise else DIRECTIONS[name]
        stored, grid = store(array, make_grid(direction), columns, signs)
        assert stored.shape == grid.shape
        canonical = to_canonical(stored, grid)
        assert canonical.flags.c_contiguous
        forms.append((canonical, canonical_grid(grid)))
        np.testing.assert_array_equal(from_canonical(canonical, grid), stored)
    for canonical, grid in forms:
        np.testing.assert_array_equal(canonical, forms[0][0])
        assert same_grid(grid, forms[0][1], tolerance=1e-6 if not noise else 1e-4)


@given(st.integers(0, 10**6), st.sampled_from(STORED))
@settings(max_examples=30, deadline=None)
def test_canonical_keeps_every_voxel_where_it_is_in_the_world(seed, form):
    rng = np.random.default_rng(seed)
    array, grid = store(rng.normal(size=SHAPE), make_grid(Rotation.random(random_state=seed).as_matrix()), *form)
    moved, canonical = to_canonical(array, grid), canonical_grid(grid)

    def positions(array, grid):
        indices = np.indices(array.shape)[::-1].reshape(3, -1)
        world = grid.affine() @ np.vstack([indices, np.ones(indices.shape[1])])
        rank = np.argsort(array.ravel())
        return world[:3, rank]

    np.testing.assert_allclose(positions(array, grid), positions(moved, canonical), atol=1e-9)


@given(st.floats(-30, 30), st.floats(-30, 30), st.sampled_from(STORED))
@settings(max_examples=30, deadline=None)
def test_canonical_is_itks_lps_orientation_for_moderate_tilts(first, second, form):
    tilt = Rotation.from_euler("zx", (first, second), degrees=True).as_matrix()
    array, grid = store(np.arange(np.prod(SHAPE)).reshape(SHAPE), make_grid(tilt), *form)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(np.ravel(grid.direction).tolist())
    oriented = sitk.DICOMOrient(image, "LPS")
    np.testing.assert_array_equal(to_canonical(array, grid), sitk.GetArrayFromImage(oriented))
    canonical = canonical_grid(grid)
    np.testing.assert_allclose(canonical.origin_mm, oriented.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(np.ravel(canonical.direction), oriented.GetDirection(), atol=1e-9)


def test_leading_axes_stay():
    array = np.arange(2 * 5 * 7 * 11).reshape(2, *SHAPE)
    grid = make_grid([[0, 0, -1], [1, 0, 0], [0, 1, 0]])
    moved = to_canonical(array, grid)
    np.testing.assert_array_equal(moved[1], to_canonical(array[1], grid))
    np.testing.assert_array_equal(from_canonical(moved, grid), array)


def test_2d_images_are_never_reoriented():
    grid = make_grid([[0, -1, 0], [1, 0, 0], [0, 0, 1]], shape=(1, 7, 11), dimension=2)
    assert canonical_axes(grid) == ((0, 1, 2), (False, False, False))
    assert same_grid(canonical_grid(grid), grid)


def nudged(**changes):
    base = {"direction": np.eye(3), "spacing_mm": (3.0, 1.5, 0.5), "origin_mm": (10.0, -20.0, 30.0), "shape": SHAPE}
    return make_grid(**{**base, **changes})


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (nudged(), None),
        (nudged(direction=np.eye(3) + 1e-6), None),
        (nudged(origin_mm=(10.0, -20.0, 30.01)), None),
        (nudged(spacing_mm=(3.0, 1.5, 0.5001)), None),
        (nudged(shape=(5, 7, 12)), "shape"),
        (nudged(shape=(11, 7, 5)), "shape"),
        (nudged(spacing_mm=(5.0, 1.5, 0.5)), "spacing"),
        (nudged(spacing_mm=(3.0, 1.5, 0.51)), "spacing"),
        (nudged(direction=np.diag((-1, -1, 1))), "direction"),
        (nudged(direction=Rotation.from_euler("z", 2, degrees=True).as_matrix()), "direction"),
        (nudged(origin_mm=(10.0, -20.0, 33.0)), "origin"),
        (nudged(origin_mm=(10.06, -20.0, 30.0)), "origin"),
        (nudged(dimension=2), "dimension"),
    ],
)
def test_mismatch_names_what_differs(other, kind):
    found = mismatch(nudged(), other)
    assert (found and found.split(":")[0]) == kind


def test_agrees_is_about_corners():
    assert nudged().agrees(nudged(origin_mm=(10.009, -20.0, 30.0)))
    assert not nudged().agrees(nudged(origin_mm=(10.02, -20.0, 30.0)))
    # 0.01 mm a voxel over the 10 steps of the last axis.
    assert nudged().distance_mm(nudged(spacing_mm=(3.0, 1.5, 0.51))) == pytest.approx(0.1)
