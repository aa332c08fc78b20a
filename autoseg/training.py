"""The training loop: parts come in finished, state is in plain sight, every step can be repeated.

The recipe's defaults are nnU-Net's (Isensee et al., Nature Methods 2021): SGD with Nesterov momentum, a polynomial
decay stepped once an epoch, gradients clipped by norm, pseudo-Dice on random validation patches after each epoch.
Under a budget the decay follows the time instead, at every step. Other optimizers, schedules and weights to keep are in
`autoseg.optimizers`, `autoseg.rates` and `autoseg.kept`. Requests to save or to end (`autoseg.signals`) are answered
between two steps or two validation batches; what is saved there goes on as if nothing had happened.
"""

import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import nn

from autoseg.bad_steps import record_bad_step, refuse_many
from autoseg.checkpoint import Progressed, load_checkpoint, save_checkpoint, save_weights
from autoseg.computing import apply, scaler
from autoseg.devices import release
from autoseg.history import Epoch, append_metrics, forget_metrics_from, in_words, read_metrics, rolling
from autoseg.kept import average, second_network, take_over
from autoseg.parameter_groups import hold_encoder, set_rate
from autoseg.progress import Progress
from autoseg.rates import by_validation_loss, early_stop, learning_rate, lowest, next_leg, reduced
from autoseg.sampling import Batch, Stream, generator
from autoseg.schedule import TIMED_STEPS, choose_rhythm, is_over, progress
from autoseg.schema import Recipe
from autoseg.settings import say_duration
from autoseg.signals import Requests, Stopped
from autoseg.step import NoMemory, Parts, batches, make_optimizer, more_pieces, training_step, validate
from autoseg.watchdog import count_shown, watch

WEIGHTS = "weights.safetensors"
RECENT_STEPS = 8
"""Steps whose durations tell how long the next one takes."""


def train(
    parts: Parts,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
    requests: Requests | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progressed:
    """Train one fold to the end of its recipe, going on from its newest checkpoint if there is one.

    Writes metrics.jsonl, checkpoints and at the end weights.safetensors into `parts.folder`; `on_epoch` receives all
    metric lines after each epoch. `requests` are answered as they come in; `clock` gives seconds. Where several
    processes train together all call this; one of them writes, and its clock and all their requests count. Raises
    AutosegError when losses stay non-finite or a patch cannot be read, Stopped when the end was asked for.
    """
    recipe, folder, device, team = parts.recipe, parts.folder, parts.device, parts.team
    asked = requests or Requests()
    if team.leads:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".checkpoint_*.tmp"):
            shutil.rmtree(left)
    network = apply(parts.network, parts.tuning, device).train()
    optimizer = make_optimizer(network, recipe)
    loss_scaler = scaler(parts.tuning, device)
    state = load_checkpoint(folder, network, optimizer) or Progressed(step=0, epoch=0, epoch_start=0)
    if state.loss_scale:
        loss_scaler.load_state_dict(state.loss_scale)
    gathered = team.share(network)
    kept = second_network(network, recipe, folder)
    state = replace(state, leg=next_leg(recipe, state.moment(recipe), state.rate))
    if team.leads:
        forget_metrics_from(folder, state.epoch)
    bad: list[Batch] = []
    recent: deque[float] = deque(maxlen=RECENT_STEPS)
    started, saved = team.lead(clock()) - state.seconds, state.seconds
    before, shown = state.shown, torch.zeros(2, parts.labels.count, dtype=torch.int64, device=device)
    validating = 0.0
    """Seconds of the last pseudo-validation, which the budget must still hold if it ends within an epoch."""

    def elapsed() -> float:
        return team.lead(clock()) - started

    def counted() -> Progressed:
        return replace(state, shown=before.plus(team.total(shown)))

    def save() -> None:
        whole = replace(counted(), loss_scale=loss_scaler.state_dict())
        if team.leads:
            save_checkpoint(folder, network, optimizer, whole, kept)

    def heed() -> None:
        wanted, stop = team.largest(asked.save, asked.stop or 0)
        if wanted or stop:
            asked.save = False
            save()
            bar.say(f"checkpoint of step {state.step} saved")
        if stop:
            team.wait()  # nobody leaves before all is saved
            raise Stopped(signal.Signals(stop))

    with _progress_bar(recipe, state, quiet=not team.leads) as bar:
        if _epoch_is_full(recipe, state):  # it was stopped in its pseudo-validation
            state = _end_epoch(parts, kept, counted(), on_epoch, heed, bar)
        mark = elapsed()
        for batch in batches(parts.training, _steps(recipe, state.step), recipe.loader_threads, device):
            heed()
            now = elapsed()
            closing = validating if state.step > state.epoch_start else 0.0
            if is_over(recipe, step=state.step, seconds=now, recent=recent, closing=closing):
                break
            if why := early_stop(recipe, state.moment(recipe)):
                bar.say(f"{why}: training ends here")
                break
            rate = learning_rate(recipe, state.moment(recipe, now))
            set_rate(optimizer, rate)
            hold_encoder(network, recipe, state.epoch)
            loss, parts = _step(parts, optimizer, loss_scaler, batch, gathered, bar)
            team.agree(network)
            shown += count_shown(batch.labels, parts.labels)
            if loss is None:
                bad.append(batch)
                if team.leads:
                    record_bad_step(folder, batch)
                refuse_many(bad, recipe.max_bad_steps, folder)
            else:
                bad = []
            state = replace(
                state,
                step=batch.step + 1,
                skipped_steps=state.skipped_steps + (loss is None),
                epoch_losses=state.epoch_losses if loss is None else (*state.epoch_losses, loss),
                seconds=elapsed(),
                rate=rate,
            )
            if kept is not None and recipe.weights == "ema":
                average(kept, network, batch.step, recipe.ema_decay)
            recent.append(state.seconds - mark)
            if len(recent) == TIMED_STEPS and _lacks_rhythm(recipe, state):
                state = _with_rhythm(recipe, state, recent, bar)
            _show(bar, recipe, state, loss)
            if _epoch_is_full(recipe, state):
                state = _end_epoch(parts, kept, counted(), on_epoch, heed, bar)
                validating = elapsed() - state.seconds
                state = replace(state, seconds=elapsed())
            if state.seconds - saved > recipe.checkpoint_minutes * 60:
                save()
                saved = state.seconds
            mark = elapsed()
        if state.step > state.epoch_start:  # the budget ended within an epoch
            state = _end_epoch(parts, kept, counted(), on_epoch, heed, bar)
            state = replace(state, seconds=elapsed())
        if recipe.weights == "best" and (best := lowest(state.validation_losses)) is not None:
            bar.say(f"kept: the weights of epoch {best}, whose validation loss was the lowest")
    save()
    state = counted()
    if team.leads:
        save_weights(network if kept is None else kept, folder / WEIGHTS)
    return state


