"""Pictures of numbers: the course of a training, bars."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from autoseg.records import atomic_write

REDRAWN_S = 30.0
"""At most so often a picture of a training under way is drawn: a third of a second, of epochs that may be as short."""


@dataclass(kw_only=True)
class Curves:
    """Draws `training_curves` to `path` as lines come in: the first at once, then from time to time, and at the end."""

    path: Path
    clock: Callable[[], float] = time.monotonic
    """Gives seconds."""
    drawn: float | None = None
    """When it was last."""
    waiting: Sequence[Mapping[str, Any]] = ()
    """All lines, where the last is not in the picture yet."""

    def __call__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take all lines so far, after another epoch."""
        self.waiting = lines
        if self.drawn is None or self.clock() - self.drawn >= REDRAWN_S:
            self.finish()

    def finish(self) -> None:
        """Draw what is not in the picture yet; to be called however training ends."""
        if self.waiting:
            training_curves(self.waiting, self.path)
            self.waiting, self.drawn = (), self.clock()


def training_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, pseudo-Dice and learning rate over the epochs of `lines` (metrics.jsonl) to the PNG `path`.

    Drawn without matplotlib's global state, so that it may be called from any thread and needs no display.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    losses, dice, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    epochs = [line["epoch"] + 1 for line in lines]

    def draw(axes: Any, values: Sequence[float | None], label: str, **style: Any) -> None:
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(epochs, shown, label=label, marker="." if len(epochs) < 30 else None, **style)

    draw(losses, [line["training_loss"] for line in lines], "training")
    draw(losses, [line["validation_loss"] for line in lines], "validation patches")
    for kind, colour in (("training", "C0"), ("validation", "C1")):
        smooth = [line.get(f"rolling_{kind}_loss") for line in lines]
        draw(losses, smooth, f"{kind}, rolling mean", color=colour, linewidth=3, alpha=0.35)
    losses.set_ylabel("loss")
    names = list(lines[-1]["pseudo_dice"]) if lines else []
    for name in names[:10]:
        draw(dice, [line["pseudo_dice"][name] for line in lines], name, linewidth=1)
    draw(dice, [line["smooth_pseudo_dice"] for line in lines], "mean, smoothed", color="black", linewidth=2)
    dice.set_ylabel("pseudo-Dice of patches")
    dice.set_ylim(0, 1)
    draw(rate, [line["learning_rate"] for line in lines], "learning rate", color="grey")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (losses, dice):
        axes.legend(loc="best", fontsize="small")
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as file:
        canvas.print_png(file)


def bars(values: Mapping[str, float], what: str, path: Path) -> None:
    """Draw `values` as horizontal bars with their numbers, the first on top, to the PNG `path`."""
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(values)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = axes.barh([*values], [*values.values()], color="#6baed6")
    axes.bar_label(drawn, [f"{value:,.3g}" for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * max(values.values(), default=1.0))
    axes.set_xlabel(what)
    with atomic_write(path, "wb") as file:
        canvas.print_png(file)
