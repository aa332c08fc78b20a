"""predict: images -> label files, with the model that is there or the one asked for; never a guess.

status.csv beside the files says what became of every case. The same command again does only what is not done: a case
counts as done while its files, the model and the options are the same, whatever ended the command before. A file that
status.csv does not speak of is somebody else's, a truth perhaps: it is never removed nor written over.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoseg.bundle import printable
from autoseg.cases import Bad, Case, names, result_name, survey_cases
from autoseg.devices import choose_device, keep_freed_memory
from autoseg.ensemble import Chosen, Ensemble, EnsembleCase, chosen_at, open_choice
from autoseg.evaluation.folders import PROBABILITIES, note_merged
from autoseg.model import Model, Trained, at, channels_wanted, is_finished, other_dimension
from autoseg.outliers import unlike_training
from autoseg.parallel import Outcome, map_cases, raise_failures
from autoseg.pipeline.status import NAME, Row, Status, begin, refuse_foreign, take_back
from autoseg.postprocess import PostProcessing, out_of_reach
from autoseg.preprocess import PREPROCESS_VERSION, PreparedCase
from autoseg.progress import Progress
from autoseg.raw import hash_files, refuse_not_finite
from autoseg.readers import read_image, says_size, write_image, write_labels
from autoseg.records import AutosegError, hash_text, remove_leftovers, sole_writer
from autoseg.restore import Trace
from autoseg.supervise import JOURNAL
from autoseg.volume import canonical_grid
from autoseg.workspace import Workspace, plain

STAGE = "predict"

PREDICT_VERSION = 1
"""Goes up when the same model makes other voxels of the same files than before; part of every key in status.csv."""


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
    retry_failed: bool = False
    device: str = "auto"


def candidates(workspace: Workspace, options: PredictOptions) -> list[Path]:
    """The folder of every configuration of every run that the options allow and that has a finished fold."""
    dataset = workspace.dataset(options.dataset)[0] if options.dataset is not None else "*"
    run = "*" if options.run is None else plain(options.run, "--run")
    pattern = f"{dataset}/{run}/{options.configuration or '*'}"
    folders = sorted((workspace.root / "runs").glob(pattern))
    return [folder for folder in folders if any(is_finished(fold) for fold in folder.glob("fold_*"))]


def options_for(folder: Path) -> tuple[str, ...]:
    """The options that choose the configuration in `folder`."""
    dataset, run, configuration = folder.parts[-3:]
    return "-d", dataset, "-c", configuration, "--run", run


def choice_for(found: Sequence[Path], options: PredictOptions) -> Chosen | None:
    """What `find_best` chose among the candidates `found`, if it did; None where a configuration is asked for.

    Of one run, or of all runs of a dataset where no run is asked for.
    """
    runs = {folder.parent for folder in found}
    if options.configuration is not None or len({run.parent for run in runs}) != 1:
        return None
    run = next(iter(runs))
    of_all = None if options.run is not None else open_choice(run.parent, options.folds)
    chosen = of_all or (open_choice(run, options.folds) if len(runs) == 1 else None)
    if chosen is None:
        return None
    compared = {member.folder for candidate in chosen.choice.candidates for member in candidate.members}
    there = [folder.relative_to(chosen.where.parent).as_posix() for folder in found]
    return replace(chosen, others=tuple(name for name in there if name not in compared))


def choose_model(
    workspace: Workspace, options: PredictOptions, verb: Sequence[str] = ("predict", "-i", "IN", "-o", "OUT")
) -> Trained | Chosen:
    """What to predict with: the model file or folder of -m, what find_best chose, or the only candidate.

    All stages of a cascade come with it.

    Raises AutosegError that lists the exact choices (as options of `verb`) when there are several, and what to do when
    there are none.
    """
    if options.model is not None:
        return chosen_at(options.model, options.folds)
    found = candidates(workspace, options)
    if not found:
        asked = f" for {options.dataset}" if options.dataset else ""
        asked += f" of the configuration {options.configuration}" if options.configuration else ""
        asked += f" of the run {options.run}" if options.run is not None else ""
        if there := candidates(workspace, replace(options, configuration=None, run=None)):
            lines = "\n".join("  " + workspace.command(*verb, *options_for(folder)) for folder in there)
            raise AutosegError(f"there is no finished model{asked}, only:\n{lines}")
        raise AutosegError(
            f"no finished model{asked} in {workspace.root / 'runs'}; train one with `autoseg train`, choose another "
            "root with --workspace, or name a run folder or a model file with -m"
        )
    if chosen := choice_for(found, options):
        return chosen
    if len(found) > 1:
        lines = "\n".join("  " + workspace.command(*verb, *options_for(folder)) for folder in found)
        which = options.dataset
        compared = "" if which is None else f", or give {workspace.command('find_best', '-d', which)}"
        raise AutosegError(f"{len(found)} models could be meant; choose one{compared}:\n{lines}")
    return at(found[0], options.folds)


def export(
    logits: Any,
    trace: Trace,
    model: Model | Ensemble,
    path: Path,
    rule: PostProcessing | None = None,
    probabilities: bool = False,
) -> None:
    """Write what `model` said of a prepared case as labels on the grid of its file, with original values, to `path`.

    With `probabilities` one image with a channel a head of the network stands beside it, see `probabilities_of`.
    """
    write_labels(model.labels(logits, trace, rule), trace.stored, path)
    if probabilities:
        write_image(model.probabilities(logits, trace), trace.stored, probabilities_of(path.parent, trace.case))


def labels_of(folder: Path, case: Case) -> Path:
    """Where the labels of a case stand: in a file of the kind of its image."""
    return folder / result_name(case.id, Path(case.images[0]))


def probabilities_of(folder: Path, case: str) -> Path:
    """Where the probabilities of a case stand."""
    return folder / f"{case}{PROBABILITIES}"


def model_key(trained: Trained | Chosen, rule: PostProcessing | None, options: PredictOptions) -> str:
    """Hash of all that decides which voxels a case gets, the case itself apart: weights, plan, rule, options, code."""
    said = (
        PREDICT_VERSION,
        PREPROCESS_VERSION,
        trained.name,
        [step.action for step in rule.steps] if rule else [],
        options.step,
        options.mirror,
    )
    return hash_text(*trained.identity(), repr(said))


def case_key(case: Case, model: str) -> str:
    """What tells whether a case need be predicted again: a hash of its files, and of `model`, the key of the model."""
    return hash_files(case.images, (model,))


def predict(
    workspace: Workspace, source: Path | Sequence[Path], target: Path, options: PredictOptions
) -> list[Outcome[Path]]:
    """Predict every case of `source` (a folder or a file, or several) into the folder `target`.

    What was done before is not done again, and what failed only with `options.retry_failed`; status.csv says what is
    what. A case that fails, or a file that belongs to none, is named with its reason and the others are done; then, or
    if it failed before, AutosegError is raised; before anything is done, for files in `target` that are not ours.
    """
    trained = choose_model(workspace, options)
    rule, in_words = trained.postprocessing() if options.postprocess else (None, "none, as asked")
    print(f"Model: {printable(trained.describe())}", flush=True)
    print(f"Post-processing: {printable(in_words)}")
    device = choose_device(options.device)
    keep_freed_memory()
    model = trained.open(device)
    key = model_key(trained, rule, options)
    sources = [source] if isinstance(source, Path) else source
    cases, bad = gather_cases(sources, len(trained.plan.sources), target, channels_wanted(trained.plan))
    refuse_overwriting(cases, target)
    with sole_writer(target):
        written = {case.id: (labels_of(target, case).name, probabilities_of(target, case.id).name) for case in cases}
        made = [name for files in written.values() for name in files]
        remove_leftovers(target, (NAME, *made))
        status = Status(target)
        refuse_foreign(status, {case: files[: 1 + options.save_probabilities] for case, files in written.items()})
        # Images may lie there too.
        images = [Path(image).name for case in cases for image in case.images]
        note_merged(trained.plan.labels, target, (*made, *images))
        for place, unread in bad.items():
            note_bad(unread, status, place)
        outcomes = settled_before(cases, status, key, options)
        failed = sum(outcome.error is not None for outcome in outcomes.values())
        if len(outcomes) > failed:
            print(f"{len(outcomes) - failed} of {len(cases)} cases are predicted already")
        if failed:
            print(f"{failed} of {len(cases)} cases failed before, see {status.path}; --retry-failed tries them again")
        if work := [case for case in cases if case.id not in outcomes]:
            outcomes |= predict_cases(model, work, status, rule, key, options)
    done = sum(outcome.error is None for outcome in outcomes.values())
    for place, unread in bad.items():
        if unread:
            print(f"{len(unread)} cases or files of {place} cannot be read as images of a case")
    print(f"Predicted: {done} of {len(cases) + sum(map(len, bad.values()))} cases in {target}")
    listed = [outcomes[case.id] for case in cases]
    for unread in bad.values():
        listed += [Outcome(case=name, error=AutosegError(reason)) for name, reason in sorted(unread.items())]
    raise_failures(listed, "predict")
    return listed


def gather_cases(
    sources: Sequence[Path], channels: int, target: Path, cure: str = ""
) -> tuple[list[Case], dict[Path, Bad]]:
    """The cases of several folders and files, and what cannot be read as such in each of them.

    cure: what to do about another number of channels, see `survey_cases`.

    Raises AutosegError for two cases of one name, and as `survey_cases`.
    """
    found: dict[str, Case] = {}
    bad: dict[Path, Bad] = {}
    for source in dict.fromkeys(sources):
        cases, bad[source] = survey_cases(source, channels, ours=made_before(source, target), cure=cure)
        for case in cases:
            if case.id in found and found[case.id].images != case.images:
                raise AutosegError(
                    f"{found[case.id].images[0]} and {case.images[0]} are both called {case.id}, so one result would "
                    "replace the other; predict them into folders of their own"
                )
            found[case.id] = case
    return [*found.values()], bad


def refuse_overwriting(cases: Sequence[Case], target: Path) -> None:
    """AutosegError if a result would stand where an image is."""
    for case in cases:
        images = {Path(image).resolve() for image in case.images}
        for path in (labels_of(target, case), probabilities_of(target, case.id)):
            if path.resolve() in images:
                raise AutosegError(f"{path} is an image of case {case.id} and would be overwritten; give another -o")


def made_before(source: Path, target: Path) -> set[str]:
    """Names of files in `source` that were predicted into it: they are no images."""
    if source.resolve() != target.resolve() or not (target / NAME).is_file():
        return set()
    before = Status(target)
    return {name for case in before.rows for name in before.made(case)}


def note_bad(bad: Bad, status: Status, source: Path) -> None:
    """A line for each case or file of `source` that cannot be predicted; those of an earlier look at it go."""
    key = hash_text(str(source.resolve()))
    for row in [row for row in status.rows.values() if row.key == key and row.case not in bad]:
        status.drop(row.case)
    for name, reason in bad.items():
        take_back(status, name)
        status.put(Row(case=name, status="failed", reason=" ".join(reason.split()), seconds="0.0", file="", key=key))


def settled_before(
    cases: Sequence[Case], status: Status, model: str, options: PredictOptions
) -> dict[str, Outcome[Path]]:
    """The outcomes of cases that need not be tried again: their files, the model and the options are as they were."""
    keys = map_cases(
        lambda case: case_key(case, model),
        [case for case in cases if case.id in status.rows],
        name=lambda case: case.id,
        what="look for changes",
        finishes=False,
    )
    found: dict[str, Outcome[Path]] = {}
    for case, key in ((outcome.case, outcome.value) for outcome in keys):
        row = status.rows[case]
        if row.key != key:
            continue
        if row.status != "done":
            if not options.retry_failed:
                found[case] = Outcome(case=case, error=AutosegError(row.reason))
            continue
        file, maps = status.folder / row.file, probabilities_of(status.folder, case)
        if file.is_file() and (maps.is_file() or not options.save_probabilities):
            found[case] = Outcome(case=case, value=file)
    return found


def predict_cases(
    model: Model | Ensemble,
    cases: Sequence[Case],
    status: Status,
    rule: PostProcessing | None,
    key: str,
    options: PredictOptions,
) -> dict[str, Outcome[Path]]:
    """Read, compute and write in three overlapping steps; at most one case waits between two of them.

    Each case has its line in `status` as soon as it is done or has failed. Cases that ended a process before fail, and
    those that may have done so come first and alone, see autoseg/supervise.py.
    """
    outcomes: dict[str, Outcome[Path]] = {}
    keys: dict[str, str] = {}
    seconds: dict[str, float] = {}
    unlike: dict[str, str] = {}

    @contextmanager
    def step(case: Case, doing: str, last: bool = False) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with JOURNAL.working(STAGE, case.id, doing, last):
                yield
        finally:
            seconds[case.id] = seconds.get(case.id, 0.0) + time.perf_counter() - started

    def settle(case: Case, path: Path | None = None, error: Exception | None = None) -> None:
        outcome = outcomes[case.id] = Outcome(case=case.id, value=path, error=error)
        status.put(
            Row(
                case=case.id,
                status="failed" if error else "done",
                reason=" ".join(outcome.reason().split()),
                seconds=f"{seconds.get(case.id, 0.0):.1f}",
                file=path.name if path else "",
                key=keys.get(case.id, ""),
            )
        )
        bar.advance(note=f"{case.id} failed" if error else case.id)

    def prepared_of(case: Case) -> Any:
        with step(case, "reading"):
            keys[case.id] = case_key(case, key)
            begin(status, {case.id: labels_of(status.folder, case).name})
            paths = [Path(path) for path in case.images]
            image, stored = read_image(paths, channels=len(model.plan.sources), cure=channels_wanted(model.plan))
            refuse_not_finite(image, model.plan.sources)
            if odd := other_dimension(stored, model.plan, model.configurations):
                bar.say(f"{case.id} {odd}")
            if odd := unlike_training(stored, model.plan, model.configurations[-1]):
                unlike[case.id] = odd
            trained_at = model.configurations[-1].spacing_mm
            if set(trained_at) != {1.0} and not says_size(Path(case.images[0])):
                sides = " x ".join(f"{side:g}" for side in trained_at)
                bar.say(
                    f"{case.id} does not say its voxel size: 1 mm is taken, and the model was made for {sides} mm; "
                    f'put {{"spacing": [...]}} into {case.id}.json beside the image'
                )
            return model.prepare(case.id, image, stored)

    def write(case: Case, prepared: PreparedCase | EnsembleCase, logits: Any) -> None:
        path = labels_of(status.folder, case)
        try:
            with step(case, "writing", last=True):
                grid = canonical_grid(prepared.trace.stored)
                for left_out in out_of_reach(rule.steps if rule else (), grid.spacing_mm, grid.shape[0] == 1):
                    done = left_out.describe(model.plan.labels)
                    bar.say(f"{case.id}: {done} is left out: its voxels are too fine for that")
                export(logits, prepared.trace, model, path, rule, options.save_probabilities)
        except Exception as error:
            take_back(status, case.id)
            settle(case, error=error)
        else:
            settle(case, path=path)

    def suspected(case: Case | None) -> bool:
        return case is not None and (STAGE, case.id) in JOURNAL.suspects

    dead = {case.id: death for case in cases if (death := JOURNAL.dead.get((STAGE, case.id)))}
    order = sorted((case for case in cases if case.id not in dead), key=lambda case: not suspected(case))
    ahead: Future[Any] | None = None
    writing: Future[None] | None = None
    with Progress("predict", len(cases)) as bar, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for case in cases:
            if case.id in dead:
                # A line without a key never holds: the case would be tried again by the next command.
                with suppress(AutosegError, OSError):
                    keys[case.id] = case_key(case, key)
                take_back(status, case.id)
                settle(case, error=AutosegError(dead[case.id]))
        for case, following in zip(order, [*order[1:], None]):
            reading = ahead or reader.submit(prepared_of, case)
            ahead = None if following is None or suspected(case) else reader.submit(prepared_of, following)
            try:
                prepared = reading.result()
                with step(case, "computing"):
                    logits = model.logits(prepared, step=options.step, mirror=options.mirror)
            except Exception as error:
                settle(case, error=error)
                continue
            if writing is not None:
                writing.result()
            writing = writer.submit(write, case, prepared, logits)
            if suspected(case):
                writing.result()
        if writing is not None:
            writing.result()
    if unlike:
        print(
            f"warning: {len(unlike)} of {len(cases)} cases have another scale than those of training: {names(unlike)} "
            f"({next(iter(unlike.values()))}); look at the header: metres or centimetres for millimetres?"
        )
    return outcomes
