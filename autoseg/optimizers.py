"""The optimizers that a recipe may name. What is not said here has torch's default.

SGD with Nesterov momentum is nnU-Net's; Adam after Kingma and Ba (ICLR 2015), AdamW with decoupled weight decay after
Loshchilov and Hutter (ICLR 2019), RMSprop after Tieleman and Hinton (2012).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from autoseg.schema import Recipe

Parameters = Iterable[Any]
"""What torch's optimizers take: tensors, or groups of them."""


def sgd(parameters: Parameters, recipe: Recipe) -> torch.optim.Optimizer:
    """With Nesterov momentum; the weight decay is added to the gradient."""
    return torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def adam(parameters: Parameters, recipe: Recipe) -> torch.optim.Optimizer:
    """Betas 0.9 and 0.999, epsilon 1e-8; the weight decay is added to the gradient."""
    return torch.optim.Adam(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def adamw(parameters: Parameters, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam whose weight decay is apart from the gradient."""
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def rmsprop(parameters: Parameters, recipe: Recipe) -> torch.optim.Optimizer:
    """Smoothing 0.9 as its authors had it (torch: 0.99), no momentum; the weight decay is added to the gradient."""
    return torch.optim.RMSprop(parameters, lr=recipe.learning_rate, alpha=0.9, weight_decay=recipe.weight_decay)


OPTIMIZERS: dict[str, Callable[[Parameters, Recipe], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "rmsprop": rmsprop,
}
