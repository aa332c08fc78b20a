"""Losses of segmentation by name, sums of them, and deep supervision over decoder scales.

`make_loss("dice+focal(gamma=2)", ...)` reads what a recipe says: terms joined by +, each with a factor in front if
need be (`0.5*ce+tversky(alpha=0.3,beta=0.7)`). A term is a key of LOSSES or a loss of your own, `package.module:Name`:
a function that is called as `dice_ce` is, with options of its own as keywords with defaults, which are set the same
way. For one called `weights` the weights of classes by median frequency are filled in, unless they are given. Naming a
module imports it: a recipe that does so is as trustworthy as the code beside it.

`dice_ce` is the default, and the fastest and smallest: its gradient is written down. The others leave theirs to
automatic differentiation. Soft Dice runs from -1 (perfect), boundary loss has no fixed end, all others run from 0
(perfect) up. A new loss: a function over `basis.prepare` in the module of its family, an entry here, values worked by
hand in the tests.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from autoseg.labels import Labels
from autoseg.losses.basis import WHOLE, Given, Part
from autoseg.losses.closed_form import cross_entropy, dice, dice_ce
from autoseg.losses.distance import boundary, hausdorff
from autoseg.losses.overlap import dice_squared, focal_tversky, tversky
from autoseg.losses.scales import deep_supervision, scale_targets, scale_weights
from autoseg.losses.skeleton import cldice
from autoseg.losses.unified import unified_focal
from autoseg.losses.voxelwise import bce, categorical_focal, focal, topk_ce, weighted_ce
from autoseg.own import own
from autoseg.records import AutosegError, nearest
from autoseg.settings import parse_sum

__all__ = [
    "LOSSES",
    "WHOLE",
    "Loss",
    "Part",
    "check_loss",
    "cross_entropy",
    "deep_supervision",
    "describe_losses",
    "dice",
    "dice_ce",
    "make_loss",
    "scale_targets",
    "scale_weights",
]

Loss = Callable[..., Tensor]
"""Logits (B, K, *s) and target (B, *s) -> scalar; by keyword what `Given` says, and options."""

LOSSES: dict[str, Loss] = {
    "dice_ce": dice_ce,
    "dice": dice,
    "dice_squared": dice_squared,
    "ce": cross_entropy,
    "bce": bce,
    "weighted_ce": weighted_ce,
    "topk_ce": topk_ce,
    "focal": focal,
    "categorical_focal": categorical_focal,
    "unified_focal": unified_focal,
    "tversky": tversky,
    "focal_tversky": focal_tversky,
    "boundary": boundary,
    "hausdorff": hausdorff,
    "cldice": cldice,
}

WEIGHTS = "weights"
"""The option that is filled in from the data."""


def make_loss(
    text: str,
    *,
    labels: Labels,
    batch_dice: bool,
    weights: Sequence[float] | None = None,
    dimension: int = 3,
) -> Loss:
    """The loss that `text` describes, a function of logits and target and, by keyword, `annotated` and `part`.

    weights: of the classes, background first, for losses that take them from the data; None: they are not known.
    dimension: of the patches, 2 or 3. The loss is tried on a few voxels. Raises AutosegError for what `check_loss`
    refuses, for options out of their range, for weights that nobody knows, and for a loss that gives no single number.
    """
    terms = []
    for factor, name, function, options in _terms(text):
        if WEIGHTS in _options(function) and options.get(WEIGHTS) is None:
            if weights is None:
                raise AutosegError(
                    f"loss {text!r}: {name} takes its weights from the frequencies of the classes, which this "
                    "fingerprint, of an earlier version, does not have: run autoseg plan_and_preprocess again, or give "
                    f"them, background first: {name}(weights=[1, 2, 5])"
                )
            options = options | {WEIGHTS: tuple(weights)}
        loss = partial(function, batch_dice=batch_dice, labels=labels, **options)
        _try(f"loss {text!r}: {name}", loss, labels, dimension)
        terms.append((factor, loss))
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]

    def weighted_sum(logits: Tensor, target: Tensor, **given: Any) -> Tensor:
        return torch.stack([factor * loss(logits, target, **given) for factor, loss in terms]).sum()

    return weighted_sum


def takes_weights(text: str) -> bool:
    """Whether a term of the loss takes weights of the classes from the data. Raises AutosegError as `check_loss`."""
    return any(
        WEIGHTS in _options(function) and options.get(WEIGHTS) is None for _, _, function, options in _terms(text)
    )


def check_loss(text: str) -> None:
    """AutosegError for text of another form, a loss that is not known or cannot be called so, and wrong options.

    What rests on the classes of the dataset is left to `make_loss`: how many weights there must be, and one's own.
    """
    for _, name, function, options in _terms(text):
        if name not in LOSSES:
            continue
        if WEIGHTS in _options(function):
            options = options | {WEIGHTS: options.get(WEIGHTS) or (1.0, 1.0)}
        classes = max(len(options.get(WEIGHTS, (1, 1))) - 1, 1)
        labels = Labels.from_dataset({"background": 0} | {f"class {value}": value for value in range(1, classes + 1)})
        _try(f"loss {text!r}: {name}", partial(function, batch_dice=False, labels=labels, **options), labels, 3)


def describe_losses() -> list[str]:
    """One line a loss: its name, its options with their defaults, and what it is."""
    calls = {name: f"{name}({said})" if (said := _said(loss)) else name for name, loss in LOSSES.items()}
    width = max(map(len, calls.values()))
    return [f"{call:{width}}  {(LOSSES[name].__doc__ or '').splitlines()[0]}" for name, call in calls.items()]


def _terms(text: str) -> list[tuple[float, str, Loss, dict[str, Any]]]:
    """Factor, name, function and options of each term."""
    found = []
    try:
        terms = parse_sum(text)
    except AutosegError as error:
        raise AutosegError(f"loss {error}") from None
    for factor, name, options in terms:
        function = LOSSES[name] if name in LOSSES else _own(name)
        known = _options(function)
        for key, value in options.items():
            if key not in known:
                raise AutosegError(
                    f"loss {text!r}: {name} has no option {key!r}; "
                    + (f"it has {_said(function)}" if known else "it has none")
                )
            wrong = f"loss {text!r}: {name}: {key} must be"
            if isinstance(known[key], int | float) and not _is_number(value):
                raise AutosegError(f"{wrong} a number, not {value!r}")
            if name in LOSSES and isinstance(known[key], int) and value != int(value):
                raise AutosegError(f"{wrong} a whole number, not {value!r}")
            if key == WEIGHTS and not (isinstance(value, list) and value and all(map(_is_number, value))):
                raise AutosegError(f"{wrong} a number for each class, background first, as [1, 2, 5], not {value!r}")
        found.append((factor, name, function, options))
    return found


def _is_number(value: object) -> bool:
    """Whether it is a finite number: in Python True is one, and a loss can do nothing with nan."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _options(function: Loss) -> dict[str, Any]:
    """Option -> default of a loss: its keywords beside those that every loss is called with."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [p for p in parameters if p.kind in kinds and p.default is not p.empty]
    return {p.name: p.default for p in keywords if p.name not in Given.__annotations__}


def _said(function: Loss) -> str:
    """Options with their defaults, in words."""
    said = {
        name: f"{value:.3g}" if isinstance(value, float) else "from the data" if value is None else repr(value)
        for name, value in _options(function).items()
    }
    return ", ".join(f"{name}={value}" for name, value in said.items())


def _own(name: str) -> Loss:
    if ":" not in name:
        known = ", ".join(LOSSES)
        raise AutosegError(
            f"unknown loss {name!r}{nearest(name, LOSSES)}; choose one of {known}, or name your own as "
            "package.module:Name"
        )
    found = own(name, "loss")
    try:
        inspect.signature(found).bind(None, None, **dict.fromkeys(Given.__annotations__))
    except TypeError as error:
        raise AutosegError(
            f"the loss {name} must take {', '.join(Given.__annotations__)} by keyword, as autoseg.losses.dice_ce does, "
            f"and have a default for each option of its own ({error})"
        ) from None

    @wraps(found)
    def guarded(logits: Tensor, target: Tensor, **given: Any) -> Tensor:
        try:
            value: Tensor = found(logits, target, **given)
        except (AutosegError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise AutosegError(
                f"the loss {name} failed on logits of shape {tuple(logits.shape)} with a target of shape "
                f"{tuple(target.shape)}: {type(error).__name__}: {error}"
            ) from error
        return value

    return guarded


def _try(what: str, loss: Loss, labels: Labels, dimension: int) -> None:
    """AutosegError unless the loss of a few voxels is a single finite number that has a finite gradient."""
    shape = (2, 3, 5)[:dimension]
    logits = torch.linspace(-1, 1, 2 * labels.heads * math.prod(shape)).view(2, labels.heads, *shape).requires_grad_()
    try:
        with torch.enable_grad():
            value = loss(logits, torch.ones(2, *shape, dtype=torch.int64), annotated=None, part=WHOLE)
    except ValueError as error:
        raise AutosegError(f"{what}: {error}") from None
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise AutosegError(f"{what} must give a tensor of a single number that depends on the logits")
    (gradient,) = torch.autograd.grad(value, logits)
    if not (value.isfinite() and gradient.isfinite().all()):
        raise AutosegError(f"{what} gives {value.item():g} for logits from -1 to 1, or a gradient that is not finite")
