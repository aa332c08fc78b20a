"""Cross-entropy, soft Dice, and their sum, the default: the losses whose gradient is written down.

Both are one function of the class probabilities whose gradient is known in closed form. Writing that gradient down
needs one buffer of the size of the logits in each direction; automatic differentiation of the textbook formulas, with
one-hot targets, needs five or more, which at a hundred classes is most of a GPU. Regions have a sigmoid each and the
binary cross-entropy. What counts where is as `basis` says.
Sources: soft Dice after Drozdzal et al. (DLMIA 2016), the sum after nnU-Net (Isensee et al., 2021).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoseg.labels import Labels
from autoseg.losses.basis import SMOOTH, WHOLE, Part, merge_logits, merge_target, refuse_misfit, table


class _DiceCrossEntropy(torch.autograd.Function):
    """dice_share * (-mean soft Dice) + ce_share * (mean cross-entropy) of logits (B, K, R, X), target (B, R, X).

    ignored: mask (B, R, X) or None. counted: (B, K), 1 where a Dice enters the mean, else 0; None: all but background.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignored: Tensor | None,
        counted: Tensor | None,
        dice_share: float,
        ce_share: float,
        batch_dice: bool,
        part: Part,
    ) -> Tensor:
        shares = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if ignored is None:
            cross_entropy = -shares.gather(1, target[:, None]).mean() * part.share
            ctx.by_log_share = -ce_share / target.numel() * part.share
            weight = torch.ones_like(target, dtype=shares.dtype)
        else:
            target = target.masked_fill(ignored, 0)
            weight = (~ignored).to(shares.dtype)
            voxels = part.total(weight.sum()).clamp_(min=1)
            cross_entropy = -shares.gather(1, target[:, None]).masked_fill_(ignored[:, None], 0).sum() / voxels
            ctx.by_log_share = -ce_share / voxels
        shares.exp_()
        if ignored is not None:
            shares.masked_fill_(ignored[:, None], 0)
        expected = shares.sum((2, 3))
        hit = _sum_by_class(shares.gather(1, target[:, None])[:, 0], target, logits.shape[1])
        present = _sum_by_class(weight, target, logits.shape[1])
        del shares, weight
        mean, by_expected, by_hit = _mean_dice(expected, hit, present, counted, 1, dice_share, batch_dice, part)
        ctx.save_for_backward(logits, target, ignored, by_expected, by_hit)
        return ce_share * cross_entropy - dice_share * mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, ignored, by_expected, by_hit = ctx.saved_tensors
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
        if ignored is not None:
            gradient.masked_fill_(ignored[:, None], 0)
        return gradient.to(logits.dtype), *[None] * 7


class _DiceBinaryCrossEntropy(torch.autograd.Function):
    """As `_DiceCrossEntropy` for regions: head k is true where `inside[k]` (K, indices) holds at the target's index."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignored: Tensor | None,
        counted: Tensor | None,
        inside: Tensor,
        dice_share: float,
        ce_share: float,
        batch_dice: bool,
        part: Part,
    ) -> Tensor:
        samples, regions = logits.shape[:2]
        kind = torch.promote_types(logits.dtype, torch.float32)
        surprise, expected, hit, present = logits.new_zeros(4, samples, regions, dtype=kind)
        for k in range(regions):
            logit, truth = logits[:, k].to(kind), inside[k][target]
            terms = F.binary_cross_entropy_with_logits(logit, truth.to(kind), reduction="none")
            share = logit.sigmoid()
            if ignored is not None:
                terms.masked_fill_(ignored, 0)
                share.masked_fill_(ignored, 0)
                truth &= ~ignored
            surprise[:, k], expected[:, k], present[:, k] = (
                voxelwise.sum((1, 2)) for voxelwise in (terms, share, truth)
            )
            hit[:, k] = share.mul_(truth).sum((1, 2))
        mean, by_expected, by_hit = _mean_dice(expected, hit, present, counted, 0, dice_share, batch_dice, part)
        voxels = surprise.new_full((samples, 1), target[0].numel())
        if ignored is not None:
            voxels -= ignored.flatten(1).sum(1, keepdim=True)
        entries = torch.ones_like(surprise) if counted is None else counted
        by_term = entries / part.total((entries * voxels).sum()).clamp_(min=1)
        ctx.save_for_backward(logits, target, ignored, inside, by_expected, by_hit, ce_share * by_term)
        return ce_share * (by_term * surprise).sum() - dice_share * mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, ignored, inside, *parts = ctx.saved_tensors
        by_expected, by_hit, by_term = ((outer * part).expand(logits.shape[:2])[..., None, None] for part in parts)
        gradient = torch.sigmoid(logits.to(by_expected.dtype))
        for k in range(logits.shape[1]):
            share, truth = gradient[:, k], inside[k][target]
            of_dice = (by_expected[:, k] + by_hit[:, k] * truth) * (1 - share) * share
            share.sub_(truth.to(share.dtype)).mul_(by_term[:, k]).add_(of_dice)
        if ignored is not None:
            gradient.masked_fill_(ignored[:, None], 0)
        return gradient.to(logits.dtype), *[None] * 8


def _mean_dice(
    expected: Tensor,
    hit: Tensor,
    present: Tensor,
    counted: Tensor | None,
    first: int,
    share: float,
    batch_dice: bool,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean soft Dice from sums (B, K), and the derivatives of -share times it by `expected` and by `hit`.

    The mean is over the entries that are `counted`, or where that is None over all classes from `first` on. With
    `batch_dice` a class is pooled over the samples where it counts, and its derivatives may be (1, K). Of the mean the
    contribution of the `part` is returned.
    """
    if counted is not None:
        expected, hit, present = (statistic * counted for statistic in (expected, hit, present))
    if batch_dice:
        expected, hit, present = part.total(
            torch.stack([statistic.sum(0, keepdim=True) for statistic in (expected, hit, present)])
        )
    numerator, denominator = 2 * hit + SMOOTH, expected + present + SMOOTH
    quotient = numerator / denominator
    scale: Tensor | float
    if counted is None:
        chosen = quotient[:, first:]
        mean, scale = chosen.mean() * part.share, share / chosen.numel()
        # Pooled over the whole batch, the derivative by a sum of this part is that by the whole sum.
        scale = scale if batch_dice else scale * part.share
    else:
        weight = (part.total(counted.sum(0, keepdim=True)) > 0).to(counted.dtype) if batch_dice else counted
        entries = weight.sum() if batch_dice else part.total(weight.sum())
        weight = weight / entries.clamp(min=1)
        mean, scale = (weight * quotient).sum() * (part.share if batch_dice else 1.0), share * weight
    # By the two sums of a class: over all voxels, and over the voxels where the class is true.
    by_expected = scale * numerator / denominator**2
    by_hit = -2 * scale / denominator
    if counted is None:
        by_expected[:, :first] = by_hit[:, :first] = 0
        return mean, by_expected, by_hit
    return mean, by_expected * counted, by_hit * counted


