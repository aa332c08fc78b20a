"""find_best: every trained configuration and every pair of them, compared on the held-out cases; the best is chosen.

A configuration has the scores of its own cross-validation. A pair is the mean of the out-of-fold probabilities of
both, on the original grid, scored like any prediction. The single configuration of the highest mean Dice is chosen,
unless a pair is better by more than noise: it takes the time of two. `model.json` says what was found; `predict`
follows it. It lies beside the configurations where one run was compared, and beside the runs where several were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from autoseg.bundle import ModelCard
from autoseg.ensemble import Candidate, Choice, Member
from autoseg.evaluation import Summary
from autoseg.evaluation.compare import DRAWS, FEWEST_CASES, class_means, dice_table, difference, mean_dice, occurring
from autoseg.layout import Dataset, open_dataset
from autoseg.model import CARD
from autoseg.pipeline.crossval import dice_of, fit_postprocessing, score_processed
from autoseg.pipeline.pairs import (
    Pair,
    comparable,
    complete_folders,
    make_pair,
    members_of,
    open_entries,
    predict_pairs,
    score_pairs,
)
from autoseg.postprocess import PostProcessing
from autoseg.records import load_json, save_json, sole_writer
from autoseg.schema import Fingerprint
from autoseg.splits import read_splits
from autoseg.workspace import Workspace

SEED = 0


@dataclass(frozen=True, kw_only=True)
class BestOptions:
    """The options of find_best. `runs`: those to compare, all if empty."""

    runs: tuple[str, ...] = ()
    device: str = "auto"
    workers: int | None = None


def find_best(workspace: Workspace, dataset_text: str, options: BestOptions) -> Choice:
    """Compare all configurations whose folds are all trained, and their pairs; write, print and return the choice.

    The same command goes on after a stop. Raises AutosegError if there is no such configuration.
    """
    name, raw = workspace.dataset(dataset_text)
    dataset = open_dataset(raw)
    again = f"plan again without them: autoseg plan_and_preprocess -d {dataset_text}{workspace.option}"
    divided = workspace.prepared(name) / "splits.json"
    splits = read_splits(divided, [case.id for case in dataset.cases], cure=again)
    folders = complete_folders(workspace, name, options.runs, splits)
    place = folders[0].parent if len({folder.parent for folder in folders}) == 1 else folders[0].parent.parent
    with sole_writer(place):
        facts = load_json(Fingerprint, workspace.prepared(name) / "fingerprint.json")
        opened = open_entries(workspace, folders, place, dataset, splits, options.workers)
        entries = comparable(workspace, opened, facts, dataset)
        cases = sorted({score.case for score in entries[0].summary.scores})
        pairs = [make_pair(place, *two) for two in combinations(entries, 2)]
        summaries: dict[tuple[Member, ...], Summary] = {(entry.member,): entry.summary for entry in entries}
        summaries |= score_pairs(workspace, pairs, dataset, splits, cases, options.device, options.workers)
        candidates = compare(summaries, {entry.member: entry.seconds for entry in entries}, cases)
        chosen, reason = decide(candidates, len(cases))
        absent = [label for label in entries[0].summary.labels if label not in candidates[0].dice]
        print(comparison_table(candidates, chosen, reason, absent, len(cases)), flush=True)
        members = candidates[chosen].members
        if len(members) == 1:
            card = load_json(ModelCard, place / members[0].folder / CARD)
            rule, processed = card.postprocessing, card.dice_postprocessed
        else:
            pair = next(pair for pair in pairs if members_of(pair) == members)
            predict_pairs(workspace, [pair], dataset, splits, cases, options.device, options.workers)
            rule, processed = fit_rule(pair, dataset, cases, summaries[members], options.workers)
        choice = Choice(
            dataset=name,
            cases=len(cases),
            chosen=chosen,
            reason=reason,
            candidates=candidates,
            absent=tuple(absent),
            draws=DRAWS,
            seed=SEED,
            dice_postprocessed=processed,
            postprocessing=rule,
        )
        save_json(choice, place / CARD)
        root = workspace.root / "runs" / name
        if not options.runs and place != root:
            # All runs were asked for: a former choice among several, which predict would follow first, is out of date.
            (root / CARD).unlink(missing_ok=True)
        for pair in pairs:
            if members_of(pair) != members:
                pair.forget_predictions(dataset, cases)
    print(f"Post-processing: {rule.describe(entries[0].trained.plan.labels)}")
    if rule.steps and processed["foreground"] is not None:
        print(f"Mean Dice with it: {processed['foreground']:.4f}")
    named = () if place == root else ("--run", place.name)
    print(f"Model: {place / CARD}; {workspace.command('predict', '-d', name, *named)} follows it", flush=True)
    return choice


def fit_rule(
    pair: Pair, dataset: Dataset, cases: Sequence[str], raw: Summary, workers: int | None
) -> tuple[PostProcessing, dict[str, float | None]]:
    """Post-processing fitted on the held-out predictions of a pair, and its Dice with it."""
    held_out, labels, annotated = (
        pair.held_out(dataset, cases),
        pair.entries[0].trained.plan.labels,
        dataset.annotated(pair.entries[0].trained.plan.labels),
    )
    rule = fit_postprocessing(held_out, labels, annotated, workers)
    return rule, dice_of(score_processed(held_out, labels, annotated, rule, raw, workers) if rule.steps else raw)


def compare(
    summaries: Mapping[tuple[Member, ...], Summary], seconds: Mapping[Member, float | None], cases: Sequence[str]
) -> tuple[Candidate, ...]:
    """Every candidate from the highest mean Dice to the lowest; of equal ones the simpler, then the faster first.

    summaries: of each candidate's held-out cases, all with the same truth. Only classes that occur are counted.
    """
    classes = occurring(next(iter(summaries.values())))
    tables = {members: dice_table(summary, cases, classes) for members, summary in summaries.items()}
    times = {members: [seconds[member] for member in members] for members in tables}
    known = {members: None if None in own else sum(filter(None, own)) for members, own in times.items()}

    def rank(members: tuple[Member, ...]) -> tuple[float, int, float]:
        time = known[members]
        return -(mean_dice(tables[members]) or 0.0), len(members), float("inf") if time is None else time

    order = sorted(tables, key=rank)
    best = next(members for members in order if len(members) == 1)
    candidates = []
    for members in order:
        gap, low, high = (None, None, None) if members == best else difference(tables[members], tables[best], SEED)
        candidates.append(
            Candidate(
                members=members,
                dice={
                    label: None if mean != mean else float(mean)  # NaN: no case defines it
                    for label, mean in zip(classes, class_means(tables[members]))
                },
                mean=mean_dice(tables[members]),
                difference=gap,
                low=low,
                high=high,
                seconds=known[members],
            )
        )
    return tuple(candidates)


def decide(candidates: Sequence[Candidate], cases: int) -> tuple[int, str]:
    """Which of `compare`'s candidates is chosen, and why.

    The best single configuration, unless the whole interval of a pair's difference to it is above 0; of several such
    pairs the best.
    """
    single = next(place for place, one in enumerate(candidates) if len(one.members) == 1)
    if len(candidates) == 1:
        return single, "the only one that is trained"
    above = [place for place, one in enumerate(candidates) if len(one.members) > 1 and place < single]
    if not above:
        return single, "no pair has a higher mean Dice"
    sure = [place for place in above if (candidates[place].low or 0) > 0]
    if cases < FEWEST_CASES:
        return single, f"{cases} cases are too few to show that a pair, which takes longer, is better"
    if not sure:
        return single, "no pair, which takes longer, is better by more than noise: all intervals reach 0"
    return sure[0], "a pair that is better than any configuration alone by more than noise"


def comparison_table(
    candidates: Sequence[Candidate], chosen: int, reason: str, absent: Sequence[str], cases: int
) -> str:
    """All candidates with their Dice, the difference to the best single one, and time; which is chosen and why."""
    rows = [["", "configuration", *candidates[0].dice, "mean Dice", "to the best alone (95 %)", "s/case"]]
    for place, one in enumerate(candidates):
        gap = ""
        if one.difference is not None:
            gap = f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
        numbers = ["undefined" if value is None else f"{value:.4f}" for value in (*one.dice.values(), one.mean)]
        time = "" if one.seconds is None else f"{one.seconds:.2f}"
        rows.append(["*" if place == chosen else "", one.name, *numbers, gap, time])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append(
        f"{cases} held-out cases, as predicted; intervals by {DRAWS} bootstrap draws of cases, seed {SEED}\n"
        "s/case: to predict and score a case with one fold, as measured in validation"
    )
    if absent:
        lines.append(f"No case has {', '.join(absent)}: left out of every mean")
    return "\n" + "\n".join([*lines, f"Chosen: {candidates[chosen].name}, {reason}"])
