"""What a scanner does to an image, by hand and against Fourier transforms; nothing at zero strength."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.augment import artefacts, intensity

SHAPES = [(5, 7, 11), (9, 14), (1, 1, 1), (1, 2, 9)]


def picture(shape=(9, 14)):
    return torch.from_numpy(np.random.default_rng(5).gamma(2.0, size=shape).astype(np.float32) - 1)


def changed(image, change, *parameters):
    image = image.clone()
    assert change(image, *parameters) is None
    return image


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_happens_at_zero_strength(shape):
    image = picture(shape)
    zeros = np.zeros([4] * len(shape))
    assert torch.equal(changed(image, artefacts.blur_by_motion, 0.0, 1.0), image)
    assert torch.equal(changed(image, artefacts.add_ghosts, 1, 3, 0.0), image)
    torch.testing.assert_close(changed(image, artefacts.add_bias, zeros), image)
    torch.testing.assert_close(changed(image, artefacts.add_rician_noise, 0.0, rng()), image)
    assert torch.equal(changed(image, intensity.lower_resolution, (1.0,) * len(shape)), image)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_patch_stays_constant(shape):
    image = torch.full(shape, 3.5)
    for change, *parameters in (
        (artefacts.blur_by_motion, 4.3, 0.7),
        (artefacts.add_ghosts, 0, 3, 0.3),
        (artefacts.add_bias, np.random.default_rng(0).uniform(-1, 1, [4] * len(shape))),
    ):
        torch.testing.assert_close(changed(image, change, *parameters), image)


def test_motion_kernels_by_hand():
    assert artefacts.motion_kernel(0.0, 0.3).tolist() == [[1.0]]
    # Two voxels along a row: half of the path is spent nearer than half a voxel; the ends get 1/8 each, half of 1/4.
    along = artefacts.motion_kernel(2.0, 0.0)
    assert along[[0, 2]] == pytest.approx(np.zeros((2, 3)))
    assert along[1] == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert artefacts.motion_kernel(2.0, math.pi / 2) == pytest.approx(along.T)
    # Half a turn is the same path backwards.
    assert artefacts.motion_kernel(3.7, 0.6) == pytest.approx(artefacts.motion_kernel(3.7, 0.6 + math.pi))


@pytest.mark.parametrize("length", [0.4, 1.0, 2.9, 5.0])
@pytest.mark.parametrize("degrees", [0, 30, 90, 135, 250, 359])
def test_a_blurred_point_is_a_line_of_sum_one(length, degrees):
    image = torch.zeros(2, 13, 15)
    image[1, 6, 7] = 1
    angle = math.radians(degrees)
    found = changed(image, artefacts.blur_by_motion, length, angle)
    assert found.sum() == pytest.approx(1, abs=1e-6) and found[0].sum() == 0 and found.min() >= 0
    y, x = (found[1] > 1e-6).nonzero().T.numpy()
    y, x, weight = y - 6, x - 7, found[1][found[1] > 1e-6].numpy()
    # All of it within a voxel of the line, as long as it should be, and balanced about the point.
    across = np.abs(x * math.sin(angle) - y * math.cos(angle))
    assert across.max() < math.sqrt(2)
    assert (weight * x).sum() == pytest.approx(0, abs=1e-5) and (weight * y).sum() == pytest.approx(0, abs=1e-5)
    spread = (weight * (x * math.cos(angle) + y * math.sin(angle)) ** 2).sum()
    # Variance of a path, and up to that of linear interpolation, 1/6 along one axis.
    assert length**2 / 12 - 0.02 < spread < length**2 / 12 + 0.26


def test_motion_equals_a_convolution():
    image = picture((3, 9, 14))
    kernel = artefacts.motion_kernel(4.2, 0.8)
    found = changed(image, artefacts.blur_by_motion, 4.2, 0.8)
    for plane, expected in zip(found, image):
        np.testing.assert_allclose(plane, ndimage.convolve(expected, kernel[::-1, ::-1], mode="mirror"), atol=1e-5)


def test_a_bias_that_is_constant_is_one_factor_above_the_darkest_voxel():
    image = torch.tensor([[1.0, 2.0], [4.0, 1.0]])
    found = changed(image, artefacts.add_bias, np.full((4, 4), math.log(3)))
    torch.testing.assert_close(found, torch.tensor([[1.0, 4.0], [10.0, 1.0]]))


def test_a_bias_by_hand():
    # Logarithms that are the places of the control points themselves make a straight line: -1/2 to 1/2.
    points = np.broadcast_to([-1.5, -0.5, 0.5, 1.5], (4, 4))
    image = torch.ones(2, 5)
    image[0, 0] = 0
    found = changed(image, artefacts.add_bias, points)
    expected = np.exp([-0.5, -0.25, 0, 0.25, 0.5])
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    assert found[0, 0] == 0


@pytest.mark.parametrize("shape", [(5, 7, 11), (9, 14)])
def test_a_bias_is_a_cubic_polynomial_between_its_bounds(shape):
    logs = np.random.default_rng(1).uniform(-0.7, 0.7, [4] * len(shape))
    image = torch.ones(shape)
    image.view(-1)[0] = 0
    gain = changed(image, artefacts.add_bias, logs).log()
    gain.view(-1)[0] = gain.view(-1)[1]
    assert gain.abs().max() <= 0.7
    line = gain[(-1,) * (len(shape) - 1)].numpy()
    assert np.polyfit(np.arange(shape[-1]), line, 3, full=True)[1] == pytest.approx([0], abs=1e-8)


def test_ghosts_of_a_point():
    image = torch.zeros(3, 12)
    image[1, 2] = 1
    found = changed(image, artefacts.add_ghosts, 1, 2, 0.3)
    expected = torch.zeros(3, 12)
    expected[1, 2], expected[1, 6], expected[1, 10] = 0.7, 0.15, 0.15
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("axis, copies", [(0, 2), (1, 1), (1, 3)])
def test_ghosts_are_weaker_lines_of_k_space(axis, copies):
    image = picture((9, 16))
    strength = 0.24
    found = changed(image, artefacts.add_ghosts, axis, copies, strength)
    # Of N lines all but each (copies + 1)-th keep 1 - strength (copies + 1) / copies.
    lines = np.full(image.shape[axis], 1 - strength * (copies + 1) / copies)
    lines[:: copies + 1] = 1
    shape = (-1, 1) if axis == 0 else (1, -1)
    expected = np.fft.ifft(np.fft.fft(image.numpy(), axis=axis) * lines.reshape(shape), axis=axis)
    np.testing.assert_allclose(found, expected.real, atol=1e-5)
    assert found.mean() == pytest.approx(image.mean().item(), abs=1e-5)


def test_rician_noise_without_and_with_signal():
    image = torch.zeros(300, 400)
    image[150:] = 5.0
    found = changed(image, artefacts.add_rician_noise, 0.2, rng())
    # Rayleigh where there is no signal, nearly Gaussian where there is much.
    dark, bright = found[:150], found[150:]
    assert dark.min() >= 0
    assert dark.mean() == pytest.approx(0.2 * math.sqrt(math.pi / 2), rel=0.01)
    assert dark.std() == pytest.approx(0.2 * math.sqrt(2 - math.pi / 2), rel=0.01)
    assert bright.mean() == pytest.approx(5 + 0.2**2 / 10, abs=0.003) and bright.std() == pytest.approx(0.2, rel=0.01)


def test_rician_noise_counts_from_the_darkest_voxel_and_follows_its_seed():
    image = picture((30, 40))
    one, again, other = (changed(image, artefacts.add_rician_noise, 0.3, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.min() >= image.min()
    torch.testing.assert_close(changed(image + 7, artefacts.add_rician_noise, 0.3, rng(1)), one + 7, atol=1e-5, rtol=0)


def test_one_coarse_axis_leaves_the_others():
    ramp = torch.arange(11.0).expand(5, 7, 11) * 0 + torch.arange(5.0)[:, None, None]
    assert torch.equal(changed(ramp, intensity.lower_resolution, (1.0, 0.4, 1.0)), ramp)
    image = torch.zeros(1, 8)
    image[0, 2] = 4
    # Two of eight voxels remain, the third and the seventh; between them it is linear, beyond them constant.
    found = changed(image, intensity.lower_resolution, (1.0, 0.25))
    torch.testing.assert_close(found[0], torch.tensor([4, 4, 3.5, 2.5, 1.5, 0.5, 0, 0]))


def test_gamma_on_known_values():
    image = torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = changed(image, intensity.change_gamma, 2.0, False)
    # Squares, brought back to the mean and deviation that there were.
    squares = np.array([0.0, 0.0625, 0.25, 1.0])
    expected = (squares - squares.mean()) / squares.std() * image.numpy().std() + image.numpy().mean()
    np.testing.assert_allclose(found, expected, atol=1e-6)
