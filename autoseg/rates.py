"""The learning rate, and when to stop: pure functions of where a run stands, so that a resumed run needs nothing else.

A schedule that has to be down at the end follows progress (`autoseg.schedule`), so that the decay is complete when the
steps or the time are over, however fast the machine. One that counts epochs counts those that are complete; a run by
time has about 50 of them, whatever the recipe's number.

A longer or shorter run is a new `Leg` of the same one. `poly` and `cosine` are recomputed for the new end, so their
rate jumps; `wsd` goes on from the rate that there was; the others know of no end and go on as if nothing had happened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Protocol

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from autoseg.records import AutosegError, problems, record
from autoseg.schema import Recipe
from autoseg.settings import parse_call

Factor = Annotated[float, Field(gt=0, lt=1)]


@record
class Leg:
    """The part of a run on the way to its present end: all of it, or what came after its length was last changed."""

    epochs: int
    budget_seconds: float | None
    """The length, as in the recipe."""
    epoch: int = 0
    """Epochs that were complete where it began."""
    progress: float = 0.0
    """There, on the way to the present end."""
    share: float = 1.0
    """Of the recipe's learning rate that the last step before took, warm-up apart."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where the next step of a run stands: all that its learning rate may depend on."""

    step: int = 0
    epoch: int = 0
    """Epochs that are complete."""
    progress: float = 0.0
    losses: Sequence[float | None] = ()
    """Validation loss of each complete epoch; None where it was not finite."""
    leg: Leg | None = None


class Schedule(Protocol):
    """How the learning rate of a recipe changes. The fields are the options that `Recipe.schedule` takes."""

    ends: ClassVar[bool]
    """Whether the rate follows progress and is 0 at the end."""

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """The learning rate, warm-up apart."""
        ...


@record
class Constant:
    """The recipe's rate throughout."""

    ends: ClassVar[bool] = False

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate


@record
class Poly:
    """(1 - progress) ** `poly_exponent`: the decay of DeepLab (Chen et al., TPAMI 2018) and nnU-Net."""

    ends: ClassVar[bool] = True

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate * (1 - now.progress) ** recipe.poly_exponent


@record
class Cosine:
    """Half a cosine (Loshchilov and Hutter, ICLR 2017, without its restarts)."""

    ends: ClassVar[bool] = True

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate * (1 + math.cos(math.pi * now.progress)) / 2


