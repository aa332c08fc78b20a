"""Losses of overlap beside the soft Dice of `closed_form`: squared Dice, Tversky, Focal-Tversky.

False positives weigh `alpha` and false negatives `beta` in all of them. Papers do not agree on the letters: so did
Salehi et al. (MLMI 2017); Abraham and Khan (ISBI 2019) have them the other way round.

Arguments as in `dice_ce`. Means are over classes and samples as there, over pooled sums with `batch_dice`. By automatic
differentiation, which holds three to four buffers of the size of the logits.
"""

from typing import Unpack

from torch import Tensor

from autoseg.losses.basis import SMOOTH, Given, Samples, per_class, prepare, require


def dice_squared(logits: Tensor, target: Tensor, **given: Unpack[Given]) -> Tensor:
    """Minus soft Dice with squared probabilities in the denominator, as of V-Net: from -1 (perfect) to 0.

    (2 sum(p g) + 1e-5) / (sum(p^2) + sum(g) + 1e-5), g being 0 or 1 (Milletari et al., 3DV 2016).
    """
    samples = prepare(logits, target, **given)
    shares, truth = samples.shares(), samples.truth()
    hit, squares, present = samples.pooled(
        per_class(shares.masked_fill(~truth, 0)), per_class(shares.square()), per_class(truth)
    )
    return -samples.mean_over_classes((2 * hit + SMOOTH) / (squares + present + SMOOTH))


def tversky(logits: Tensor, target: Tensor, *, alpha: float = 0.3, beta: float = 0.7, **given: Unpack[Given]) -> Tensor:
    """1 - Tversky index: from 0 (perfect) to 1; with alpha = beta = 0.5 it is 1 - Dice.

    The index is hit / (hit + alpha sum(p (1 - g)) + beta sum((1 - p) g)) with hit = sum(p g), smoothed as Dice is
    (Salehi et al., MLMI 2017). More beta than alpha: rather too much than too little.
    """
    samples = prepare(logits, target, **given)
    return samples.mean_over_classes(1 - tversky_index(samples, alpha, beta))


def focal_tversky(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 4 / 3,
    **given: Unpack[Given],
) -> Tensor:
    """Mean of (1 - Tversky index)^(1 / gamma): from 0 (perfect) to 1; with gamma = 1 it is `tversky`.

    Abraham and Khan (ISBI 2019), whose alpha is beta here. gamma above 1 raises the gradient of classes that are nearly
    right; see `power` for how it stays finite.
    """
    require(gamma > 0, f"gamma must be above 0, not {gamma}")
    samples = prepare(logits, target, **given)
    return samples.mean_over_classes(power(1 - tversky_index(samples, alpha, beta), 1 / gamma))


def tversky_index(samples: Samples, alpha: float, beta: float) -> Tensor:
    """Tversky index of each class, (B or 1, F), from 0 to 1 (perfect, or class absent and not predicted)."""
    require(alpha >= 0 and beta >= 0 and alpha + beta > 0, f"alpha {alpha} and beta {beta} must not be negative, nor 0")
    shares, truth = samples.shares(), samples.truth()
    hit, too_much, missing = samples.pooled(
        per_class(shares.masked_fill(~truth, 0)),
        per_class(shares.masked_fill(truth, 0)),
        per_class((1 - shares).masked_fill(~truth, 0)),
    )
    smooth = SMOOTH / 2  # alpha = beta = 0.5 then gives the very quotient of Dice
    return (hit + smooth) / (hit + alpha * too_much + beta * missing + smooth)


def power(values: Tensor, exponent: float) -> Tensor:
    """values^exponent for values from 0 on, 0 at 0, with a derivative that stays finite there.

    Without that a class predicted as well as can be has an infinite gradient for an exponent below 1. There it is
    (values + 1e-5)^exponent - 1e-5^exponent: 0.003 less than said for a root, a third less for an exponent of 0.1.
    """
    if exponent >= 1:
        return values.clamp(min=0).pow(exponent)
    return (values.clamp(min=0) + SMOOTH).pow(exponent) - SMOOTH**exponent
