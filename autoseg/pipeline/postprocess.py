"""postprocess: search for post-processing of label files that any program predicted, or apply a rule that is there.

Beside the processed files stands `postprocessing.json`: the rule, what was tried, and what its classes are; and
postprocess.csv: what became of every case, and which files there are ours. Others are left alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autoseg.bundle import CARD, ENDING, ModelCard, read
from autoseg.cases import result_name
from autoseg.evaluation.folders import Meaning, Pair, as_predicted, files_by_case, find_labels, note_merged
from autoseg.labels import Labels
from autoseg.layout import labels_in
from autoseg.parallel import Outcome, map_cases, raise_failures
from autoseg.pipeline.status import Status, begin, end, refuse_foreign
from autoseg.postprocess import Case, PostProcessing, apply, before_and_after, choose, measure, out_of_reach, trials
from autoseg.readers import read_labels, read_pair, write_labels
from autoseg.records import (
    SCHEMA_VERSION,
    AutosegError,
    load_json,
    record,
    refuse_unwritable,
    remove_leftovers,
    save_json,
    sole_writer,
)
from autoseg.schema import Run
from autoseg.volume import mismatch
from autoseg.workspace import Workspace

NAME = "postprocessing.json"
STATUS = "postprocess.csv"
"""The list of cases, see autoseg/pipeline/status.py."""

R = TypeVar("R")


@record
class RuleFile:
    """postprocessing.json: a rule, and the labels whose indices its steps name."""

    schema_version: int = SCHEMA_VERSION
    labels: Labels
    postprocessing: PostProcessing


def postprocess(
    workspace: Workspace,
    source: Path,
    target: Path,
    *,
    truth: Path | None = None,
    rule: Path | None = None,
    dataset: str | None = None,
    workers: int | None = None,
) -> PostProcessing:
    """Write the label files of the folder `source`, post-processed, to the folder `target`.

    truth: folder of true label files of the same names, to search for the steps on; or rule: a postprocessing.json, a
    model.json or a model file to take them from. dataset: whose labels the files hold; by default a dataset.json in or
    above the folders says, else every value is a class.

    A case that fails is named with its reason and the others are done; then AutosegError is raised; before anything is
    done, for files in `target` that are not ours.
    """
    if (truth is None) == (rule is None):
        raise AutosegError("give --truth FOLDER to search for post-processing, or --rule FILE to apply one")
    if target.resolve() in {source.resolve(), truth.resolve() if truth else None}:
        raise AutosegError(f"-o {target} holds the files to be read; give another folder for the processed ones")
    refuse_unwritable(target)
    files = files_by_case(source)
    claim(target, files)
    told: Meaning | None = None if dataset is None else labels_in(workspace.dataset(dataset)[1])
    failed: list[Outcome[Any]] = []
    if truth is not None:
        meaning = as_predicted(told or find_labels(truth, source), source) or _by_value(truth, source, workers)
        chosen, failed = search_folder(files, truth, meaning, workers)
        labels = meaning[0]
    else:
        assert rule is not None
        told = as_predicted(told, source)
        chosen, labels = load_rule(rule, told[0] if told else None)
        print(f"Post-processing: {chosen.describe(labels)}", flush=True)
    with sole_writer(target):
        named = {case: result_name(case, path) for case, path in files.items()}
        remove_leftovers(target, (NAME, STATUS, *named.values()))
        status = claim(target, files)  # again: the search takes time
        note_merged(labels, target, named.values())
        begin(status, named)
        save_json(RuleFile(labels=labels, postprocessing=chosen), target / NAME)
        outcomes = write_processed(files, target, chosen, labels, workers)
        end(status, outcomes)
    changed = sum(outcome.value is True for outcome in outcomes)
    done = sum(outcome.error is None for outcome in outcomes)
    print(f"Processed: {done} of {len(files)} cases in {target}, {changed} of them changed. Rule: {target / NAME}")
    # A case that cannot be read fails at both: said once.
    written = {outcome.case for outcome in outcomes if outcome.error is not None}
    raise_failures([*outcomes, *(outcome for outcome in failed if outcome.case not in written)], "postprocess")
    return chosen


def claim(target: Path, files: Mapping[str, Path]) -> Status:
    """The list of cases in `target`. Raises AutosegError for what would be written over there and is not ours."""
    status = Status(target, STATUS)
    refuse_foreign(status, {case: [result_name(case, path)] for case, path in files.items()})
    place = target / NAME
    if place.exists() and not status.rows:
        raise AutosegError(
            f"{place} would be overwritten and is none of ours ({STATUS} is not there); give another -o, or move it "
            "away"
        )
    return status


def search_folder(
    files: Mapping[str, Path], truth: Path, meaning: Meaning, workers: int | None
) -> tuple[PostProcessing, list[Outcome[Any]]]:
    """The rule for predictions with truth, and the cases that could not be used; prints what was found."""
    labels, annotated = meaning
    truths = files_by_case(truth)
    pairs = [(case, truths[case], path) for case, path in files.items() if case in truths]
    if not pairs:
        raise AutosegError(f"no case of {truth} has a prediction; files of one case share one name")
    outcomes = measure_pairs(pairs, labels, annotated, workers)
    good = {outcome.case: outcome.value for outcome in outcomes if outcome.value is not None}
    if not good:
        raise_failures(outcomes, "postprocess")
    if apart := len(files) - len(good):
        print(f"{len(good)} of {len(files)} predictions can be compared with a truth; {apart} are only processed")
    chosen = search(good, labels, workers)
    print(f"Post-processing: {chosen.describe(labels)}\n{trials(chosen, labels)}\n")
    print(before_and_after(chosen, labels), flush=True)
    return chosen, [outcome for outcome in outcomes if outcome.error is not None]


def measure_pairs(
    pairs: Sequence[Pair], labels: Labels, annotated: Mapping[str, Sequence[str]], workers: int | None
) -> list[Outcome[Case]]:
    """What the search needs to know of each pair of truth and prediction."""

    def look(pair: Pair) -> Case:
        truth, prediction = read_pair(*pair[1:])
        if difference := mismatch(truth.grid, prediction.grid):
            raise AutosegError(f"truth and prediction lie on different grids ({difference})")
        true, predicted = (_indices(volume.array[0], labels) for volume in (truth, prediction))
        return measure(true, predicted, labels, truth.grid.spacing_mm, labels.flags(annotated.get(pair[0])))

    return map_cases(look, pairs, name=lambda pair: pair[0], what="measure components", workers=workers)


def search(cases: Mapping[str, Case], labels: Labels, workers: int | None) -> PostProcessing:
    """The rule for the cases, tried out in `workers` threads."""
    names = list(cases)

    def each(function: Callable[[Case], R], items: Sequence[Case]) -> list[R]:
        outcomes = map_cases(
            lambda item: function(item[1]),
            list(zip(names, items, strict=True)),
            name=lambda item: item[0],
            what="fit post-processing",
            workers=workers,
        )
        return raise_failures(outcomes, "fitting post-processing")

    return choose(list(cases.values()), labels, each)


def write_processed(
    files: Mapping[str, Path], target: Path, rule: PostProcessing, labels: Labels, workers: int | None
) -> list[Outcome[bool]]:
    """Write each label file after `rule` to `target`, on its grid, with its values; whether any voxel has changed."""

    def process(item: tuple[str, Path]) -> bool:
        volume, stored = read_labels(item[1])
        before = _indices(volume.array[0], labels)
        spacing = volume.grid.spacing_mm
        for step in out_of_reach(rule.steps, spacing, before.shape[0] == 1):
            print(f"{item[0]}: {step.describe(labels)} is left out: its voxels are too fine for that", flush=True)
        after = apply(before, rule, spacing)
        write_labels(labels.to_values(after), stored, target / result_name(*item))
        return after is not before

    return map_cases(process, list(files.items()), name=lambda item: item[0], what="postprocess", workers=workers)


def load_rule(path: Path, told: Labels | None) -> tuple[PostProcessing, Labels]:
    """The rule in a postprocessing.json, a model.json or a model file, and the labels that its steps speak of.

    told: the labels of the files. Raises AutosegError if there is no rule, or it was made for other labels.
    """
    labels: Labels | None
    if path.suffix == ENDING:
        content = read(path).content
        card, labels = content.stages[-1].card, content.plan.labels
        if card is None:
            raise AutosegError(f"{path} was not cross-validated, so it has no post-processing")
        rule = card.postprocessing
    elif (choice := _content(path)) is not None and "candidates" in choice:
        from autoseg.ensemble import Choice  # loads torch, which nothing else here needs

        found = load_json(Choice, path)
        runs = sorted((path.parent / found.winner.members[0].folder).glob("fold_*/run.json"))
        labels = load_json(Run, runs[0]).plan.labels if runs else told
        rule = found.postprocessing
        if labels is None:
            raise AutosegError(f"{path} names {found.winner.name}, which holds no fold that says what its classes are")
    elif _is_card(path):
        runs = sorted(path.parent.glob("fold_*/run.json"))
        labels = load_json(Run, runs[0]).plan.labels if runs else told
        rule = load_json(ModelCard, path).postprocessing
        if labels is None:
            raise AutosegError(f"{path} does not say what its classes are, and no fold lies beside it; add -d DATASET")
    else:
        file = load_json(RuleFile, path)
        rule, labels = file.postprocessing, file.labels
    if told is not None and told.meaning != labels.meaning:
        raise AutosegError(f"{path} is for the labels {labels.scored}, and the files have {told.scored}")
    if odd := {i for step in rule.steps for i in step.members if not 0 <= i < len(labels.stored)}:
        raise AutosegError(f"{path} names the classes {sorted(odd)}, and there are {len(labels.stored)}")
    return rule, labels


def _content(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if it holds none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_card(path: Path) -> bool:
    return path.name == CARD or "configuration" in (_content(path) or {})


def _by_value(truth: Path, source: Path, workers: int | None) -> Meaning:
    """One class for each value but 0 in the files."""
    paths = [*files_by_case(truth).values(), *files_by_case(source).values()]

    def values_of(path: Path) -> set[int]:
        return set(np.unique(read_labels(path)[0].array).tolist())

    # A file that cannot be read is reported later, with its case.
    outcomes = map_cases(values_of, paths, name=lambda path: path.name, what="find labels", workers=workers)
    values = sorted(set().union(*(outcome.value for outcome in outcomes if outcome.value)) - {0})
    if not values:
        raise AutosegError("the label files hold nothing but background; there is nothing to process")
    return Labels(names=("background", *map(str, values)), values=(0, *values)), {}


def _indices(stored: np.ndarray, labels: Labels) -> np.ndarray:
    """Label map of stored values. Raises AutosegError for values that no label has."""
    try:
        return labels.to_indices(stored)
    except ValueError as error:
        raise AutosegError(f"{error}; correct the file, or say with -d whose labels it holds") from None
