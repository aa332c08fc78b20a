"""Weights that are kept beside those that learn: the right ones, in every checkpoint, the same after any stop."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_training import parts, weights, write_cases
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoseg.checkpoint import KEPT, checkpoints
from autoseg.history import read_metrics
from autoseg.kept import average
from autoseg.rates import lowest
from autoseg.records import AutosegError
from autoseg.step import validate
from autoseg.training import WEIGHTS, train

FOUR = {"epochs": 4, "steps_per_epoch": 3, "validation_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    write_cases(folder / "cases")
    return folder


def kept(made):
    return load_file(made.folder / WEIGHTS)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    pass


SETTINGS = [
    {"optimizer": "adam", "schedule": "plateau(factor=0.5, patience=1)", "weights": "best", "learning_rate": 0.003},
    {"optimizer": "rmsprop", "schedule": "wsd(decay=0.5)", "weights": "ema", "learning_rate": 0.003, "warmup_steps": 4},
    {"optimizer": "adamw", "schedule": "cosine", "weights": "ema", "ema_decay": 0.5, "learning_rate": 0.003},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting['optimizer']}-{setting['weights']}")
def test_killed_within_an_epoch_and_gone_on_with_equals_uninterrupted(place, tmp_path, setting):
    whole = parts(place, f"{tmp_path}/whole", **FOUR, **setting)
    train(whole)
    first = parts(place, f"{tmp_path}/halves", checkpoint_minutes=1e-9, **FOUR, **setting)
    calls = []

    def kill(network, inputs):
        calls.append(network.training)
        if sum(calls) == 9 and network.training:  # the last step of the third epoch
            raise Killed

    first.network.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        train(first)
    second = parts(place, f"{tmp_path}/halves", **FOUR, **setting)
    train(second)
    assert torch.equal(weights(whole), weights(second))
    assert same(kept(whole), kept(second))
    a, b = ([line | {"seconds": 0} for line in read_metrics(made.folder)] for made in (whole, second))
    assert a == b
    assert same(kept(second), load_file(checkpoints(second.folder)[-1] / KEPT))


def test_the_best_epoch_is_kept_though_the_run_goes_on(place, tmp_path, capsys):
    made = parts(place, f"{tmp_path}/run", weights="best", learning_rate=1e-5, **{**FOUR, "epochs": 6})
    seen = []

    def look(lines):
        seen.append(copy.deepcopy(made.network.state_dict()))
        if len(seen) == 3:
            with torch.no_grad():
                made.network.heads[0].weight *= -5

    train(made, look)
    best = lowest([line["validation_loss"] for line in read_metrics(made.folder)])
    assert best < 3, "what comes after is spoilt"
    assert f"kept: the weights of epoch {best}," in capsys.readouterr().out
    assert same(kept(made), seen[best])
    assert not same(kept(made), seen[-1])


STILL = {"learning_rate": 0.0, "epochs": 3, "steps_per_epoch": 1, "validation_steps": 2}


@pytest.mark.parametrize("going", [{"weights": "best"}, {"stop_patience": 9}, {"schedule": "plateau"}])
def test_weights_that_stay_have_the_same_loss_in_every_epoch_where_something_goes_by_it(place, tmp_path, going):
    made = parts(place, f"{tmp_path}/run", **STILL, **going)
    train(made)
    lines = read_metrics(made.folder)
    assert len({line["validation_loss"] for line in lines}) == 1
    assert lines[0]["validation_loss"] == validate(made, 0, 2, lambda: None)[0] == validate(made, 7, 2, lambda: None)[0]


def test_other_runs_look_at_other_patches_in_every_epoch(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", weights="ema", **STILL)
    assert train(made).compared_steps is None
    assert len({line["validation_loss"] for line in read_metrics(made.folder)}) == 3


def test_the_average_is_what_is_judged(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", weights="ema", learning_rate=0.05, **FOUR)
    train(made)
    line = read_metrics(made.folder)[-1]
    learning, _ = validate(made, 3, 1, lambda: None)
    made.network.load_state_dict(kept(made))
    averaged, dice = validate(made, 3, 1, lambda: None)
    assert (line["validation_loss"], line["pseudo_dice"]) == (averaged, dice)
    assert learning != averaged


def test_a_checkpoint_without_its_kept_weights_is_named(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", weights="ema", **FOUR)
    train(made)
    (checkpoints(made.folder)[-1] / KEPT).unlink()
    with pytest.raises(AutosegError, match=r"kept.safetensors does not exist"):
        train(parts(place, f"{tmp_path}/run", weights="ema", **FOUR))


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def test_the_average_by_hand():
    mean, present = network(0), network(1)
    present[1].running_mean += 5
    expected = {
        name: 0.1 * old + 0.9 * new
        for (name, old), (_, new) in zip(mean.named_parameters(), present.named_parameters(), strict=True)
    }
    average(mean, present, 0, 0.999)
    for name, tensor in mean.named_parameters():
        assert torch.allclose(tensor, expected[name])
    assert torch.allclose(mean[1].running_mean, 0.9 * present[1].running_mean)
    average(mean, present, 0, 0.0)
    assert same(mean.state_dict(), present.state_dict())


def test_beyond_its_beginning_the_average_is_that_of_torch():
    learning = network(0)
    theirs = AveragedModel(learning, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(learning)
    mine = copy.deepcopy(learning)
    for seed in (1, 2, 3):
        learning.load_state_dict(network(seed).state_dict())
        theirs.update_parameters(learning)
        average(mine, learning, 1000 + seed, 0.9)
    for a, b in zip(theirs.module.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(a, b)
