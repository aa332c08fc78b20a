"""The training loop: parts come in finished, state is in plain sight, every step can be repeated.

The recipe's defaults are nnU-Net's (Isensee et al., Nature Methods 2021): SGD with Nesterov momentum, a polynomial
decay stepped once an epoch, gradients clipped by norm, pseudo-Dice on random validation patches after each epoch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.checkpoint import Progressed, load_checkpoint, save_checkpoint, save_weights
from autoseg.labels import Labels
from autoseg.losses import LOSSES, deep_supervision, scale_targets
from autoseg.progress import Progress
from autoseg.records import AutosegError, atomic_write
from autoseg.sampling import Batch, Sampler, prefetch
from autoseg.schema import Recipe

METRICS = "metrics.jsonl"
BAD_STEPS = "bad_steps.jsonl"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """Everything that one fold's training is made of."""

    network: nn.Module
    training: Sampler
    validation: Sampler
    recipe: Recipe
    labels: Labels
    strides: tuple[tuple[int, ...], ...]
    """Strides of the network's stages, for the targets of deep supervision."""
    batch_dice: bool
    device: torch.device
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl. Pseudo-Dice: pooled over random validation patches, so a trend and not a score."""

    epoch: int
    step: int
    learning_rate: float
    training_loss: float | None
    validation_loss: float | None
    pseudo_dice: dict[str, float | None]
    mean_pseudo_dice: float | None
    smooth_pseudo_dice: float | None
    skipped_steps: int
    seconds: float


def poly(recipe: Recipe, epoch: int) -> float:
    """Learning rate of an epoch: decays to 0 as (1 - epoch / epochs) ** exponent."""
    return recipe.learning_rate * (1 - epoch / recipe.epochs) ** recipe.poly_exponent


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where a CUDA device computes in it (no loss scaling needed), float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum over all parameters."""
    return torch.optim.SGD(
        network.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def batch_loss(parts: Parts, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, logits at full resolution) of one batch."""
    loss = LOSSES[parts.recipe.loss]
    with autocast(parts.device):
        if not parts.recipe.deep_supervision:
            logits = parts.network(batch.image)
            return loss(logits, batch.labels, batch_dice=parts.batch_dice), logits
        scales = parts.network(batch.image, all_scales=True)
        targets = scale_targets(batch.labels, parts.strides)

        def of_scale(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits, target, batch_dice=parts.batch_dice)

        return deep_supervision(of_scale, scales, targets), scales[0]


def training_step(parts: Parts, optimizer: torch.optim.Optimizer, batch: Batch) -> float | None:
    """One optimizer step; its loss, or None if loss or gradient was not finite and the step was skipped."""
    optimizer.zero_grad(set_to_none=True)
    loss, _ = batch_loss(parts, batch)
    value = loss.item()
    if not math.isfinite(value):
        return None
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parts.network.parameters(), parts.recipe.clip_norm)
    if not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        return None
    optimizer.step()
    return value


def batches(sampler: Sampler, steps: range, threads: int, device: torch.device) -> Iterator[Batch]:
    """The batches of `steps`, read ahead by threads, transformed on the device."""
    for sources in prefetch(sampler.sources, steps, threads):
        yield sampler.assemble(sources, device)


def validate(parts: Parts, epoch: int) -> tuple[float | None, dict[str, float | None]]:
    """(mean loss, pseudo-Dice of each class) over the random validation patches of an epoch.

    Counts are pooled over all patches; a class that is neither present nor predicted is None.
    """
    steps = parts.recipe.validation_steps
    losses: list[float] = []
    counts = torch.zeros(3, parts.labels.count, dtype=torch.float64)
    parts.network.eval()
    with torch.inference_mode():
        for batch in batches(
            parts.validation, range(epoch * steps, (epoch + 1) * steps), parts.recipe.loader_threads, parts.device
        ):
            loss, logits = batch_loss(parts, batch)
            losses.append(loss.item())
            predicted = logits.argmax(1).flatten()
            joint = torch.bincount(
                batch.labels.flatten() * parts.labels.count + predicted, minlength=counts[0].numel() ** 2
            )
            table = joint.reshape(parts.labels.count, -1).cpu().double()
            counts += torch.stack([table.diagonal(), table.sum(0), table.sum(1)])
    parts.network.train()
    dice = {
        name: (2 * counts[0, i] / (counts[1, i] + counts[2, i])).item() if counts[1:, i].sum() > 0 else None
        for i, name in enumerate(parts.labels.names)
        if i > 0
    }
    finite = [loss for loss in losses if math.isfinite(loss)]
    return (sum(finite) / len(finite) if finite else None), dice


def record_bad_step(folder: Path, batch: Batch) -> None:
    """Keep what is needed to look at a batch whose loss was not finite."""
    line = {
        "step": batch.step,
        "patches": [{"case": p.case, "start": p.box.start, "stop": p.box.stop} for p in batch.patches],
    }
    with (folder / BAD_STEPS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a fold's metrics.jsonl, oldest first; empty if there is none yet."""
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drop the lines of epochs that ended after `step`: they will be trained again."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    with atomic_write(folder / METRICS) as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)


def culprits(bad: list[Batch]) -> str:
    """The cases that all bad batches share, or all of them."""
    shared = set(bad[0].cases).intersection(*(batch.cases for batch in bad))
    return ", ".join(sorted(shared or {case for batch in bad for case in batch.cases})[:8])


def train(parts: Parts, on_epoch: Callable[[list[dict[str, Any]]], None] = lambda lines: None) -> Progressed:
    """Train one fold to the end of its recipe, going on from its newest checkpoint if there is one.

    Writes metrics.jsonl, checkpoints and at the end weights.safetensors into `parts.folder`; `on_epoch` receives all
    metric lines after each epoch. Raises AutosegError when losses stay non-finite or a patch cannot be read.
    """
    recipe, folder, device = parts.recipe, parts.folder, parts.device
    folder.mkdir(parents=True, exist_ok=True)
    network = parts.network.to(device).train()
    optimizer = make_optimizer(network, recipe)
    state = load_checkpoint(folder, network, optimizer) or Progressed(step=0)
    forget_metrics_after(folder, state.step)
    total = recipe.epochs * recipe.steps_per_epoch
    bad: list[Batch] = []
    started, saved = time.monotonic() - state.seconds, time.monotonic()

    with Progress("train", total, unit="step") as bar:
        bar.advance(state.step)
        for batch in batches(parts.training, range(state.step, total), recipe.loader_threads, device):
            epoch = batch.step // recipe.steps_per_epoch
            for group in optimizer.param_groups:
                group["lr"] = poly(recipe, epoch)
            loss = training_step(parts, optimizer, batch)
            if loss is None:
                bad.append(batch)
                record_bad_step(folder, batch)
                if len(bad) >= recipe.max_bad_steps:
                    raise AutosegError(
                        f"the loss was not finite in {len(bad)} steps in a row (step {batch.step}); cases involved: "
                        f"{culprits(bad)}. Look at them (`autoseg check`; {folder / BAD_STEPS} has the patches), "
                        "or lower the rate with --set learning_rate=0.001"
                    )
            else:
                bad = []
            state = replace(
                state,
                step=batch.step + 1,
                skipped_steps=state.skipped_steps + (loss is None),
                epoch_losses=state.epoch_losses if loss is None else (*state.epoch_losses, loss),
                seconds=time.monotonic() - started,
            )
            bar.advance(
                note=f"epoch {epoch}, loss {'not finite' if loss is None else f'{loss:.3f}'}, {_dice_note(state)}"
            )
            if state.step % recipe.steps_per_epoch == 0:
                state = _end_epoch(parts, state, epoch, on_epoch)
            if time.monotonic() - saved > recipe.checkpoint_minutes * 60:
                save_checkpoint(folder, network, optimizer, state)
                saved = time.monotonic()
    save_checkpoint(folder, network, optimizer, state)
    save_weights(network, folder / WEIGHTS)
    return state


def _dice_note(state: Progressed) -> str:
    return "Dice ?" if state.smooth_pseudo_dice is None else f"Dice {state.smooth_pseudo_dice:.3f}"


def _end_epoch(
    parts: Parts,
    state: Progressed,
    epoch: int,
    on_epoch: Callable[[list[dict[str, Any]]], None],
) -> Progressed:
    validation_loss, dice = validate(parts, epoch)
    known = [value for value in dice.values() if value is not None]
    mean = sum(known) / len(known) if known else None
    smooth = state.smooth_pseudo_dice
    if mean is not None:
        smooth = mean if smooth is None else 0.9 * smooth + 0.1 * mean
    line = Epoch(
        epoch=epoch,
        step=state.step,
        learning_rate=poly(parts.recipe, epoch),
        training_loss=sum(state.epoch_losses) / len(state.epoch_losses) if state.epoch_losses else None,
        validation_loss=validation_loss,
        pseudo_dice=dice,
        mean_pseudo_dice=mean,
        smooth_pseudo_dice=smooth,
        skipped_steps=state.skipped_steps,
        seconds=round(state.seconds, 2),
    )
    with (parts.folder / METRICS).open("a") as file:
        file.write(json.dumps(line.__dict__) + "\n")
    on_epoch(read_metrics(parts.folder))
    return replace(state, smooth_pseudo_dice=smooth, epoch_losses=())
