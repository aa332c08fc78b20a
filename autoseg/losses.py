"""Losses of segmentation: cross-entropy, soft Dice, and their sum; deep supervision over decoder scales.

Both losses are one function of the class probabilities whose gradient is known in closed form. Writing that gradient
down needs one buffer of the size of the logits in each direction; automatic differentiation of the textbook
formulas, with one-hot targets, needs five or more, which at a hundred classes is most of a GPU.
Sources: soft Dice after Drozdzal et al. (DLMIA 2016), the sum and the scales after nnU-Net (Isensee et al., 2021).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice: a class absent from target and prediction scores 1."""


class _DiceCrossEntropy(torch.autograd.Function):
    """dice_share * (-mean soft Dice) + ce_share * (mean cross-entropy) of logits (B, K, R, X), target (B, R, X)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, dice_share: float, ce_share: float, batch_dice: bool
    ) -> Tensor:
        shares = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = -shares.gather(1, target[:, None]).mean()
        shares.exp_()
        expected = shares.sum((2, 3))
        hit = _sum_by_class(shares.gather(1, target[:, None])[:, 0], target, logits.shape[1])
        present = _sum_by_class(torch.ones_like(target, dtype=shares.dtype), target, logits.shape[1])
        del shares
        if batch_dice:
            expected, hit, present = (statistic.sum(0, keepdim=True) for statistic in (expected, hit, present))
        numerator, denominator = 2 * hit + SMOOTH, expected + present + SMOOTH
        foreground = (numerator / denominator)[:, 1:]
        scale = dice_share / foreground.numel()
        # Derivatives by the two sums of a class: over all voxels, and over the voxels where the class is true.
        by_expected = scale * numerator / denominator**2
        by_hit = -2 * scale / denominator
        by_expected[:, 0] = by_hit[:, 0] = 0
        ctx.save_for_backward(logits, target, by_expected, by_hit)
        ctx.by_log_share = -ce_share / target.numel()
        return ce_share * cross_entropy - dice_share * foreground.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, by_expected, by_hit = ctx.saved_tensors
        samples, classes = logits.shape[:2]
        by_expected, by_hit = ((outer * part).expand(samples, classes) for part in (by_expected, by_hit))
        by_log_share = outer * ctx.by_log_share
        gradient = torch.softmax(logits, 1, dtype=by_expected.dtype)
        # With p the softmax and g the derivative by p: the derivative by logit k is p_k * (g_k - sum_j p_j g_j).
        true_share = gradient.gather(1, target[:, None])[:, 0]
        at_truth = true_share.mul_(by_hit.gather(1, target.flatten(1)).view_as(target)).add_(by_log_share)
        mean = torch.einsum("bk,bkrx->brx", by_expected, gradient).add_(at_truth)
        for k in range(classes):
            gradient[:, k].mul_(by_expected[:, k, None, None] - mean)
        gradient.scatter_add_(1, target[:, None], at_truth[:, None])
        return gradient.to(logits.dtype), None, None, None, None


def _sum_by_class(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Sums (B, K) of `values` (B, R, X) over the voxels of each class of `target` (B, R, X)."""
    # A bin for every column: float32 sums stay short and exact, and GPU threads seldom wait for one another.
    bins = values.new_zeros(values.shape[0], classes, values.shape[2])
    return bins.scatter_add_(1, target, values).sum(2)


def _loss(logits: Tensor, target: Tensor, dice_share: float, ce_share: float, batch_dice: bool) -> Tensor:
    if logits.shape[2:] != target.shape[1:] or len(logits) != len(target):
        raise ValueError(
            f"logits (B, K, *s) and target (B, *s) do not fit: {tuple(logits.shape)}, {tuple(target.shape)}"
        )
    rows = target.long().reshape(len(target), -1, target.shape[-1])
    shaped = logits.reshape(*logits.shape[:2], *rows.shape[1:])
    return _DiceCrossEntropy.apply(shaped, rows, dice_share, ce_share, batch_dice)


def dice_ce(logits: Tensor, target: Tensor, *, batch_dice: bool) -> Tensor:
    """Cross-entropy minus soft Dice: from -1 (perfect) upwards.

    logits (B, K, *s) of any floating type; target (B, *s) integer with values in 0..K-1. The result is a scalar in
    float32, or float64 for such logits; so are all sums on the way. Cross-entropy is the mean over voxels, Dice the
    mean over the K-1 foreground classes of (2 sum(p g) + 1e-5) / (sum(p) + sum(g) + 1e-5): sums over each sample and
    then the mean over the batch, or over the whole batch with `batch_dice`. A foreground class that the target lacks
    pushes its probability to 0. Raises ValueError for shapes that do not fit.
    """
    return _loss(logits, target, 1.0, 1.0, batch_dice)


def dice(logits: Tensor, target: Tensor, *, batch_dice: bool) -> Tensor:
    """Minus soft Dice, from -1 (perfect) to 0; arguments as in `dice_ce`."""
    return _loss(logits, target, 1.0, 0.0, batch_dice)


def cross_entropy(logits: Tensor, target: Tensor, *, batch_dice: bool) -> Tensor:
    """Mean cross-entropy over voxels; arguments as in `dice_ce`, of which `batch_dice` changes nothing here."""
    return _loss(logits, target, 0.0, 1.0, batch_dice)


LOSSES: dict[str, Callable[..., Tensor]] = {"dice_ce": dice_ce, "dice": dice, "ce": cross_entropy}


def scale_weights(scales: int) -> tuple[float, ...]:
    """Weight of each decoder scale, highest resolution first: 1, 1/2, 1/4, ..., the last 0; they sum to 1.

    The lowest resolution is left out, unless it is the only one.
    """
    weights = [0.5**scale for scale in range(scales)]
    if scales > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def deep_supervision(
    loss: Callable[[Tensor, Tensor], Tensor], logits_list: Sequence[Tensor], target_list: Sequence[Tensor]
) -> Tensor:
    """Weighted sum of `loss` over the scales of a decoder, highest resolution first.

    A network may give fewer scales than there are targets. Scales of weight 0 are not computed at all.
    """
    if not 0 < len(logits_list) <= len(target_list):
        raise ValueError(f"{len(logits_list)} scales of logits do not fit {len(target_list)} scales of targets")
    weighted = zip(scale_weights(len(logits_list)), logits_list, target_list)
    terms = [weight * loss(logits, target) for weight, logits, target in weighted if weight > 0]
    return torch.stack(terms).sum()


def scale_targets(target: Tensor, strides: Sequence[Sequence[int]]) -> list[Tensor]:
    """Target (B, *s) at the resolution of every decoder scale, highest first.

    strides: of all stages of the network; the bottleneck, which is the last, has no target. Each voxel takes the
    label at its centre, that is nearest-exact interpolation, which for whole factors f is every f-th voxel from f // 2.
    """
    factors = accumulate(strides[:-1], lambda total, stride: [t * s for t, s in zip(total, stride)])
    return [target[(slice(None), *(slice(f // 2, None, f) for f in factor))] for factor in factors]
