"""Losses that know how far from the truth a voxel lies: boundary and Hausdorff distance.

Distances are Euclidean, in voxels of the scale at hand, to the surface that runs between voxels: half a voxel for a
voxel at it. They are exact, and computed where the logits are: on the CPU a distance transform of every patch would
keep a GPU waiting for seconds. A class that is nowhere, or everywhere, has no surface; there its distances are 0.
Ignored voxels are not of the class, as far as distances go, and have no term.

Both are means over voxels and classes, whatever `batch_dice` is; other arguments as in `dice_ce`. Both need a loss of
overlap beside them, which says something where a class is not: `dice_ce+0.1*boundary`, `dice_ce+0.01*hausdorff`. By
automatic differentiation: about six buffers of the size of the logits; the time
grows with the edges of the patch.
"""

from typing import Unpack

import torch
from torch import Tensor

from autoseg.losses.basis import Given, prepare, require


def boundary(logits: Tensor, target: Tensor, **given: Unpack[Given]) -> Tensor:
    """Mean of probability times signed distance, which is negative inside: perfect is minus the mean depth inside.

    Its value is therefore below 0 where all is well, and only differences between values mean something
    (Kervadec et al., Medical Image Analysis 67, 2021).
    """
    samples = prepare(logits, target, **given)
    return samples.mean_over_voxels(samples.shares() * signed_distance(samples.truth()), samples.counted)


def hausdorff(logits: Tensor, target: Tensor, *, alpha: float = 2.0, **given: Unpack[Given]) -> Tensor:
    """Mean of squared error times d^alpha of the truth plus d^alpha of the prediction: from 0 (perfect) up.

    d are the distances to both surfaces, of the truth and of what has a probability above one half (Karimi and
    Salcudean, IEEE TMI 39, 2020). Far errors make it large: hundreds for errors ten voxels away.
    """
    require(alpha >= 0, f"alpha must not be negative, not {alpha}")
    samples = prepare(logits, target, **given)
    shares, truth = samples.shares(), samples.truth()
    of_truth, of_shares = (signed_distance(mask).abs().pow(alpha) for mask in (truth, shares.detach() > 0.5))
    wrong = (shares - truth.to(shares.dtype)).square()
    return samples.mean_over_voxels(wrong * (of_truth + of_shares), samples.counted)


@torch.no_grad()
def signed_distance(mask: Tensor) -> Tensor:
    """Distance of each voxel to the surface of its mask (B, F, *s), float32, negative inside; 0 without a surface."""
    outside, inside = (squared_distance(where).sqrt() for where in (mask, ~mask))
    signed = torch.where(mask, 0.5 - inside, outside - 0.5)
    return signed.masked_fill(signed.isinf(), 0)


@torch.no_grad()
def squared_distance(mask: Tensor) -> Tensor:
    """Squared distance in voxels of each voxel to the next True of its mask (B, F, *s), float32; infinite without any.

    Axis by axis: along one, the least of what is known at another place plus the square of the way there.
    """
    found = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.inf)
    for axis in range(2, mask.ndim):
        before, edge = found, mask.shape[axis]
        found = before.clone()
        for step in range(1, edge):
            for to, origin in ((step, 0), (0, step)):
                place = found.narrow(axis, to, edge - step)
                torch.minimum(place, before.narrow(axis, origin, edge - step) + step**2, out=place)
    return found
