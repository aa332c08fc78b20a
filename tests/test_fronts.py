"""Fronts: distances against formulas, growth against speed times time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from autoseg.datasets import fronts
from autoseg.datasets.fields import voxel_centres
from autoseg.datasets.fronts import SHAPES, evolve, plate, reinitialise, sphere, stable_step, tube, upwind_norm

MILD = (1.2, 0.8, 0.8)


def points(shape, spacing_mm):
    return np.stack(np.broadcast_arrays(*voxel_centres(shape, spacing_mm)), axis=-1)


def measured_radius(phi, spacing_mm):
    """Radius of the sphere (in a plane, the circle) whose volume lies inside, the cut voxels counted in part."""
    planar = phi.shape[0] == 1
    inside = np.clip(0.5 - phi, 0, 1).sum() * np.prod(spacing_mm[1:] if planar else spacing_mm)
    return np.sqrt(inside / np.pi) if planar else (3 * inside / (4 * np.pi)) ** (1 / 3)


EXAMPLES = {
    "sphere": ((15.0, 14.0, 16.0), 6.0),
    "tube": (np.array([[4.0, 6.0, 5.0], [20.0, 22.0, 24.0]]), 3.0),
    "plate": ((15.0, 14.0, 16.0), (0.6, 0.0, 0.8), 7.0, 5.0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_the_table_is_a_signed_distance(name):
    phi = SHAPES[name](voxel_centres((30, 31, 33), (1.0, 1.0, 1.0)), *EXAMPLES[name])
    outside = phi > 2
    steepness = np.linalg.norm(np.gradient(phi), axis=0)
    assert (phi < 0).any() and np.abs(steepness[outside] - 1).max() < 0.1
    nearest_inside = distance_transform_edt(phi >= 0)
    assert np.abs(nearest_inside - phi)[outside].max() < 1.2


def test_sphere_is_distance_to_its_centre_less_the_radius():
    shape, centre = (5, 7, 11), np.array([2.5, 3.0, 4.0])
    expected = np.linalg.norm(points(shape, MILD) - centre, axis=-1) - 2.25
    np.testing.assert_allclose(sphere(voxel_centres(shape, MILD), centre, 2.25), expected, atol=1e-6)


def test_circle_in_a_plane():
    phi = sphere(voxel_centres((1, 7, 9), (3.0, 0.5, 0.8)), (0, 1.5, 3.2), 1.0)
    assert phi[0, 3, 4] == pytest.approx(-1.0, abs=1e-6)
    assert phi[0, 5, 4] == pytest.approx(0.0, abs=1e-6)
    assert phi[0, 3, 0] == pytest.approx(2.2, abs=1e-6)


def test_straight_tube_is_distance_to_its_axis_by_the_cross_product():
    shape = (7, 9, 11)
    path = np.array([[-50.0, -60.0, -40.0], [60.0, 50.0, 70.0]])
    along = (path[1] - path[0]) / np.linalg.norm(path[1] - path[0])
    expected = np.linalg.norm(np.cross(points(shape, MILD) - path[0], along), axis=-1) - 1.7
    np.testing.assert_allclose(tube(voxel_centres(shape, MILD), path, 1.7), expected, atol=1e-6)


def test_tube_ends_are_round_and_its_bends_take_the_nearest_piece():
    at = voxel_centres((1, 11, 11), (1.0, 1.0, 1.0))
    phi = tube(at, np.array([[0.0, 2.0, 2.0], [0.0, 2.0, 8.0], [0.0, 8.0, 8.0]]), 1.0)
    assert phi[0, 2, 5] == pytest.approx(-1, abs=1e-6)
    assert phi[0, 5, 8] == pytest.approx(-1, abs=1e-6)
    assert phi[0, 5, 6] == pytest.approx(1, abs=1e-6)
    assert phi[0, 0, 0] == pytest.approx(np.sqrt(8) - 1, abs=1e-6)
    assert phi[0, 10, 10] == pytest.approx(np.sqrt(8) - 1, abs=1e-6)


def test_tube_of_one_repeated_point_is_a_sphere():
    at = voxel_centres((5, 7, 6), MILD)
    point = np.array([2.0, 2.2, 2.4])
    np.testing.assert_allclose(tube(at, np.stack([point, point]), 1.5), sphere(at, point, 1.5), atol=1e-6)


def test_plate_inside_above_beside_and_past_its_edge():
    at = voxel_centres((21, 3, 21), (0.5, 0.5, 0.5))
    phi = plate(at, (5.0, 0.5, 5.0), (1.0, 0.0, 0.0), 3.0, 2.0)
    assert phi[10, 1, 10] == pytest.approx(-1, abs=1e-6)
    assert phi[10, 1, 15] == pytest.approx(-0.5, abs=1e-6)
    assert phi[14, 1, 10] == pytest.approx(1, abs=1e-6)
    assert phi[10, 1, 20] == pytest.approx(2, abs=1e-6)
    assert phi[18, 1, 20] == pytest.approx(np.hypot(2, 3), abs=1e-6)


@given(
    sign=st.sampled_from([-1, 1]),
    spacing=st.tuples(*[st.floats(0.7, 1.3)] * 3),
    planar=st.booleans(),
    speed=st.floats(0.5, 3),
)
@settings(max_examples=20, deadline=None)
def test_sphere_under_constant_speed_grows_by_speed_times_time(sign, spacing, planar, speed):
    shape = tuple(int(27 / h) for h in spacing)
    shape = (1, *shape[1:]) if planar else shape
    centre = (0.0 if planar else 13.0, 12.7, 13.2)
    travelled = 3.0
    start = sphere(voxel_centres(shape, spacing), centre, 8.0)
    end = evolve(start, np.full(shape, sign * speed), spacing, time=travelled / speed)
    grown = measured_radius(end, spacing) - measured_radius(start, spacing)
    assert grown == pytest.approx(sign * travelled, rel=0.02)


def test_a_negative_speed_only_removes_and_a_positive_one_only_adds():
    shape = (9, 11, 13)
    start = sphere(voxel_centres(shape, MILD), (4.8, 4.0, 4.8), 2.5)
    shrunk = evolve(start, np.full(shape, -1.0), MILD, time=1.0) < 0
    grown = evolve(start, np.full(shape, 1.0), MILD, time=1.0) < 0
    assert 0 < shrunk.sum() < (start < 0).sum() < grown.sum()
    assert not (shrunk & (start >= 0)).any() and not ((start < 0) & ~grown).any()


def test_a_vanished_sphere_stays_away():
    shape = (9, 11, 13)
    start = sphere(voxel_centres(shape, MILD), (4.8, 4.0, 4.8), 2.0)
    assert (evolve(start, np.full(shape, -1.0), MILD, time=4.0) > 0).all()


def test_only_the_side_with_speed_moves():
    shape, spacing = (1, 41, 43), (1.0, 1.0, 1.0)
    speed = np.zeros(shape)
    speed[:, :, 25:] = 1.0
    end = evolve(sphere(voxel_centres(shape, spacing), (0, 20, 20), 8.0), speed, spacing, time=2.0)
    assert end[0, 20, 30] == pytest.approx(0, abs=0.1)
    assert end[0, 20, 12] == pytest.approx(0, abs=1e-12)


def test_stable_step_is_the_share_of_a_voxel_over_all_axes():
    speed = np.zeros((3, 4, 5))
    speed[1, 2, 3] = -2.0
    assert stable_step(speed, (1.0, 0.5, 0.25), cfl=0.7) == pytest.approx(0.7 / (2 * (1 + 2 + 4)))
    assert stable_step(speed[:1] - 2, (1.0, 0.5, 0.25)) == pytest.approx(0.5 / (2 * (2 + 4)))
    assert stable_step(np.zeros((3, 4, 5)), MILD) == np.inf


def test_evolution_takes_no_step_longer_than_the_stable_one(monkeypatch):
    calls = []
    monkeypatch.setattr(fronts, "upwind_norm", lambda *args: calls.append(1) or upwind_norm(*args))
    shape = (5, 6, 7)
    start = sphere(voxel_centres(shape, MILD), (2.4, 2.0, 2.4), 1.5)
    speed = np.full(shape, 1.5)
    evolve(start, speed, MILD, time=1.0)
    # Two gradients a step; 1 / stable_step = 1.5 * (1/1.2 + 2/0.8) / 0.5 = 10.0
    assert stable_step(speed, MILD) == pytest.approx(0.1)
    assert 20 <= len(calls) <= 22


def test_no_time_or_no_speed_changes_nothing():
    start = sphere(voxel_centres((5, 6, 7), MILD), (2.4, 2.0, 2.4), 1.5)
    np.testing.assert_array_equal(evolve(start, np.ones(start.shape), MILD, time=0.0), start)
    np.testing.assert_array_equal(evolve(start, np.zeros(start.shape), MILD, time=3.0), start)


def test_upwind_norm_of_a_slope_is_its_steepness_up_to_the_border():
    z, y, x = voxel_centres((5, 7, 6), MILD)
    slope = 2.0 * z - 1.0 * y + 2.0 * x
    for direction in (1.0, -1.0):
        np.testing.assert_allclose(upwind_norm(slope, np.full(slope.shape, direction), MILD), 3.0, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 45, 43), (1, 45, 43)])
def test_reinitialise_restores_the_distance_and_moves_no_voxel(shape):
    centre = (0.0 if shape[0] == 1 else 17.5, 17.0, 17.2)
    z, y, x = voxel_centres(shape, MILD)
    distance = sphere((z, y, x), centre, 9.0)
    bent = distance * (1 + 0.8 * np.sin(z / 3 + x / 4) * np.cos(y / 4))
    restored = reinitialise(bent, MILD, band_mm=4.0)
    near = np.abs(distance) < 3
    assert np.abs(bent - distance)[near].max() > 1.5
    assert np.abs(restored - distance)[near].max() < 0.4
    np.testing.assert_array_equal(restored < 0, distance < 0)


def test_reinitialise_leaves_a_volume_without_front_on_its_side():
    far = np.full((5, 6, 7), 9.0, dtype=np.float32)
    assert (reinitialise(far, MILD, band_mm=2.0) > 0).all()
    assert (reinitialise(-far, MILD, band_mm=2.0) < 0).all()
