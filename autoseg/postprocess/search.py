"""Which steps of post-processing to take: a greedy search over held-out cases that keeps only what is beyond chance.

First whole components are removed, then holes and gaps are filled; in both the foreground comes before each class, and
each decision compares its candidates on top of what was accepted before. A candidate is accepted if the mean Dice of
its members rises, the mean of no other class falls, and the lower bound of a paired bootstrap of the gain over the
cases is above 0. Of several the one with the largest gain is taken, of equal ones the first.

How sure. Keeping the largest component has nothing to tune, and the field takes it on any rise (Isensee et al., Nature
Methods 2021): each is tested at LEVEL. All the others together are a search, and share LEVEL equally (Bonferroni), so
that the chance of any false find among them stays near or below it, however many classes there are.

The cost. Each case is read once and then kept as compressed label maps. What removing does follows by arithmetic from
a table of components (`Case`): every component of several classes is made of whole components of one, so a graph of
which touch which gives those of any union, also of overlapping regions, after any removal. Filling is tried on the
label maps, all candidates in one pass; another pass is needed only after a step was accepted.

Ignored voxels count for the size of a component, since prediction does not know them, and for no Dice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import TypeVar

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from autoseg.labels import Labels
from autoseg.postprocess.components import Case
from autoseg.postprocess.significance import Resamples, mean_of, means
from autoseg.postprocess.steps import PostProcessing, Step, apply_steps, filling, is_below, out_of_reach

LEVEL = 0.05
SIZES = 4
"""Sizes of islands that are tried: these quantiles of the sizes of components without a true voxel."""
REACHES = (1.5, 2.5)
"""Radii of closings that are tried, in voxels of the middle spacing of a typical case: next and next but one voxels."""
SEARCHED = SIZES + 1 + len(REACHES)
"""Candidates of each class that share LEVEL."""
PARTS = 5
"""Of the cases, for cross-fitting."""
SLACK = 1e-12
"""Means that differ by less are equal."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """All cases after the steps accepted so far: voxels (cases, R) predicted as each class, and right ones of them."""

    steps: tuple[Step, ...] = ()
    kept: np.ndarray
    """Components that remain, over all cases."""
    found: np.ndarray
    right: np.ndarray

    def plus(self, step: Step, found: np.ndarray, right: np.ndarray, kept: np.ndarray | None = None) -> "State":
        """After `step`, which changes the voxel counts by so much."""
        return State(
            steps=(*self.steps, step),
            kept=self.kept if kept is None else kept,
            found=self.found + found,
            right=self.right + right,
        )


Each = Callable[[Callable[[Case], T], Sequence[Case]], list[T]]
"""Apply a function to every case, in threads or one after the other."""


def choose(cases: Sequence[Case], labels: Labels, each: Each | None = None) -> PostProcessing:
    """Choose the steps from held-out cases; `each` applies a function to all of them, by default in turn."""
    search = Search(cases, labels, each or (lambda function, items: [function(item) for item in items]))
    everyone = np.arange(len(cases))
    state, rejected = search.run(everyone)
    crossfitted: tuple[float | None, ...] = ()
    if len(cases) >= 2 * PARTS and state.steps:
        table = np.full((len(cases), len(labels.members)), np.nan)
        # Neighbours stay together: cases of one patient mostly follow each other.
        for held in np.array_split(everyone, PARTS):
            table[held] = search.dice(search.run(np.setdiff1d(everyone, held))[0])[held]
        crossfitted = _listed(means(table))
    return PostProcessing(
        cases=len(cases),
        steps=state.steps,
        rejected=tuple(rejected),
        dice=_listed(means(search.dice(search.start))),
        dice_processed=_listed(means(search.dice(state))),
        dice_crossfitted=crossfitted,
    )


def _listed(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)


class Search:
    """The tables of all cases one below the other, and what was already tried on their label maps."""

    def __init__(self, cases: Sequence[Case], labels: Labels, each: Each) -> None:
        self.cases, self.each, self.regions = cases, each, labels.members
        foreground = tuple(sorted({index for members in labels.members for index in members}))
        # With a single class, or a region of everything, the foreground is that class.
        self.targets = [foreground, *(members for members in self.regions if set(members) != set(foreground))]
        self.inside = np.zeros((len(labels.known), len(self.regions)), dtype=np.int64)
        for number, members in enumerate(self.regions):
            self.inside[list(members), number] = 1
        counts = [len(case.owner) for case in cases]
        firsts = np.cumsum([0, *counts])
        self.case = np.repeat(np.arange(len(cases)), counts)
        nothing = np.zeros(0, dtype=np.int64)
        self.owner = np.concatenate([nothing, *(case.owner for case in cases)])
        self.size = np.concatenate([nothing, *(case.size for case in cases)])
        self.voxel_mm3 = np.array([np.prod(case.spacing_mm) for case in cases])
        self.hits = np.concatenate([np.zeros((0, len(labels.stored))), *(case.hits for case in cases)])
        counted = np.concatenate([nothing, *(case.counted for case in cases)])
        self.edges = np.concatenate([nothing.reshape(0, 2), *(c.edges + n for c, n in zip(cases, firsts))])
        # What each component adds to the voxels of each class, and to the right ones.
        self.adds = counted[:, None] * self.inside[self.owner]
        self.adds_right = (self.hits @ self.inside[: len(labels.stored)]) * self.inside[self.owner]
        shape = (len(cases), len(self.regions))
        self.true = np.array([case.true for case in cases]).reshape(shape)
        self.scored = np.array([case.scored for case in cases], dtype=bool).reshape(shape)
        everything = np.ones(len(self.owner), dtype=bool)
        self.start = State(
            kept=everything, found=self.sums(self.adds, everything), right=self.sums(self.adds_right, everything)
        )
        self.tried: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}

    def sums(self, adds: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Sum of `adds` (components, R) over the chosen components of each case."""
        out = np.zeros((len(self.cases), len(self.regions)))
        np.add.at(out, self.case[chosen], adds[chosen])
        return out

    def dice(self, state: State) -> np.ndarray:
        """Dice (cases, R); NaN where truth and prediction are both empty or the class was not annotated.

        Removing can empty a class that was wrongly predicted where there is none: its Dice 0 becomes undefined.
        """
        both = state.found + self.true
        defined = self.scored & (both > 0)
        return np.divide(2 * state.right, both, out=np.full(both.shape, np.nan), where=defined)

    def run(self, rows: np.ndarray) -> tuple[State, list[Step]]:
        """The search on the cases `rows`: the state of all cases in the end, and what was turned down."""
        state, rejected = self.start, []
        judge = Judge(self, rows)
        for members in self.targets:
            state, refused = judge.decide(state, self.removals(state, members, rows))
            rejected += refused
        middle = np.median([sorted(self.cases[row].spacing_mm)[1] for row in rows]) if len(rows) else 1.0
        closings = [float(f"{reach * middle:.3g}") for reach in REACHES]
        decisions = []
        for members in self.targets:
            decisions.append([Step(kind="holes", members=members)])
            tried = [Step(kind="closing", members=members, radius_mm=radius) for radius in closings]
            # What the voxels of some case are too fine for cannot be judged.
            odd = {step for case in self.cases for step in out_of_reach(tried, case.spacing_mm, case.flat)}
            decisions.append([step for step in tried if step not in odd])
        for number, candidates in enumerate(decisions):
            self.try_out(state, [step for later in decisions[number:] for step in later])
            trials = [state.plus(step, *self.tried[_key(state, step)]) for step in candidates]
            state, refused = judge.decide(state, trials)
            rejected += refused
        return state, rejected

    def removals(self, state: State, members: tuple[int, ...], rows: np.ndarray) -> list[State]:
        """The state after each candidate that removes components of the union of `members`."""
        mine = state.kept & np.isin(self.owner, members)
        edges = self.edges[mine[self.edges].all(axis=1)]
        graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(mine), len(mine)))
        count, group = connected_components(graph, directed=False) if len(mine) else (0, self.case)
        size = np.bincount(group[mine], weights=self.size[mine], minlength=count)
        of_case = np.zeros(count, dtype=np.int64)
        of_case[group] = self.case
        largest = np.zeros(len(self.cases))
        np.maximum.at(largest, of_case, size)
        smaller, volume = size < largest[of_case], size * self.voxel_mm3[of_case]
        trials = [self.without(state, Step(members=members), mine & smaller[group])]
        right = np.bincount(group[mine], weights=self.hits[mine][:, list(members)].sum(1), minlength=count)
        wrong = (size > 0) & (right == 0) & np.isin(of_case, rows)
        for below in island_sizes(volume[wrong]):
            step = Step(kind="islands", members=members, below_mm3=below)
            trials.append(self.without(state, step, mine & is_below(volume, below)[group]))
        return trials

    def without(self, state: State, step: Step, gone: np.ndarray) -> State:
        """The state once the components `gone` are removed."""
        less = -self.sums(self.adds, gone), -self.sums(self.adds_right, gone)
        return state.plus(step, *less, state.kept & ~gone)

    def try_out(self, state: State, steps: Sequence[Step]) -> None:
        """Look up, on the label maps of all cases, what each of `steps` that fill adds to `state`."""
        new = [step for step in steps if _key(state, step) not in self.tried]

        def adds(case: Case) -> np.ndarray:
            truth, before = case.maps()
            before = apply_steps(before, state.steps, case.spacing_mm, case.flat)
            out = np.zeros((len(new), 2, len(self.regions)))
            for number, step in enumerate(new):
                places, values = filling(before, step, case.spacing_mm, case.flat)
                true = truth[places]
                seen = true < self.hits.shape[1]
                filled = self.inside[values[seen]]
                out[number] = filled.sum(0), (filled * self.inside[true[seen]]).sum(0)
            return out

        if new:
            every = self.each(adds, self.cases)
            for number, step in enumerate(new):
                both = np.stack([one[number] for one in every]) if every else np.zeros((0, 2, len(self.regions)))
                self.tried[_key(state, step)] = both[:, 0], both[:, 1]


