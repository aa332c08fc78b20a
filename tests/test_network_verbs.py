"""Every network through every verb: a table in which each meets each verb, and no two the same mixture of choices.

A row trains, stops, goes on, is exported, predicts from the file, is averaged with another fold and with another
network, and is fine-tuned from its file. Rows take turns in what else there is: 2D or 3D, as the second stage of a
cascade or alone, which weights are kept, with or without deep supervision. The normal suite has one row a network,
trained by the loop; the slow one has those with the other choices, trained and validated by the verb, and plans and
fits by name.
"""

import json
import shutil
import signal
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from network_contract import narrow
from toys import balls_dataset, network

import autoseg
from autoseg.checkpoint import read_progress, read_weights, save_weights
from autoseg.ensemble import Ensemble
from autoseg.model import at, earlier_folds, open_model
from autoseg.networks import NETWORKS, build
from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.cascade import find_priors
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.fit import FitOptions, fit
from autoseg.pipeline.parts import PRETRAINED, make_parts
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions
from autoseg.pipeline.recipe import SHORT, TrainOptions
from autoseg.pipeline.share import export_model
from autoseg.pipeline.train import train_fold
from autoseg.readers import read_image, read_labels
from autoseg.records import load_json, save_json
from autoseg.schema import NetworkSpec, Recipe, Request, Run
from autoseg.settings import in_json
from autoseg.signals import Requests, Stopped
from autoseg.splits import read_splits
from autoseg.training import WEIGHTS, train
from autoseg.transfer import open_source, transfer
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
CPU = torch.device("cpu")
CASES = ["p0_0", "p0_1", "p1_0"]
QUICK = {"steps_per_epoch": 1, "validation_steps": 1, "tune": False, "keep_probabilities": False}
QUICKLY = {"mirror": False, "step": 1.0}
PATCHES = {"2d": [12, 12], "3d_fullres": [8, 12, 12]}
FIRST = "first"
"""The configuration that the cascades begin with."""


def small(name: str, dimension: int) -> NetworkSpec:
    """The network with three stages of a few features, or as many stages as it must have."""
    five = {"features": (4, 8, 8, 8, 8), "encoder_blocks": (1,) * 5}
    if name.startswith("fc_densenet"):
        spec = narrow(NETWORKS[name].spec(dimension, first_features=5), (3, 4, 5))
        return replace(spec, encoder_blocks=(1, 2, 2), decoder_blocks=(2, 1))
    if name.startswith("fcn"):
        return replace(NETWORKS[name].spec(dimension), **five)
    if name == "resnet34_unet":
        spec = NETWORKS[name].spec(dimension)
        options = {**spec.options, "decoder_features": (3, 4, 4, 4, 4)}
        return replace(spec, **five, decoder_blocks=(1,) * 5, options=options)
    if name == "vgg_unet":
        full = NETWORKS[name].spec(dimension)
        return replace(narrow(full), options={**full.options, "decoder_features": (3, 4)})
    if name == "deeplabv3plus":
        spec = NETWORKS[name].spec(dimension)
        options = {**spec.options, "head_features": 5, "skip_features": 3}
        return replace(spec, **{**five, "encoder_blocks": (2, 1, 1, 2, 2)}, options=options)
    if name == "primus_v3":
        spec = NETWORKS[name].spec(dimension, grid=(2,) * dimension)
        options = {**spec.options, "attention_heads": 2}
        return replace(spec, features=(4, 5, 6, 7, 24), encoder_blocks=(1, 1, 1, 1, 2), options=options)
    options = {"mednext": {"expansion": (2,)}, "slice_unet3d": {"context": 3}, "slice_vnet": {"context": 3}}
    return narrow(NETWORKS[name].spec(dimension, **options.get(name, {})))


