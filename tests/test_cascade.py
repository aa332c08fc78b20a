"""The cascade: which folds it needs, that its inputs were predicted by folds that had not seen them, both stages."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import TINY, balls_dataset, write_balls

from autoseg.augment import make_augmentation
from autoseg.layout import open_dataset
from autoseg.model import earlier_folds, open_model
from autoseg.pipeline.cascade import NextStage, find_priors, held_out_by, map_path, maps_folder
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.preparing import preprocess
from autoseg.pipeline.probabilities import find_probabilities
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.readers import read_labels
from autoseg.records import AutosegError, load_json, save_json
from autoseg.restore import project
from autoseg.sampling import PreparedCases, Prior, Sampler, Stream
from autoseg.schema import Fingerprint, Fold
from autoseg.splits import Splits, read_splits
from autoseg.store import StoredArray, read_case, stored_key
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
QUICK = {"steps_per_epoch": 8, "validation_steps": 1, "learning_rate": 0.02, "momentum": 0.9}
TRAIN = TrainOptions(epochs=4, device="cpu", changes=QUICK)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Four cases, two folds, prepared for 3d_lowres and 3d_cascade_fullres; the first stage is trained."""
    root = tmp_path_factory.mktemp("cascade")
    workspace = Workspace(root)
    raw = workspace.raw(NAME)
    balls_dataset(raw)
    (raw / "splits_final.json").write_text(
        '[{"train": ["p0_0", "p0_1"], "val": ["p1_0", "p1_1"]}, {"train": ["p1_0", "p1_1"], "val": ["p0_0", "p0_1"]}]'
    )
    made = plan_and_preprocess(workspace, "7", PlanOptions(request=TINY, configurations=("3d_fullres",)))
    full = made.configuration("3d_fullres")
    low = replace(full, name="3d_lowres", spacing_mm=(1.9, 1.7, 1.6), patch=(8, 12, 12), prepared="3d_lowres")
    cascade = replace(full, name="3d_cascade_fullres", previous_stage="3d_lowres")
    made = replace(made, configurations=(low, full, cascade))
    save_json(made, workspace.plan_folder(NAME, "default") / "plan.json")
    fingerprint = load_json(Fingerprint, workspace.prepared(NAME) / "fingerprint.json")
    preprocess(workspace, open_dataset(raw), made, [low], fingerprint, {}, None)
    with pytest.raises(AutosegError, match=r"3d_lowres 0\n.*3d_lowres 1"):
        train_fold(workspace, "7", "3d_cascade_fullres", "0", TRAIN)
    train_fold(workspace, "7", "3d_lowres", "0", TRAIN)
    with pytest.raises(AutosegError) as refused:
        train_fold(workspace, "7", "3d_cascade_fullres", "1", TRAIN)
    assert "1 folds" in str(refused.value)
    assert f"autoseg train {NAME} 3d_lowres 1" in str(refused.value)
    assert "3d_lowres 0" not in str(refused.value)
    train_fold(workspace, "7", "3d_lowres", "1", TRAIN)
    return workspace, made


def fold(workspace, configuration, number):
    return workspace.fold(NAME, "default", configuration, number)


def test_each_case_is_read_from_the_fold_that_held_it_out(place):
    workspace, made = place
    sources = held_out_by(workspace, made, "default", "3d_lowres")
    expected = {"p1_0": 0, "p1_1": 0, "p0_0": 1, "p0_1": 1}
    assert sources == {name: fold(workspace, "3d_lowres", number) for name, number in expected.items()}


def test_validation_leaves_maps_that_prediction_from_scratch_gives_too(place):
    """They are the held-out model's logits, resampled to the grid of the next stage."""
    workspace, made = place
    cascade = made.configuration("3d_cascade_fullres")
    names = ("p0_0", "p0_1", "p1_0", "p1_1")
    found = read_splits(workspace.prepared(NAME) / "splits.json", list(names))
    first = find_priors(workspace, made, cascade, "default", found.fold(0), found, CPU)
    assert first is not None
    kept = {name: path.read_bytes() for name, path in first.items()}
    for name, path in first.items():
        number = 0 if name.startswith("p1") else 1
        assert path.parent == maps_folder(fold(workspace, "3d_lowres", number), cascade.name)
        low = read_case(workspace.cases(NAME, "default", "3d_lowres"), name)
        onto = read_case(workspace.cases(NAME, "default", "3d_fullres"), name)
        model = open_model([fold(workspace, "3d_lowres", number)], CPU)
        expected = project(model.logits(low), low.trace, onto.trace, made.labels, model.configuration, cascade)
        assert np.array_equal(StoredArray(path)[...], expected)
        assert expected.shape == onto.labels.shape
        path.unlink()
    again = find_priors(workspace, made, cascade, "default", found.fold(0), found, CPU)
    assert again == first
    assert {name: path.read_bytes() for name, path in again.items()} == kept


def test_configurations_without_an_earlier_stage_need_nothing(place):
    workspace, made = place
    full = made.configuration("3d_fullres")
    nobody = Fold(train=(), val=())
    assert find_priors(workspace, made, full, "default", nobody, Splits(folds=(nobody,)), CPU) is None


