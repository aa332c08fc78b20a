"""Out-of-fold probabilities, kept on the prepared grid: what comparing and ensembling configurations needs of a case.

One byte a voxel and foreground class (the background of a softmax is what is left to 1), written when the fold that
held the case out is validated. Prediction resamples logits and takes probabilities of them afterwards, so the bytes are
turned back into logits before they are resampled: on Hippocampus, resampled by 1.37, the labels of an ensemble made
from them agree with those of its exact logits to a Dice of 0.9992; resampling the probabilities themselves gave 0.986.
They took 6 to 11 kB a case there, 2 to 4 % of what the prepared case takes.

They lie beside the weights they come from, in a folder named by the weights' content, in files named by how the case
is prepared: what belongs to other weights or to another preparation is never read.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from autoseg.labels import Labels
from autoseg.model import open_model, open_run, weights_hash
from autoseg.pipeline.cascade import find_priors, refuse_prepared_otherwise
from autoseg.progress import Progress
from autoseg.records import hash_text, sole_writer
from autoseg.schema import Fold
from autoseg.splits import Splits
from autoseg.store import StoredArray, read_case, stored_key, write_bytes
from autoseg.workspace import Workspace

ROUNDED_TO_0 = 0.25
"""In 1/255: what a probability that was rounded to 0 is taken for; of 1/4, 1/10, 1/30 and 1/100 it agreed best."""


def quantise(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Logits (heads, Z, Y, X) -> probabilities in 1/255, uint8, without the background of a softmax."""
    found: np.ndarray = labels.probabilities(logits)[1 if labels.exclusive else 0 :]
    return np.rint(found * 255).astype(np.uint8)


def restore_logits(kept: np.ndarray, labels: Labels) -> np.ndarray:
    """The way back of `quantise`: float32 logits (heads, Z, Y, X) of the rounded probabilities."""
    found = kept.astype(np.float32)
    if labels.exclusive:
        found = np.concatenate([255 - found.sum(0, keepdims=True), found])
    return labels.logits(found.clip(ROUNDED_TO_0, 255 - ROUNDED_TO_0) / np.float32(255))


def place_of(fold: Path) -> Path:
    """Where the probabilities of a finished fold's weights lie."""
    return fold / "probabilities" / weights_hash(fold)


def path_of(place: Path, prepared: Path, case: str) -> Path:
    """The file of one case in `place`, a folder of `place_of`: named by what the case was prepared from and how."""
    return place / f"{case}.{hash_text(stored_key(prepared, case) or '')[:8]}.b2nd"


def keep(path: Path, logits: np.ndarray, labels: Labels, patch: Sequence[int]) -> None:
    """Write the probabilities of a prepared case's logits to `path`, whole or not at all."""
    write_bytes(path, quantise(logits, labels), patch)


def read(path: Path, labels: Labels) -> np.ndarray:
    """Logits (heads, Z, Y, X) of the probabilities at `path`."""
    return restore_logits(StoredArray(path)[...], labels)


def forget(fold: Path) -> None:
    """Remove those of earlier weights of a fold, and what a killed process left. Only for the fold's sole writer."""
    kept = place_of(fold)
    for left in kept.glob(".*.b2nd"):
        left.unlink()
    for other in kept.parent.glob("*"):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)


def say_room(fold: Path) -> None:
    """What they take on the disk, in a line."""
    files = list(place_of(fold).glob("*.b2nd"))
    if files:
        size = sum(file.stat().st_size for file in files)
        print(
            f"Probabilities of {len(files)} held-out cases are kept for find_best: {size / 1e6:.2f} MB in "
            f"{place_of(fold).parent} (--set keep_probabilities=false leaves them out)"
        )


def find_probabilities(
    workspace: Workspace, folds: Sequence[Path], splits: Splits, device: torch.device
) -> Mapping[str, Path]:
    """Held-out case of any of `folds`, of one configuration -> the file of its probabilities; missing ones are made.

    Raises AutosegError for what is no longer prepared, and in a cascade for what the earlier stage lacks.
    """
    found: dict[str, Path] = {}
    missing: dict[Path, list[str]] = {}
    for fold in folds:
        run, place = open_run(fold), place_of(fold)
        prepared = workspace.cases(run.dataset, run.plan.name, run.plan.configuration(run.configuration).prepared)
        for name in run.cases.val:
            found[name] = path_of(place, prepared, name)
            if not found[name].is_file():
                missing.setdefault(fold, []).append(name)
    if missing:
        what = f"held-out probabilities of {open_run(folds[0]).configuration}"
        with Progress(what, sum(map(len, missing.values()))) as bar:
            for fold, names in missing.items():
                with sole_writer(fold):
                    predict_missing(workspace, fold, {name: found[name] for name in names}, splits, device, bar)
    return found


def predict_missing(
    workspace: Workspace, fold: Path, wanted: Mapping[str, Path], splits: Splits, device: torch.device, bar: Progress
) -> None:
    """Predict held-out cases of a fold again, as its validation did, and keep their probabilities at `wanted`."""
    run = open_run(fold)
    configuration = run.plan.configuration(run.configuration)
    prepared = workspace.cases(run.dataset, run.plan.name, configuration.prepared)
    refuse_prepared_otherwise(workspace, fold, wanted)
    forget(fold)
    cases = Fold(train=(), val=tuple(wanted))
    priors = find_priors(workspace, run.plan, configuration, fold.parent.parent.name, cases, splits, device)
    model = open_model([fold], device)
    for name, path in wanted.items():
        prior = None if priors is None else StoredArray(priors[name])[...]
        logits = model.logits(read_case(prepared, name), prior=prior)
        keep(path, logits, run.plan.labels, configuration.patch)
        bar.advance(note=name)
