"""Deep supervision: a loss at every resolution of a decoder, as nnU-Net weighs them (Isensee et al., 2021)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


def scale_targets(target: Tensor, scales: Sequence[Sequence[int]]) -> list[Tensor]:
    """Target (B, *s) at the resolution of each of a network's outputs, which are `scales` times smaller.

    Each voxel takes the label at its centre, that is nearest-exact interpolation, which for whole factors f is every
    f-th voxel from f // 2.
    """
    return [target[(slice(None), *(slice(f // 2, None, f) for f in factors))] for factors in scales]
