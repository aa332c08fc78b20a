"""clDice, which keeps vessels and other thin things connected: overlap of each mask with the other's skeleton."""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from autoseg.losses.basis import SMOOTH, Given, per_class, prepare, require


def cldice(logits: Tensor, target: Tensor, *, iterations: int = 3, **given: Unpack[Given]) -> Tensor:
    """1 - clDice on soft skeletons: from 0 (perfect) to 1; use it with a loss of overlap.

    The harmonic mean of how much of the skeleton of the prediction lies in the truth, and of that of the truth in the
    prediction (Shit et al., CVPR 2021), smoothed as Dice is. A plain has no ridge, hence no skeleton, so it says nothing
    of one: `dice_ce+cldice`. iterations: of erosion, as many as the radius of the thickest structure in voxels.
    Arguments and means over classes as in `dice_ce`; ignored voxels are cut out. By automatic differentiation: about
    eight buffers of the size of the logits an iteration, and as many before the first.
    """
    require(iterations >= 0, f"iterations must not be negative, not {iterations}")
    samples = prepare(logits, target, **given)
    shares, truth = samples.shares(), samples.truth()
    solid = truth.to(shares.dtype)
    thin, thin_truth = soft_skeleton(shares, iterations), soft_skeleton(solid, iterations)
    in_truth, own, in_shares, own_truth = samples.pooled(
        per_class(thin * solid), per_class(thin), per_class(thin_truth * shares), per_class(thin_truth)
    )
    precision = (in_truth + SMOOTH) / (own + SMOOTH)
    sensitivity = (in_shares + SMOOTH) / (own_truth + SMOOTH)
    return samples.mean_over_classes(1 - 2 * precision * sensitivity / (precision + sensitivity))


def soft_skeleton(shares: Tensor, iterations: int) -> Tensor:
    """What erosion removes and dilation does not bring back, of shares (B, F, *s) between 0 and 1, summed up softly."""
    skeleton = F.relu(shares - _dilate(_erode(shares)))
    for _ in range(iterations):
        shares = _erode(shares)
        more = F.relu(shares - _dilate(_erode(shares)))
        skeleton = skeleton + F.relu(more - skeleton * more)
    return skeleton


def _erode(shares: Tensor) -> Tensor:
    """Least of each voxel and its neighbours along the axes; what lies outside the patch takes no part."""
    eroded = shares
    for axis in range(shares.ndim - 2):
        least = -_largest(-shares, tuple(3 if other == axis else 1 for other in range(shares.ndim - 2)))
        eroded = least if axis == 0 else eroded.minimum(least)
    return eroded


def _dilate(shares: Tensor) -> Tensor:
    """Largest of each voxel and all its neighbours, diagonal ones too."""
    return _largest(shares, (3,) * (shares.ndim - 2))


def _largest(shares: Tensor, window: tuple[int, ...]) -> Tensor:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1]
    return pool(shares, window, stride=1, padding=tuple(edge // 2 for edge in window))
