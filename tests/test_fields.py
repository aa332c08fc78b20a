"""Random fields: smooth to the length asked for, bounded, and the same for the same seed."""

import numpy as np
import pytest

from autoseg.datasets.fields import SPEEDS, gaussian_process, random_speed, voxel_centres

MILD = (1.2, 0.8, 0.8)


def correlation(field: np.ndarray, axis: int, lag: int) -> float:
    field = np.moveaxis(field, axis, 0)
    return float((field[:-lag] * field[lag:]).mean() / (field**2).mean())


def measured_length(field: np.ndarray, axis: int, spacing: float) -> float:
    """Distance at which the autocorrelation falls to exp(-1/2), between lags by a straight line."""
    lags = range(1, field.shape[axis] // 2)
    values = [1.0, *(correlation(field, axis, lag) for lag in lags)]
    after = next(i for i, value in enumerate(values) if value < np.exp(-0.5))
    share = (values[after - 1] - np.exp(-0.5)) / (values[after - 1] - values[after])
    return (after - 1 + share) * spacing


def test_voxel_centres_are_index_times_spacing():
    z, y, x = voxel_centres((2, 3, 4), (1.5, 1.0, 0.5))
    assert z.shape == (2, 1, 1) and y.shape == (1, 3, 1) and x.shape == (1, 1, 4)
    assert z[1, 0, 0] == 1.5 and y[0, 2, 0] == 2.0 and x[0, 0, 3] == 1.5


@pytest.mark.parametrize("length_mm", [2.0, 3.5])
def test_autocorrelation_length_is_the_setting_along_every_axis(length_mm):
    field = gaussian_process(np.random.default_rng(0), (61, 93, 87), MILD, length_mm)
    for axis, spacing in enumerate(MILD):
        assert measured_length(field, axis, spacing) == pytest.approx(length_mm, rel=0.05)
    assert field.std() == pytest.approx(1, abs=0.1)
    assert field.dtype == np.float32 and field.shape == (61, 93, 87)


def test_opposite_faces_are_independent():
    fields = [gaussian_process(np.random.default_rng(seed), (5, 7, 20), (1.0, 1.0, 1.0), 2.0) for seed in range(200)]
    first, last = (np.array([field[2, 3, x] for field in fields]) for x in (0, -1))
    assert abs(np.corrcoef(first, last)[0, 1]) < 0.25


def test_a_length_far_below_the_spacing_is_white_noise():
    field = gaussian_process(np.random.default_rng(0), (20, 31, 29), (1.0, 1.0, 1.0), 0.01)
    assert all(abs(correlation(field, axis, 1)) < 0.03 for axis in range(3))
    assert field.std() == pytest.approx(1, abs=0.03)


def test_planar_field_has_unit_variance_and_the_length():
    field = gaussian_process(np.random.default_rng(2), (1, 301, 257), (5.0, 0.8, 0.5), 3.0)
    assert field.std() == pytest.approx(1, abs=0.1)
    assert measured_length(field, 1, 0.8) == pytest.approx(3.0, rel=0.06)
    assert measured_length(field, 2, 0.5) == pytest.approx(3.0, rel=0.06)


@pytest.mark.parametrize("kind", SPEEDS)
@pytest.mark.parametrize("shape", [(11, 7, 13), (1, 9, 14)])
def test_speeds_reach_their_amplitude_and_repeat_by_seed(kind, shape):
    def draw(seed):
        return random_speed(np.random.default_rng(seed), kind, shape, MILD, length_mm=3.0, amplitude_mm=0.7)

    assert np.abs(draw(4)).max() == pytest.approx(0.7, rel=1e-6)
    assert draw(4).shape == shape and draw(4).dtype == np.float32
    np.testing.assert_array_equal(draw(4), draw(4))
    assert not np.allclose(draw(4), draw(5))


@pytest.mark.parametrize("kind", SPEEDS)
def test_speeds_do_not_jump_between_voxels(kind):
    field = random_speed(np.random.default_rng(1), kind, (30, 41, 37), (1.0, 1.0, 1.0), length_mm=5.0, amplitude_mm=1.0)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.4


def test_affine_is_affine():
    field = SPEEDS["affine"](np.random.default_rng(3), (7, 9, 11), MILD, 5.0).astype(float)
    assert np.abs(field).max() > 0.1
    for axis in range(3):
        np.testing.assert_allclose(np.diff(field, n=2, axis=axis), 0, atol=1e-5)


def test_unknown_speed_lists_the_good_ones():
    with pytest.raises(ValueError, match="gaussian, sinusoidal, affine"):
        random_speed(np.random.default_rng(0), "wavy", (3, 4, 5), MILD, length_mm=1.0, amplitude_mm=1.0)