def _step(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    loss_scaler: torch.amp.GradScaler,
    batch: Batch,
    gathered: Callable[[], None],
    bar: Progress,
) -> tuple[float | None, Parts]:
    """Loss of a training step, see `training_step`, and the parts with as many pieces as it found memory for."""
    while True:
        # Dropout draws from torch's global generator: seeded anew, a step that is gone on with is the same one.
        seed = int(generator(parts.recipe.seed, Stream.DROPOUT, batch.step).integers(2**62))
        torch.manual_seed(seed + parts.team.rank)
        try:
            return training_step(parts, optimizer, loss_scaler, batch, gathered), parts
        except NoMemory as error:
            pieces = more_pieces(parts)
            if pieces is None:
                raise
            bar.say(
                f"{parts.device} has no memory for {math.ceil(len(batch.image) / parts.pieces)} patches at once "
                f"({str(error).splitlines()[0]}): from now on a batch goes through the network in {pieces} pieces, "
                "the same step in more time; a plan for less --gpu-memory would not need it"
            )
            parts = replace(parts, pieces=pieces)
        # Out here no traceback holds what the attempt had computed.
        optimizer.zero_grad(set_to_none=True)
        release(parts.device)


def _steps(recipe: Recipe, first: int) -> Iterable[int]:
    if recipe.budget_seconds is not None:
        return count(first)
    return range(first, recipe.epochs * recipe.steps_per_epoch)


def _lacks_rhythm(recipe: Recipe, state: Progressed) -> bool:
    chosen = None if state.rhythm is None else state.rhythm.budget_seconds
    return recipe.budget_seconds not in (None, chosen)


def _epoch_lengths(recipe: Recipe, state: Progressed) -> tuple[int, int]:
    """Steps of training and of validation in the epoch under way."""
    steps, validation_steps = recipe.steps_per_epoch, recipe.validation_steps
    if recipe.budget_seconds is not None and state.rhythm is not None:
        steps, validation_steps = state.rhythm.steps, state.rhythm.validation_steps
    elif recipe.budget_seconds is not None:
        # A budget too short to be timed has no room for the recipe's validation either.
        validation_steps = min(1, validation_steps)
    return steps, state.compared_steps or validation_steps


