"""Lines of long work: now and then, and what an epoch says of each class."""

from types import SimpleNamespace

import pytest

from autoseg import progress
from autoseg.history import CLASSES_SAID, Epoch, in_words
from autoseg.progress import Progress


def epoch(dice, **more):
    known = [value for value in dice.values() if value is not None]
    facts = {
        "epoch": 3, "step": 30, "progress": 0.5, "learning_rate": 0.01, "training_loss": -0.5, "validation_loss": None,
        "mean_pseudo_dice": sum(known) / len(known) if known else None, "smooth_pseudo_dice": None, "skipped_steps": 0,
        "seconds": 1.0, "pseudo_iou": {},
    }  # fmt: skip
    return Epoch(pseudo_dice=dice, **{**facts, **more})


def test_an_epoch_names_every_class_and_those_that_no_patch_had():
    said = in_words(epoch({"liver": 0.8125, "lesion": None}))
    assert said == "epoch 3: loss -0.500, held-out not finite; pseudo-Dice 0.812: liver 0.812, lesion absent"
    assert "pseudo-Dice ?: liver absent" in in_words(epoch({"liver": None}))


def test_of_many_classes_the_worst_are_named():
    said = in_words(epoch({f"c{n}": None if n == 0 else n / 20 for n in range(12)}))
    assert said.endswith(": c1 0.050, c2 0.100, c3 0.150, c4 0.200, c5 0.250, c6 0.300, c7 0.350, c8 0.400 and 4 more")
    assert CLASSES_SAID == 8


def test_short_epochs_leave_a_line_a_minute_and_the_last_one(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("train", 5) as bar:
        for number, seconds in enumerate([10, 10, 30, 30, 10]):
            now[0] += seconds
            bar.remark(f"epoch {number}")
    assert capsys.readouterr().out.split("\n") == ["epoch 0", "epoch 3", "epoch 4", ""]


@pytest.mark.parametrize("quiet", [False, True])
def test_nothing_is_remarked_twice(quiet, capsys):
    with Progress("train", 1, quiet=quiet) as bar:
        bar.remark("epoch 0")
    assert capsys.readouterr().out == ("" if quiet else "epoch 0\n")
