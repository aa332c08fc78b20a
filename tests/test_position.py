"""Networks that are told where their patch lies: one formula in training and prediction, a phantom that needs it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import PATCH, parts, write_cases
from torch import nn
from toys import grid, network

from autoseg.augment import make_augmentation
from autoseg.augment.policy import NONE
from autoseg.evaluation import Summary
from autoseg.inference import predict_logits
from autoseg.networks import NETWORKS
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.readers import write_image, write_labels
from autoseg.records import AutosegError, load_json, to_json
from autoseg.sampling import position_of
from autoseg.schema import Request
from autoseg.settings import in_json
from autoseg.step import batch_loss
from autoseg.team import Team
from autoseg.training import train
from autoseg.volume import Box, relative_place
from autoseg.workspace import Workspace

CPU = torch.device("cpu")


def test_places_by_hand():
    assert [relative_place(start, 4, 12) for start in (0, 2, 4, 8)] == [-1, -0.5, 0, 1]
    assert relative_place(0, 5, 5) == 0
    assert relative_place(-2, 9, 5) == 0
    box = Box(start=(0, -1, 6), stop=(1, 7, 12))
    assert position_of(box, (3, 6, 12), (False, True)) == (0, -1)
    assert position_of(box, (3, 6, 14), (False, True)) == (0, -0.5)
    assert position_of(box, (3, 6, 14), (False, False, False)) == (-1, 0, 0.5)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_the_place_in_the_mirror_image_is_the_negative(edge, beyond, data):
    size = edge + beyond
    start = data.draw(st.integers(0, beyond))
    place = relative_place(start, edge, size)
    assert -1 <= place <= 1
    assert relative_place(beyond - start, edge, size) == pytest.approx(-place, abs=1e-12)


# Training.


@pytest.fixture
def cases(tmp_path):
    write_cases(tmp_path / "cases")
    return tmp_path


def told(made, policy=None, **more):
    augmentation = made.augmentation if policy is None else replace(made.augmentation, policy=policy)
    return replace(made, positions=True, augmentation=augmentation, **more)


def test_a_batch_says_where_its_patches_lie(cases):
    made = parts(cases).training
    plain, with_places = (one.assemble(one.sources(3), CPU) for one in (made, told(made)))
    assert plain.position is None
    assert torch.equal(plain.image, with_places.image) and plain.patches == with_places.patches
    position = with_places.position
    assert position.shape == (2, 3) and position.dtype == torch.float32
    mirrored = told(made).sources(3).draws.mirrored
    for place, patch, flipped in zip(position.tolist(), with_places.patches, mirrored):
        shape = made.cases[patch.case].labels.shape
        free = [n - edge for n, edge in zip(shape, PATCH)]
        expected = [(2 * s / f - 1) * (-1 if m else 1) for s, f, m in zip(patch.box.start, free, flipped)]
        assert place == pytest.approx(expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_patch_is_told_its_place_in_the_mirrored_image(cases, axis):
    """Voxels that say how far beyond the middle of the image they lie: in its mirror image they lie before it."""
    made = told(parts(cases, augmentation="none").training, replace(NONE, mirror=0.5))
    seen = set()
    for step in range(6):
        sources = made.sources(step)
        position = made.assemble(sources, CPU).position[:, axis].tolist()
        for sample, patch in enumerate(sources.patches):
            size, edge = made.cases[patch.case].labels.shape[axis], PATCH[axis]
            line = torch.arange(patch.box.start[axis], patch.box.stop[axis]) - (size - 1) / 2
            ramp = line.reshape([-1 if a == axis else 1 for a in range(3)]).expand(1, *PATCH)
            one = sources.draws.part(slice(sample, sample + 1))
            shown = made.augmentation.apply(one, [(ramp, sources.arrays[sample][1])])[0][0, 0]
            shown = shown.movedim(axis, 0).flatten(1).mean(1)
            flipped = bool(shown[0] > shown[-1])
            middle = shown.mean().item() * (-1 if flipped else 1)
            assert position[sample] == pytest.approx(2 * middle / (size - edge), abs=1e-5)
            seen.add((flipped, middle > 0))
    assert len(seen) == 4


def test_processes_that_share_a_batch_have_the_positions_of_their_own(cases):
    whole = told(parts(cases).training)
    made = whole.assemble(whole.sources(5), CPU)
    halves = [told(parts(cases).training, team=Team(rank=rank, size=2)) for rank in range(2)]
    own = [half.assemble(half.sources(5), CPU).position for half in halves]
    assert [len(one) for one in own] == [1, 1]
    assert torch.equal(torch.cat(own), made.position)


def test_what_does_not_say_which_patches_it_mirrors_is_refused(cases):
    elsewhere = make_augmentation("batchgenerators", patch=PATCH, dimension=3, masked=(False,))
    with pytest.raises(AutosegError, match="augmentation=default or none"):
        replace(parts(cases).training, positions=True, augmentation=elsewhere).sources(0)


class Placed(nn.Module):
    """Two convolutions; the position scales and shifts the channels between."""

    takes_position = True
    scales = ((1, 1, 1),)

    def __init__(self, spec, in_channels, heads):
        super().__init__()
        width = 12
        self.read = nn.Conv3d(in_channels, width, 3, padding=1)
        self.mix = nn.Conv3d(width, width, 3, padding=1)
        self.place = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2 * width))
        self.head = nn.Conv3d(width, heads, 1)
        self.told = []

    def forward(self, x, all_scales=False, position=None):
        position = x.new_zeros(len(x), 3) if position is None else position
        self.told.append(position)
        scale, shift = self.place(position)[:, :, None, None, None].chunk(2, 1)
        logits = self.head((self.mix(self.read(x).relu()) * (1 + scale) + shift).relu())
        return [logits] if all_scales else logits


class Blind(Placed):
    """The same, never told."""

    takes_position = False


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_training_and_its_validation_tell_the_network(cases, deep_supervision):
    made = parts(cases, epochs=1, steps_per_epoch=2, validation_steps=1, deep_supervision=deep_supervision)
    toy = Placed(None, 1, made.labels.heads)
    made = replace(made, network=toy, scales=toy.scales, training=told(made.training), validation=told(made.validation))
    train(made)
    expected = [made.training.assemble(made.training.sources(step), CPU).position for step in range(2)]
    expected.append(made.validation.assemble(made.validation.sources(0), CPU).position)
    assert torch.equal(torch.cat(toy.told), torch.cat(expected))
    # Whoever calls it with an image alone means the middle.
    batch = made.training.assemble(made.training.sources(0), CPU)
    middle = batch_loss(made, replace(batch, position=torch.zeros(2, 3)))[1]
    assert torch.equal(batch_loss(made, replace(batch, position=None))[1], middle)
    assert not torch.equal(batch_loss(made, batch)[1], middle)


# Prediction.


class Map:
    """Says for every voxel of a tile where it lies in the image, from the middle, by the tile's position alone."""

    takes_position = True

    def __init__(self, size, patch):
        self.free = [n - edge for n, edge in zip(size[-len(patch) :], patch)]
        self.patch = patch

    def __call__(self, x, position):
        inside = [torch.arange(edge) - (edge - 1) / 2 for edge in self.patch]
        maps = []
        for axis, line in enumerate(inside):
            middle = position[:, axis] * self.free[axis] / 2
            line = line.reshape([-1 if a == axis else 1 for a in range(len(self.patch))])
            maps.append((middle.reshape(-1, *[1] * len(self.patch)) + line).expand(len(x), *self.patch))
        return torch.stack(maps, 1)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*[st.integers(1, 13)] * 3),
    st.sampled_from([(4, 6, 8), (5, 3, 7), (6, 8), (3, 5)]),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.integers(1, 5),
)
def test_every_window_is_told_its_place(size, patch, step, tile_batch):
    size = tuple(max(n, edge) for n, edge in zip(size, (1,) * (3 - len(patch)) + patch))
    found = predict_logits(
        [Map(size, patch)], torch.zeros(1, *size), patch=patch, heads=len(patch), step=step, tile_batch=tile_batch
    )
    axes = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
    torch.testing.assert_close(found, torch.stack(axes[-len(patch) :]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axes", [(0,), (2,), (0, 1, 2)])
def test_a_mirrored_view_is_told_its_place_in_the_mirror_image(axes):
    """There a voxel lies as far on the other side, so that the mean of both views is 0."""
    size, patch = (5, 9, 14), (4, 6, 8)
    found = predict_logits([Map(size, patch)], torch.zeros(1, *size), patch=patch, heads=3, mirror_axes=axes)
    for axis in range(3):
        assert (found[axis].abs().max() < 1e-5) == (axis in axes)


def test_an_image_within_one_window_and_networks_that_do_not_ask():
    placed = Placed(None, 1, 2).eval()
    predict_logits([placed], torch.zeros(1, 3, 6, 9), patch=(4, 6, 8), heads=2, step=1.0)
    assert torch.cat(placed.told).tolist() == [[0, 0, -1], [0, 0, 1]]

    def deaf(x):
        return x.clone()

    assert not predict_logits([deaf], torch.zeros(1, 3, 6, 9), patch=(4, 6, 8), heads=1).any()


# From raw images to predictions.


NAME = "Dataset012_Places"
SHAPE, WINDOW = (6, 12, 96), (6, 12, 16)


def write_phantom(raw):
    """Equal cubes in noise, `one` in the first part of the last axis and `two` in the last; no window shows both."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        labels = np.zeros(SHAPE, np.int16)
        for value, low in ((1, 0), (2, 58)):
            for x in low + rng.choice(np.arange(0, 36, 3), 7, replace=False):
                z, y = rng.integers(0, 4), rng.integers(0, 9)
                labels[z : z + 3, y : y + 3, x : x + 3] = value
        image = np.where(labels > 0, 4.0, 2.0) + rng.normal(0, 0.3, SHAPE)
        here = grid(SHAPE, (1.0, 1.0, 1.0))
        write_image(image.astype(np.float32), here, raw / "imagesTr" / f"c{seed}_0000.nii.gz")
        write_labels(labels, here, raw / "labelsTr" / f"c{seed}.nii.gz")
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "one": 1, "two": 2}}
    (raw / "dataset.json").write_text(json.dumps(facts | {"numTraining": 4, "file_ending": ".nii.gz"}))
    folds = [{"train": ["c1", "c2", "c3"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1", "c2", "c3"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))


def toy(name):
    return replace(network(), name=f"test_position:{name}")


def trained(workspace, name, spec, mirror_axes, steps=150):
    """Mean Dice of the held-out case."""
    changes = {
        "configurations.3d_fullres.patch": list(WINDOW),
        "configurations.3d_fullres.batch_size": 4,
        "configurations.3d_fullres.network": json.loads(to_json(spec)),
        "configurations.3d_fullres.mirror_axes": mirror_axes,
    }
    request = Request(changes=in_json(changes))
    plan_and_preprocess(workspace, NAME, PlanOptions(configurations=("3d_fullres",), request=request, name=name))
    recipe = {"steps_per_epoch": steps, "validation_steps": 1, "learning_rate": 0.01, "tune": False}
    options = TrainOptions(epochs=2, device="cpu", changes=recipe, plan=name, run=name)
    train_fold(workspace, NAME, "3d_fullres", "0", options)
    folder = workspace.fold(NAME, name, "3d_fullres", 0)
    return load_json(Summary, folder / "validation" / "summary.json").foreground["dice"].mean


def test_a_network_that_asks_needs_a_plan_that_says_which_mirror_images_there_are(tmp_path):
    workspace = Workspace(tmp_path)
    write_phantom(workspace.raw(NAME))
    with pytest.raises(AutosegError, match=r"configurations.3d_fullres.mirror_axes=\[\]"):
        trained(workspace, "default", toy("Placed"), None)
    assert trained(workspace, "none", toy("Placed"), [], steps=2) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["toy", "unet3d"])
def test_a_phantom_that_only_the_position_tells_apart(tmp_path, kind):
    workspace = Workspace(tmp_path)
    write_phantom(workspace.raw(NAME))
    small = {"stages": 3, "width": 4}
    if kind == "toy":
        told, blind = toy("Placed"), toy("Blind")
    else:
        told = NETWORKS["relative_unet3d"].spec(3, position="film", **small)
        blind = NETWORKS["unet3d"].spec(3, **small)
    assert trained(workspace, "told", told, []) > 0.9
    # Never told, one answer is as good as the other for every cube.
    assert trained(workspace, "blind", blind, []) < 0.6
    # Shown a mirror image beside the image, either label is right at every place.
    assert trained(workspace, "mirrored", told, [0, 1, 2]) < 0.6