def configuration_name(name: str, dimension: int, late: bool) -> str:
    return f"{name}_{dimension}d{'_late' if late else ''}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three prepared cases, and the plan of what they are prepared for; the first stage of cascades is trained."""
    workspace = Workspace(tmp_path_factory.mktemp("verbs"))
    balls_dataset(workspace.raw(NAME), cases=3)
    folds = [{"train": CASES[:2], "val": CASES[2:]}, {"train": CASES[2:], "val": CASES[:2]}]
    (workspace.raw(NAME) / "splits_final.json").write_text(json.dumps(folds))
    fixed = {f"configurations.{name}.patch": patch for name, patch in PATCHES.items()}
    fixed |= {f"configurations.{name}.batch_size": 2 for name in PATCHES}
    fixed |= {f"configurations.{name}.network.features": [4, 6, 8] for name in PATCHES}
    request = Request(changes=in_json(fixed), spacing_mm=(1.6, 1.5, 1.4))
    made = plan_and_preprocess(workspace, "7", PlanOptions(configurations=(*PATCHES,), request=request))
    kept = tuple(made.configuration(name) for name in PATCHES)
    first = replace(made.configuration("3d_fullres"), name=FIRST, network=network(3))
    made = replace(made, configurations=(*kept, first))
    save_json(made, workspace.plan_folder(NAME, "default") / "plan.json")
    for fold in ("0", "1"):
        train_row(workspace, FIRST, fold=fold)
    return workspace, made


def planned(place, *rows):
    """The plan with a configuration for each row (network, dimension, whether it is the second stage of a cascade)."""
    workspace, made = place
    bases, added = {one.dimension: one for one in made.configurations if one.name in PATCHES}, []
    for name, dimension, late in rows:
        spec = small(name, dimension)
        # Where its place is told, the axes along which there may be mirror images all the same.
        axes = (dimension - 1,) if "position" in spec.options else None
        one = replace(bases[dimension], network=spec, context=spec.slices, mirror_axes=axes)
        where = configuration_name(name, dimension, late)
        added.append(replace(one, name=where, previous_stage=FIRST if late else None))
    made = replace(made, configurations=(*made.configurations, *added))
    save_json(made, workspace.plan_folder(NAME, "default") / "plan.json")
    return made


def train_row(workspace, where, run="default", fold="0", **changes):
    """One fold of the configuration `where`, trained by the verb for two epochs of one step; its folder."""
    options = TrainOptions(run=run, epochs=2, device="cpu", changes=QUICK | changes)
    train_fold(workspace, "7", where, fold, options)
    return workspace.fold(NAME, run, where, int(fold))


def run_of(workspace, made, where, **changes):
    """As the verb begins it, to be trained by the loop alone, without scores and curves."""
    splits = read_splits(workspace.prepared(NAME) / "splits.json", CASES)
    return Run(
        autoseg_version=autoseg.__version__,
        versions={},
        dataset=NAME,
        configuration=where,
        fold=0,
        cases=splits.fold(0),
        plan=made,
        recipe=Recipe(**QUICK, **SHORT, epochs=2, **changes),
        data_hash=made.data_hash,
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:01+00:00",
    )


def parts_of(workspace, run, folder):
    configuration = run.plan.configuration(run.configuration)
    splits = read_splits(workspace.prepared(NAME) / "splits.json", CASES)
    priors = find_priors(workspace, run.plan, configuration, "default", run.cases, splits, CPU)
    return make_parts(
        run, configuration, workspace.cases(NAME, "default", configuration.prepared), folder, CPU, priors, {}
    )


def check_going_on(workspace, folder, again):
    """The run in `folder`, trained once more in `again` with a stop after its first epoch, has the same weights."""
    run = load_json(Run, folder / "run.json")
    requests = Requests()

    def stop(lines):
        requests.stop = signal.SIGTERM

    with pytest.raises(Stopped):
        train(parts_of(workspace, run, again), stop, requests)
    begun = read_progress(again)
    assert (begun.step, begun.epoch) == (1, 1)
    train(parts_of(workspace, run, again))
    whole, parts = (read_weights(one / WEIGHTS) for one in (folder, again))
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])] == []


