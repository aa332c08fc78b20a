"""Left and right where images are mirrored: batches, views at prediction, and a phantom that only place tells apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ball, configuration, grid
from toys import plan as toy_plan

import autoseg
from autoseg.augment import make_augmentation
from autoseg.augment.classic import _mirrors
from autoseg.augment.default import DefaultAugmentation, rotation_limit_rad
from autoseg.augment.geometry import rename
from autoseg.augment.policy import DEFAULT
from autoseg.inference import Swap, count_views, predict_logits
from autoseg.labels import UNSEEN, Labels
from autoseg.mirroring import ALL_AXES, Flips, Mirroring
from autoseg.model import Model
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.share import export_model
from autoseg.pipeline.train import train_fold
from autoseg.preprocess import prepare
from autoseg.readers import read_labels, write_image, write_labels
from autoseg.records import load_json, save_json, to_json
from autoseg.schema import Fingerprint, Request
from autoseg.settings import in_json
from autoseg.volume import Volume
from autoseg.workspace import Workspace

SIDES = (0, 2, 1)
"""Of the classes left and right: what each becomes."""


def told_apart(axes, left_right, indices=SIDES) -> Flips:
    return Flips(axes=tuple(axes), left_right=left_right, indices=indices, heads=indices)


def by_place(shape, axis) -> torch.Tensor:
    """Left, 1, beyond the middle of an axis; right, 2, before it; nothing in the middle."""
    places = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    twice = 2 * places - (shape[axis] - 1)
    return torch.where(twice > 0, 1, torch.where(twice < 0, 2, 0)).expand(shape).clone()


# Batches.


def test_renaming_nothing_and_by_hand():
    empty = torch.zeros(2, 3, dtype=torch.int64)
    rename(empty, SIDES)
    assert not empty.any()
    labels = torch.tensor([UNSEEN, 0, 1, 2, 3, 4], dtype=torch.int16)
    rename(labels, (0, 2, 1, 3, 4))
    assert labels.tolist() == [UNSEEN, 0, 2, 1, 3, 4] and labels.dtype == torch.int16


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([((5, 7, 11), 0), ((5, 7, 11), 1), ((5, 7, 11), 2), ((9, 14), 0), ((9, 14), 1), ((2, 9, 11), 2)]),
)
def test_labels_of_a_batch_always_agree_with_place(seed, drawn):
    patch, across = drawn
    augmentation = DefaultAugmentation(
        policy=replace(DEFAULT, rotation=0, noise=0, blur=0, low_resolution=0, gamma=0, gamma_inverted=0),
        patch=patch,
        dimension=len(patch),
        masked=(False,),
        flips=told_apart(range(len(patch)), across),
    )
    draws = augmentation.draw(np.random.default_rng(seed), 4, 1)
    shapes = [draws.source_shape(sample) for sample in range(4)]
    labels = [by_place(shape, across).short() for shape in shapes]
    # Left is bright in the image, whatever becomes of the label.
    image, moved = augmentation.apply(draws, [((label == 1).float()[None], label) for label in labels])
    assert torch.equal(moved, by_place(patch, across).expand(4, *patch))
    assert torch.equal(augmentation.follow(draws, labels), moved)
    bright = [image[sample, 0][moved[sample] == 1].mean() > 0.5 for sample in range(4)]
    assert bright == (~draws.mirrored[:, across]).tolist()


def test_without_sides_the_same_numbers_are_drawn_as_ever():
    masked = {"dimension": 3, "masked": (False,)}
    ever = make_augmentation("default", patch=(5, 7, 11), **masked)
    told = make_augmentation("default", patch=(5, 7, 11), **masked, flips=told_apart((0, 1, 2), 2))
    less = make_augmentation("default", patch=(5, 7, 11), **masked, flips=Flips(axes=(0, 1), left_right=2))
    generators = [np.random.default_rng((0, 0, 0)) for _ in range(3)]
    draws = [each.draw(rng, 4, 2) for each, rng in zip((ever, told, less), generators)]
    # As they were before any plan told left from right.
    assert draws[0].mirrored.tolist() == [[False] * 3, [True, True, False], [True] * 3, [False, True, True]]
    assert [rng.random() for rng in generators] == [0.8735226311207321] * 3
    for other in draws[1:]:
        for field in ("affine", "noise_sigma", "noise_seed", "blur_sigma", "brightness", "zoom", "gamma"):
            np.testing.assert_array_equal(getattr(other, field), getattr(draws[0], field))
    assert (draws[1].mirrored == draws[0].mirrored).all()
    assert (draws[2].mirrored == draws[0].mirrored & [True, True, False]).all()


def test_no_half_turn_where_it_would_make_the_other_mirror_image():
    degrees = [
        round(np.rad2deg(rotation_limit_rad(patch, across)))
        for patch, across in [
            ((9, 12), None), ((9, 12), 0), ((9, 12), 1), ((9, 30), 1),
            ((3, 12, 12), None), ((3, 12, 12), 0), ((3, 12, 12), 1), ((3, 12, 12), 2), ((9, 12, 12), 2),
        ]
    ]  # fmt: skip
    assert degrees == [180, 30, 30, 15, 180, 180, 30, 30, 30]


@pytest.mark.parametrize("across", [0, 1, 2])
def test_batchgenerators_mirrors_sides_with_their_labels(across):
    shape, batch = (5, 7, 11), 24
    labels = by_place(shape, across)
    # Beside the sides, a number that tells whether each axis was mirrored.
    places = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij"))
    data = {
        "data": places.expand(batch, -1, *shape).numpy().copy(),
        "seg": labels.expand(batch, 1, *shape).numpy() * 1.0,
    }
    np.random.seed(3)  # noqa: NPY002 - its own generator
    for step in _mirrors(told_apart((0, 1, 2), across), 3):
        data = step(**data)
    seen = {tuple(bool(sample[axis].take(0, axis).mean() > 0) for axis in range(3)) for sample in data["data"]}
    assert len(seen) == 8
    assert (data["seg"] == labels.numpy()).all()


def test_batchgenerators_leaves_forbidden_axes_alone():
    places = np.linspace(-1, 1, 11) * np.ones((24, 1, 5, 7, 1))
    data = {"data": places.astype(np.float32), "seg": np.zeros((24, 1, 5, 7, 11))}
    for step in _mirrors(Flips(axes=(0, 1), left_right=2), 3):
        data = step(**data)
    assert (data["data"] == places.astype(np.float32)).all()
    assert _mirrors(Flips(axes=()), 3) == []
    assert len(_mirrors(ALL_AXES, 2)) == 1


# Views.


def by_ramp(x):
    """Left, the second head, the more the further along the last axis; right, the third, the less; whatever it sees."""
    ramp = torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 1, *x.shape[2:])
    return torch.cat((0 * ramp, ramp, -ramp), 1)


def test_heads_trade_places_in_mirrored_views_by_hand():
    image, patch = torch.zeros(1, 4, 6, 8), (4, 6, 8)
    ask = {"patch": patch, "heads": 3, "mirror_axes": (0, 1, 2)}
    ramp = torch.linspace(-1, 1, 8).expand(patch)
    swapped = predict_logits([by_ramp], image, swap=Swap(axis=2, channels=(0,), heads=SIDES), **ask)
    torch.testing.assert_close(swapped, torch.stack((0 * ramp, ramp, -ramp)))
    assert predict_logits([by_ramp], image, **ask).abs().max() < 1e-6
    with pytest.raises(ValueError, match="swap orders 1 channels and 2 heads"):
        predict_logits([by_ramp], image, swap=Swap(axis=2, channels=(0,), heads=(1, 0)), **ask)


class Placed(torch.nn.Module):
    """Says a class where its mask is and the class should lie: left, the first mask, beyond the middle of an image.

    `background`: whether there is a head for it.
    """

    def __init__(self, background):
        super().__init__()
        self.background, self.calls = background, 0

    def forward(self, x):
        self.calls += len(x)
        place = by_place(x.shape[2:], x.ndim - 3)
        heads = [x[:, 1] * (place == 1), x[:, 2] * (place == 2)]
        return torch.stack([0 * x[:, 0]] * self.background + heads, 1)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8)])
def test_masks_and_heads_of_a_cascade_trade_places_together(regions, patch):
    labels = Labels.from_dataset({"background": 0, "left": 5, "right": 6})
    if regions:
        labels = Labels(names=("background", "left", "right"), values=(0, 5, 6), regions=((5,), (6,)))
    second = configuration(
        name="second", patch=patch, spacing_mm=(3.0, 1.0, 0.5)[-len(patch) :], previous_stage="first"
    )
    made = replace(toy_plan(second), labels=labels, mirroring=Mirroring(left_right=2, swapped=((1, 2),)))
    image = np.random.default_rng(0).normal(5, 1, (1, 5, 7, 10)).astype(np.float32)
    here = grid(image.shape[1:])
    case = prepare("a", Volume(array=image, grid=here), None, here, made, second)
    prior = by_place(case.labels.shape, 2).numpy()
    # One tile along left-right, so that place in a tile is place in the image.
    wide = replace(second, patch=(*patch[:-1], case.labels.shape[-1]))

    def logits(plan):
        model = Model(plan=plan, configuration=wide, networks=(Placed(not regions),), device=torch.device("cpu"))
        return model.logits(case, prior=prior)[-2:]

    expected = np.stack([prior == 1, prior == 2])
    np.testing.assert_allclose(logits(made), expected, atol=1e-5)
    # The control: without trading places half of the views disagree.
    np.testing.assert_allclose(logits(replace(made, mirroring=Mirroring())), expected / 2, atol=1e-5)


def test_a_forbidden_flip_halves_the_views():
    made = toy_plan()
    sided = replace(made, mirroring=Mirroring(left_right=2, forbidden=(2,)))
    case = prepare(
        "a", Volume(array=np.ones((1, 5, 7, 11), np.float32), grid=grid()), None, grid(), made, configuration()
    )
    calls = []
    for plan in (made, sided):
        network = Placed(True)
        model = Model(
            plan=plan, configuration=configuration(), networks=(lambda x, n=network: n(x.expand(-1, 3, -1, -1, -1)),),
            device=torch.device("cpu"),
        )  # fmt: skip
        model.logits(case)
        calls.append(network.calls)
        assert network.calls == count_views(case.labels.shape, (4, 6, 8), plan.flips(configuration()).axes)
    assert calls[0] == 2 * calls[1]


# From raw files to predictions.


NAME = "Dataset011_Phantom"
SHAPE = (8, 8, 16)
SMALL = {
    "configurations.3d_fullres.patch": list(SHAPE),
    "configurations.3d_fullres.batch_size": 2,
    "configurations.3d_fullres.network.features": [16, 16],
}
BLIND = {"mirroring.swapped": [], "mirroring.left_right": None}
"""Every axis is mirrored and labels stay what they are, as before."""


def write_phantom(raw):
    """Two equal spheres, left and right of a fainter plate: its own mirror image but for noise and place."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z, y, x = (n // 2 + rng.integers(-1, 1) for n in SHAPE)
        left, right = ball(SHAPE, (z, y, x + 4), 2), ball(SHAPE, (z, y, x - 4), 2)
        plate = np.arange(SHAPE[2]) == x
        image = np.where(left | right, 6.0, 3.0 * plate) + rng.normal(2, 0.2, SHAPE)
        here = grid(SHAPE, (1.0, 1.0, 1.0))
        write_image(image.astype(np.float32), here, raw / "imagesTr" / f"c{seed}_0000.nii.gz")
        write_labels(np.select([left, right], [1, 2]).astype(np.int16), here, raw / "labelsTr" / f"c{seed}.nii.gz")
    named = {"background": 0, "sphere left": 1, "sphere right": 2}
    facts = {"channel_names": {"0": "MR"}, "labels": named, "numTraining": 3, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(facts))
    folds = [{"train": ["c1", "c2"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1", "c2"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))


def swapped(raw, predicted) -> float:
    """Of all voxels of both spheres of the held-out case that were found, the share with the other one's name."""
    truth = read_labels(raw / "labelsTr" / "c0.nii.gz")[0].array[0]
    found = (truth > 0) & (predicted > 0)
    assert found.sum() > 0.8 * (truth > 0).sum()
    return float((truth != predicted)[found].mean())


def trained(workspace, name, changes):
    """Train the first fold with all mirror images that the plan allows; the labels predicted with them."""
    request = Request(changes=in_json(SMALL | changes))
    plan_and_preprocess(workspace, NAME, PlanOptions(configurations=("3d_fullres",), request=request, name=name))
    recipe = {"steps_per_epoch": 50, "validation_steps": 1, "learning_rate": 0.005, "tune": False}
    train_fold(
        workspace, NAME, "3d_fullres", "0", TrainOptions(epochs=2, device="cpu", changes=recipe, plan=name, run=name)
    )
    folder = workspace.fold(NAME, name, "3d_fullres", 0)
    return read_labels(folder / "validation" / "c0.nii.gz")[0].array[0]


def test_a_phantom_that_only_place_tells_apart(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    write_phantom(raw)
    predicted = trained(workspace, "default", {})
    assert "left and right: 1 pair of classes trades places in mirror images along axis 2" in capsys.readouterr().out
    assert swapped(raw, predicted) == 0
    # The control: with mirror images as before, left and right are guessed.
    assert swapped(raw, trained(workspace, "blind", BLIND)) > 0.2

    export_model(workspace, tmp_path / "m.autoseg", PredictOptions(dataset=NAME, run="default"), licence="", note="")
    model = autoseg.load(tmp_path / "m.autoseg", device="cpu")
    assert model.model.plan.mirroring == Mirroring(left_right=2, swapped=((1, 2),))
    assert (model.predict(raw / "imagesTr" / "c0_0000.nii.gz").labels == predicted).all()


def test_fingerprints_of_before_get_what_they_lack_and_cases_stay_prepared(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    write_phantom(raw)
    options = PlanOptions(configurations=("3d_fullres",), request=Request(changes=in_json(SMALL)))
    made = plan_and_preprocess(workspace, NAME, options)
    path = workspace.prepared(NAME) / "fingerprint.json"
    new = load_json(Fingerprint, path)
    for lost in ("voxels", "across"):
        old = replace(new, cases=tuple(replace(case, **{lost: None}) for case in new.cases))
        save_json(old, path)
        capsys.readouterr()
        again = plan_and_preprocess(workspace, NAME, options)
        assert to_json(again) == to_json(made) and load_json(Fingerprint, path) == new
        printed = capsys.readouterr().out
        assert "3 of 3 cases are prepared already" in printed and "fingerprint reused" not in printed
    # Names that say no side need no position: nothing is decoded again.
    facts = json.loads((raw / "dataset.json").read_text())
    facts["labels"] = {"background": 0, "one sphere": 1, "other sphere": 2}
    (raw / "dataset.json").write_text(json.dumps(facts))
    save_json(old, path)
    assert plan_and_preprocess(workspace, NAME, options).mirroring == Mirroring()
    assert "fingerprint reused" in capsys.readouterr().out
