"""The course of a training: metrics.jsonl, one line an epoch, appended as it goes."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoseg.records import atomic_write

METRICS = "metrics.jsonl"
ROLLING = 5
"""Epochs that a rolling mean is of."""
CLASSES_SAID = 8
"""Of more classes only the worst are named in a line."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl. Pseudo-Dice: pooled over random validation patches, so a trend and not a score."""

    epoch: int
    step: int
    progress: float
    """From 0 to 1, of the steps or of the time."""
    learning_rate: float | None
    """Of the epoch's last step."""
    training_loss: float | None
    validation_loss: float | None
    rolling_training_loss: float | None = None
    rolling_validation_loss: float | None = None
    """Means of the last epochs, see `rolling`."""
    pseudo_dice: dict[str, float | None]
    pseudo_iou: dict[str, float | None]
    """Of the same counts: Dice / (2 - Dice)."""
    mean_pseudo_dice: float | None
    smooth_pseudo_dice: float | None
    skipped_steps: int
    seconds: float
    silent: tuple[dict[str, str], ...] = ()
    """Classes that are not predicted, and why; see `autoseg.watchdog`."""


def rolling(lines: Sequence[Mapping[str, Any]], loss: str) -> float | None:
    """Mean of `loss` in the last `ROLLING` of the lines, of as many as there are; without those that have none."""
    known: list[float] = [line[loss] for line in lines[-ROLLING:] if line[loss] is not None]
    return sum(known) / len(known) if known else None


def in_words(epoch: Epoch) -> str:
    """One epoch in a line: losses, and the pseudo-Dice of each class, of many classes that of the worst."""
    known = {name: "absent" if dice is None else f"{dice:.3f}" for name, dice in epoch.pseudo_dice.items()}
    few = known
    if len(known) > CLASSES_SAID:
        worst = sorted(known, key=lambda name: 2.0 if (dice := epoch.pseudo_dice[name]) is None else dice)
        few = {name: known[name] for name in worst[:CLASSES_SAID]}
    losses = ["not finite" if loss is None else f"{loss:.3f}" for loss in (epoch.training_loss, epoch.validation_loss)]
    shown = ", ".join(f"{name} {dice}" for name, dice in few.items())
    mean = "?" if epoch.mean_pseudo_dice is None else f"{epoch.mean_pseudo_dice:.3f}"
    more = f" and {len(known) - len(few)} more" if len(few) < len(known) else ""
    return f"epoch {epoch.epoch}: loss {losses[0]}, held-out {losses[1]}; pseudo-Dice {mean}: {shown}{more}"


def append_metrics(folder: Path, epoch: Epoch) -> None:
    """Add the line of an epoch that has ended; on disk before the checkpoint that counts it."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(asdict(epoch)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a fold's metrics.jsonl, oldest first, without one that was torn; empty if there is none yet."""
    path = folder / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_metrics_from(folder: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later ones: they will be trained, or at least validated, again."""
    kept = [line for line in read_metrics(folder) if line["epoch"] < epoch]
    with atomic_write(folder / METRICS) as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
