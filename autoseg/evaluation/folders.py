"""Evaluate label files: find the pairs of truth and prediction, refuse what cannot be compared, score in threads."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from autoseg.evaluation.metrics import DEFAULT_TOLERANCE_MM, CaseScore, score_case
from autoseg.evaluation.summary import Summary, summarise
from autoseg.labels import Labels
from autoseg.layout import labels_in
from autoseg.merging import Merges, annotated_as, is_merged, merge
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import ENDINGS, read_labels, read_pair
from autoseg.records import AutosegError, load_json, save_json
from autoseg.volume import Volume, mismatch

NAMES_SHOWN = 10
PROBABILITIES = "_probabilities.nii.gz"
"""After the case: what `predict --save-probabilities` writes beside its labels."""
BESIDE = PROBABILITIES.removesuffix(".nii.gz")

MERGED = "merged_labels.json"
"""Beside predictions of a model that merges labels: its labels, since the files have values of labels as they were."""

Meaning = tuple[Labels, Mapping[str, Sequence[str]]]
"""Labels, and case -> annotated classes of the cases where not all were."""

Pair = tuple[str, Path, Path]
"""Case, file of the truth, file of the prediction."""


def evaluate_folders(
    truth: Path,
    prediction: Path,
    *,
    labels: Labels | None = None,
    annotated: Mapping[str, Sequence[str]] | None = None,
    merges: Merges | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    workers: int | None = None,
    partial: bool = False,
    quiet: bool = False,
) -> Summary:
    """Score every label file of `truth` against the file of the same case in `prediction`.

    A case is a file name without its ending. `labels` default to those of a dataset.json in or above either folder, and
    without one to the values found in the files, 0 being the background. Predictions without a truth are passed over.
    annotated: case -> classes to score, where not all were annotated; it comes from the dataset.json too.
    merges: labels to score as one class; by default those that the model merged which predicted (MERGED beside them).

    Raises AutosegError that names the cases without prediction (unless `partial`: then they are passed over), whose
    grids differ, or that hold values which no label has.
    """
    truths, predictions = files_by_case(truth), files_by_case(prediction)
    pairs = [(case, truths[case], predictions[case]) for case in sorted(set(truths) & set(predictions))]
    if not pairs:
        case, other = min(truths), predictions[min(predictions)].name
        raise AutosegError(
            f"no case of {truth} has a prediction in {prediction}, which holds {other}; that of {truths[case].name} is "
            f"called {case}.nii.gz there, or with another known ending: predictions are CASE.nii.gz, without _0000"
        )
    missing = sorted(set(truths) - set(predictions))
    if missing and not partial:
        raise AutosegError(
            f"{prediction} has no prediction for {len(missing)} of {len(truths)} cases of {truth}: {_few(missing)}; "
            "predict them, or score only those that are there with --partial"
        )
    told = (labels, annotated or {}) if labels is not None else find_labels(truth, prediction)
    if told is None and (merges or not (prediction / MERGED).is_file()):
        told = _labels_in(pairs, workers, quiet), annotated or {}
    found = as_predicted(told, prediction, merges=merges)
    assert found is not None
    labels, annotated = found
    for name, values in labels.merges.items():
        if not quiet:
            print(f"{name}: the labels {', '.join(map(str, values))} as one class")
    return evaluate_pairs(pairs, labels, annotated=annotated, tolerance_mm=tolerance_mm, workers=workers, quiet=quiet)


def evaluate_pairs(
    pairs: Sequence[Pair],
    labels: Labels,
    *,
    annotated: Mapping[str, Sequence[str]] | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    workers: int | None = None,
    quiet: bool = False,
) -> Summary:
    """Score pairs of label files in `workers` threads; errors as in `evaluate_folders`.

    For arrays in memory: `score_case` on each pair, then `summarise`, which is all that happens here after reading.
    """

    def score(pair: Pair) -> tuple[CaseScore, ...]:
        case, truth_path, prediction_path = pair
        truth, prediction = read_pair(truth_path, prediction_path)
        _refuse_unexpected(truth, truth_path, labels)
        _refuse_unexpected(prediction, prediction_path, labels)
        if difference := mismatch(truth.grid, prediction.grid):
            raise AutosegError(
                f"truth and prediction lie on different grids ({difference}); predict from the image that the truth "
                "was drawn on, or resample the prediction to the grid of the truth with nearest-neighbour interpolation"
            )
        return score_labels(
            case, truth.array[0], prediction.array[0], truth.grid.spacing_mm, labels, tolerance_mm, annotated
        )

    outcomes = map_cases(score, pairs, name=lambda pair: pair[0], what="evaluate", workers=workers, quiet=quiet)
    scores = [score for scores in raise_failures(outcomes, "evaluate") for score in scores]
    return summarise(scores, labels.scored, tolerance_mm)


def score_labels(
    case: str,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Labels,
    tolerance_mm: float,
    annotated: Mapping[str, Sequence[str]] | None = None,
) -> tuple[CaseScore, ...]:
    """`score_case` of stored values (Z, Y, X), for the classes of `labels` that were annotated in this case."""
    names = (annotated or {}).get(case, labels.names)
    wanted = {name: value for name, value in labels.scored.items() if name in names}
    return score_case(case, truth, prediction, spacing_mm, wanted, tolerance_mm, labels.ignore)


def _refuse_unexpected(volume: Volume, path: Path, labels: Labels) -> None:
    unexpected = labels.unexpected(volume.array)
    if unexpected:
        raise AutosegError(
            f"{path} holds the values {_few(unexpected)}, which no label has (labels: {sorted(labels.allowed)}); "
            "correct the file or the labels in dataset.json"
        )


def files_by_case(folder: Path, kind: str = "label files") -> dict[str, Path]:
    """Case -> file, for every file of `folder` that a reader knows. Raises AutosegError if there are none, or two.

    Probabilities beside the labels of a case are no case of their own. kind: what they are, for the error.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
        if ending is None or path.name.startswith("."):
            continue
        case = path.name[: -len(ending)]
        if case in files:
            raise AutosegError(
                f"{folder} has two files for case {case}: {files[case].name} and {path.name}; remove one"
            )
        files[case] = path
    files = {c: p for c, p in files.items() if not (p.name.endswith(PROBABILITIES) and c[: -len(BESIDE)] in files)}
    if not files:
        raise AutosegError(f"{folder} is no folder with {kind} ({', '.join(ENDINGS)})")
    return files


