"""Deep supervision: a loss at every output of a network.

A decoder's resolutions are weighed as nnU-Net does (Isensee et al., Nature Methods 2021), unless the network says how.
"""

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
    loss: Callable[[Tensor, Tensor], Tensor],
    logits_list: Sequence[Tensor],
    target_list: Sequence[Tensor],
    weights: Sequence[float] = (),
) -> Tensor:
    """Weighted sum of `loss` over the outputs of a network, highest resolution first.

    A network may give fewer scales than there are targets. weights: of the outputs, as their network states them;
    (): `scale_weights`. Outputs of weight 0 are not computed at all. Raises ValueError for numbers of them that do not
    fit.
    """
    if not 0 < len(logits_list) <= len(target_list):
        raise ValueError(f"{len(logits_list)} scales of logits do not fit {len(target_list)} scales of targets")
    stated = tuple(weights) or scale_weights(len(logits_list))
    if len(stated) != len(logits_list):
        raise ValueError(f"{len(stated)} weights do not fit {len(logits_list)} scales of logits")
    weighted = zip(stated, logits_list, target_list)
    terms = [weight * loss(logits, target) for weight, logits, target in weighted if weight > 0]
    return torch.stack(terms).sum()


def scale_targets(target: Tensor, scales: Sequence[Sequence[int]]) -> list[Tensor]:
    """Target (B, *s) at the resolution of each of a network's outputs, which are `scales` times smaller.

    Each voxel takes the label at its centre, that is nearest-exact interpolation, which for whole factors f is every
    f-th voxel from f // 2.
    """
    return [target[(slice(None), *(slice(f // 2, None, f) for f in factors))] for factors in scales]
