"""The loop: learns, resumes bit for bit, skips what is not finite and names who did it."""

import json
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from toys import LABELS, ball, configuration, grid, network, plan

from autoseg.augment import make_augmentation
from autoseg.bad_steps import BAD_STEPS
from autoseg.checkpoint import read_progress
from autoseg.computing import safe_base
from autoseg.evaluation.plots import Curves, training_curves
from autoseg.history import read_metrics, rolling
from autoseg.labels import Labels
from autoseg.losses import make_loss
from autoseg.networks import build, output_scales, output_weights
from autoseg.preprocess import prepare
from autoseg.records import AutosegError
from autoseg.sampling import PreparedCases, Sampler, Stream
from autoseg.schema import Recipe
from autoseg.signals import Requests, Stopped
from autoseg.step import Parts, class_counts, make_optimizer, training_step
from autoseg.store import write_case
from autoseg.team import ALONE
from autoseg.training import train
from autoseg.volume import Volume

SHAPE, PATCH = (9, 13, 15), (8, 12, 12)
NAMES = ("a", "b", "c")


def write_cases(folder, spoil=None):
    for seed, name in enumerate(NAMES):
        rng = np.random.default_rng(seed)
        labels = np.zeros(SHAPE, np.int16)
        labels[ball(SHAPE, (4, 4 + seed, 4), 3)] = 1
        labels[ball(SHAPE, (4, 7, 11), 2)] = 2
        image = (2.0 * labels + rng.normal(5, 0.3, SHAPE)).astype(np.float32)
        case = prepare(name, Volume(array=image[None], grid=grid(SHAPE)), labels, grid(SHAPE), plan(), configuration())
        if name == spoil:
            case.image[:] = np.nan
        write_case(folder, case, key=name)


def made_spec():
    return network(features=(6, 8, 10))


def parts(tmp_path, run="run", augmentation="default", tuning=None, team=ALONE, **recipe):
    made = Recipe(**{"epochs": 3, "steps_per_epoch": 4, "validation_steps": 2, "seed": 1, **recipe})
    cases = PreparedCases(tmp_path / "cases", 1 << 30)
    torch.manual_seed(made.seed)

    def sampler(stream, name):
        return Sampler(
            cases=cases, case_names=NAMES, patch=PATCH, batch_size=2, foreground_fraction=0.33, seed=made.seed,
            augmentation=make_augmentation(name, patch=PATCH, dimension=3, masked=(False,)), stream=stream,
            team=team,
        )  # fmt: skip

    spec = made_spec()
    network = build(spec, 1, LABELS.heads)
    return Parts(
        network=network,
        training=sampler(Stream.TRAINING, augmentation),
        validation=sampler(Stream.VALIDATION, "none"),
        recipe=made,
        labels=LABELS,
        scales=output_scales(network, spec),
        output_weights=output_weights(network),
        loss=make_loss(made.loss, labels=LABELS, batch_dice=False),
        device=torch.device("cpu"),
        folder=tmp_path / run,
        tuning=replace(safe_base(torch.device("cpu")), **(tuning or {})),
        team=team,
    )


@pytest.fixture
def place(tmp_path):
    write_cases(tmp_path / "cases")
    return tmp_path


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.network.parameters()])


