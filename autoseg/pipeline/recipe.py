"""Which recipe a run is trained with, and for how long: from defaults, files, options, and the run that is there.

Only the length of a run may change later, and only beyond what is trained: then the schedule is recomputed and that
is said. Everything else would silently mix two runs into one and is refused elsewhere. The optimizer follows from the
length that a run begins with: docs/decisions/0010.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoseg import settings
from autoseg.augment import check_augmentation
from autoseg.checkpoint import Progressed, read_progress
from autoseg.losses import check_loss
from autoseg.pipeline.idle import refuse_frozen, refuse_idle
from autoseg.placement import check_placement
from autoseg.planners import words
from autoseg.rates import by_validation_loss, learning_rate, make_schedule, next_leg, refuse_schedule
from autoseg.recipes import RECIPES, NamedRecipe
from autoseg.records import AutosegError
from autoseg.schema import Configuration, Recipe, Request, Run
from autoseg.settings import say_duration

RECIPE_OPTIONS = {"epochs": "--epochs", "budget_seconds": "--budget", "seed": "--seed", "loss": "--loss"}
"""Recipe fields that have an option of their own."""
LENGTH = ("epochs", "budget_seconds")
"""Recipe fields that say how long training lasts."""
CPU_BUDGET_SECONDS = 2 * 3600.0
SHORT_STEPS = 5000
"""Runs of fewer steps begin with `SHORT`."""
SHORT: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.003, "warmup_steps": 20}
UNNORMED_RATE = 0.08
"""The learning rate of `SHORT` is at most this by the root of the width of a network without normalisation."""
OPTIMIZER = (*SHORT, "momentum", "schedule")
"""Recipe fields of which none is touched if one of them is stated."""
TOO_SLOW = 1e-3
"""Share of a recipe's learning rate under which nothing is learnt any more."""
CHOSEN = (OPTIMIZER, ("batch_size",), ("validation_steps",))
"""Groups of recipe fields that a run chooses for itself when it begins, unless one of a group is stated."""
ENOUGH_STEPS = 2000
"""A run by time has at least so many, if need be of smaller batches than planned: docs/decisions/0019."""
SMALLEST_BATCH = 2
GUESSED_SECONDS = {"cpu": 1.0}
"""Of a step that was not timed, by kind of device; on others a tenth."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of train."""

    plan: str = "default"
    run: str = "default"
    epochs: int | None = None
    budget_seconds: float | None = None
    extend_seconds: float | None = None
    seed: int | None = None
    loss: str | None = None
    device: str = "auto"
    pretrained: Path | None = None
    validate_only: bool = False
    recipe: Path | None = None
    """A name of RECIPES, or a TOML file."""
    changes: Mapping[str, Any] | None = None
    neighbours: int = 1
    """How many trainings, this one included, share the memory of this machine."""


