"""What passes from one stage of a cascade to the next: held-out label maps on the grid of the next stage.

A second stage that is trained on predictions of cases which the first stage had learnt by heart would trust them too
much. So each case's map comes from the fold that held it out. It is written when that fold is validated, and made
here where it is missing. Maps lie beside the weights they come from, in a folder named by the weights' content, and in
files named by how the case is prepared for both stages: what has changed since is made anew.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoseg.model import Model, is_finished, open_model, open_run, weights_hash
from autoseg.pipeline.preparing import unprepared
from autoseg.progress import Progress
from autoseg.records import AutosegError, hash_text, load_json
from autoseg.restore import Trace, project
from autoseg.schema import Configuration, Fingerprint, Fold, Plan
from autoseg.splits import Splits
from autoseg.store import read_case, stored_key, write_map
from autoseg.supervise import JOURNAL
from autoseg.workspace import Workspace, given


@dataclass(frozen=True, kw_only=True)
class NextStage:
    """A configuration that reads predictions of another, and its prepared cases."""

    configuration: Configuration
    prepared: Path


def next_stages(workspace: Workspace, plan: Plan, configuration: Configuration) -> tuple[NextStage, ...]:
    """The configurations of the plan whose earlier stage is `configuration`."""
    return tuple(
        NextStage(configuration=later, prepared=workspace.cases(plan.dataset, plan.name, later.prepared))
        for later in plan.configurations
        if later.previous_stage == configuration.name
    )


def map_path(fold: Path, stage: NextStage, prepared: Path, case: str) -> Path:
    """The file of one case's map: named by the weights of `fold`, and by what the case was prepared from and onto."""
    # As it always was for logits, so that maps of those stay valid.
    kind = () if stage.configuration.prior == "logits" else (stage.configuration.prior,)
    grids = hash_text(stored_key(prepared, case) or "", stored_key(stage.prepared, case) or "", *kind)
    return maps_folder(fold, stage.configuration.name) / f"{case}.{grids[:8]}.b2nd"


def maps_folder(fold: Path, stage: str) -> Path:
    """Where the maps of a finished fold's weights for the configuration `stage` lie."""
    return fold / "next_stage" / stage / weights_hash(fold)


def forget_maps(fold: Path, stage: str) -> None:
    """Remove the maps of earlier weights of a fold."""
    kept = maps_folder(fold, stage)
    for other in kept.parent.glob("*"):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)


def write_prior(path: Path, logits: np.ndarray, trace: Trace, model: Model, later: NextStage) -> None:
    """Write logits (K, Z, Y, X) of a prepared case as labels on the grid of the next stage, unless they are there.

    A case that is not prepared for the next stage is passed over: it can be made once it is.
    """
    if path.exists() or stored_key(later.prepared, trace.case) is None:
        return
    onto = read_case(later.prepared, trace.case).trace
    stages = model.configuration, later.configuration
    write_map(path, project(logits, trace, onto, model.plan.labels, *stages), later.configuration.patch)


def held_out_by(workspace: Workspace, plan: Plan, run: str, stage: str) -> dict[str, Path]:
    """Case -> the finished fold of `stage` that held it out. Raises AutosegError for a fold of another plan."""
    found: dict[str, Path] = {}
    for fold in sorted(workspace.run(plan.dataset, run, stage).glob("fold_[0-9]*")):
        if not is_finished(fold):
            continue
        facts = open_run(fold)
        if facts.plan.concerning(stage) != plan.concerning(stage):
            raise AutosegError(
                f"{fold} was trained with another plan; train {stage} again under another --run, and the cascade too"
            )
        found |= dict.fromkeys(facts.cases.val, fold)
    return found