@pytest.mark.parametrize("tuning", [{"precision": "bfloat16"}, {"precision": "float16"}, {"channels_last": True}])
def test_other_settings_train_and_go_on_bit_for_bit(place, tuning):
    """float16 with its loss scale, which is part of the checkpoint."""
    whole = parts(place, "whole", tuning=tuning, epochs=2)
    train(whole)
    begun = parts(place, "begun", tuning=tuning, epochs=2)
    requests = Requests()

    def stop(lines):
        requests.stop = signal.SIGTERM

    with pytest.raises(Stopped):
        train(begun, stop, requests)
    scale = read_progress(place / "begun").loss_scale
    assert bool(scale) == (tuning.get("precision") == "float16")
    gone_on = parts(place, "begun", tuning=tuning, epochs=2)
    train(gone_on)
    assert torch.equal(weights(whole), weights(gone_on))
    plain = parts(place, "plain", epochs=2)
    train(plain)
    assert not torch.equal(weights(whole), weights(plain)), "the setting is in force"
    # Rounding apart the loss is the same.
    losses = [read_metrics(place / run)[-1]["training_loss"] for run in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_a_loss_scale_that_is_too_large_is_no_bad_step(place):
    made = parts(place, tuning={"precision": "float16"}, epochs=1, steps_per_epoch=3)
    optimizer = make_optimizer(made.network, made.recipe)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = weights(made)
    batch = made.training.assemble(made.training.sources(0), made.device)
    assert training_step(made, optimizer, scaler, batch) is not None
    assert torch.equal(before, weights(made))
    assert scaler.get_scale() == 2.0**59


def test_a_gradient_is_shortened_to_the_clip_norm_and_0_leaves_it(place):
    def moved(clip_norm):
        made = parts(place, augmentation="none", clip_norm=clip_norm, momentum=0.0, weight_decay=0.0, learning_rate=1.0)
        optimizer, before = make_optimizer(made.network, made.recipe), weights(made)
        batch = made.training.assemble(made.training.sources(0), made.device)
        training_step(made, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch)
        return weights(made) - before

    assert torch.equal(moved(0.0), moved(1e9))
    assert moved(0.0).norm() > 0.1
    assert moved(0.01).norm() == pytest.approx(0.01, rel=1e-3)


def test_a_run_without_validation_has_no_losses_of_it(place):
    made = parts(place, epochs=2, steps_per_epoch=1, validation_steps=0, augmentation="none")
    assert train(made).validation_losses == (None, None)
    assert [line["mean_pseudo_dice"] for line in read_metrics(made.folder)] == [None, None]


def test_curves_are_drawn_at_once_then_now_and_then_and_what_is_missing_at_the_end(tmp_path):
    now = [100.0]
    curves = Curves(path=tmp_path / "progress.png", clock=lambda: now[0])
    line = dict.fromkeys(("training_loss", "validation_loss", "smooth_pseudo_dice", "learning_rate"), 0.5)
    seen = []

    def after(seconds, epochs):
        now[0] += seconds
        curves([{**line, "epoch": epoch, "pseudo_dice": {}} for epoch in range(epochs)])
        seen.append((tmp_path / "progress.png").read_bytes())

    after(0, 1)
    after(10, 2)
    after(19, 3)
    after(1, 4)
    after(29, 5)
    curves.finish()
    seen.append((tmp_path / "progress.png").read_bytes())
    assert [one == other for one, other in pairwise(seen)] == [True, True, False, True, False]
    (tmp_path / "progress.png").unlink()
    curves.finish()
    assert not (tmp_path / "progress.png").exists(), "nothing new"


def test_it_learns_and_writes_what_it_should(place):
    made = parts(place, epochs=8, steps_per_epoch=12, augmentation="none", learning_rate=0.02)
    state = train(made)
    lines = read_metrics(made.folder)
    assert [line["epoch"] for line in lines] == list(range(8))
    assert lines[-1]["training_loss"] < lines[0]["training_loss"] - 0.5
    assert lines[-1]["mean_pseudo_dice"] > 0.8
    assert set(lines[-1]["pseudo_dice"]) == set(lines[-1]["pseudo_iou"]) == {"liver", "lesion"}
    dice, iou = lines[-1]["pseudo_dice"]["liver"], lines[-1]["pseudo_iou"]["liver"]
    assert 0 < iou < dice and dice == pytest.approx(2 * iou / (1 + iou))
    for kind in ("training_loss", "validation_loss"):
        raw, smooth = ([line[f"{name}{kind}"] for line in lines] for name in ("", "rolling_"))
        assert smooth[4:] == pytest.approx(np.convolve(raw, np.ones(5) / 5, "valid"))
        assert smooth[:2] == pytest.approx([raw[0], (raw[0] + raw[1]) / 2])
    assert state.step == 96
    assert {p.name for p in made.folder.iterdir()} == {"checkpoint_000000096", "metrics.jsonl", "weights.safetensors"}
    training_curves(lines, made.folder / "progress.png")
    assert (made.folder / "progress.png").read_bytes().startswith(b"\x89PNG")


COUNTED = {
    "plain": Labels.from_dataset({"background": 0, "a": 1, "b": 2}),
    "ignore": Labels.from_dataset({"background": 0, "a": 1, "b": 2, "ignore": 9}),
    "regions": Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "ignore": 9}),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_counts_of_the_pseudo_dice_are_those_of_masks(kind):
    labels, generator = COUNTED[kind], torch.Generator().manual_seed(0)
    logits = torch.randn(2, labels.heads, 5, 7, generator=generator)
    target = torch.randint(len(labels.known), (2, 5, 7), generator=generator)
    found = class_counts(logits, target, labels)
    assert found.shape == (3, 2, 2)
    for sample, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        valid = target[sample] != labels.ignored if labels.ignored is not None else target[sample] >= 0
        true = torch.isin(target[sample], torch.tensor(labels.members[number])) & valid
        inside = logits[sample].argmax(0) == number + 1 if labels.exclusive else logits[sample, number] > 0
        predicted = inside & valid
        expected = [(predicted & true).sum(), predicted.sum(), true.sum()]
        assert found[:, sample, number].tolist() == expected