def make_recipe(options: TrainOptions, existing: Recipe | None = None) -> Recipe:
    """Defaults, then the named recipe or TOML file, then --set, then the options.

    The length that nothing states is that of the recipe `existing`, if there is one: a run is gone on with by the
    same command, also after it was extended. So are the fields that it has chosen itself. Raises AutosegError for what
    is not possible.
    """
    lengths = {"--epochs": options.epochs, "--budget": options.budget_seconds, "--extend": options.extend_seconds}
    if len(lengths) - list(lengths.values()).count(None) > 1:
        raise AutosegError(f"{', '.join(lengths)} say how long to train; give one of them")
    kept = [*LENGTH, *(name for group in CHOSEN if not states(options, group) for name in group)]
    recipe = Recipe() if existing is None else replace(Recipe(), **{name: getattr(existing, name) for name in kept})
    named, own = read_recipe(options.recipe)
    carried = {} if named is None else {**named.changes}
    if existing is not None:
        # A named recipe states a length too, but nobody edits it: a run that has been made longer keeps its own.
        carried = {name: value for name, value in carried.items() if name not in LENGTH}
    recipe = settings.change(recipe, {**carried, **own}, where=str(options.recipe))
    recipe = settings.change(recipe, options.changes or {}, taken=RECIPE_OPTIONS)
    given = {
        "epochs": options.epochs,
        "budget_seconds": options.budget_seconds,
        "seed": options.seed,
        "loss": options.loss,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.epochs is not None:
        changes["budget_seconds"] = None
    recipe = settings.change(recipe, changes, where="option")
    short = states(options, ("steps_per_epoch",)) and not states(options, ("validation_steps",))
    if existing is None and short and not by_validation_loss(recipe):
        # As many as a usual epoch has for its steps, where they decide nothing: 50 after an epoch of 25 take as long.
        recipe = replace(recipe, validation_steps=min(max(1, recipe.steps_per_epoch // 5), recipe.validation_steps))
    if not recipe.match_steps:  # of the stated length of an epoch: whoever repeats the command gets the same
        recipe = replace(recipe, steps_per_epoch=recipe.steps_per_epoch * (recipe.offline_copies + 1))
    check_loss(recipe.loss)
    check_augmentation(recipe.augmentation)
    refuse_schedule(recipe)
    check_placement(recipe)
    refuse_idle(recipe, {*own, *(options.changes or ())}, pretrained=options.pretrained is not None)
    if recipe.budget_seconds is None:  # how many epochs there are in a time is known once steps are timed
        refuse_frozen(recipe)
    return replace(recipe, loss="".join(recipe.loss.split()), schedule="".join(recipe.schedule.split()))


def refuse_without_effect(options: TrainOptions) -> None:
    """AutosegError for options that say how to train, where nothing is trained."""
    said = {
        "--epochs": options.epochs,
        "--budget": options.budget_seconds,
        "--extend": options.extend_seconds,
        "--seed": options.seed,
        "--loss": options.loss,
        "--pretrained": options.pretrained,
        "--recipe": options.recipe,
        "--set": options.changes or None,
    }
    if idle := [option for option, value in said.items() if value is not None]:
        raise AutosegError(f"--validate-only trains nothing, so it takes no {', '.join(idle)}; leave that out")


def batch_size(recipe: Recipe, configuration: Configuration) -> int:
    """Patches a step: as the recipe says, else as planned."""
    return recipe.batch_size or configuration.batch_size


def say_large_batch(recipe: Recipe, configuration: Configuration) -> None:
    """A line where the recipe has larger batches than were planned for the memory."""
    batch, planned = batch_size(recipe, configuration), configuration.batch_size
    if batch > planned:
        print(
            f"batches of {batch} patches, and {planned} were planned to fill the memory; if it runs out: "
            f"--set batch_size={planned}, or plan for more with --gpu-memory",
            flush=True,
        )


def read_recipe(place: Path | None) -> tuple[NamedRecipe | None, dict[str, Any]]:
    """The named recipe that `place` is or builds on, and field -> value of what a file itself states.

    place: a name of RECIPES, or a TOML file, which may begin with `base = "NAME"`; None: no recipe, which states
    nothing. Raises AutosegError for what is neither, with the names.
    """
    if place is None:
        return None, {}
    if str(place) in RECIPES:
        return RECIPES[str(place)], {}
    if not place.suffix and not place.exists():
        raise AutosegError(f"--recipe {place}: neither a file nor one of {', '.join(RECIPES)}")
    stated = settings.read_toml(place)
    base = stated.pop("base", None)
    if base is not None and base not in RECIPES:
        raise AutosegError(f"{place}: base = {base!r} is none of {', '.join(RECIPES)}")
    return None if base is None else RECIPES[base], stated


def say_other_network(options: TrainOptions, network: str, asked: str, request: Request) -> None:
    """A line where the named recipe of `options` was made for another network than the plan has: how to train that.

    asked: the dataset and the workspace, as they are given on the command line. request: of the plan, which holds for
    another network too, but for what is the network's own.
    """
    named, _ = read_recipe(options.recipe)
    if named is not None and named.network_name != network:
        changes = {k: v for k, v in request.changes.items() if not k.startswith("configurations.")}
        more = words(replace(request, preset=None, network=None, changes=changes))
        own, where = named.network_name, f"-d {asked}{more and ' '}{more} --network '{named.network}'"
        print(
            f"recipe {options.recipe} was made for the network {own}, this plan has {network}; to train that: "
            f"autoseg fit {where} --recipe {options.recipe} --run {own}; for one fold: "
            f"autoseg plan_and_preprocess {where}, then this command with --plan {own} --run {own}",
            flush=True,
        )


def for_new_run(recipe: Recipe, options: TrainOptions, device: str) -> Recipe:
    """The recipe of a run that begins: on a CPU a budget of two hours, said with its reason, unless a length is given.

    Raises AutosegError for --extend, since there is nothing to extend yet.
    """
    if options.extend_seconds is not None:
        raise AutosegError("--extend goes on with a run that is there, and there is none; begin it with --budget 2h")
    budget = usual_budget(options, device)
    if budget is None:
        return recipe
    print(
        f"training for {say_duration(budget)}, because the default of {describe_length(recipe)} takes days "
        f"on a CPU; choose otherwise with --budget 8h or --epochs {recipe.epochs}"
    )
    return replace(recipe, budget_seconds=budget)


def usual_budget(options: TrainOptions, device: str) -> float | None:
    """Seconds that a new run trains for where no length is given; None: by epochs."""
    stated = options.epochs is not None or options.budget_seconds is not None or states(options, LENGTH)
    return None if stated or device != "cpu" else CPU_BUDGET_SECONDS


def states(options: TrainOptions, fields: Collection[str]) -> bool:
    """Whether --set, the named recipe or the TOML file states one of these recipe fields."""
    named, own = read_recipe(options.recipe)
    stated = {*(options.changes or ()), *own, *(named.changes if named else ())}
    return not stated.isdisjoint(fields)


def for_length(
    recipe: Recipe, options: TrainOptions, device: str, seconds_a_step: float | None, *, width: int | None = None
) -> Recipe:
    """The recipe of a run that begins, with the optimizer that its length asks for; said, unless the user states one.

    seconds_a_step: as timed on this machine, None if it was not. width: of a network that does not normalise between
    its layers, see `networks.unnormed_width`. Adam moves every weight by about the rate, weights are drawn with a
    deviation that falls with the root of the width, and nothing holds what follows: the rate falls likewise.
    """
    if states(options, OPTIMIZER):
        return recipe
    steps = recipe.epochs * recipe.steps_per_epoch
    if recipe.budget_seconds is not None:
        steps = min(steps, round(recipe.budget_seconds / (seconds_a_step or GUESSED_SECONDS.get(device, 0.1))))
    if steps >= SHORT_STEPS:
        return recipe
    rate = SHORT["learning_rate"] if width is None else min(SHORT["learning_rate"], UNNORMED_RATE / math.sqrt(width))
    chosen = replace(recipe, **SHORT | {"learning_rate": float(f"{rate:.2g}")})
    print(
        f"about {steps} steps, fewer than {SHORT_STEPS}: {chosen.optimizer} at learning rate {chosen.learning_rate:g}"
        f"{'' if width is None else ' for a network without normalisation'}, "
        f"which learns sooner than {recipe.optimizer} at {recipe.learning_rate:g}; "
        f"choose otherwise with --set optimizer={recipe.optimizer}",
        flush=True,
    )
    return chosen


def for_time(recipe: Recipe, planned: int, least: int, seconds_a_step: float | None) -> Recipe:
    """The recipe of a run that begins, with smaller batches where its budget leaves few steps of the planned ones.

    planned: patches in a batch; least: as many as there must be; seconds_a_step: of a planned batch as timed, None if
    it was not, and then nothing is changed. Said, unless the user states a batch size.
    """
    if recipe.budget_seconds is None or recipe.batch_size is not None or seconds_a_step is None:
        return recipe
    steps = recipe.budget_seconds / seconds_a_step
    batch = max(round(planned * steps / ENOUGH_STEPS), least, SMALLEST_BATCH)
    if batch >= planned:
        return recipe
    print(
        f"about {steps:.0f} steps of {planned} patches, fewer than {ENOUGH_STEPS}: batches of {batch} learn more in "
        f"that time; choose otherwise with --set batch_size={planned}",
        flush=True,
    )
    return replace(recipe, batch_size=batch)


def describe_length(recipe: Recipe) -> str:
    """How long a recipe trains, in words."""
    if recipe.budget_seconds is not None:
        return f"{say_duration(recipe.budget_seconds)} of training"
    return f"{recipe.epochs} epochs of {recipe.steps_per_epoch} steps"


def epochs_done(recipe: Recipe, done: Progressed) -> str:
    """How many epochs are trained, in words; those of a run by time are shorter than those that --epochs counts."""
    if done.rhythm is None:
        return f"{done.epoch} epochs"
    return f"{done.step} steps, as many as {done.step / recipe.steps_per_epoch:.1f} epochs of {recipe.steps_per_epoch},"


def with_length(old: Run, wanted: Recipe, options: TrainOptions, folder: Path) -> Run:
    """The run `old` in `folder` with the length that `wanted` or --extend asks for; `old` itself if that is its own.

    A changed length makes the run unfinished and is announced with the old and the new learning rate. Raises
    AutosegError if that much is trained already, or if the checkpoint to go on from is gone.
    """
    done = read_progress(folder) or Progressed(step=0, epoch=0, epoch_start=0)
    recipe = replace(old.recipe, epochs=wanted.epochs, budget_seconds=wanted.budget_seconds)
    if options.extend_seconds is not None:
        if old.finished is None and not recipe.budget_seconds:
            raise AutosegError(
                f"{folder} is not trained to its end ({describe_length(old.recipe)}) and goes on without --extend; "
                "to end it by time give --budget"
            )
        # What an unfinished run by time still has left is not taken away from it.
        begin = done.seconds if old.finished or not recipe.budget_seconds else recipe.budget_seconds
        recipe = replace(recipe, budget_seconds=float(math.ceil(begin + options.extend_seconds)))
    if recipe == old.recipe:
        return old
    if old.finished is not None and done.step == 0:
        raise AutosegError(f"{folder} has no checkpoint any more to go on from; train a new run with --run NAME")
    now = done.moment(recipe)
    if now.progress >= 1:
        raise AutosegError(
            f"{folder}: {epochs_done(recipe, done)} are trained already, {say_duration(done.seconds)} in all; asked "
            f"for were {describe_length(recipe)}. Ask for more than is there, or for --extend 1h"
        )
    before = learning_rate(old.recipe, done.moment(old.recipe)) if done.rate is None else done.rate
    after = learning_rate(recipe, replace(now, leg=next_leg(recipe, now, done.rate)))
    schedule = f"the schedule goes on at learning rate {after:.2g}"
    if make_schedule(recipe.schedule).ends:
        schedule = f"the schedule is recomputed: learning rate {before:.2g} -> {after:.2g} now, and 0 at the new end"
    elif after < TOO_SLOW * recipe.learning_rate:
        schedule += f"; to begin it anew from these weights: --run NAME --pretrained {folder}"
    print(
        f"{folder}: from {describe_length(old.recipe)} to {describe_length(recipe)}; {done.step} steps are done, "
        f"{say_duration(done.seconds)} in all; {schedule}"
    )
    return replace(old, recipe=recipe, finished=None, ended=None)
