"""predict: images -> label files, with the model that is there or the one asked for; never a guess."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.devices import choose_device, keep_freed_memory
from autoseg.layout import Case, ending_of, find_cases
from autoseg.model import Model, open_model, open_run
from autoseg.parallel import Outcome, raise_failures
from autoseg.postprocess import PostProcessing, apply
from autoseg.preprocess import PreparedCase, Trace, restore, restore_probabilities
from autoseg.progress import Progress
from autoseg.readers import read_image, write_image, write_labels
from autoseg.records import AutosegError, load_json
from autoseg.schema import Run
from autoseg.workspace import Workspace

POSTPROCESSING = "postprocessing.json"


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The options of predict."""

    dataset: str | None = None
    configuration: str | None = None
    folds: tuple[str, ...] = ()
    run: str | None = None
    model: Path | None = None
    step: float = 0.5
    mirror: bool = True
    save_probabilities: bool = False
    postprocess: bool = True
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The finished folds of one configuration of one run."""

    folder: Path
    folds: tuple[Path, ...]

    @property
    def choice(self) -> str:
        """The options that choose it."""
        dataset, run, configuration = self.folder.parts[-3:]
        return f"-d {dataset} -c {configuration} --run {run}"


def candidates(workspace: Workspace, options: PredictOptions) -> list[Candidate]:
    """Every configuration of every run that the options allow and that has a finished fold."""
    dataset = workspace.dataset(options.dataset)[0] if options.dataset is not None else "*"
    pattern = f"{dataset}/{options.run or '*'}/{options.configuration or '*'}"
    found = []
    for folder in sorted((workspace.root / "runs").glob(pattern)):
        folds = tuple(sorted(path.parent for path in folder.glob("fold_*/run.json") if load_json(Run, path).finished))
        if folds:
            found.append(Candidate(folder=folder, folds=folds))
    return found


def choose_folds(workspace: Workspace, options: PredictOptions) -> tuple[Path, ...]:
    """The fold folders to predict with: those of -m, or of the only candidate.

    Raises AutosegError that lists the exact choices when there are several, and what to do when there are none.
    """
    if options.model is not None:
        folder = options.model
        folds = (
            (folder,)
            if (folder / "run.json").is_file()
            else tuple(sorted(p.parent for p in folder.glob("fold_*/run.json")))
        )
        if not folds:
            raise AutosegError(f"-m {folder} holds no trained fold; give a folder such as runs/DATASET/RUN/3d_fullres")
        found = [Candidate(folder=folder, folds=folds)]
    else:
        found = candidates(workspace, options)
    if not found:
        asked = f" for {options.dataset}" if options.dataset else ""
        raise AutosegError(
            f"no finished model{asked} in {workspace.root / 'runs'}; train one with `autoseg train`, choose another "
            "root with --workspace, or name a run folder with -m"
        )
    if len(found) > 1:
        lines = "\n".join(f"  autoseg predict -i IN -o OUT {candidate.choice}" for candidate in found)
        raise AutosegError(f"{len(found)} models could be meant; choose one:\n{lines}")
    folds = found[0].folds
    if options.folds:
        by_name = {fold.name.removeprefix("fold_"): fold for fold in folds}
        missing = [name for name in options.folds if name not in by_name]
        if missing:
            raise AutosegError(f"fold {', '.join(missing)} is not trained to its end; finished: {', '.join(by_name)}")
        return tuple(by_name[name] for name in options.folds)
    # `all` saw every case in training: it stands beside cross-validated folds only when it is asked for.
    crossed = tuple(fold for fold in folds if fold.name != "fold_all")
    return crossed or folds


def export(
    logits: np.ndarray,
    trace: Trace,
    model: Model,
    path: Path,
    rule: PostProcessing | None = None,
    probabilities: bool = False,
) -> None:
    """Write logits of a prepared case as labels on the grid of its file, with the original values, to `path`.

    With `probabilities` one image with a channel a class stands beside it, `<case>_probabilities.nii.gz`.
    """
    indices = restore(logits, trace, model.configuration)
    if rule is not None:
        indices = apply(indices, rule)
    write_labels(model.plan.labels.to_values(indices), trace.stored, path)
    if probabilities:
        maps = restore_probabilities(logits, trace, model.plan.labels, model.configuration)
        write_image(maps, trace.stored, path.with_name(f"{trace.case}_probabilities.nii.gz"))


def predict(workspace: Workspace, source: Path, target: Path, options: PredictOptions) -> list[Outcome[Path]]:
    """Predict every case of `source` (a folder, or one file) into the folder `target`.

    The next case is read and the last one written while the current one is computed. A case that fails is named with
    its reason and the others are done; then AutosegError is raised.
    """
    folds = choose_folds(workspace, options)
    run = open_run(folds[0])
    names = ", ".join(fold.name.removeprefix("fold_") for fold in folds)
    rule = None
    rule_path = folds[0].parent / POSTPROCESSING
    if options.postprocess and rule_path.is_file():
        rule = load_json(PostProcessing, rule_path)
    print(f"Model: {run.dataset} {run.configuration}, fold {names} ({folds[0].parent})", flush=True)
    print(f"Post-processing: {rule.describe(run.plan.labels.names) if rule else 'none'}")
    device = choose_device(options.device)
    keep_freed_memory()
    model = open_model(folds, device)
    cases = find_cases(source, channels=len(run.plan.channels))
    target.mkdir(parents=True, exist_ok=True)

    def load(case: Case) -> PreparedCase:
        image, stored = read_image([Path(p) for p in case.images], channels=len(run.plan.channels))
        return model.prepare(case.id, image, stored)

    outcomes = predict_cases(model, cases, load, target, rule, options)
    raise_failures(outcomes, "predict")
    print(f"Predicted: {len(outcomes)} cases in {target}")
    return outcomes


def predict_cases(
    model: Model,
    cases: Sequence[Case],
    load: Callable[[Case], PreparedCase],
    target: Path,
    rule: PostProcessing | None,
    options: PredictOptions,
) -> list[Outcome[Path]]:
    """Load, compute and export in three overlapping stages; at most one case waits between two of them."""
    outcomes: list[Outcome[Path]] = []

    def settle(name: str, job: Future[Path]) -> None:
        error = job.exception()
        outcomes.append(Outcome(case=name, error=error) if error else Outcome(case=name, value=job.result()))
        bar.advance(note=name)

    def finish(prepared: PreparedCase, logits: np.ndarray) -> Path:
        path = target / f"{prepared.case}{endings[prepared.case]}"
        export(logits, prepared.trace, model, path, rule, options.save_probabilities)
        return path

    endings = {case.id: ending_of(Path(case.images[0])) for case in cases}
    writing: tuple[str, Future[Path]] | None = None
    with Progress("predict", len(cases)) as bar, ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as writer:
        loading = [loader.submit(load, case) for case in cases[:1]]
        for number, case in enumerate(cases):
            if number + 1 < len(cases):
                loading.append(loader.submit(load, cases[number + 1]))
            try:
                prepared = loading.pop(0).result()
                logits = model.logits(prepared.image, step=options.step, mirror=options.mirror)
            except Exception as error:
                outcomes.append(Outcome(case=case.id, error=error))
                bar.advance(note=f"{case.id} failed")
                continue
            if writing is not None:
                settle(*writing)
            writing = case.id, writer.submit(finish, prepared, logits)
        if writing is not None:
            settle(*writing)
    return outcomes
