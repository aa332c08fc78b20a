"""Losses that are a mean over voxels: cross-entropy one class against the rest, weighted, focal, of the hardest voxels.

All start from the surprise -log(p) at the probability p of the truth; 0 is perfect, and there is no upper end. Regions
have a sigmoid each, hence one term a region; classes that exclude each other have the one term of their softmax, but in
`bce` and `focal`, which ask of every class but the background: this class, or not? The probability of that is the
softmax's too, never a sigmoid of single logits, which would be no probability that prediction ever uses. So for one
foreground class `bce` is `ce`, and `focal` is `categorical_focal`; for regions they are the same anyway.

Arguments as in `dice_ce`, of which `batch_dice` changes nothing. By automatic differentiation: about three buffers of
the size of the logits, `bce` and `focal` of several classes about eleven.
"""

from collections.abc import Sequence
from math import ceil
from typing import Unpack

import torch
from torch import Tensor

from autoseg.losses.basis import Given, prepare, require


def bce(logits: Tensor, target: Tensor, **given: Unpack[Given]) -> Tensor:
    """Mean binary cross-entropy over voxels and classes, each against the rest: from 0 (perfect) up."""
    samples = prepare(logits, target, **given)
    return samples.mean_over_voxels(*samples.binary_surprise())


def weighted_ce(
    logits: Tensor, target: Tensor, *, weights: Sequence[float] | None = None, **given: Unpack[Given]
) -> Tensor:
    """Cross-entropy with a weight a class: from 0 (perfect) up; without weights median-frequency ones of the data.

    weights: one a class, background first. A voxel weighs as much as its class; the mean is weighted too, so only
    their ratios matter. Of a region its voxels weigh as much as itself, all others as the background. By median
    frequency (Eigen and Fergus, ICCV 2015) they come through `make_loss`, counted in what is left of the images after
    the crops; called without, it is an error.
    """
    samples = prepare(logits, target, **given)
    if weights is None:
        raise ValueError("give weights=[...], one a class, background first; `make_loss` takes them from the data")
    known = len(samples.table) + 1
    require(
        len(weights) == known and min(weights) >= 0 and max(weights) > 0,
        f"weights must be {known} numbers from 0 up, background first, not {list(weights)}",
    )
    terms, entries = samples.surprise()
    by_class = terms.new_tensor(weights)
    if samples.exclusive:
        return samples.mean_over_voxels(terms, entries, by_class[samples.target][:, None])
    own = by_class[1:].reshape(1, -1, *[1] * (terms.ndim - 2))
    return samples.mean_over_voxels(terms, entries, torch.where(samples.truth(), own, by_class[0]))


def focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0, **given: Unpack[Given]) -> Tensor:
    """Focal loss of each class against the rest: from 0 (perfect) up; with gamma = 0 it is `bce`.

    Mean of -(1 - p)^gamma log(p) over voxels and classes (Lin et al., ICCV 2017): easy voxels weigh less.
    """
    samples = prepare(logits, target, **given)
    terms, entries = samples.binary_surprise()
    return samples.mean_over_voxels(focused(terms, gamma), entries)


def categorical_focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0, **given: Unpack[Given]) -> Tensor:
    """Focal loss of the softmax: from 0 (perfect) up; with gamma = 0 it is `ce`. Of regions it is `focal`."""
    samples = prepare(logits, target, **given)
    terms, entries = samples.surprise()
    return samples.mean_over_voxels(focused(terms, gamma), entries)


def topk_ce(logits: Tensor, target: Tensor, *, k: float = 10.0, **given: Unpack[Given]) -> Tensor:
    """Mean cross-entropy over the worst k % of the voxels of each sample: from 0 (perfect) up; k = 100 is `ce`.

    Of a sample's terms that count, as many as that share of them, rounded up (after Wu et al., arXiv:1605.06885). Each
    sample has its own worst voxels, so that a hard one does not leave the others of its batch without a gradient.
    """
    require(0 < k <= 100, f"k is a percentage above 0 and up to 100, not {k}")
    samples = prepare(logits, target, **given)
    terms, entries = samples.surprise()
    wide = (..., *(None,) * (terms.ndim - 2))
    out = entries[wide] == 0
    if samples.ignored is not None:
        out = out | samples.ignored[:, None]
    flat = terms.masked_fill(out, -1).flatten(1)
    kept = (entries.sum(1, keepdim=True) * samples.known() * k / 100).ceil()
    worst = flat.topk(ceil(flat.shape[1] * k / 100), sorted=True).values
    chosen = torch.arange(worst.shape[1], device=worst.device) < kept
    return worst.masked_fill(~chosen, 0).sum() / samples.part.total(kept.sum()).clamp(min=1)


def focused(surprise: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma times `surprise`, which is -log(p); finite in value and gradient also where p is 1."""
    require(gamma >= 0, f"gamma must not be negative, not {gamma}")
    return (-torch.expm1(-surprise)).clamp(min=1e-12).pow(gamma) * surprise