def find_priors(
    workspace: Workspace,
    plan: Plan,
    configuration: Configuration,
    run: str,
    cases: Fold,
    splits: Splits,
    device: torch.device,
) -> dict[str, Path] | None:
    """Case -> file of its held-out labels for a configuration with an earlier stage; None for one without.

    Missing maps are predicted first. Raises AutosegError that lists the commands for the folds still to be trained.
    """
    if configuration.previous_stage is None:
        return None
    earlier = plan.configuration(configuration.previous_stage)
    sources = held_out_by(workspace, plan, run, earlier.name)
    needed = (*cases.train, *cases.val)
    refuse_untrained(plan, configuration.name, earlier.name, run, needed, sources, splits, workspace)
    later = NextStage(
        configuration=configuration, prepared=workspace.cases(plan.dataset, plan.name, configuration.prepared)
    )
    prepared = workspace.cases(plan.dataset, plan.name, earlier.prepared)
    found = {name: map_path(sources[name], later, prepared, name) for name in needed}
    folds = ", ".join(sorted({sources[name].name.removeprefix("fold_") for name in needed}))
    print(f"Reads what {earlier.name} predicts for cases that it has not seen: fold {folds}", flush=True)
    missing = [name for name, path in found.items() if not path.exists()]
    for fold in sorted({sources[name] for name in missing}):
        refuse_prepared_otherwise(workspace, fold, [name for name in missing if sources[name] == fold])
    predict_missing(found, sources, prepared, later, device)
    return found


def refuse_prepared_otherwise(workspace: Workspace, fold: Path, cases: Iterable[str]) -> None:
    """AutosegError if some of `cases` are not prepared as the plan says that the fold was trained with."""
    run = open_run(fold)
    configuration = run.plan.configuration(run.configuration)
    prepared = workspace.cases(run.dataset, run.plan.name, configuration.prepared)
    fingerprint = load_json(Fingerprint, workspace.prepared(run.dataset) / "fingerprint.json")
    if missing := unprepared(prepared, cases, run.plan, configuration, fingerprint):
        cure = workspace.command("plan_and_preprocess", "-d", run.dataset, *given("--plan", run.plan.name))
        raise AutosegError(
            f"{fold} cannot predict {len(missing)} cases, for example {missing[0]}: they are not prepared in "
            f"{prepared} as the plan says that it was trained with. Take that plan back from its run.json and give "
            f"{cure}, or train again under another --run"
        )


def refuse_untrained(
    plan: Plan,
    stage: str,
    earlier: str,
    run: str,
    needed: Sequence[str],
    sources: Mapping[str, Path],
    splits: Splits,
    workspace: Workspace,
) -> None:
    """AutosegError if a needed case was held out by no finished fold; it lists the commands that are missing."""
    missing = set(needed) - set(sources)
    if not missing:
        return
    refuse_incomplete(stage, needed, splits)
    folds = [number for number, fold in enumerate(splits.folds) if missing & set(fold.val)]
    named = (*given("--run", run), *given("--plan", plan.name))
    lines = "\n".join("  " + workspace.command("train", plan.dataset, earlier, str(n), *named) for n in folds)
    raise AutosegError(
        f"{stage} learns from predictions of {earlier} for cases that the predicting fold has not seen; "
        f"{len(folds)} folds of it are still to be trained:\n{lines}"
    )


def refuse_incomplete(stage: str, needed: Iterable[str], splits: Splits) -> None:
    """AutosegError if the splits hold out some case in no fold: nothing unseen can then be predicted for it."""
    never = sorted(set(needed) - {case for fold in splits.folds for case in fold.val})
    if never:
        raise AutosegError(
            f"{stage} learns from held-out predictions, and {len(never)} training cases are held out in no fold, for "
            f"example {never[0]}; give folds that hold out every case once, or train 3d_fullres instead"
        )


def predict_missing(
    found: Mapping[str, Path],
    sources: Mapping[str, Path],
    prepared: Path,
    later: NextStage,
    device: torch.device,
) -> None:
    """Predict every case whose map is not there, fold by fold."""
    missing = [name for name, path in found.items() if not path.exists()]
    with Progress(f"held-out predictions for {later.configuration.name}", len(missing)) as bar:
        for fold in sorted({sources[name] for name in missing}):
            model = open_model([fold], device)
            for name in missing:
                if sources[name] == fold:
                    if death := JOURNAL.dead.get(("validate", name)):
                        raise AutosegError(f"held-out case {name} of {fold} cannot be predicted: {death}")
                    with JOURNAL.working("validate", name):
                        case = read_case(prepared, name)
                        write_prior(found[name], model.logits(case), case.trace, model, later)
                    bar.advance(note=name)
