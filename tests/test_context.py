"""2D networks that see neighbouring slices: what reaches them in training and prediction, and exact stitching."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planners import fingerprint
from toys import LABELS, balls_dataset, configuration, grid, plan
from typer.testing import CliRunner

from autoseg.augment import make_augmentation
from autoseg.augment.default import DefaultAugmentation
from autoseg.augment.policy import DEFAULT, NONE
from autoseg.cli import app
from autoseg.inference import Swap, predict_logits
from autoseg.labels import UNSEEN
from autoseg.mirroring import Flips
from autoseg.model import Model, open_model
from autoseg.networks import NETWORKS, build
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.planners import PLANNERS, explain, with_context
from autoseg.planners import plan as make_plan
from autoseg.preprocess import prepare
from autoseg.records import AutosegError, load_json, to_json
from autoseg.sampling import PreparedCases, Prior, Sampler, Stream
from autoseg.schema import Plan, Request
from autoseg.settings import in_json
from autoseg.store import write_case
from autoseg.transfer import Source, inputs, transfer
from autoseg.volume import Volume
from autoseg.workspace import Workspace

CPU = torch.device("cpu")
SHAPE, PATCH = (5, 7, 11), (6, 8)


def image_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(context=3, patch=PATCH, **more):
    return configuration("2d", spacing_mm=(1.0, 0.5), patch=patch, context=context, **more)


def middle(context):
    """A network that gives back the middle slice of every channel."""
    return lambda x: x[:, context // 2 :: context].clone()


# Training.


def toy_case(seed=0):
    rng = np.random.default_rng(seed)
    volume = Volume(array=rng.random((2, *SHAPE), np.float32) + 1, grid=grid(SHAPE))
    marked = rng.integers(0, 3, SHAPE).astype(np.int16)
    return prepare("a", volume, marked, grid(SHAPE), plan(channels=("a", "b")), configuration())


@pytest.fixture
def folder(tmp_path):
    write_case(tmp_path, toy_case(), key="a")
    return tmp_path


def sampler(folder, context, patch=PATCH, augmentation="none", prior=None):
    augmentation = make_augmentation(augmentation, patch=patch, dimension=2, masked=(False, False), context=context)
    return Sampler(
        cases=PreparedCases(folder, 1 << 20), case_names=("a",), patch=patch, batch_size=4, foreground_fraction=0.33,
        augmentation=augmentation, seed=3, stream=Stream.TRAINING, prior=prior,
    )  # fmt: skip


def batch_of(made, step=0):
    return made.assemble(made.sources(step), CPU)


@pytest.mark.parametrize("context", [1, 3, 5])
def test_slices_of_a_patch_are_its_neighbours_channel_by_channel(folder, context):
    case = toy_case()
    padded = np.pad(case.image, ((0, 0), (4, 4), (0, 0), (0, 0)))
    seen = set()
    for step in range(4):
        batch = batch_of(sampler(folder, context), step)
        assert batch.image.shape == (4, 2 * context, *PATCH) and batch.labels.shape == (4, *PATCH)
        for sample, patch in enumerate(batch.patches):
            (z, y, x), (_, y_end, x_end) = patch.box.start, patch.box.stop
            seen.add(z)
            for channel in range(2):
                for k in range(context):
                    expected = padded[channel, 4 + z - context // 2 + k, y:y_end, x:x_end]
                    assert np.array_equal(batch.image[sample, channel * context + k], expected)
            assert np.array_equal(batch.labels[sample], case.labels[z, y:y_end, x:x_end])
    assert {0, 4} <= seen, "the ends of the image are among the patches"


def test_the_same_patches_are_drawn_and_moved_as_without_neighbours(folder):
    """Grey values differ, since the statistics of a channel are those of all its slices."""
    for step in range(3):
        one, three = (batch_of(sampler(folder, context, augmentation="default"), step) for context in (1, 3))
        assert one.patches == three.patches
        assert torch.equal(one.labels, three.labels)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 5]), st.booleans())
def test_all_slices_of_a_stack_are_changed_alike(seed, context, shaded):
    """Equal slices stay equal, whatever is drawn but noise; moved alone, the middle one comes out as before."""
    geometry = replace(NONE, rotation=0.7, scaling=0.7, mirror=0.5)
    policy = replace(DEFAULT, noise=0.0) if shaded else geometry
    alone = DefaultAugmentation(policy=policy, patch=PATCH, dimension=2, masked=(False, False))
    stacked = replace(alone, context=context)
    draws = stacked.draw(np.random.default_rng(seed), 3, 2)
    plain = alone.draw(np.random.default_rng(seed), 3, 2)
    slices = [image_of(2, *plain.source_shape(n), seed=n) for n in range(3)]
    marked = [(one[0] > 0).short() for one in slices]
    stacks = [
        (one[:, None].expand(-1, context, -1, -1).contiguous(), label.expand(context, *label.shape).contiguous())
        for one, label in zip(slices, marked)
    ]
    assert [draws.source_shape(n) for n in range(3)] == [(context, *plain.source_shape(n)) for n in range(3)]
    image, labels = stacked.apply(draws, stacks)
    by_slice = image.unflatten(1, (2, context))
    torch.testing.assert_close(by_slice, by_slice[:, :, :1].expand_as(by_slice), atol=1e-5, rtol=0)
    expected, expected_labels = alone.apply(plain, list(zip(slices, marked)))
    # Rounding decides ties of labels.
    assert (labels != expected_labels).float().mean() < 0.02
    torch.testing.assert_close(by_slice[:, :, 0], expected, atol=1e-4, rtol=0)


def test_each_slice_of_a_masked_channel_is_zero_outside_its_own_content():
    augmentation = DefaultAugmentation(
        policy=replace(NONE, noise=1.0, noise_sigma=(0.5, 0.5)),
        patch=PATCH,
        dimension=2,
        masked=(True, False),
        context=3,
    )
    labels = torch.zeros(3, *PATCH, dtype=torch.int16)
    labels[0, :2] = UNSEEN
    labels[2] = UNSEEN
    image, found = augmentation.apply(
        augmentation.draw(np.random.default_rng(0), 1, 2), [(image_of(2, 3, *PATCH), labels)]
    )
    assert (image[0, :3] == 0).flatten(1).sum(1).tolist() == [2 * PATCH[1], 0, PATCH[0] * PATCH[1]]
    assert image[0, 3:].all() and not found.any()


def test_left_and_right_trade_places_in_the_middle_slice():
    flips = Flips(axes=(0, 1), left_right=1, indices=(0, 2, 1), heads=(0, 2, 1))
    augmentation = DefaultAugmentation(
        policy=replace(NONE, mirror=0.5), patch=PATCH, dimension=2, masked=(False,), flips=flips, context=3
    )
    draws = augmentation.draw(np.random.default_rng(1), 8, 1)
    across = draws.mirrored[:, 2]
    assert 0 < across.sum() < 8 and not draws.mirrored[:, 0].any()
    source = (image_of(1, 3, *PATCH), torch.ones(3, *PATCH, dtype=torch.int16))
    _, labels = augmentation.apply(draws, [source] * 8)
    assert [set(label.flatten().tolist()) for label in labels] == [{2 if flipped else 1} for flipped in across]


@pytest.mark.parametrize("corrupted", [False, True])
def test_masks_of_an_earlier_stage_come_with_their_neighbours(folder, corrupted):
    case = toy_case()
    prior = Prior(maps=lambda name: case.labels, foreground=(1, 2), corrupted=corrupted)
    for augmentation in ("none", "default"):
        batch = batch_of(sampler(folder, 3, augmentation=augmentation, prior=prior))
        assert batch.image.shape == (4, 2 * 3 + 2 * 3, *PATCH)
        masks = batch.image[:, 6:].unflatten(1, (2, 3))
        assert set(masks.unique().tolist()) <= {0.0, 1.0}
        if not corrupted:
            expected = torch.stack([batch.labels == index for index in (1, 2)], 1).float()
            assert torch.equal(masks[:, :, 1], expected), "the truth as prior moves with the labels"
            z, y, x = batch.patches[0].box.start
            if augmentation == "none" and z:
                below = case.labels[z - 1, y : y + PATCH[0], x : x + PATCH[1]]
                assert np.array_equal(masks[0, 1, 0], below == 2)


@pytest.mark.parametrize("name", ["batchgenerators", "anywhere:mine"])
def test_what_cannot_change_slices_alike_is_refused(name):
    with pytest.raises(AutosegError, match="augmentation=default or none"):
        make_augmentation(name, patch=PATCH, dimension=2, masked=(False,), context=3)


# Prediction.


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from([(), (1,), (0, 1)]),
    st.sampled_from([0.4, 0.5, 1.0]),
)
def test_the_middle_slices_are_stitched_back_into_the_image(size, patch, context, mirror_axes, step):
    image = image_of(2, *size)
    logits = predict_logits(
        [middle(context)], image, patch=patch, heads=2, context=context, mirror_axes=mirror_axes, step=step
    )
    torch.testing.assert_close(logits, image, atol=3e-6, rtol=1e-6)


def test_a_network_sees_each_neighbour_and_zeros_beyond_the_ends():
    image = image_of(2, *SHAPE)
    logits = predict_logits([lambda x: x.clone()], image, patch=PATCH, heads=10, context=5)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 0, 2, 2))
    expected = torch.stack([padded[c, k : k + SHAPE[0]] for c in range(2) for k in range(5)])
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["unet", "slice_unet3d"])
def test_a_slice_is_predicted_from_its_nearest_neighbours_only(name):
    torch.manual_seed(0)
    spec = flat().network if name == "unet" else NETWORKS[name].spec(2, context=5, stages=2, width=2)
    here = flat(context=5) if name == "unet" else replace(flat(context=5), network=spec)
    network = build(here.network, plan(here).in_channels(here), 3).eval()
    image = image_of(1, 9, 7, 11)

    def predicted(given):
        return predict_logits([network], given, patch=PATCH, heads=3, context=5, mirror_axes=(0, 1))

    before = predicted(image)
    for changed in range(9):
        other = image.clone()
        other[:, changed] += 1
        moved = (predicted(other) != before).flatten(2).any(2).any(0)
        assert moved.tolist() == [abs(k - changed) <= 2 for k in range(9)]


def test_training_and_prediction_show_a_network_the_same(folder):
    """Patches as large as the slices: what a tile holds is what a sample holds."""
    seen = []

    def network(x):
        seen.append(x.clone())
        return x[:, 1::3].clone()

    case = toy_case()
    predict_logits([network], torch.from_numpy(case.image), patch=(9, 13), heads=2, context=3)
    tiles = torch.cat(seen)
    made = sampler(folder, 3, patch=(9, 13))
    for step in range(3):
        batch = batch_of(made, step)
        for sample, patch in enumerate(batch.patches):
            assert torch.equal(batch.image[sample], tiles[patch.box.start[0]])


def test_places_are_traded_with_all_slices_in_mirrored_views():
    image = image_of(2, *SHAPE)
    seen = []

    def network(x):
        seen.append(x.clone())
        return x[:, 1::3].clone()

    swap = Swap(axis=1, channels=(1, 0), heads=(1, 0))
    logits = predict_logits(
        [network], image, patch=(7, 11), heads=2, context=3, mirror_axes=(1,), swap=swap, tile_batch=1
    )
    torch.testing.assert_close(logits, image, atol=2e-6, rtol=1e-6)
    plain, mirrored = seen[:2]
    assert torch.equal(mirrored.flip(3), plain[:, [3, 4, 5, 0, 1, 2]])


@pytest.mark.parametrize(("context", "patch"), [(2, PATCH), (0, PATCH), (3, (4, 6, 8))])
def test_a_context_that_cannot_be_is_refused(context, patch):
    with pytest.raises(ValueError, match="odd number of slices"):
        predict_logits([middle(1)], image_of(1, *SHAPE), patch=patch, heads=1, context=context)


@torch.no_grad()
def test_a_model_of_a_later_stage_sees_the_neighbours_of_the_masks():
    here = flat(previous_stage="3d_fullres")
    made = plan(here, configuration())
    heads = LABELS.heads
    assert made.in_channels(here) == 3 * (1 + 2)

    def network(x):
        return x[:, [1, 4, 6]].clone()  # image; first mask; second mask one slice below

    model = Model(plan=made, configuration=here, networks=(network,), device=CPU)
    volume = Volume(array=np.random.default_rng(0).random((1, *SHAPE), np.float32), grid=grid(SHAPE))
    case = prepare("a", volume, None, grid(SHAPE), made, configuration())
    prior = np.random.default_rng(1).integers(0, 3, SHAPE)
    logits = model.logits(case, prior=prior)
    below = np.concatenate([np.zeros((1, *SHAPE[1:])), prior[:-1] == 2])
    np.testing.assert_allclose(logits, np.stack([case.image[0], prior == 1, below]), atol=3e-6)
    assert logits.shape[0] == heads


# Plans, files, other weights.


def fresh_plan():
    return make_plan(fingerprint((4, (36, 50, 35), (1, 1, 1))), LABELS, PLANNERS["unet"])


def test_a_plan_says_how_many_slices_and_why():
    before = fresh_plan()
    made = with_context(before, 5)
    assert {c.name: c.context for c in made.configurations} == {
        c.name: 5 if c.dimension == 2 else 1 for c in before.configurations
    }
    assert [replace(c, context=1) for c in made.configurations] == [*before.configurations]
    assert "2d: context: 5 slices, 5 input channels instead of 1" in explain(made)
    assert "sees 5 slices" in explain(made)
    assert with_context(made, 1).configurations == before.configurations


@pytest.mark.parametrize(
    ("slices", "asked", "words"),
    [
        (4, (), "give an odd number"),
        (0, (), "give an odd number"),
        (-3, (), "give an odd number"),
        (33, (), "at most 31"),
        (5, ("3d_fullres",), "add -c 2d, or leave out"),
    ],
)
def test_a_context_is_refused_with_the_cure(slices, asked, words):
    with pytest.raises(AutosegError, match=words):
        with_context(fresh_plan(), slices, asked)


def test_a_context_of_plans_that_have_none_is_refused():
    made = fresh_plan()
    spatial = replace(made, configurations=tuple(c for c in made.configurations if c.dimension == 3))
    with pytest.raises(AutosegError, match="3D configurations only, which see all slices anyway"):
        with_context(spatial, 3)
    with pytest.raises(AutosegError, match="are 2D and have no neighbouring slices"):
        with_context(replace(made, dimension=2), 3)


def test_a_file_with_an_impossible_context_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    for context, where, words in (
        (4, flat(), "odd number"),
        (33, flat(), "up to 31"),
        (3, configuration(), "3D and sees"),
    ):
        content = json.loads(to_json(plan(replace(where, context=1))))
        content["configurations"][0]["context"] = context
        path.write_text(json.dumps(content))
        with pytest.raises(AutosegError, match=words):
            load_json(Plan, path)
    with pytest.raises(ValueError, match="no neighbouring slices"):
        replace(plan(flat()), dimension=2)


@torch.no_grad()
def test_a_2d_network_goes_on_with_neighbours_as_it_was():
    """Neighbours begin at zero, so that the first step predicts as the network without them."""
    alone, near = plan(flat(1), channels=("a", "b")), plan(flat(3), channels=("a", "b"))
    assert inputs(alone, flat(1)) == ("a", "b")
    assert inputs(near, flat(3)) == (
        "a of slice -1", "a", "a of slice +1", "b of slice -1", "b", "b of slice +1"
    )  # fmt: skip
    torch.manual_seed(0)
    old, new = build(flat(1).network, 2, 3).eval(), build(flat(3).network, 6, 3).eval()
    source = Source(words="", tensors=old.state_dict(), plan=alone, configuration=flat(1))
    begin, lines = transfer(new, near, flat(3), source)
    new.load_state_dict(begin)
    image = image_of(1, 6, *PATCH)
    torch.testing.assert_close(new(image), old(image[:, 1::3]), atol=1e-5, rtol=1e-5)
    assert [line.what for line in lines].count("adapted") == 1
    # Of channels that are all strange, each begins as the mean of the old ones, weighing as much together.
    other = plan(flat(3), channels=("c", "d"))
    strange, _ = transfer(build(flat(3).network, 6, 3), other, flat(3), source)
    entry = next(line.tensor for line in lines if line.what == "adapted")
    expected = old.state_dict()[entry].mean(1, keepdim=True).expand(-1, 6, -1, -1) / 3
    torch.testing.assert_close(strange[entry], expected)


@pytest.mark.parametrize("context", [3, 5, 7])
def test_only_the_first_convolution_is_another(context):
    made = plan(flat(context), channels=("a", "b"))
    with torch.device("meta"):
        alone, near = (build(flat().network, count, 3) for count in (2, made.in_channels(flat(context))))
    shapes = [{name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (alone, near)]
    other = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert other == {near.first_weight} and shapes[0].keys() == shapes[1].keys()
    features, _, *kernel = shapes[0][near.first_weight]
    assert shapes[1][near.first_weight] == (features, 2 * context, *kernel)


def test_a_network_that_is_told_of_its_slices_is_told_the_right_number():
    spec = replace(flat().network, options={"context": 5})
    with pytest.raises(ValueError, match="told of 5 slices in its options, and context is 3"):
        replace(flat(3), network=spec)
    made = fresh_plan()
    told = replace(flat(5), network=spec)
    with pytest.raises(AutosegError, match=r"ask for the network unet\(context=3\)"):
        with_context(replace(made, configurations=(told,)), 3)


NAME = "Dataset007_Balls"
SMALL = {
    "configurations.2d.patch": [16, 16],
    "configurations.2d.batch_size": 4,
    "configurations.2d.network.features": [4, 8, 12],
}


def test_from_raw_images_to_predictions_with_neighbours(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    balls_dataset(workspace.raw(NAME))
    options = PlanOptions(configurations=("2d",), request=Request(context=3, changes=in_json(SMALL)))
    made = plan_and_preprocess(workspace, "7", options)
    assert made.configuration("2d").context == 3
    assert "3 slices, 3 input channels instead of 1" in capsys.readouterr().out
    quick = {"steps_per_epoch": 4, "validation_steps": 1, "tune": False}
    train_fold(workspace, "7", "2d", "0", TrainOptions(epochs=2, device="cpu", changes=quick))
    folder = workspace.fold(NAME, "default", "2d", 0)
    model = open_model([folder], CPU)
    assert model.networks[0].state_dict()[model.networks[0].first_weight].shape[1] == 3
    assert (folder / "validation" / "summary.json").is_file()

    run = CliRunner().invoke
    place = ["--workspace", str(tmp_path)]
    again = run(app, ["plan_and_preprocess", "-d", "7", "-c", "2d", "--context", "4", *place])
    assert again.exit_code and "give an odd number" in str(again.exception)
    again = run(app, ["plan_and_preprocess", "-d", "7", "--set", "configurations.2d.context=5", *place])
    assert again.exit_code and "use the option --context" in str(again.exception)


def test_slices_for_what_would_not_be_trained_are_refused_with_the_cure(tmp_path):
    workspace = Workspace(tmp_path)
    balls_dataset(workspace.raw(NAME))
    options = PlanOptions(request=Request(context=3), choose=lambda made: ("3d_fullres",))
    with pytest.raises(AutosegError, match=r"is for 2d, and only 3d_fullres is asked for; add -c 2d"):
        plan_and_preprocess(workspace, "7", options)
    assert not workspace.plan_folder(NAME, "default").exists()