def test_both_stages_train_and_predict(place, tmp_path):
    workspace, _ = place
    summary = train_fold(workspace, "7", "3d_cascade_fullres", "0", replace(TRAIN, epochs=6))
    assert len(summary.scores) == 4
    folder = fold(workspace, "3d_cascade_fullres", 0)
    assert earlier_folds(folder) == (fold(workspace, "3d_lowres", 0), fold(workspace, "3d_lowres", 1))

    splits = read_splits(workspace.prepared(NAME) / "splits.json", ["p0_0", "p0_1", "p1_0", "p1_1"])
    kept = find_probabilities(workspace, [folder], splits, CPU)
    assert sorted(kept) == ["p1_0", "p1_1"]
    before = {name: path.read_bytes() for name, path in kept.items()}
    kept["p1_0"].unlink()
    find_probabilities(workspace, [folder], splits, CPU)
    assert {name: path.read_bytes() for name, path in kept.items()} == before, "made again with the same priors"

    write_balls(tmp_path, "x", seed=11, split="Ts")
    options = PredictOptions(configuration="3d_cascade_fullres", device="cpu")
    predict(workspace, tmp_path / "imagesTs", tmp_path / "out", options)
    found, _ = read_labels(tmp_path / "out" / "x.nii.gz")
    truth, _ = read_labels(tmp_path / "labelsTs" / "x.nii.gz")
    assert found.array.shape == truth.array.shape

    model = open_model([folder], CPU, earlier_folds(folder))
    case = read_case(workspace.cases(NAME, "default", "3d_fullres"), "p1_0")
    empty = np.zeros(case.labels.shape, np.int16)
    full = np.full(case.labels.shape, 1, np.int16)
    assert not np.allclose(model.logits(case, prior=empty), model.logits(case, prior=full)), "the prior is read"
    with pytest.raises(ValueError, match="the stage before"):
        open_model([folder], CPU).logits(case)


@pytest.mark.parametrize("patch", [(9, 10, 12), (10, 12)])
def test_masks_move_with_the_labels(place, patch):
    """A prior that is the truth comes out as the masks of the augmented labels, voxel by voxel."""
    workspace, _ = place
    cases = PreparedCases(workspace.cases(NAME, "default", "3d_fullres"), memory=1 << 20)

    def sampler(corrupted: bool) -> Sampler:
        return Sampler(
            cases=cases,
            case_names=("p0_0", "p1_1"),
            patch=patch,
            batch_size=3,
            foreground_fraction=0.33,
            augmentation=make_augmentation("default", patch=patch, dimension=len(patch), masked=(False,)),
            seed=5,
            stream=Stream.TRAINING,
            prior=Prior(maps=lambda name: cases[name].labels, foreground=(1, 2), corrupted=corrupted),
        )

    differing = 0
    for step in range(12):
        plain, spoilt = (sampler(c).assemble(sampler(c).sources(step), CPU) for c in (False, True))
        assert plain.image.shape == (3, 3, *patch)
        expected = torch.stack([plain.labels == index for index in (1, 2)], dim=1).float()
        assert torch.equal(plain.image[:, 1:], expected)
        assert torch.equal(plain.image[:, :1], spoilt.image[:, :1])
        assert torch.equal(plain.labels, spoilt.labels)
        assert (spoilt.image[:, 1:].sum(1) <= 1).all()
        differing += not torch.equal(plain.image, spoilt.image)
    assert 3 < differing < 12, "masks are spoilt in about three batches of four"


def test_an_augmentation_from_elsewhere_is_refused_in_words(place):
    workspace, _ = place
    with pytest.raises(AutosegError, match="augmentation=default"):
        train_fold(
            workspace,
            "7",
            "3d_cascade_fullres",
            "1",
            replace(TRAIN, run="default", changes=QUICK | {"augmentation": "batchgenerators"}),
        )


def test_maps_of_cases_that_were_prepared_anew_are_not_used(place, tmp_path):
    """One case's first stage on another grid: its name on the disk is another."""
    workspace, made = place
    low = workspace.cases(NAME, "default", "3d_lowres")
    stage = NextStage(
        configuration=made.configuration("3d_cascade_fullres"), prepared=workspace.cases(NAME, "default", "3d_fullres")
    )
    first = map_path(fold(workspace, "3d_lowres", 0), stage, low, "p1_0")
    assert first.is_file()
    shutil.copytree(low / "p1_0", tmp_path / "p1_0")
    card = tmp_path / "p1_0" / "case.json"
    card.write_text(card.read_text().replace(stored_key(low, "p1_0"), "another"))
    assert map_path(fold(workspace, "3d_lowres", 0), stage, tmp_path, "p1_0") != first


def test_a_first_stage_predicts_no_case_that_is_prepared_otherwise_than_it_was_trained(place):
    workspace, made = place
    low = workspace.cases(NAME, "default", "3d_lowres")
    card, said = low / "p1_0" / "case.json", (low / "p1_0" / "case.json").read_text()
    splits = read_splits(workspace.prepared(NAME) / "splits.json", ["p0_0", "p0_1", "p1_0", "p1_1"])
    cascade = made.configuration("3d_cascade_fullres")
    try:
        card.write_text(said.replace(stored_key(low, "p1_0"), "another"))
        with pytest.raises(AutosegError, match="3d_lowres/fold_0 cannot predict 1 cases, for example p1_0"):
            find_priors(workspace, made, cascade, "default", splits.fold(0), splits, CPU)
    finally:
        card.write_text(said)


def test_maps_of_other_weights_are_not_used(place):
    workspace, _ = place
    low = fold(workspace, "3d_lowres", 0)
    before = maps_folder(low, "3d_cascade_fullres")
    weights = low / "weights.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes((fold(workspace, "3d_lowres", 1) / "weights.safetensors").read_bytes())
        assert maps_folder(low, "3d_cascade_fullres") != before
    finally:
        weights.write_bytes(kept)
