"""Grey-value changes, against the classes of batchgenerators and against scipy, with fixed parameters."""

import numpy as np
import pytest
import torch
from batchgenerators.transforms.color_transforms import ContrastAugmentationTransform, GammaTransform
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from scipy import ndimage

from autoseg.augment import intensity

SHAPE = (11, 13, 17)


def picture(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(5).gamma(2.0, size=shape).astype(np.float32) - 1


def changed(image: np.ndarray, change, *parameters) -> np.ndarray:
    tensor = torch.from_numpy(image.copy())
    assert change(tensor, *parameters) is None
    return tensor.numpy()


def classic(step, image: np.ndarray) -> np.ndarray:
    return step(data=image[None, None].astype(np.float64))["data"][0, 0]


@pytest.mark.parametrize(
    "change",
    [
        (intensity.change_contrast, 1.2),
        (intensity.change_gamma, 0.7, False),
        (intensity.change_gamma, 1.4, True),
        (intensity.blur, (0.6, 0.8, 1.0)),
        (intensity.lower_resolution, (0.6, 0.6, 0.6)),
    ],
)
@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 1, 1), (1, 2, 9)])
def test_a_constant_patch_stays_constant(change, shape):
    np.testing.assert_allclose(changed(np.full(shape, 3.5, np.float32), *change), 3.5, atol=1e-5)


@pytest.mark.parametrize("factor", [0.75, 0.9, 1.25])
def test_contrast(factor):
    image = picture()
    expected = classic(ContrastAugmentationTransform(contrast_range=lambda: factor), image)
    found = changed(image, intensity.change_contrast, factor)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() >= image.min() and found.max() <= image.max()


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma(inverted):
    image = picture()
    step = GammaTransform((1.3, 1.3), invert_image=inverted, per_channel=True, retain_stats=True)
    found = changed(image, intensity.change_gamma, 1.3, inverted)
    np.testing.assert_allclose(found, classic(step, image), atol=2e-5)
    np.testing.assert_allclose([found.mean(), found.std()], [image.mean(), image.std()], rtol=1e-5)


def test_gamma_below_one_by_hand():
    # (0, 1, 4) / 4 to the power 1/2 is (0, 1/2, 1): mean 1/2, deviation 1/sqrt 6. The old ones: 5/3 and sqrt(26/9).
    found = changed(np.array([0.0, 1.0, 4.0], np.float32), intensity.change_gamma, 0.5, False)
    deviation = np.sqrt(26 / 9)
    np.testing.assert_allclose(found, 5 / 3 + np.array([-0.5, 0, 0.5]) * np.sqrt(6) * deviation, rtol=1e-5)


def test_inversion_spreads_the_bright_end():
    image = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    plain = changed(image, intensity.change_gamma, 1.5, False)
    inverted = changed(image, intensity.change_gamma, 1.5, True)
    np.testing.assert_allclose(inverted, (1 - plain).ravel()[::-1].reshape(5, 7), atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, (9, 14)])
@pytest.mark.parametrize("zoom", [0.5, 0.6, 0.93])
def test_low_resolution(shape, zoom):
    image = picture(shape)
    step = SimulateLowResolutionTransform(zoom_range=(zoom, zoom), order_downsample=0, order_upsample=1)
    found = changed(image, intensity.lower_resolution, (zoom,) * len(shape))
    np.testing.assert_allclose(found, classic(step, image), atol=1e-4)


def test_low_resolution_leaves_an_axis_alone():
    image = picture()
    step = SimulateLowResolutionTransform((0.7, 0.7), order_downsample=0, order_upsample=1, ignore_axes=(0,))
    found = changed(image, intensity.lower_resolution, (1.0, 0.7, 0.7))
    np.testing.assert_allclose(found, classic(step, image), atol=1e-4)
    by_slice = [changed(plane, intensity.lower_resolution, (0.7, 0.7)) for plane in image]
    np.testing.assert_allclose(found, by_slice, atol=1e-5)


@pytest.mark.parametrize("sigma, length", [(0.5, 3), (0.55, 3), (0.6, 5), (0.9, 5), (0.92, 7), (1.0, 7)])
def test_kernel_is_the_nearest_odd_number_to_six_sigma_and_a_half(sigma, length):
    kernel = intensity.gaussian_kernel(sigma)
    assert len(kernel) == length
    assert sum(kernel) == pytest.approx(1)
    assert kernel == kernel[::-1]
    assert kernel[length // 2] / kernel[length // 2 + 1] == pytest.approx(np.exp(0.5 / sigma**2))


@pytest.mark.parametrize("shape", [SHAPE, (9, 14), (1, 2, 9)])
def test_blur_equals_scipy_with_the_same_kernel(shape):
    image, sigmas = picture(shape), (0.5, 0.8, 1.0)[: len(shape)]
    expected = image.astype(np.float64)
    for axis, sigma in enumerate(sigmas):
        radius = len(intensity.gaussian_kernel(sigma)) // 2
        expected = ndimage.gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=radius)
    np.testing.assert_allclose(changed(image, intensity.blur, sigmas), expected, atol=1e-5)


def test_blur_equals_batchgenerators_but_for_the_kernel_ends():
    image = ndimage.gaussian_filter(picture((15, 17, 19)), 1.0)
    expected = classic(GaussianBlurTransform((0.8, 0.8)), image)
    inner = (slice(4, -4),) * 3
    found = changed(image, intensity.blur, (0.8,) * 3)
    assert np.abs(found - expected)[inner].max() < 0.01 * np.abs(image - expected)[inner].max() + 0.005


def test_noise():
    image = np.zeros((2, 20, 30, 40), np.float32)
    noise = changed(image, intensity.add_noise, 0.07, 3)
    theirs = GaussianNoiseTransform((0.07, 0.07))(data=image[None].astype(np.float64))["data"]
    assert noise.std() == pytest.approx(theirs.std(), rel=0.02) == pytest.approx(0.07, rel=0.02)
    assert abs(noise.mean()) < 4 * 0.07 / np.sqrt(noise.size)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.03  # channels are independent
    np.testing.assert_array_equal(noise, changed(image, intensity.add_noise, 0.07, 3))
    assert not np.array_equal(noise, changed(image, intensity.add_noise, 0.07, 4))
