"""A class that is not predicted is named, once, with the cause that the counts tell; the counts survive every stop."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_training import LABELS, NAMES, PATCH, SHAPE, parts, write_cases
from toys import ball, configuration, grid, plan

from autoseg.checkpoint import read_progress
from autoseg.history import read_metrics
from autoseg.labels import Labels
from autoseg.preprocess import prepare
from autoseg.schema import Recipe
from autoseg.store import write_case
from autoseg.team import Team
from autoseg.training import train
from autoseg.volume import Volume
from autoseg.watchdog import CAUSES, PATIENCE, Shown, count_shown, silent_classes, watch

PARTLY = Labels.from_dataset({"background": 0, "a": 1, "b": 2, "ignore": 9})
REGIONS = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2})


# Counts.


def test_counts_by_hand():
    empty, both = torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([[[0, 1, 1], [2, 3, 3]]])
    assert count_shown(empty, PARTLY).tolist() == [[1, 0, 0], [6, 0, 0]]
    assert count_shown(torch.cat([empty, both, both]), PARTLY).tolist() == [[3, 2, 2], [6 + 4 + 4, 4, 2]]
    assert count_shown(both.clip(max=2), REGIONS).tolist() == [[1, 1, 1], [6, 5, 3]]
    assert count_shown(both.clip(max=2), LABELS).tolist() == [[1, 1, 1], [6, 2, 3]]


def test_counts_add_up():
    one = Shown().plus(torch.tensor([[3, 2, 0], [60, 7, 0]]))
    assert one == Shown(patches=3, voxels=60, patches_with=(2, 0), voxels_of=(7, 0))
    assert one.plus(torch.tensor([[1, 0, 1], [20, 0, 5]])) == Shown(
        patches=4, voxels=80, patches_with=(2, 1), voxels_of=(7, 5)
    )


# Diagnoses.


@dataclass
class Held:
    """Of a sampler what the watchdog asks."""

    holding: dict


HELD = Held({1: ("a", "b", "c"), 2: ("b",)})


def course(*dice, progress=0.5, skipped=0, step=300):
    """Lines of epochs with these pseudo-Dice of the lesion; the liver does well."""
    return [
        {"pseudo_dice": {"liver": 0.9, "lesion": d}, "progress": progress, "step": step, "skipped_steps": skipped}
        for d in dice
    ]


def seen(patches_with, voxels_of):
    return Shown(patches=1000, voxels=10**7, patches_with=(900, patches_with), voxels_of=(10**6, voxels_of))


def said(lines=None, shown=None, training=HELD, judged=HELD, **recipe):
    return watch(lines or course(*[0.0] * 5), shown or seen(400, 10**5), LABELS, Recipe(**recipe), training, judged)


def test_five_epochs_without_a_prediction_are_silence():
    names = ("liver", "lesion")
    assert PATIENCE == 5
    assert silent_classes(course(*[0.0] * 4), names) == []
    assert silent_classes(course(0.0, None, 0.0, None, None), names) == ["lesion"]
    assert silent_classes(course(0.7, *[0.0] * 5), names) == ["lesion"]
    assert silent_classes(course(0.0, 0.0, 0.01, 0.0, 0.0), names) == []
    assert silent_classes(course(*[0.0] * 5, progress=0.05), names) == [], "it has only just begun"
    assert silent_classes(course(*[0.0] * 5, progress=0.05, step=1250), names) == ["lesion"]


@pytest.mark.parametrize(
    ("cause", "cure", "more"),
    [
        ("in no case", "splits.json", {"training": Held({1: ("a",)}), "shown": seen(0, 0)}),
        ("in no case", "splits.json", {"training": Held({1: ("a",)}), "judged": Held({}), "shown": seen(0, 0)}),
        ("skipped", "200 of 300 steps were skipped", {"lines": course(*[0.0] * 5, skipped=200), "shown": seen(0, 0)}),
        ("never shown", "1 training cases hold it", {"shown": seen(0, 0)}),
        ("never shown", "patch_position=balanced", {"shown": Shown()}),
        ("never shown", "components for small parts", {"shown": seen(0, 0), "foreground_fraction": 0.0}),
        ("seldom shown", "patch_position=components", {"shown": seen(49, 10**5), "patch_position": "balanced"}),
        ("seldom shown", "balanced or components", {"shown": seen(49, 10**5), "patch_position": "uniform"}),
        ("few voxels", "--loss dice_ce", {"shown": seen(400, 9999), "loss": "ce"}),
        ("not learnt", "more steps", {"shown": seen(400, 9999), "loss": "dice_ce"}),
        ("not learnt", "more steps", {"shown": seen(400, 9999), "loss": "0.5*ce+tversky(alpha=0.3,beta=0.7)"}),
    ],
)
def test_the_cause_that_the_counts_tell_and_its_cure(cause, cure, more):
    (one,) = said(**more)
    assert (one["name"], one["cause"]) == ("lesion", cause)
    assert cure in one["said"]
    assert "class lesion was not found in the last 5 epochs" in one["said"]


def test_the_line_has_the_numbers():
    (one,) = said(shown=seen(49, 2000))
    assert "49 of 1000 training patches so far held it, 0.0002 of all voxels" in one["said"]
    assert set(CAUSES) == {"in no case", "skipped", "never shown", "few voxels", "seldom shown", "not learnt"}


def test_each_thing_is_said_once_and_another_cause_is_another_thing():
    lines = course(*[0.0] * 6)
    first = said(lines[:5], seen(0, 0))
    lines[4]["silent"] = first
    assert said(lines, seen(0, 0)) == []
    assert [one["cause"] for one in said(lines, seen(10, 10**5))] == ["seldom shown"]


def test_what_no_validation_case_holds_cannot_be_judged():
    assert said(course(*[None] * 5), judged=Held({1: ("d",)})) == []
    assert said(course(*[0.5] * 5)) == []


def test_a_class_that_no_compared_patch_holds_cannot_be_judged():
    never = course(*[None] * 5)
    assert said(never, weights="best") == []
    assert [one["cause"] for one in said(never)] == ["not learnt"], "other patches each time"
    assert [one["cause"] for one in said(never, seen(0, 0), weights="best")] == ["never shown"]
    assert [one["cause"] for one in said(course(0.0, *[None] * 5), weights="best")] == ["not learnt"]


# Trainings.

LONG = {"epochs": 6, "steps_per_epoch": 2, "validation_steps": 1, "augmentation": "none"}


def without_lesion(folder):
    """As `write_cases`, but only one case has the second class."""
    write_cases(folder)
    for seed, name in enumerate(NAMES[:2]):
        labels = np.zeros(SHAPE, np.int16)
        labels[ball(SHAPE, (4, 4 + seed, 4), 3)] = 1
        image = np.random.default_rng(seed).normal(2.0 * labels, 0.3).astype(np.float32)
        case = prepare(name, Volume(array=image[None], grid=grid(SHAPE)), labels, grid(SHAPE), plan(), configuration())
        write_case(folder, case, key=name)


def split(made):
    """Trains on what lacks the second class."""
    return replace(
        made,
        training=replace(made.training, case_names=NAMES[:2]),
        validation=replace(made.validation, case_names=NAMES[2:]),
    )


def test_a_class_of_no_training_case_is_named_in_the_fifth_epoch_and_never_again(tmp_path, capsys):
    without_lesion(tmp_path / "cases")
    made = split(parts(tmp_path, **LONG))
    for bias in made.network.parameters():
        if bias.shape == (LABELS.heads,):  # it never predicts the second class, as one that never sees it comes to do
            bias.data[2] = -50
    train(made)
    lines = read_metrics(made.folder)
    named = [[(one["name"], one["cause"]) for one in line["silent"]] for line in lines]
    assert ("lesion", "in no case") in named[4]
    assert [epoch for epoch, ones in enumerate(named) if ("lesion", "in no case") in ones] == [4]
    assert capsys.readouterr().out.count("no training case of the fold holds it") == 1


class Killed(BaseException):
    pass


def test_counts_are_those_of_the_batches_and_survive_a_kill(tmp_path):
    write_cases(tmp_path / "cases")
    whole = parts(tmp_path, "whole", **LONG)
    state = train(whole)
    sampler, expected = whole.training, Shown()
    for step in range(12):
        labels = sampler.assemble(sampler.sources(step), whole.device).labels
        for one in labels:
            present = [bool((one == index).any()) for index in (1, 2)]
            sizes = [int((one == index).sum()) for index in (1, 2)]
            expected = expected.plus(torch.tensor([[1, *present], [one.numel(), *sizes]]))
    assert state.shown == expected == read_progress(whole.folder).shown
    assert expected.patches == 24 and expected.voxels == 24 * np.prod(PATCH)

    begun = parts(tmp_path, "begun", checkpoint_minutes=1e-9, **LONG)
    calls = []

    def kill(network, inputs):
        calls.append(network.training)
        if sum(calls) == 8 and network.training:
            raise Killed

    begun.network.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        train(begun)
    assert read_progress(begun.folder).shown.patches == 14
    gone_on = train(parts(tmp_path, "begun", **LONG))
    assert gone_on.shown == expected


def test_the_parts_of_a_team_add_up_to_the_batch(tmp_path):
    write_cases(tmp_path / "cases")

    def counts(team):
        sampler = parts(tmp_path, team=team).training
        return count_shown(sampler.assemble(sampler.sources(3), torch.device("cpu")).labels, LABELS)

    halves = [counts(Team(rank=rank, size=2)) for rank in range(2)]
    assert torch.equal(halves[0] + halves[1], counts(Team()))
    assert halves[1][0, 0] == 1


def test_a_checkpoint_that_did_not_count_goes_on(tmp_path):
    write_cases(tmp_path / "cases")
    made = parts(tmp_path, **{**LONG, "epochs": 1})
    train(made)
    state = made.folder / "checkpoint_000000002" / "state.json"
    content = json.loads(state.read_text())
    del content["shown"]
    state.write_text(json.dumps(content))
    assert train(parts(tmp_path, **{**LONG, "epochs": 2})).shown.patches == 4