def check_file(workspace, folder, path, validated):
    """Exported to `path` the fold predicts what its folder predicts, or what was written when it was validated."""
    where = folder.parent.name
    export_model(workspace, path, PredictOptions(dataset="7", configuration=where, folds=("0",), device="cpu"), "", "")
    loaded, model = autoseg.load(path, device="cpu"), at(folder).open(CPU)
    image = workspace.raw(NAME) / "imagesTr" / "p1_0_0000.nii.gz"
    case = model.prepare("p1_0", *read_image([image]))
    found = loaded.model.logits(case)
    assert found.std() > 0
    # Kernels may round otherwise where a tensor begins at another place in memory.
    if validated:
        written, _ = read_labels(folder / "validation" / "p1_0.nii.gz")
        assert (loaded.model.labels(found, case.trace) != written.array.squeeze()).mean() < 0.01
    else:
        np.testing.assert_allclose(found, model.logits(case), rtol=1e-3, atol=1e-4)


def check_averages(workspace, folder, place):
    """Of two folds the mean of their logits, with another network the mean of the probabilities."""
    second = place / "fold_1"
    second.mkdir()
    shutil.copy(folder / "run.json", second)
    model = at(folder).open(CPU)
    torch.manual_seed(7)
    other = build(model.configuration.network, model.plan.in_channels(model.configuration), model.plan.labels.heads)
    save_weights(other, second / WEIGHTS)
    two = open_model([folder, second], CPU, earlier_folds(folder))
    image = workspace.raw(NAME) / "imagesTr" / "p0_0_0000.nii.gz"
    volume, stored = read_image([image])
    case = two.prepare("p0_0", volume, stored)
    each = [replace(two, networks=(network,)).logits(case, **QUICKLY) for network in two.networks]
    assert not np.allclose(*each)
    np.testing.assert_allclose(two.logits(case, **QUICKLY), np.mean(each, 0), rtol=1e-3, atol=1e-4)

    first = open_model([workspace.fold(NAME, "default", FIRST, 0)], CPU)
    both = Ensemble(members=(model, first))
    mixed = both.prepare("p0_0", volume, stored)
    found = both.probabilities(both.logits(mixed, **QUICKLY), mixed.trace)
    alone = [one.probabilities(one.logits(own, **QUICKLY), own.trace) for one, own in zip(both.members, mixed.members)]
    np.testing.assert_allclose(found, np.mean(alone, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)


def check_start(path, folder):
    """A network that begins with the file takes every tensor over."""
    run = load_json(Run, folder / "run.json")
    configuration = run.plan.configuration(run.configuration)
    fresh = build(configuration.network, run.plan.in_channels(configuration), run.plan.labels.heads)
    begin, lines = transfer(fresh, run.plan, configuration, open_source(path, run.configuration))
    assert {line.what for line in lines} == {"reused"}
    assert all(torch.equal(begin[name], tensor) for name, tensor in read_weights(folder / WEIGHTS).items())


def check_row(workspace, folder, tmp_path, validated):
    check_going_on(workspace, folder, tmp_path / "again")
    check_file(workspace, folder, tmp_path / "one.autoseg", validated)
    check_averages(workspace, folder, tmp_path)
    check_start(tmp_path / "one.autoseg", folder)


ROWS = [
    (name, NETWORKS[name].dimensions[number % len(NETWORKS[name].dimensions)], number // 2 % 2 == 1, kept, deep)
    for number, (name, kept, deep) in enumerate(
        zip(NETWORKS, cycle(("last", "ema", "best")), cycle((True, True, False)))
    )
]
"""Network, dimension, whether it is the second stage of a cascade, which weights are kept, deep supervision."""
OTHER_ROWS = [
    (
        name,
        NETWORKS[name].dimensions[(NETWORKS[name].dimensions.index(dimension) + 1) % len(NETWORKS[name].dimensions)],
        not late,
        {"last": "ema", "ema": "best", "best": "last"}[kept],
        not deep,
    )
    for name, dimension, late, kept, deep in ROWS
]


@pytest.mark.parametrize(("name", "dimension", "late", "weights", "deep"), ROWS)
def test_every_network_through_every_verb(place, tmp_path, name, dimension, late, weights, deep):
    workspace, _ = place
    made, where = planned(place, (name, dimension, late)), configuration_name(name, dimension, late)
    folder = workspace.fold(NAME, "default", where, 0)
    run = run_of(workspace, made, where, weights=weights, deep_supervision=deep)
    train(parts_of(workspace, run, folder))
    save_json(run, folder / "run.json")
    check_row(workspace, folder, tmp_path, validated=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimension", "late", "weights", "deep"), OTHER_ROWS)
def test_every_network_through_every_verb_otherwise(place, tmp_path, name, dimension, late, weights, deep):
    """With the other choices, and trained and validated by the verb."""
    workspace, _ = place
    planned(place, (name, dimension, late))
    where = configuration_name(name, dimension, late)
    folder = train_row(workspace, where, weights=weights, deep_supervision=deep)
    # In validation the priors of a second stage are of one fold, in prediction of all.
    check_row(workspace, folder, tmp_path, validated=not late)


def test_the_table_has_every_network_in_every_dimension_alone_and_as_a_second_stage():
    for number, name in enumerate(NETWORKS):
        first, other = ROWS[number], OTHER_ROWS[number]
        assert first[0] == other[0] == name
        assert {first[1], other[1]} == {*NETWORKS[name].dimensions}
        assert {first[2], other[2]} == {first[4], other[4]} == {True, False}
    assert {row[1:3] for row in ROWS} == {(dimension, late) for dimension in (2, 3) for late in (True, False)}


@pytest.mark.slow
def test_different_networks_are_compared_and_the_best_is_followed(place, tmp_path):
    """One that is told its place, one that sees slices, one with an auxiliary head, in 3D and 2D."""
    workspace, _ = place
    rows = [("relative_unet3d", 3, False), ("slice_vnet", 2, False), ("fcn_resnet50", 2, False)]
    planned(place, *rows)
    names = [configuration_name(*row) for row in rows]
    for where in names:
        for fold in ("0", "1"):
            train_row(workspace, where, run="pair", fold=fold, keep_probabilities=True)
    choice = find_best(workspace, "7", BestOptions(runs=("pair",), device="cpu", workers=1))
    assert len(choice.candidates) == 6
    assert {member.folder for one in choice.candidates for member in one.members} == {*names}
    loaded = autoseg.load(workspace.root / "runs" / NAME / "pair", device="cpu")
    image = workspace.raw(NAME) / "imagesTr" / "p0_0_0000.nii.gz"
    assert loaded.predict(image).labels.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(image))).shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("relative_vnet(size=tiny, width=2)", "3d_fullres"),
        ("slice_unet3d(size=tiny, width=2, context=3)", "2d"),
        ("unet3d_nohighway(size=tiny, width=2)", "3d_fullres"),
        ("multires_unet(width=4, stages=3)", "2d"),
        ("mednext(width=4, kernel=5)", "3d_fullres"),
    ],
)
def test_a_fit_by_name_plans_trains_and_is_gone_on_with_from_its_model(tmp_path, text, where):
    workspace = Workspace(tmp_path)
    balls_dataset(workspace.raw(NAME), cases=3)
    options = FitOptions(
        plan=PlanOptions(name="own", request=Request(network=text), configurations=(where,)),
        train=TrainOptions(plan="own", run="own", epochs=1, device="cpu", changes=QUICK | {"batch_size": 2}),
        configurations=(where,),
        folds=(0,),
    )
    (card,) = fit(workspace, "7", options)
    assert card.configuration == where
    chosen = PredictOptions(dataset="7", configuration=where, run="own", device="cpu")
    export_model(workspace, tmp_path / "one.autoseg", chosen, "", "")
    tuned = replace(options.train, run="tuned", pretrained=tmp_path / "one.autoseg")
    train_fold(workspace, "7", where, "0", tuned)
    fold = workspace.fold(NAME, "tuned", where, 0)
    assert " 0 adapted, 0 new" in (fold / PRETRAINED).read_text()
