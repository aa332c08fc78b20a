"""How far training is, what follows from that, and how a run by time divides itself into epochs.

Progress is a number from 0 to 1: steps done of all steps, or training seconds of the budget. What the learning rate
makes of it is in `autoseg.rates`.
"""

from collections.abc import Sequence
from statistics import fmean

from autoseg.records import record
from autoseg.schema import Recipe

TIMED_STEPS = 4
"""Steps that are timed before a run by time chooses its epochs; the first is left out (buffers, caches, kernels)."""
EPOCHS_IN_BUDGET = 50
SHORTEST_EPOCH = 5
"""With one validation step, which costs less than a training step, validation stays below a fifth of training."""
VALIDATION_SHARE = 0.07
"""What validation costs beside training at one validation step in five, each a third of a training step."""


@record
class Rhythm:
    """The epochs of a run by time: chosen once for a budget, and kept so that a resumed run has the same."""

    budget_seconds: float
    steps: int
    validation_steps: int


def progress(recipe: Recipe, *, step: int, seconds: float) -> float:
    """From 0 to 1: `step` of all steps, or under a budget `seconds` of training out of its seconds."""
    if recipe.budget_seconds is not None:
        return min(seconds / recipe.budget_seconds, 1.0)
    return min(step / (recipe.epochs * recipe.steps_per_epoch), 1.0)


def choose_rhythm(
    recipe: Recipe, seconds_left: float, seconds_a_step: float, validation_steps: int | None = None
) -> Rhythm:
    """About 50 epochs in `seconds_left`, none shorter than five steps or, which comes first, longer than the recipe's.

    The recipe's 250 steps an epoch would leave a slow machine a handful of epochs, and so a handful of measurements.
    Validation steps are a fifth of the training steps, at least one, at most the recipe's; or those that are given,
    and then epochs are long enough for them.
    """
    if recipe.budget_seconds is None:
        raise ValueError("a run without a budget has the epochs of its recipe")
    wanted = seconds_left / EPOCHS_IN_BUDGET / (seconds_a_step * (1 + VALIDATION_SHARE))
    steps = min(max(round(wanted), SHORTEST_EPOCH, 5 * (validation_steps or 0)), recipe.steps_per_epoch)
    return Rhythm(
        budget_seconds=recipe.budget_seconds,
        steps=steps,
        validation_steps=validation_steps or min(max(1, steps // 5), recipe.validation_steps),
    )


def expected_epochs(recipe: Recipe, seconds_a_step: float | None) -> int:
    """How many epochs a run has; by time about so many where a step takes so long, None: not known."""
    if recipe.budget_seconds is None:
        return recipe.epochs
    if seconds_a_step is None:
        return EPOCHS_IN_BUDGET
    rhythm = choose_rhythm(recipe, recipe.budget_seconds, seconds_a_step)
    return round(recipe.budget_seconds / (rhythm.steps * seconds_a_step * (1 + VALIDATION_SHARE)))


def is_over(recipe: Recipe, *, step: int, seconds: float, recent: Sequence[float], closing: float) -> bool:
    """Whether training ends here: all steps are done, or the next one would end nearer beyond the budget than before.

    recent: seconds of the last steps, empty just after a start; closing: seconds that are still needed after the
    last step (the validation of an unfinished epoch).
    """
    if recipe.budget_seconds is None:
        return step >= recipe.epochs * recipe.steps_per_epoch
    if step == 0:
        return False
    expected = fmean(recent) if recent else seconds / step
    return seconds + closing + expected / 2 > recipe.budget_seconds