def _sum_by_class(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Sums (B, K) of `values` (B, R, X) over the voxels of each class of `target` (B, R, X)."""
    # A bin for every column: float32 sums stay short and exact, and GPU threads seldom wait for one another.
    bins = values.new_zeros(values.shape[0], classes, values.shape[2])
    return bins.scatter_add_(1, target, values).sum(2)


def _loss(
    logits: Tensor,
    target: Tensor,
    dice_share: float,
    ce_share: float,
    batch_dice: bool,
    labels: Labels | None,
    annotated: Tensor | None,
    part: Part,
) -> Tensor:
    refuse_misfit(logits, target)
    exclusive = labels is None or labels.exclusive
    rows = target.long().reshape(len(target), -1, target.shape[-1])
    shaped = logits.reshape(*logits.shape[:2], *rows.shape[1:])
    ignored = None if labels is None or labels.ignored is None else rows == labels.ignored
    counted = None
    if ignored is not None or annotated is not None:
        counted = logits.new_ones(logits.shape[:2], dtype=torch.promote_types(logits.dtype, torch.float32))
        if exclusive:
            counted[:, 0] = 0
        if annotated is not None:
            counted[:, int(exclusive) :] *= annotated
        if ignored is not None:
            counted *= ~ignored.flatten(1).all(1, keepdim=True)
    if exclusive:
        if annotated is not None:
            shaped, rows = merge_logits(shaped, annotated), merge_target(rows, annotated)
        return _DiceCrossEntropy.apply(shaped, rows, ignored, counted, dice_share, ce_share, batch_dice, part)
    assert labels is not None
    inside = table(labels.members, len(labels.known), logits.device)
    return _DiceBinaryCrossEntropy.apply(shaped, rows, ignored, counted, inside, dice_share, ce_share, batch_dice, part)


def dice_ce(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool,
    labels: Labels | None = None,
    annotated: Tensor | None = None,
    part: Part = WHOLE,
) -> Tensor:
    """Cross-entropy minus soft Dice: from -1 (perfect) upwards.

    logits (B, K, *s) of any floating type; target (B, *s) integer, a label map of `labels` with no negative index; None
    means K classes that exclude each other. annotated: bool (B, classes without background), which classes were
    annotated in each sample; None: all. part: see `Part`; else the samples are the whole batch.
    The result is a scalar in float32, or float64 for such logits; so are all sums on the way. Cross-entropy is the mean
    over voxels (and regions), Dice the mean over the K-1 foreground classes (K regions) of
    (2 sum(p g) + 1e-5) / (sum(p) + sum(g) + 1e-5): sums over each sample and then the mean over the batch, or over the
    whole batch with `batch_dice`. A foreground class that the target lacks pushes its probability to 0. Ignored voxels,
    samples without any other, and classes that were not annotated in a sample take part in nothing; zero where nothing
    is left. Raises ValueError for shapes that do not fit.
    """
    return _loss(logits, target, 1.0, 1.0, batch_dice, labels, annotated, part)


def dice(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool,
    labels: Labels | None = None,
    annotated: Tensor | None = None,
    part: Part = WHOLE,
) -> Tensor:
    """Minus soft Dice: from -1 (perfect) to 0. Arguments as in `dice_ce`."""
    return _loss(logits, target, 1.0, 0.0, batch_dice, labels, annotated, part)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool,
    labels: Labels | None = None,
    annotated: Tensor | None = None,
    part: Part = WHOLE,
) -> Tensor:
    """Mean cross-entropy over voxels (and regions): from 0 (perfect) up.

    Arguments as in `dice_ce`, of which `batch_dice` changes nothing here.
    """
    return _loss(logits, target, 0.0, 1.0, batch_dice, labels, annotated, part)