def find_labels(*folders: Path) -> Meaning | None:
    """What the first dataset.json in or just above the folders says of labels; None without one."""
    for folder in folders:
        for place in (folder, folder.resolve().parent):
            if (place / "dataset.json").is_file():
                return labels_in(place)
    return None


def note_merged(labels: Labels | None, folder: Path, written: Collection[str] | None = None) -> None:
    """Say in a folder of predictions that `labels` are merged in them; or take back what was said of earlier ones.

    written: names of the files that are made there, and of those that hold no labels; None: there are no others.
    Raises AutosegError if something else was said, and other label files stay, of which that holds.
    """
    place, merged = folder / MERGED, labels if labels is not None and labels.merges else None
    if written is not None and place.is_file() and load_json(Labels, place) != merged:
        there = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(tuple(ENDINGS)))
        if others := [name for name in there if not name.startswith(".") and name not in written]:
            raise AutosegError(
                f"{place} says which labels are merged in {_few(others)}, and is not true of what would be written "
                "beside them; give another -o, or move them away with that file"
            )
    if merged is not None:
        save_json(merged, place)
    else:
        place.unlink(missing_ok=True)


def as_predicted(meaning: Meaning | None, *folders: Path, merges: Merges | None = None) -> Meaning | None:
    """`meaning` with the labels merged as asked, else as they are in the predictions of the folders (MERGED).

    Raises AutosegError if it tells classes apart that are one in the predictions.
    """
    said = {place: load_json(Labels, place) for folder in folders if (place := folder / MERGED).is_file()}
    if meaning is None:
        meaning = (next(iter(said.values())), {}) if said else None
    else:
        finer, annotated = meaning
        labels = merge(finer, merges) if merges else next(iter(said.values()), finer)
        if is_merged(labels, finer):
            meaning = labels, annotated_as(annotated, finer, labels)
    apart = [set(np.ravel(values)) for values in meaning[0].scored.values()] if meaning else []
    for place, labels in said.items():
        for name, values in labels.merges.items():
            if not any(set(values) <= each for each in apart):
                raise AutosegError(
                    f"{place} says that {name} is one class of the labels {', '.join(map(str, values))}, which the "
                    "predictions no longer tell apart; give -d the dataset that the model was trained on, or --merge "
                    "them. Where the truth has them merged too, remove that file"
                )
    return meaning


def _labels_in(pairs: Sequence[Pair], workers: int | None, quiet: bool) -> Labels:
    """One class for each value but 0 that any of the files holds, called by its value."""

    def values_of(pair: Pair) -> set[int]:
        return {int(value) for path in pair[1:] for value in np.unique(read_labels(path)[0].array)}

    outcomes = map_cases(values_of, pairs, name=lambda pair: pair[0], what="find labels", workers=workers, quiet=quiet)
    values = sorted(set().union(*raise_failures(outcomes, "evaluate")) - {0})
    if not values:
        raise AutosegError("the label files hold nothing but background; there is nothing to score")
    return Labels(names=("background", *map(str, values)), values=(0, *values))


def _few(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:NAMES_SHOWN]))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
