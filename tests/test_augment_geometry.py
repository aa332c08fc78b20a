"""The affine map of augmentation: exact on ramps, equal to scipy and batchgenerators, labels by the heaviest vote."""

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.spatial_transformations import augment_spatial
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autoseg.augment import geometry

PATCH = (5, 7, 11)


def warp(image: np.ndarray, labels: np.ndarray, affine: np.ndarray, patch: tuple[int, ...]):
    out_image = torch.full((len(image), *patch), torch.nan)
    out_labels = torch.full(patch, -9, dtype=torch.int64)
    geometry.warp_into(torch.from_numpy(image), torch.from_numpy(labels), affine, out_image, out_labels)
    return out_image.numpy(), out_labels.numpy()


def blobs(shape: tuple[int, ...], count: int, seed: int = 3) -> np.ndarray:
    """Smooth regions with the values -1, 0, 1, ..."""
    fields = np.random.default_rng(seed).normal(size=(count, *shape))
    return (ndimage.gaussian_filter(fields, (0, *[1.2] * len(shape))).argmax(0) - 1).astype(np.int16)


def ramps(shape: tuple[int, ...]) -> np.ndarray:
    """(D, *shape): the offset of every voxel from the centre, along each axis."""
    return np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")).astype(np.float32)


@st.composite
def maps(draw):
    dimension = draw(st.sampled_from((2, 3)))
    patch = tuple(draw(st.lists(st.integers(1, 13), min_size=dimension, max_size=dimension)))
    angles = draw(st.lists(st.floats(-3.2, 3.2), min_size=2 * dimension - 3, max_size=2 * dimension - 3))
    flips = draw(st.lists(st.sampled_from((-1.0, 1.0)), min_size=dimension, max_size=dimension))
    return patch, geometry.rotation(np.array(angles)) * draw(st.floats(0.7, 1.4)) * np.array(flips)


@settings(max_examples=30, deadline=None)
@given(maps())
def test_a_ramp_comes_back_as_the_map_itself(drawn):
    # Linear interpolation is exact on ramps, and a single voxel read from outside the box would show.
    patch, affine = drawn
    source = geometry.source_shape(affine, patch)
    image, labels = warp(ramps(source), np.full(source, 4, np.int16), affine, patch)
    assert np.abs(image - np.einsum("ij,j...->i...", affine, ramps(patch))).max() < 1e-4
    assert (labels == 4).all()
    assert all((a - b) % 2 == 0 for a, b in zip(source, patch))


def test_source_shape_by_hand():
    assert geometry.source_shape(np.eye(3), PATCH) == PATCH
    assert geometry.source_shape(np.diag([1.0, -1.0, 1.0]), PATCH) == PATCH
    # Half the edge less one half is 2, 3, 5; times 0.7 it is 1.4, 2.1, 3.5, so boxes reach 2, 3, 4 voxels outwards.
    assert geometry.source_shape(np.eye(3) * 0.7, PATCH) == (5, 7, 9)
    # 2.8, 4.2, 7.0; the last is on the border, where the upper corner of a cell needs one voxel more.
    assert geometry.source_shape(np.eye(3) * 1.4, PATCH) == (7, 11, 17)
    # A quarter turn about axis 0 exchanges the other two.
    assert geometry.source_shape(geometry.rotation(np.array([np.pi / 2, 0, 0])), PATCH) == (5, 13, 9)


@pytest.mark.parametrize("patch", [(7, 12), (5, 7, 11), (6, 5, 8)])
def test_intensities_equal_scipy(patch):
    angles = np.array([0.3, -0.5, 0.2])[: 2 * len(patch) - 3]
    affine = geometry.rotation(angles) * 1.15
    source = geometry.source_shape(affine, patch)
    image = np.random.default_rng(1).normal(size=(2, *source)).astype(np.float32)
    found, _ = warp(image, np.zeros(source, np.int16), affine, patch)
    offset = (np.array(source) - 1) / 2 - affine @ ((np.array(patch) - 1) / 2)
    for channel in range(2):
        expected = ndimage.affine_transform(image[channel], affine, offset, output_shape=patch, order=1)
        np.testing.assert_allclose(found[channel], expected, atol=2e-5)


