"""The weights that a run keeps where these are not those of its last step: a second network beside the one that learns.

`best` has the weights of the epoch whose validation loss was lowest, `ema` an exponential moving average over all steps
(Polyak averaging). Either is part of every checkpoint, so it is there whole, belongs to the very step of the
checkpoint, and goes on bit for bit.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from autoseg.checkpoint import KEPT, checkpoints, load_weights
from autoseg.schema import Recipe


def second_network(network: nn.Module, recipe: Recipe, folder: Path) -> nn.Module | None:
    """The network of the kept weights: those of the newest checkpoint in `folder`, a copy of `network` without one.

    None where the recipe keeps the last weights. Raises AutosegError for a checkpoint whose file is missing or broken.
    """
    if recipe.weights == "last":
        return None
    kept = copy.deepcopy(network).requires_grad_(False)
    if found := checkpoints(folder):
        load_weights(kept, found[-1] / KEPT)
    return kept


@torch.no_grad()
def take_over(kept: nn.Module, network: nn.Module) -> None:
    """Give `kept` the weights that `network` has now."""
    kept.load_state_dict(network.state_dict())


@torch.no_grad()
def average(kept: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """Move the average `kept` towards `network` after step number `step`, and the statistics of norms likewise.

    The average is over about 1 / (1 - decay) steps, in the beginning over a ninth of those done: the first weights,
    which know nothing, are soon forgotten.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    for mean, present in zip(kept.parameters(), network.parameters(), strict=True):
        mean.lerp_(present, share)
    for counted, buffer in zip(kept.buffers(), network.buffers(), strict=True):
        if counted.is_floating_point():
            counted.lerp_(buffer, share)
        else:
            counted.copy_(buffer)
