"""Cross-validation of one configuration: the held-out scores of its folds put together, post-processing fitted on them.

Written into the configuration's folder: `crossval/` with the scores of every case, as predicted, and where
post-processing changes anything `crossval_postprocessed/`; `model.json`, which `predict` follows. The post-processed
scores are those of the cases that the rule was chosen on, so they flatter it a little; the cross-fitted Dice does not.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from autoseg.bundle import ModelCard
from autoseg.evaluation import CaseScore, Summary, save_summary, score_labels, summarise, table
from autoseg.labels import Labels
from autoseg.layout import Dataset
from autoseg.model import CARD, is_finished, open_run, weights_hash
from autoseg.parallel import map_cases, raise_failures
from autoseg.pipeline.postprocess import measure_pairs, search
from autoseg.pipeline.recipe import LENGTH, SHORT
from autoseg.postprocess import PostProcessing, apply, trials
from autoseg.readers import read_pair
from autoseg.records import AutosegError, load_json, save_json, to_json
from autoseg.schema import Recipe, Run
from autoseg.splits import Splits

SUMMARY = "summary.json"
MAY_DIFFER = (*LENGTH, "batch_size", "seed", "keep_probabilities", "loader_threads", "checkpoint_minutes")
"""Recipe fields that folds of one cross-validation need not share."""

HeldOut = tuple[str, Path, Path]
"""(case, file of the truth, file of the held-out prediction)."""


def held_out(folder: Path, run: Run, dataset: Dataset, place: str = "validation") -> list[HeldOut]:
    """Every held-out case of the fold in `folder`, with its prediction in the folder `place` of it.

    Raises AutosegError if the dataset has lost one.
    """
    truths = {case.id: Path(case.label) for case in dataset.cases if case.label is not None}
    if lost := sorted(set(run.cases.val) - set(truths)):
        raise AutosegError(
            f"{folder} held out {', '.join(lost)}, which the dataset no longer has; put the case back, or train under "
            "another --run"
        )
    return [(name, truths[name], folder / place / f"{name}{dataset.file_ending}") for name in run.cases.val]


def validated(folder: Path) -> bool:
    """Whether a fold is trained to its end and its held-out cases are scored."""
    return is_finished(folder) and (folder / "validation" / SUMMARY).is_file()


def all_folds(folder: Path, splits: Splits) -> tuple[Path, ...] | None:
    """The fold folders of a configuration if every fold of the splits is trained and validated, else None.

    A fold of other cases than the splits have now, by an earlier division, is none of theirs.
    """
    folds = tuple(folder / f"fold_{number}" for number in range(len(splits.folds)))
    whole = all(validated(fold) and open_run(fold).cases == cases for fold, cases in zip(folds, splits.folds))
    return folds if whole else None


def cross_validate(folds: Sequence[Path], dataset: Dataset, workers: int | None = None) -> ModelCard:
    """Merge the scores of validated folds, fit post-processing, write and print both. Does nothing twice.

    Raises AutosegError if a fold is unfinished or a file of it is missing.
    """
    folder = folds[0].parent
    hashes = {fold.name: weights_hash(fold) for fold in folds}
    if (folder / CARD).is_file() and (card := load_json(ModelCard, folder / CARD)).folds == hashes:
        return card
    runs = [open_run(fold) for fold in folds]
    refuse_mixture(folds, runs)
    labels = runs[0].plan.labels
    summaries = [load_json(Summary, fold / "validation" / SUMMARY) for fold in folds]
    merged = summarise(
        (score for summary in summaries for score in summary.scores), summaries[0].labels, summaries[0].tolerance_mm
    )
    pairs = [pair for fold, run in zip(folds, runs) for pair in held_out(fold, run, dataset)]
    annotated = dataset.annotated(labels)
    rule = fit_postprocessing(pairs, labels, annotated, workers)
    processed = score_processed(pairs, labels, annotated, rule, merged, workers) if rule.steps else merged
    card = ModelCard(
        dataset=runs[0].dataset,
        configuration=runs[0].configuration,
        folds=hashes,
        cases=len(pairs),
        dice=dice_of(merged),
        dice_postprocessed=dice_of(processed),
        postprocessing=rule,
    )
    save_summary(merged, folder / "crossval")
    print(f"\nCross-validation of {len(folds)} folds, {len(pairs)} held-out cases, as predicted:\n{table(merged)}")
    print(f"Post-processing: {rule.describe(labels)}\n{trials(rule, labels)}", flush=True)
    if rule.steps:
        save_summary(processed, folder / "crossval_postprocessed")
        print(f"\nThe same with post-processing:\n{table(processed)}")
    else:
        shutil.rmtree(folder / "crossval_postprocessed", ignore_errors=True)  # of an earlier rule
    save_json(card, folder / CARD)
    print(f"Model: {folder / CARD}", flush=True)
    return card


def refuse_mixture(folds: Sequence[Path], runs: Sequence[Run]) -> None:
    """AutosegError if the folds were trained with different plans, data or recipes, MAY_DIFFER apart.

    Nor need they share what their length chose: near its limit folds of one budget may get either optimizer.
    """

    def essence(run: Run) -> str:
        short = all(getattr(run.recipe, name) == value for name, value in SHORT.items())
        alike = (*MAY_DIFFER, *SHORT) if short else MAY_DIFFER
        recipe = replace(run.recipe, **{name: getattr(Recipe(), name) for name in alike})
        return to_json(run.plan.concerning(run.configuration)) + to_json(recipe)

    for fold, run in zip(folds, runs):
        if essence(run) != essence(runs[0]):
            raise AutosegError(
                f"{fold} and {folds[0]} were trained with different plans or recipes, so they make no common "
                "cross-validation; train one of them again under another --run"
            )
        if run.data_hash != runs[0].data_hash:
            raise AutosegError(
                f"{fold} and {folds[0]} were trained on different data: cases have been changed, removed or added in "
                "between, so they make no common cross-validation; train all folds again under another --run"
            )


def fit_postprocessing(
    pairs: Sequence[HeldOut], labels: Labels, annotated: Mapping[str, Sequence[str]], workers: int | None
) -> PostProcessing:
    """The rule for held-out predictions; each case is read once."""
    cases = raise_failures(measure_pairs(pairs, labels, annotated, workers), "fitting post-processing")
    return search(dict(zip((pair[0] for pair in pairs), cases, strict=True)), labels, workers)


def score_processed(
    pairs: Sequence[HeldOut],
    labels: Labels,
    annotated: Mapping[str, Sequence[str]],
    rule: PostProcessing,
    raw: Summary,
    workers: int | None,
) -> Summary:
    """Scores of the held-out predictions after `rule`; `raw` are those before it."""

    def score(pair: HeldOut) -> Iterable[CaseScore]:
        truth, predicted = read_pair(*pair[1:])
        spacing = truth.grid.spacing_mm
        prediction = apply(labels.to_indices(predicted.array[0]), rule, spacing)
        stored = labels.to_values(prediction)
        return score_labels(pair[0], truth.array[0], stored, spacing, labels, raw.tolerance_mm, annotated)

    outcomes = map_cases(score, pairs, name=lambda pair: pair[0], what="evaluate", workers=workers)
    return summarise(
        (one for scores in raise_failures(outcomes, "evaluate") for one in scores), raw.labels, raw.tolerance_mm
    )


def dice_of(summary: Summary) -> dict[str, float | None]:
    """Class -> mean Dice, and `foreground`, the mean over classes."""
    means = {entry.label: entry.means["dice"].mean for entry in summary.classes}
    return means | {"foreground": summary.foreground["dice"].mean}
