"""The held-out cases of a fold, predicted whole and scored; and forgotten once the weights have changed.

A validation that is made again stands in a folder of its own, AGAIN, until it is whole, and then takes the place of the
former one. Killed in between, it goes on there when it is asked for again.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from autoseg.evaluation import Summary, evaluate_pairs, save_summary, table
from autoseg.evaluation.folders import note_merged
from autoseg.layout import Dataset
from autoseg.model import CARD, open_model, open_run
from autoseg.pipeline import probabilities
from autoseg.pipeline.cascade import NextStage, forget_maps, map_path, write_prior
from autoseg.pipeline.crossval import held_out, validated
from autoseg.pipeline.orders import give_order
from autoseg.pipeline.predict import export
from autoseg.progress import Progress
from autoseg.records import AutosegError, load_json
from autoseg.schema import Run
from autoseg.store import StoredArray, read_case
from autoseg.supervise import JOURNAL
from autoseg.team import ALONE, Team

AGAIN = "validation_again"
"""In a fold folder, beside `validation`."""


class Unvalidated(AutosegError):
    """Held-out cases that ended the process that predicted them; all others of the fold are predicted."""


def begin_again(folder: Path) -> None:
    """Have the next validation of a fold make everything anew, beside the one that is there, if that is whole."""
    if validated(folder):
        (folder / AGAIN).mkdir(exist_ok=True)


def place_of_validation(folder: Path) -> str:
    """The name of the folder that the validation under way, or the next one, writes to."""
    return AGAIN if (folder / AGAIN).is_dir() else "validation"


def validate_fold(
    folder: Path,
    dataset: Dataset,
    prepared: Path,
    device: torch.device,
    priors: Mapping[str, Path] | None = None,
    later: Sequence[NextStage] = (),
    team: Team = ALONE,
) -> Summary:
    """Predict the fold's held-out cases whole, write them on their original grids, and score those files.

    Writes `validation/<case><ending>` and `validation/summary.json`; the numbers are those of `autoseg evaluate`. Goes
    on after a kill: a prediction that is there is kept, since training removes those of earlier weights. Raises
    Unvalidated for cases that ended a process, when the others are predicted.
    priors: as in `make_parts`. later: the stages of a cascade that read these predictions; they get theirs too.
    """
    run = open_run(folder)
    out = folder / place_of_validation(folder)
    out.mkdir(exist_ok=True)
    # The fold `all` has learnt every case by heart: its predictions are no use to a next stage.
    for stage in later if run.fold != "all" else ():
        forget_maps(folder, stage.configuration.name)
    probabilities.forget(folder)
    give_order("validate", run, folder, prepared, priors, team, ending=dataset.file_ending)
    predict_held_out(folder, dataset.file_ending, prepared, device, priors, later, team)
    labels = run.plan.labels
    pairs = held_out(folder, run, dataset, out.name)
    summary = evaluate_pairs(pairs, labels, annotated=dataset.annotated(labels))
    save_summary(summary, out)
    note_merged(labels, out)
    if out.name == AGAIN:
        shutil.rmtree(folder / "validation", ignore_errors=True)
        out.rename(folder / "validation")
    print(table(summary))
    probabilities.say_room(folder)
    return summary


def predict_held_out(
    folder: Path,
    ending: str,
    prepared: Path,
    device: torch.device,
    priors: Mapping[str, Path] | None,
    later: Sequence[NextStage],
    team: Team,
) -> None:
    """Predict the fold's held-out cases that have no prediction yet: of a team each process its own share of them."""
    run = open_run(folder)
    model = open_model([folder], device)
    stages = later if run.fold != "all" else ()
    kept = probabilities.place_of(folder) if run.recipe.keep_probabilities and run.fold != "all" else None
    mine = run.cases.val[team.rank :: team.size]
    out, dead = folder / place_of_validation(folder), dict[str, str]()
    with Progress("validate", len(mine), quiet=not team.leads) as bar:
        for name in mine:
            path = out / f"{name}{ending}"
            if path.exists():
                pass
            elif death := JOURNAL.dead.get(("validate", name)):
                dead[name] = death
            else:
                with JOURNAL.working("validate", name):
                    case = read_case(prepared, name)
                    prior = None if priors is None else StoredArray(priors[name])[...]
                    logits = model.logits(case, prior=prior)
                    for stage in stages:
                        write_prior(map_path(folder, stage, prepared, name), logits, case.trace, model, stage)
                    if kept is not None:
                        place = probabilities.path_of(kept, prepared, name)
                        probabilities.keep(place, logits, run.plan.labels, model.configuration.patch)
                    # Last: a case whose prediction is there has left everything else.
                    export(logits, case.trace, model, path)
            bar.advance(note=name)
    team.wait()
    if dead:
        lines = "\n".join(f"  {name}: {death}" for name, death in dead.items())
        raise Unvalidated(f"{len(dead)} of {len(mine)} held-out cases of {folder} cannot be predicted:\n{lines}")


def forget_validation(folder: Path) -> None:
    """Remove the whole-case predictions of earlier weights, so that those that are there are of the present ones."""
    for name in ("validation", AGAIN):
        shutil.rmtree(folder / name, ignore_errors=True)


def forget_later(folder: Path, stage: str) -> None:
    """Remove what later stages of a cascade, in the run of the fold `folder`, said from earlier weights of `stage`."""
    for path in sorted(folder.parent.parent.glob("*/fold_*/run.json")):
        run = load_json(Run, path)
        if run.plan.configuration(run.configuration).previous_stage == stage:
            forget_validation(path.parent)
            shutil.rmtree(path.parent / "probabilities", ignore_errors=True)
            (path.parent.parent / CARD).unlink(missing_ok=True)