@pytest.mark.parametrize("patch", [(9, 14), (5, 7, 11)])
def test_rotation_and_scaling_equal_batchgenerators(patch):
    angles = np.array([0.4, -0.3, 0.25])[: 2 * len(patch) - 3]
    # It turns row vectors, the other way round than a matrix turns columns.
    affine = geometry.rotation(-angles) * 1.2
    source = geometry.source_shape(affine, patch)
    image = np.random.default_rng(1).normal(size=(1, *source)).astype(np.float32)
    labels = blobs(source, 4)
    expected_image, expected_labels = augment_spatial(
        image[None].astype(np.float64),
        labels[None, None].astype(np.float32),
        patch,
        do_elastic_deform=False,
        **{name: (angle, angle) for name, angle in zip(("angle_x", "angle_y", "angle_z"), angles)},
        scale=(1.2, 1.2),
        order_data=1,
        order_seg=1,
        random_crop=False,
        border_cval_seg=-1,
    )
    found_image, found_labels = warp(image, labels, affine, patch)
    np.testing.assert_allclose(found_image, expected_image[0], atol=2e-5)
    np.testing.assert_array_equal(found_labels, expected_labels[0, 0])


def test_labels_are_the_heaviest_of_one_interpolation_a_label():
    affine = geometry.rotation(np.array([0.5, 0.2, -0.4])) * 0.8
    patch = (13, 11, 17)
    source = geometry.source_shape(affine, patch)
    labels = blobs(source, 6)
    _, found = warp(np.zeros((1, *source), np.float32), labels, affine, patch)
    offset = (np.array(source) - 1) / 2 - affine @ ((np.array(patch) - 1) / 2)
    weights = np.stack(
        [
            ndimage.affine_transform((labels == k) * 1.0, affine, offset, output_shape=patch, order=1)
            for k in range(-1, 5)
        ]
    )
    ordered = np.sort(weights, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-3
    assert 0.5 < clear.mean() <= 1
    np.testing.assert_array_equal(found[clear], weights.argmax(0)[clear] - 1)
    assert (ordered[-1] < 0.5).any()  # three labels met somewhere, where no single one has the half


def test_votes_by_hand():
    def vote(corners: list[int], fraction: float) -> list[int]:
        place = torch.tensor([fraction])
        return geometry._vote([torch.tensor([corner]) for corner in corners], [place, place]).tolist()

    # Corners (0, 0), (0, 1), (1, 0), (1, 1) weigh (1 - f)^2, f (1 - f) twice, and f^2.
    assert vote([5, 7, 7, 0], 0.4) == [7]  # 0.48 together against 0.36 of the nearest corner
    assert vote([5, 7, 7, 0], 0.3) == [5]  # 0.42 against 0.49
    # At one third 5 and 7 have four ninths each: the nearest corner decides, wherever it is in the cell.
    assert vote([5, 7, 7, 0], 1 / 3) == [5]
    assert vote([0, 7, 7, 5], 2 / 3) == [5]
    assert vote([5, 2, 2, 0], 1 / 3) == [5]


@pytest.mark.parametrize("patch", [(9, 14), (5, 7, 11)])
def test_image_and_labels_stay_aligned(patch):
    affine = geometry.rotation(np.array([0.3, -0.4, 0.2])[: 2 * len(patch) - 3]) * 1.1
    source = geometry.source_shape(affine, patch)
    labels = (blobs(source, 2) == 0).astype(np.int16)
    image, found = warp(labels[None].astype(np.float32), labels, affine, patch)
    clear = np.abs(image[0] - 0.5) > 1e-3
    np.testing.assert_array_equal(found[clear], (image[0] > 0.5)[clear])
    assert 0 < found.mean() < 1


def test_an_axis_that_is_kept_moves_slice_by_slice():
    patch = (3, 11, 13)
    affine = np.eye(3)
    affine[1:, 1:] = geometry.rotation(np.array([2.5])) * 0.9
    affine[:, 0] *= -1
    source = geometry.source_shape(affine, patch)
    assert source[0] == 3
    image = np.random.default_rng(1).normal(size=(2, *source)).astype(np.float32)
    labels = blobs(source, 4)
    found, found_labels = warp(image, labels, affine, patch)
    for z in range(3):
        expected, expected_labels = warp(image[:, 2 - z], labels[2 - z], affine[1:, 1:], patch[1:])
        np.testing.assert_allclose(found[:, z], expected, atol=1e-5)
        np.testing.assert_array_equal(found_labels[z], expected_labels)


def test_a_quarter_turn_only_moves_voxels():
    patch = (4, 6)
    affine = geometry.rotation(np.array([np.pi / 2]))
    source = geometry.source_shape(affine, patch)
    image = np.random.default_rng(1).normal(size=(1, *source)).astype(np.float32)
    labels = blobs(source, 5)
    found, found_labels = warp(image, labels, affine, patch)
    # The map sends (y, x) to (-x, y): rows of the patch are columns of the source.
    box = geometry.centre(torch.from_numpy(image), (6, 4)).numpy()[0]
    rows = np.array([[box[5 - x, y] for x in range(6)] for y in range(4)])
    np.testing.assert_allclose(found[0], rows, atol=1e-4)
    inner = geometry.centre(torch.from_numpy(labels), (6, 4)).numpy()
    assert found_labels.tolist() == [[inner[5 - x, y] for x in range(6)] for y in range(4)]


def test_views_and_slabs_change_nothing(monkeypatch):
    affine = geometry.rotation(np.array([0.3, 0.1, -0.2]))
    source = geometry.source_shape(affine, PATCH)
    image = np.random.default_rng(1).normal(size=(2, *source)).astype(np.float32)
    labels = blobs(source, 4)
    expected = warp(image, labels, affine, PATCH)
    padded = np.pad(image, ((0, 1), (2, 3), (1, 1), (4, 0)))[:2, 2:-3, 1:-1, 4:]
    padded_labels = np.pad(labels, ((2, 3), (1, 1), (4, 0)))[2:-3, 1:-1, 4:]
    assert padded.strides != image.strides
    for box in (padded_labels, labels):  # strides alike, and strides that differ
        for found, wanted in zip(warp(padded, box, affine, PATCH), expected):
            np.testing.assert_array_equal(found, wanted)
    monkeypatch.setattr(geometry, "_SLAB_CPU", 2 * 7 * 11)
    for found, wanted in zip(warp(image, labels, affine, PATCH), expected):
        np.testing.assert_array_equal(found, wanted)


def test_centre():
    line = torch.arange(35).view(5, 7)
    assert geometry.centre(line, (1, 3)).tolist() == [[16, 17, 18]]
    assert geometry.centre(line, (3,)).tolist() == [[2 + 7 * y, 3 + 7 * y, 4 + 7 * y] for y in range(5)]
    for shape in ((5, 9), (4, 7)):
        with pytest.raises(ValueError, match="is not centred"):
            geometry.centre(line, shape)


def test_mirror():
    image, labels = torch.randn(2, *PATCH), torch.from_numpy(blobs(PATCH, 3))
    out_image, out_labels = torch.empty(2, *PATCH), torch.empty(PATCH, dtype=torch.int64)
    geometry.mirror_into(image, labels, np.array([True, False, True]), out_image, out_labels)
    np.testing.assert_array_equal(out_image, image.numpy()[:, ::-1, :, ::-1])
    np.testing.assert_array_equal(out_labels, labels.numpy()[::-1, :, ::-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    affine = geometry.rotation(np.array([0.3, -0.5, 0.2])) * 1.15
    source = geometry.source_shape(affine, PATCH)
    image, labels = torch.randn(2, *source), torch.from_numpy(blobs(source, 5))
    expected = warp(image.numpy(), labels.numpy(), affine, PATCH)
    out_image = torch.empty(2, *PATCH, device="cuda")
    out_labels = torch.empty(PATCH, dtype=torch.int64, device="cuda")
    geometry.warp_into(image.cuda(), labels.cuda(), affine, out_image, out_labels)
    np.testing.assert_allclose(out_image.cpu(), expected[0], atol=1e-5)
    np.testing.assert_array_equal(out_labels.cpu(), expected[1])