@pytest.mark.parametrize(
    ("labels", "annotated"),
    [
        (COUNTED["regions"], None),
        (COUNTED["ignore"], None),
        (COUNTED["plain"], {"a": (True, False), "b": (False, True), "c": (True, True)}),
        (COUNTED["regions"], {"a": (True, False), "b": (False, True), "c": (True, True)}),
    ],
)
def test_every_kind_of_labels_learns(place, labels, annotated):
    made = parts(place, epochs=4, steps_per_epoch=10, augmentation="none", learning_rate=0.02)
    network = build(made_spec(), 1, labels.heads)
    samplers = {name: replace(getattr(made, name), annotated=annotated) for name in ("training", "validation")}
    loss = make_loss(made.recipe.loss, labels=labels, batch_dice=False)
    train(replace(made, network=network, labels=labels, loss=loss, **samplers))
    lines = read_metrics(made.folder)
    assert lines[-1]["training_loss"] < lines[0]["training_loss"] - 0.3
    assert set(lines[-1]["pseudo_dice"]) == set(labels.names[1:])
    assert max(lines[-1]["pseudo_dice"].values()) > 0.5


class Stop(BaseException):
    pass


@pytest.mark.parametrize("deep", [True, False])
def test_stopped_and_resumed_equals_uninterrupted(place, deep):
    whole = parts(place, "whole", deep_supervision=deep)
    train(whole)
    first = parts(place, "halves", deep_supervision=deep, checkpoint_minutes=1e-9)

    def stop_after_two_epochs(lines):
        if len(lines) == 2:
            raise Stop

    with pytest.raises(Stop):
        train(first, on_epoch=stop_after_two_epochs)
    second = parts(place, "halves", deep_supervision=deep)
    train(second)
    assert torch.equal(weights(whole), weights(second))
    a, b = ([line | {"seconds": 0} for line in read_metrics(made.folder)] for made in (whole, second))
    assert [line["epoch"] for line in b] == [0, 1, 2]
    assert a == b


def test_another_seed_gives_other_weights(place):
    one, other = parts(place, "one"), parts(place, "other", seed=2)
    train(one)
    train(other)
    assert not torch.equal(weights(one), weights(other))


def test_losses_that_stay_non_finite_end_the_run_and_name_the_case(tmp_path):
    write_cases(tmp_path / "cases", spoil="b")
    made = parts(tmp_path, augmentation="none", max_bad_steps=3, epochs=50)
    with pytest.raises(AutosegError, match=r"not finite in 3 steps in a row.*\bb\b"):
        train(made)
    recorded = [json.loads(line) for line in (made.folder / BAD_STEPS).read_text().splitlines()]
    assert all("b" in [patch["case"] for patch in line["patches"]] for line in recorded)
    assert torch.isfinite(weights(made)).all()


def test_a_bad_batch_leaves_no_trace_in_the_statistics_of_norms(tmp_path):
    write_cases(tmp_path / "cases", spoil="b")
    made = parts(tmp_path, augmentation="none", max_bad_steps=50)
    network = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, LABELS.heads, 1))
    made = replace(made, network=network, scales=((1, 1, 1),), recipe=replace(made.recipe, deep_supervision=False))
    state = train(made)
    assert 0 < state.skipped_steps < state.step
    assert all(torch.isfinite(tensor).all() for tensor in made.network.state_dict().values())
    assert network[0].running_mean.abs().sum() > 0


def test_a_broken_case_ends_the_run(place):
    for file in (place / "cases" / "c").iterdir():
        file.write_bytes(b"")
    with pytest.raises(AutosegError, match="case c"):
        train(parts(place, epochs=100))


def test_a_rolling_mean_leaves_out_epochs_without_a_loss():
    lines = [{"loss": loss} for loss in (100.0, None, 4.0, None, 8.0, None)]
    assert rolling(lines, "loss") == 6.0
    assert rolling(lines[-1:], "loss") is None and rolling([], "loss") is None
