"""Unified focal loss: one pair of numbers for a focal cross-entropy and a focal Tversky loss.

Yeung et al., Computerized Medical Imaging and Graphics 95 (2022), in its asymmetric form: what is rare, that is every
class but the background, is never focused away by the cross-entropy, and is brought forward by the Tversky term.
Arguments as in `dice_ce`. By automatic differentiation: about six buffers of the size of the logits.
"""

from typing import Unpack

import torch
from torch import Tensor

from autoseg.losses.basis import Given, prepare, require
from autoseg.losses.overlap import power, tversky_index
from autoseg.losses.voxelwise import focused


def unified_focal(
    logits: Tensor,
    target: Tensor,
    *,
    weight: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    **given: Unpack[Given],
) -> Tensor:
    """Weight times focal cross-entropy, plus 1 - weight times focal Tversky: from 0 (perfect) up.

    The first is the mean over voxels of -delta log(p) where the truth is a class or region, and elsewhere of
    -(1 - delta) (1 - p)^gamma log(p). The second is the mean over classes of (1 - T)^(1 - gamma), where the Tversky
    index T weighs false negatives by delta and false positives by 1 - delta; the background has no part in it, as in
    all overlaps here.
    """
    require(0 <= weight <= 1 and 0 < delta < 1, f"weight {weight} and delta {delta} must lie between 0 and 1")
    require(0 <= gamma < 1, f"gamma must be from 0 up and below 1, not {gamma}")
    samples = prepare(logits, target, **given)
    terms, entries = samples.surprise()
    terms = torch.where(samples.positive(), delta * terms, (1 - delta) * focused(terms, gamma))
    overlap = power(1 - tversky_index(samples, 1 - delta, delta), 1 - gamma)
    return weight * samples.mean_over_voxels(terms, entries) + (1 - weight) * samples.mean_over_classes(overlap)
