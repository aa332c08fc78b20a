"""Changes of grey values: noise, blur, brightness, contrast, low resolution, gamma.

Each function is the deterministic twin of a draw: it changes the array it is handed in place, on whatever device that
array is, and reads nothing random but a seed. Statistics are those of the patch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# The smallest range or standard deviation that is divided by: a constant patch stays constant.
_TINY = 1e-7


def add_noise(image: Tensor, sigma: float, seed: int) -> None:
    """Add Gaussian noise of standard deviation `sigma`, independent in every voxel of `image` (any shape).

    The field depends on `seed`, the shape and the kind of device: a CPU and a GPU do not draw the same numbers.
    """
    generator = torch.Generator(device=image.device).manual_seed(seed)
    image.add_(torch.randn(image.shape, generator=generator, device=image.device), alpha=sigma)


def blur(image: Tensor, sigmas: tuple[float, ...]) -> None:
    """Gaussian blur of `image` (*spatial), one standard deviation in voxels an axis, reflected at the border voxels.

    The kernel is as long as the odd number nearest to 6 sigma + 0.5, and sums to one. An axis of 0 stays as it is.
    """
    smooth = image
    for axis, sigma in enumerate(sigmas):
        if sigma == 0:
            continue
        kernel = gaussian_kernel(sigma)
        radius, size = len(kernel) // 2, image.shape[axis]
        if radius == 0:
            continue
        padded = reflect(smooth, axis, radius)
        # Shifted sums: many times faster than a convolution for so short a kernel, and it is symmetric.
        smooth = padded.narrow(axis, radius, size) * kernel[radius]
        for step in range(1, radius + 1):
            for start in (radius - step, radius + step):
                smooth.add_(padded.narrow(axis, start, size), alpha=kernel[radius + step])
    image.copy_(smooth)


def gaussian_kernel(sigma: float) -> list[float]:
    """Weights of a centred Gaussian, as many as the odd number nearest to 6 sigma + 0.5, with the sum 1."""
    radius = int((6 * sigma + 0.5) // 2)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (weights / weights.sum()).tolist()


def reflect(image: Tensor, axis: int, radius: int) -> Tensor:
    """`image` longer by `radius` voxels on both ends of `axis`, mirrored at the outermost voxels, however short."""
    size = image.shape[axis]
    if size <= radius:
        order = np.pad(np.arange(size), radius, mode="reflect")
        return image.index_select(axis, torch.from_numpy(order).to(image.device))
    padding = [0] * (2 * image.ndim)
    padding[2 * (image.ndim - 1 - axis)] = padding[2 * (image.ndim - 1 - axis) + 1] = radius
    return functional.pad(image[None, None], padding, mode="reflect")[0, 0]


def change_contrast(image: Tensor, factor: float) -> None:
    """Stretch grey values about their mean by `factor`, then clip them to the range that they had."""
    mean = image.mean()
    low, high = torch.aminmax(image)
    image.sub_(mean).mul_(factor).add_(mean)
    torch.maximum(image, low, out=image)
    torch.minimum(image, high, out=image)


def lower_resolution(image: Tensor, zooms: tuple[float, ...]) -> None:
    """Resample `image` (*spatial) to round(edge * zoom) voxels by nearest neighbour, and linearly back."""
    small = [max(1, round(edge * zoom)) for edge, zoom in zip(image.shape, zooms)]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[image.ndim]
    coarse = functional.interpolate(image[None, None], small, mode="nearest-exact")
    image.copy_(functional.interpolate(coarse, image.shape, mode=mode, align_corners=False)[0, 0])


def change_gamma(image: Tensor, gamma: float, inverted: bool) -> None:
    """Raise grey values, mapped to [0, 1] and back, to the power `gamma`; mean and standard deviation stay.

    `inverted`: the power acts on the negative image, so it spreads bright instead of dark values.
    """
    if inverted:
        image.neg_()
    mean, deviation = _moments(image)
    low, high = torch.aminmax(image)
    image.sub_(low).div_((high - low).clamp(min=_TINY))
    # x ** gamma as exp(gamma log x): less than half the time of pow; zero passes through minus infinity unharmed.
    image.log_().mul_(gamma).exp_()
    changed_mean, changed_deviation = _moments(image)
    # Matching the moments also undoes the mapping to [0, 1], so the old range need not be put back first.
    image.sub_(changed_mean).mul_(deviation / changed_deviation.clamp(min=_TINY)).add_(mean)
    if inverted:
        image.neg_()


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of an array, left on its device; faster than `torch.std_mean`."""
    mean = image.mean()
    return mean, (image - mean).square_().mean().sqrt()
