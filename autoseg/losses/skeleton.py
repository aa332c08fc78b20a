"""clDice, which keeps vessels and other thin things connected: overlap of each mask with the other's skeleton."""

from collections.abc import Callable
from functools import reduce
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autoseg.losses.basis import SMOOTH, Given, per_class, prepare, require


def cldice(logits: Tensor, target: Tensor, *, iterations: int = 3, **given: Unpack[Given]) -> Tensor:
    """1 - clDice on soft skeletons: from 0 (perfect) to 1; use it with a loss of overlap.

    The harmonic mean of how much of the skeleton of the prediction lies in the truth, and of that of the truth in the
    prediction (Shit et al., CVPR 2021), smoothed as Dice is. A plain has no ridge, hence no skeleton, and no say here:
    `dice_ce+cldice`. iterations: of erosion, as many as the radius of the thickest structure in voxels.
    Arguments and means over classes as in `dice_ce`; ignored voxels are cut out. By automatic differentiation: about
    26 buffers of the size of the logits, and two an iteration; by far the slowest of all losses.
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
    """What erosion removes and dilation does not bring back, of shares (B, F, *s) between 0 and 1, summed up softly.

    Of each iteration only what goes into it is kept for the gradient; the rest is computed again.
    """
    skeleton = torch.zeros_like(shares)
    for _ in range(iterations + 1):
        shares, skeleton = checkpoint(_thin_out, shares, skeleton, use_reentrant=False, preserve_rng_state=False)
    return skeleton


def _thin_out(shares: Tensor, skeleton: Tensor) -> tuple[Tensor, Tensor]:
    """Eroded shares, and the skeleton with the ridge that an erosion and a dilation take away."""
    axes = range(2, shares.ndim)
    eroded = reduce(torch.minimum, [_beside(shares, axis, torch.minimum) for axis in axes])  # a cross
    dilated = reduce(lambda values, axis: _beside(values, axis, torch.maximum), axes, eroded)  # a cube
    ridge = F.relu(shares - dilated)
    return eroded, skeleton + F.relu(ridge - skeleton * ridge)


def _beside(values: Tensor, axis: int, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `choose` takes of each voxel and the two beside it along an axis; the edge has one neighbour."""
    edge = values.shape[axis]
    if edge == 1:
        return values
    pairs = choose(values.narrow(axis, 0, edge - 1), values.narrow(axis, 1, edge - 1))
    first, last = pairs.narrow(axis, 0, 1), pairs.narrow(axis, edge - 2, 1)
    return choose(torch.cat([first, pairs], axis), torch.cat([pairs, last], axis))
