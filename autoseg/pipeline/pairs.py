"""Trained configurations that can be compared, and pairs of them: out-of-fold predictions by the mean of both.

What is made of a pair lies in a folder named by the weights of both. Its scores stay there; its predictions, label
files like those of a validation, stay only for as long as they are needed. So a comparison that is stopped goes on, and
one that is repeated with another configuration does only what is new.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.devices import choose_device
from autoseg.ensemble import JOIN, Member, mean_of
from autoseg.evaluation import Summary, evaluate_pairs, save_summary
from autoseg.layout import Dataset
from autoseg.merging import is_merged
from autoseg.model import Trained, earlier_folds, in_folders, is_finished, open_run
from autoseg.parallel import map_cases, raise_failures
from autoseg.pipeline.crossval import SUMMARY, HeldOut, all_folds, cross_validate, validated
from autoseg.pipeline.probabilities import find_probabilities, read
from autoseg.readers import write_labels
from autoseg.records import AutosegError, hash_text, load_json, remove_leftovers
from autoseg.restore import restore_probabilities
from autoseg.schema import Fingerprint, Run
from autoseg.splits import Splits
from autoseg.store import read_case
from autoseg.workspace import Workspace, given

ENSEMBLES = "ensembles"
"""Beside the model.json of a choice: a folder a pair."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """A configuration whose folds are all validated."""

    member: Member
    folds: tuple[Path, ...]
    trained: Trained
    prepared: Path
    summary: Summary
    """Of its cross-validation, as predicted."""
    seconds: float | None
    """To predict and score a case, the earlier stage included."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """Two entries and the folder of what is known of them together, named by their weights."""

    entries: tuple[Entry, Entry]
    folder: Path

    def held_out(self, dataset: Dataset, cases: Sequence[str]) -> list[HeldOut]:
        """Every held-out case, and where the prediction of the pair stands."""
        truths = {case.id: Path(case.label) for case in dataset.cases if case.label is not None}
        return [(name, truths[name], self.folder / f"{name}{dataset.file_ending}") for name in cases]

    def forget_predictions(self, dataset: Dataset, cases: Sequence[str]) -> None:
        """Remove the held-out predictions, not the scores."""
        for _, _, prediction in self.held_out(dataset, cases):
            prediction.unlink(missing_ok=True)


def members_of(pair: Pair) -> tuple[Member, ...]:
    """Its two members."""
    return tuple(entry.member for entry in pair.entries)


def complete_folders(workspace: Workspace, name: str, runs: Sequence[str], splits: Splits) -> list[Path]:
    """The folders of all configurations whose folds are all validated; those with a part of them are named.

    Raises AutosegError if there is none.
    """
    root = workspace.root / "runs" / name
    if missing := [run for run in runs if not (root / run).is_dir()]:
        known = ", ".join(sorted(path.name for path in root.glob("*/") if path.name != ENSEMBLES)) or "none"
        raise AutosegError(f"there is no run {missing[0]!r} of {name}; there are: {known}")
    begun = [
        folder
        for folder in sorted(root.glob("*/*"))
        if (not runs or folder.parent.name in runs) and any(folder.glob("fold_[0-9]*"))
    ]
    done = [folder for folder in begun if all_folds(folder, splits) is not None]
    for folder in begun:
        if folder not in done:
            ready = [fold for fold in folder.glob("fold_[0-9]*") if is_finished(fold)]
            print(
                f"Left out: {folder}, {len(ready)} of {len(splits.folds)} folds are trained, "
                f"{sum(validated(fold) for fold in ready)} validated"
                + (
                    ", some of them divided otherwise than splits.json says now"
                    if divided_otherwise(ready, splits)
                    else ""
                )
            )
    if not done:
        wanted: tuple[str, ...] = ("-c", "all")
        # That which lacks least, with the plan and the run that it was begun with.
        folds = max((sorted(folder.glob("fold_[0-9]*/run.json")) for folder in begun), key=len, default=[])
        if folds:
            run = load_json(Run, folds[0])
            named = (*given("--plan", run.plan.name), *given("--run", folds[0].parts[-4]))
            wanted = ("-c", run.configuration, *named)
        raise AutosegError(
            f"no configuration of {name} has all its {len(splits.folds)} folds trained and validated in {root}; "
            f"train them: {workspace.command('fit', '-d', name, *wanted)}"
        )
    return done


def divided_otherwise(folds: Sequence[Path], splits: Splits) -> bool:
    """Whether some finished fold has other cases than the splits have under its number."""
    now = {f"fold_{number}": cases for number, cases in enumerate(splits.folds)}
    return any(open_run(fold).cases != now.get(fold.name) for fold in folds)


def open_entry(
    workspace: Workspace, folder: Path, place: Path, dataset: Dataset, splits: Splits, workers: int | None
) -> Entry:
    """A complete configuration, its folds merged if they are not yet."""
    folds = all_folds(folder, splits)
    assert folds is not None
    cross_validate(folds, dataset, workers)
    trained = in_folders(folds, earlier_folds(folds[0]))
    plan = trained.plan
    seconds = [seconds_a_case(folds), *([seconds_a_case(before)] if (before := earlier_folds(folds[0])) else [])]
    known = [one for one in seconds if one is not None]
    return Entry(
        member=Member(
            folder=folder.relative_to(place).as_posix(), folds=tuple(trained.folds), weights=trained.hashes()
        ),
        folds=folds,
        trained=trained,
        prepared=workspace.cases(plan.dataset, plan.name, trained.configuration.prepared),
        summary=load_json(Summary, folder / "crossval" / SUMMARY),
        seconds=sum(known) if len(known) == len(seconds) else None,
    )


def open_entries(
    workspace: Workspace,
    folders: Sequence[Path],
    place: Path,
    dataset: Dataset,
    splits: Splits,
    workers: int | None,
) -> list[Entry]:
    """`open_entry` of each folder; those that cannot be opened are named. Raises AutosegError if none can."""
    found: list[Entry] = []
    refused: AutosegError | None = None
    for folder in folders:
        try:
            found.append(open_entry(workspace, folder, place, dataset, splits, workers))
        except AutosegError as error:
            refused = error
            print(f"Left out: {folder}, {error}")
    if not found and refused is not None:
        raise refused
    return found


def seconds_a_case(folds: Sequence[Path]) -> float | None:
    """What validating a case took, None if that was not measured."""
    runs = [open_run(fold) for fold in folds]
    seconds, cases = sum(run.validation_seconds for run in runs), sum(len(run.cases.val) for run in runs)
    return seconds / cases if seconds > 0 and cases else None


def comparable(workspace: Workspace, entries: Sequence[Entry], facts: Fingerprint, dataset: Dataset) -> list[Entry]:
    """Those trained on the data as they are now, all on the same held-out cases and classes; others are named.

    Raises AutosegError if there is none.
    """
    found: list[Entry] = []
    for entry in entries:
        why = differs(entry, found[0] if found else entry, facts, dataset)
        if why is None:
            found.append(entry)
        else:
            print(f"Left out: {entry.trained.where}, {why}")
    if not found:
        raise AutosegError(
            f"every configuration of {facts.dataset} was trained on other data than there are now, so their scores do "
            "not compare; train them again under another name: "
            + workspace.command("fit", "-d", facts.dataset, "-c", "all", "--run", "NAME")
        )
    return found


def differs(entry: Entry, first: Entry, facts: Fingerprint, dataset: Dataset) -> str | None:
    """Why the scores of a configuration say nothing of the dataset as it is, or beside the first; None if they do."""
    if open_run(entry.folds[0]).data_hash != facts.data_hash():
        return "it was trained on other data than there are now"
    own = entry.trained.plan
    if not is_merged(own.labels, dataset.labels) or len(own.sources) != len(dataset.channel_names):
        return "it has other labels or channels than the dataset has now"
    if own.labels != first.trained.plan.labels:
        return f"it merges labels otherwise than {first.member.folder}"
    if {score.case for score in entry.summary.scores} != {score.case for score in first.summary.scores}:
        return f"it held out other cases than {first.member.folder}"
    return None


def make_pair(place: Path, first: Entry, second: Entry) -> Pair:
    """The pair, and its folder; what is there of earlier weights is removed."""
    weights = (*first.member.weights, "", *second.member.weights)
    name = "+".join(entry.member.folder.replace("/", ".") for entry in (first, second))
    kept = place / ENSEMBLES / name / hash_text(*weights)[:16]
    for other in kept.parent.glob("*"):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)
    return Pair(entries=(first, second), folder=kept)


def score_pairs(
    workspace: Workspace,
    pairs: Sequence[Pair],
    dataset: Dataset,
    splits: Splits,
    cases: Sequence[str],
    device: str,
    workers: int | None,
) -> dict[tuple[Member, ...], Summary]:
    """The scores of each pair: those that are there, and the others made."""
    todo = [pair for pair in pairs if not (pair.folder / SUMMARY).is_file()]
    predict_pairs(workspace, todo, dataset, splits, cases, device, workers)
    for pair in todo:
        held_out, labels = pair.held_out(dataset, cases), pair.entries[0].trained.plan.labels
        print(f"{JOIN.join(member.folder for member in members_of(pair))}: scoring", flush=True)
        summary = evaluate_pairs(held_out, labels, annotated=dataset.annotated(labels), workers=workers)
        save_summary(summary, pair.folder)
    return {members_of(pair): load_json(Summary, pair.folder / SUMMARY) for pair in pairs}


def predict_pairs(
    workspace: Workspace,
    pairs: Sequence[Pair],
    dataset: Dataset,
    splits: Splits,
    cases: Sequence[str],
    device: str,
    workers: int | None,
) -> None:
    """Write the held-out predictions of pairs that are not there; the probabilities of a case are read once for all."""
    files = {
        (pair.folder, name): path
        for pair in pairs
        for name, _, path in pair.held_out(dataset, cases)
        if not path.exists()
    }
    work = [name for name in cases if any(case == name for _, case in files)]
    if not work:
        return
    on = choose_device(device)
    entries = {entry.member.folder: entry for pair in pairs for entry in pair.entries}
    kept = {name: find_probabilities(workspace, entry.folds, splits, on) for name, entry in entries.items()}
    for pair in pairs:
        pair.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(pair.folder, [path.name for path in files.values()])

    def cost(name: str) -> int:
        entry = next(iter(entries.values()))
        grid = read_case(entry.prepared, name).trace.stored
        voxels = grid.shape[0] * grid.shape[1] * grid.shape[2]
        return 4 * voxels * entry.trained.plan.labels.heads * (len(entries) + 3)

    def write(name: str) -> None:
        wanted = [pair for pair in pairs if (pair.folder, name) in files]
        maps = {}
        for member, entry in entries.items():
            if any(entry in pair.entries for pair in wanted):
                labels, configuration = entry.trained.plan.labels, entry.trained.configuration
                trace = read_case(entry.prepared, name).trace
                maps[member] = restore_probabilities(read(kept[member][name], labels), trace, labels, configuration)
        for pair in wanted:
            labels = pair.entries[0].trained.plan.labels
            indices = labels.decide(mean_of(maps[entry.member.folder] for entry in pair.entries))
            write_labels(labels.to_values(indices), trace.stored, files[pair.folder, name])

    outcomes = map_cases(write, work, name=lambda name: name, what="ensemble", workers=workers, cost=cost)
    raise_failures(outcomes, "averaging held-out probabilities")
