"""demo: the whole way on synthetic vessels in minutes, through the very functions that the other verbs call.

The plan is the planner's own but for patch, batch and the number of filters, which are cut down so that two CPU cores
train two folds in minutes.
"""

import shutil
import time
from pathlib import Path

from autoseg.cases import find_cases
from autoseg.datasets.levelset import best_threshold_dice
from autoseg.evaluation import evaluate_folders, save_summary, table
from autoseg.layout import open_dataset, read_description
from autoseg.pipeline.crossval import cross_validate
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.make import NUMBERS, make_dataset
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.readers import read_image, read_labels
from autoseg.records import AutosegError
from autoseg.schema import Request
from autoseg.settings import in_json
from autoseg.workspace import Workspace

CASES, TEST_CASES, SEED = 20, 4, 0
FOLDS = ("0", "1")
CONFIGURATION = "3d_fullres"
EPOCHS = 12
DATA_CHANGES = {"branch_probability": 1.0}
"""One connected tree of vessels a case, so that post-processing by components has something to find."""
SMALL = Request(
    changes=in_json(
        {
            f"configurations.{CONFIGURATION}.patch": [32, 40, 40],
            f"configurations.{CONFIGURATION}.batch_size": 2,
            f"configurations.{CONFIGURATION}.network.features": [8, 16, 32, 64],
        }
    )
)
RECIPE_CHANGES = {"steps_per_epoch": 20, "validation_steps": 2, "learning_rate": 0.02, "momentum": 0.97}
"""A run of 240 steps is too short for the default momentum of 0.99, which averages over a hundred."""


def made_before(raw: Path) -> bool:
    """Whether the demo's vessels are in `raw`; a part of them is removed. AutosegError if there is anything else."""
    if not raw.exists():
        return False
    if (raw / "dataset.json").is_file():
        facts = read_description(raw)
        if [facts.get(name) for name in ("numTraining", "numTest", "seed")] == [CASES, TEST_CASES, SEED]:
            return True
    elif all(path.is_dir() or path.name.lstrip(".").startswith("vessels_") for path in raw.rglob("*")):
        shutil.rmtree(raw)
        return False
    raise AutosegError(f"{raw} holds other data than those of the demo; choose another --workspace")


def demo(workspace: Workspace, device: str) -> float:
    """Make vessels, plan, preprocess, train two folds, predict and score unseen cases; their mean Dice.

    Goes on where it was stopped. Raises AutosegError if the workspace holds other vessels than these.
    """
    started = time.monotonic()
    name = NUMBERS["vessels"]
    raw = workspace.raw(name)

    def say(text: str) -> None:
        print(f"\n== {text} [{time.monotonic() - started:.0f} s]", flush=True)

    say("1 of 6: synthetic vessels among bright spheres and plates")
    if made_before(raw):
        print(f"They are there already: {raw}")
    else:
        make_dataset(workspace, "vessels", None, CASES, TEST_CASES, SEED, DATA_CHANGES)
    dataset = open_dataset(raw)
    say("2 of 6: check, fingerprint, plan, preprocess")
    plan_and_preprocess(workspace, name, PlanOptions(configurations=(CONFIGURATION,), request=SMALL))
    for number, fold in enumerate(FOLDS):
        say(f"{3 + number} of 6: train fold {fold}")
        train_fold(
            workspace, name, CONFIGURATION, fold, TrainOptions(device=device, epochs=EPOCHS, changes=RECIPE_CHANGES)
        )
    say("5 of 6: fit post-processing on the held-out cases, predict unseen cases with both folds")
    run = workspace.run(name, "default", CONFIGURATION)
    cross_validate([run / f"fold_{fold}" for fold in FOLDS], dataset)
    predictions = workspace.root / "predictions"
    predict(workspace, raw / "imagesTs", predictions, PredictOptions(dataset=name, device=device))
    say("6 of 6: evaluate the unseen cases")
    summary = evaluate_folders(raw / "labelsTs", predictions)
    save_summary(summary, predictions)
    print(table(summary))
    unseen = (
        (
            read_image([Path(image) for image in case.images])[0].array,
            read_labels(raw / "labelsTs" / f"{case.id}.nii.gz")[0].array[0],
        )
        for case in find_cases(raw / "imagesTs", channels=1)
    )
    dice = summary.foreground["dice"].mean
    assert dice is not None
    print(
        f"\nForeground Dice of the unseen cases: {dice:.3f} (best global intensity threshold: "
        f"{best_threshold_dice(unseen):.3f})\n"
        f"Raw data:    {raw}\nPlan:        {workspace.plan_folder(name, 'default') / 'plan.json'}\n"
        f"Trained run: {run}\nPredictions: {predictions}\nScores:      {predictions / 'summary.json'}\n"
        f"All in {time.monotonic() - started:.0f} s. Next: your own data, see README.md"
    )
    return dice