def _key(state: State, step: Step) -> tuple[object, ...]:
    return (*(other.action for other in state.steps), step.action)


def island_sizes(wrong_mm3: np.ndarray) -> list[float]:
    """Sizes to try for islands, given the volumes of wrong components: round numbers just above their quantiles.

    Round numbers (1, 2, 5, 10, ...) are as good, say what they are, and do not change with every case.
    """
    if not len(wrong_mm3):
        return []
    found = np.quantile(wrong_mm3, np.arange(1, SIZES + 1) / SIZES)
    steps = np.sort(np.concatenate([10.0**power * np.array((1, 2, 5)) for power in range(-9, 13)]))
    return sorted({float(f"{steps[np.searchsorted(steps, volume * (1 + 1e-3))]:.3g}") for volume in found})


class Judge:
    """Decides by the cases `rows` of a search whether a step is taken."""

    def __init__(self, search: Search, rows: np.ndarray) -> None:
        self.search, self.rows = search, rows
        self.resamples = Resamples(len(rows))

    def decide(self, state: State, trials: Sequence[State]) -> tuple[State, list[Step]]:
        """The best of `trials` that stands, else `state`; and the steps that were turned down."""
        before = self.search.dice(state)[self.rows]
        judged = [replace(trial, steps=(*state.steps, self.judge(before, trial))) for trial in trials]
        standing = [trial for trial in judged if not trial.steps[-1].verdict]
        best = max(standing, key=lambda trial: round(_gain(trial.steps[-1]), 9), default=state)
        refused = [trial.steps[-1] for trial in judged if trial is not best]
        return best, [replace(step, verdict=step.verdict or "another gains more") for step in refused]

    def judge(self, before: np.ndarray, trial: State) -> Step:
        """The last step of `trial` with its numbers, and with a verdict if it is turned down."""
        step, after = trial.steps[-1], self.search.dice(trial)[self.rows]
        foreground = step.members == self.search.targets[0]
        columns = slice(None) if foreground else [self.search.regions.index(step.members)]
        level = LEVEL if step.kind == "largest" else LEVEL / (SEARCHED * len(self.search.targets))
        old, new = means(before), means(after)
        step = replace(step, dice_before=mean_of(old[columns]), dice_after=mean_of(new[columns]), level=level)
        if np.array_equal(before, after, equal_nan=True):
            return replace(step, verdict="changes nothing")
        if step.dice_before is None or step.dice_after is None or _gain(step) <= SLACK:
            return replace(step, verdict="no gain")
        # A class mean that becomes undefined has not fallen.
        if np.any(new < old - SLACK):
            return replace(step, verdict="another class loses")
        # Where even a gain in every single case could be chance, by a sign test.
        if len(self.rows) < ceil(-log2(level)):
            return replace(step, verdict="too few cases")
        bound = self.resamples.lower_bound(before[:, columns], after[:, columns], level)
        return replace(step, bound=bound, verdict="" if bound > SLACK else "within chance")


def _gain(step: Step) -> float:
    assert step.dice_before is not None and step.dice_after is not None
    return step.dice_after - step.dice_before