def _epoch_is_full(recipe: Recipe, state: Progressed) -> bool:
    return state.step - state.epoch_start >= _epoch_lengths(recipe, state)[0]


def _with_rhythm(recipe: Recipe, state: Progressed, timed: Iterable[float], bar: Progress) -> Progressed:
    assert recipe.budget_seconds is not None
    step = median([*timed][1:])
    rhythm = choose_rhythm(recipe, recipe.budget_seconds - state.seconds, step, state.compared_steps)
    bar.say(
        f"a step takes {step:.2g} s: epochs of {rhythm.steps} steps and {rhythm.validation_steps} validation steps; "
        f"{recipe.epochs} epochs of {recipe.steps_per_epoch} steps would take "
        f"{say_duration(recipe.epochs * recipe.steps_per_epoch * step)}"
    )
    return replace(state, rhythm=rhythm)


def _progress_bar(recipe: Recipe, state: Progressed, quiet: bool) -> Progress:
    if recipe.budget_seconds is not None:
        return Progress("train", round(recipe.budget_seconds), unit="s", initial=int(state.seconds), quiet=quiet)
    steps = recipe.epochs * recipe.steps_per_epoch
    return Progress("train", steps, unit="step", initial=state.step, quiet=quiet)


def _show(bar: Progress, recipe: Recipe, state: Progressed, loss: float | None) -> None:
    position = state.step if recipe.budget_seconds is None else min(int(state.seconds), bar.total)
    said = "not finite" if loss is None else f"{loss:.3f}"
    dice = "?" if state.smooth_pseudo_dice is None else f"{state.smooth_pseudo_dice:.3f}"
    steps = "" if recipe.budget_seconds is None else f"step {state.step}, "
    bar.advance(position - bar.done, note=f"{steps}epoch {state.epoch}, loss {said}, Dice {dice}")


def _end_epoch(
    parts: Parts,
    kept: nn.Module | None,
    state: Progressed,
    on_epoch: Callable[[list[dict[str, Any]]], None],
    between: Callable[[], None],
    bar: Progress,
) -> Progressed:
    recipe = parts.recipe
    judged = parts if kept is None or recipe.weights == "best" else replace(parts, network=kept)
    validation_steps = _epoch_lengths(recipe, state)[1]
    validation_loss, dice = validate(judged, state.epoch, validation_steps, between)
    losses = (*state.validation_losses, validation_loss)
    if kept is not None and recipe.weights == "best" and lowest(losses) in (None, len(losses) - 1):
        take_over(kept, parts.network)
    known = [value for value in dice.values() if value is not None]
    mean = sum(known) / len(known) if known else None
    smooth = state.smooth_pseudo_dice
    if mean is not None:
        smooth = mean if smooth is None else 0.9 * smooth + 0.1 * mean
    line = Epoch(
        epoch=state.epoch,
        step=state.step,
        progress=round(progress(recipe, step=state.step, seconds=state.seconds), 6),
        learning_rate=state.rate,
        training_loss=sum(state.epoch_losses) / len(state.epoch_losses) if state.epoch_losses else None,
        validation_loss=validation_loss,
        pseudo_dice=dice,
        pseudo_iou={name: None if value is None else value / (2 - value) for name, value in dice.items()},
        mean_pseudo_dice=mean,
        smooth_pseudo_dice=smooth,
        skipped_steps=state.skipped_steps,
        seconds=round(state.seconds, 2),
    )
    if parts.team.leads:
        lines = [*read_metrics(parts.folder), asdict(line)]
        silent = watch(lines, state.shown, parts.labels, recipe, parts.training, parts.validation)
        for one in silent:
            bar.say(one["said"])
        line = replace(
            line,
            rolling_training_loss=rolling(lines, "training_loss"),
            rolling_validation_loss=rolling(lines, "validation_loss"),
            silent=tuple(silent),
        )
        bar.remark(in_words(line))
        append_metrics(parts.folder, line)
        on_epoch(read_metrics(parts.folder))
    ended = replace(
        state,
        epoch=state.epoch + 1,
        epoch_start=state.step,
        smooth_pseudo_dice=smooth,
        epoch_losses=(),
        validation_losses=losses,
        compared_steps=validation_steps if by_validation_loss(recipe) else None,
    )
    if said := reduced(recipe, state.moment(recipe), ended.moment(recipe)):
        bar.say(said)
    return ended