@record
class Step:
    """Times `factor` after every `period` epochs."""

    factor: Factor = 0.9
    period: PositiveInt = 3
    ends: ClassVar[bool] = False

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate * self.factor ** (now.epoch // self.period)


@record
class Subtract:
    """Less by `amount` after every epoch, down to `floor`."""

    amount: NonNegativeFloat = 1e-6
    floor: PositiveFloat = 1e-6
    ends: ClassVar[bool] = False

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return max(recipe.learning_rate - self.amount * now.epoch, min(self.floor, recipe.learning_rate))


@record
class InverseTime:
    """Divided by 1 + `decay` times the steps done: what the argument `decay` of the optimizers of Keras did."""

    decay: NonNegativeFloat = 1e-6
    ends: ClassVar[bool] = False

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate / (1 + self.decay * now.step)


@record
class Plateau:
    """Times `factor` whenever `patience` epochs have passed without a new lowest validation loss."""

    factor: Factor = 0.1
    patience: PositiveInt = 10
    ends: ClassVar[bool] = False

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        return recipe.learning_rate * self.factor ** reductions(now.losses, self.patience)


@record
class WarmupStableDecay:
    """The recipe's rate, and over the last `decay` of the run down to 0 in a line (Hu et al., COLM 2024: MiniCPM).

    A run that is given another length goes on from the rate that it had: it rises again where it was on its way down,
    as steeply as it falls, and is down at the new end. The warm-up is `warmup_steps`, as in all schedules.
    """

    decay: Factor = 0.2
    ends: ClassVar[bool] = True

    def rate(self, recipe: Recipe, now: Moment) -> float:
        """See `Schedule`."""
        begin, share = (0.0, 1.0) if now.leg is None else (now.leg.progress, now.leg.share)
        rising = share + (now.progress - begin) / self.decay
        # The line to the end starts no lower than the rate is where the leg begins.
        width = min(self.decay, (1 - begin) / share) if share > 0 else self.decay
        return recipe.learning_rate * min(1.0, rising, (1 - now.progress) / width)


SCHEDULES: dict[str, type[Schedule]] = {
    "poly": Poly,
    "step": Step,
    "subtract": Subtract,
    "inverse_time": InverseTime,
    "cosine": Cosine,
    "plateau": Plateau,
    "constant": Constant,
    "wsd": WarmupStableDecay,
}


@lru_cache
def make_schedule(text: str) -> Schedule:
    """The schedule that `Recipe.schedule` names, `name` or `name(option=value, ...)`. AutosegError if there is none."""
    name, options = parse_call(text)
    if name not in SCHEDULES:
        raise AutosegError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    try:
        return TypeAdapter(SCHEDULES[name]).validate_python(options)
    except ValidationError as error:
        known = _options(SCHEDULES[name]) or "none"
        raise AutosegError(f"schedule {text!r} is not possible:\n{problems(error)}\nits options: {known}") from None


def describe_schedules() -> list[str]:
    """One line a schedule: its name, its options with their defaults, and what it is."""
    calls = {name: f"{name}({said})" if (said := _options(kind)) else name for name, kind in SCHEDULES.items()}
    width = max(map(len, calls.values()))
    return [f"{call:{width}}  {(SCHEDULES[name].__doc__ or '').splitlines()[0]}" for name, call in calls.items()]


def _options(kind: type[Schedule]) -> str:
    return ", ".join(f"{key}={value}" for key, value in vars(kind()).items())


def learning_rate(recipe: Recipe, now: Moment) -> float:
    """Learning rate of the next step: the schedule's, during the first `warmup_steps` steps a growing share of it."""
    return make_schedule(recipe.schedule).rate(recipe, now) * warmup(recipe, now.step)


def warmup(recipe: Recipe, step: int) -> float:
    """Share of the schedule's rate that a step takes: grows in equal parts, then 1."""
    return min(1.0, (step + 1) / (recipe.warmup_steps + 1))


def lowest(losses: Sequence[float | None]) -> int | None:
    """The epoch of the lowest validation loss, the first of equals; None if none is known."""
    known = [(loss, epoch) for epoch, loss in enumerate(losses) if loss is not None]
    return min(known)[1] if known else None


def reductions(losses: Sequence[float | None], patience: int) -> int:
    """How often `patience` epochs in a row had no new lowest validation loss; each time the count begins anew."""
    best, waited, count = math.inf, 0, 0
    for loss in losses:
        if loss is not None and loss < best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited == patience:
            waited, count = 0, count + 1
    return count


def reduced(recipe: Recipe, before: Moment, after: Moment) -> str | None:
    """What to say where a plateau has lowered the rate between two moments; None if none has."""
    schedule = make_schedule(recipe.schedule)
    if not isinstance(schedule, Plateau):
        return None
    old, new = schedule.rate(recipe, before), schedule.rate(recipe, after)
    if new == old:
        return None
    return f"no lower validation loss in {schedule.patience} epochs: learning rate {old:.3g} -> {new:.3g}"


def early_stop(recipe: Recipe, now: Moment) -> str | None:
    """Why a run ends before its length: `stop_patience` epochs without a new lowest validation loss; else None.

    A run that is made longer has that many epochs anew.
    """
    if recipe.stop_patience == 0:
        return None
    best, begin = lowest(now.losses), 0 if now.leg is None else now.leg.epoch
    since = begin if best is None else max(begin, best + 1)
    if len(now.losses) - since < recipe.stop_patience:
        return None
    said = "it was never finite" if best is None else f"the lowest was {now.losses[best]:.4g} in epoch {best}"
    return f"no lower validation loss in {recipe.stop_patience} epochs, {said}"


def by_validation_loss(recipe: Recipe) -> tuple[str, ...]:
    """What of a recipe goes by the validation losses, which then have to be of the same patches in every epoch."""
    going = {
        "schedule=plateau": isinstance(make_schedule(recipe.schedule), Plateau),
        "stop_patience": recipe.stop_patience > 0,
        "weights=best": recipe.weights == "best",
    }
    return tuple(name for name, goes in going.items() if goes)


def refuse_schedule(recipe: Recipe) -> None:
    """AutosegError for a schedule that does not exist, that would not come into play before the early stop, or that
    has nothing to go by."""
    schedule = make_schedule(recipe.schedule)
    if recipe.validation_steps == 0 and (going := by_validation_loss(recipe)):
        raise AutosegError(
            f"validation_steps=0 leaves no validation loss for {' and '.join(going)} to go by; give at least 1"
        )
    if isinstance(schedule, Plateau) and 0 < recipe.stop_patience <= schedule.patience:
        raise AutosegError(
            f"stop_patience={recipe.stop_patience} ends training before schedule plateau(patience="
            f"{schedule.patience}) has lowered the rate once; make stop_patience larger, or the schedule's smaller"
        )


def next_leg(recipe: Recipe, now: Moment, rate: float | None) -> Leg:
    """The leg that a run is on when it goes on: the one it was on, unless its length has changed.

    rate: learning rate of the last step, None if there was none.
    """
    leg = Leg(epochs=recipe.epochs, budget_seconds=recipe.budget_seconds)
    if now.leg is None or rate is None:
        return leg
    if (now.leg.epochs, now.leg.budget_seconds) == (leg.epochs, leg.budget_seconds):
        return now.leg
    full = recipe.learning_rate * warmup(recipe, now.step - 1)
    return Leg(
        epochs=leg.epochs,
        budget_seconds=leg.budget_seconds,
        epoch=now.epoch,
        progress=now.progress,
        share=rate / full if full else 1.0,
    )
