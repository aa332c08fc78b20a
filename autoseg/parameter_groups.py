"""The encoder apart from the rest while training: its own learning rate, and epochs in which it stays as it is.

Which parameters are the encoder's a network says itself (`Network.encoder_prefixes`). An optimizer has one group of
parameters where one rate serves all, else always two, so that its saved state fits whenever a run goes on. What is
frozen has no gradient: no optimizer moves it, nor decays it, and the running statistics of its norms stay too.
"""

from typing import Any

import torch
from torch import nn

from autoseg.records import AutosegError
from autoseg.schema import Recipe

RATE_FACTOR = "rate_factor"
"""Of a group of parameters: what the learning rate is multiplied with; 1 where it is missing."""


def groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """What an optimizer is made of: all parameters, or those of the rest and of the encoder, which has another rate.

    Raises AutosegError if the recipe sets the encoder apart and the network has none.
    """
    encoder = _of_encoder(network)
    if not encoder and (recipe.freeze_encoder_epochs or recipe.encoder_rate != 1):
        raise AutosegError(
            f"the network {type(network).__name__} has no encoder that could be frozen or have a rate of its own; "
            "leave freeze_encoder_epochs and encoder_rate as they are"
        )
    if recipe.encoder_rate == 1:
        return [{"params": list(network.parameters())}]
    rest = [parameter for name, parameter in network.named_parameters() if name not in encoder]
    rate = recipe.encoder_rate
    return [
        {"params": rest},
        {"params": list(encoder.values()), "lr": recipe.learning_rate * rate, RATE_FACTOR: rate},
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate where that of the network is `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


def hold_encoder(network: nn.Module, recipe: Recipe, epoch: int) -> None:
    """Freeze the encoder in the first `freeze_encoder_epochs` epochs, and let it learn from then on.

    To be called before each step, since validation puts norms back to training.
    """
    if not recipe.freeze_encoder_epochs:
        return
    learns = epoch >= recipe.freeze_encoder_epochs
    for parameter in _of_encoder(network).values():
        parameter.requires_grad_(learns)
    for name, part in network.named_modules():
        if f"{name}.".startswith(_prefixes(network)) and getattr(part, "running_mean", None) is not None:
            part.train(learns)


def _prefixes(network: nn.Module) -> tuple[str, ...]:
    prefixes: tuple[str, ...] = getattr(network, "encoder_prefixes", ())
    return prefixes


def _of_encoder(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in network.named_parameters() if name.startswith(_prefixes(network))}
