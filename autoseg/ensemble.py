"""Ensembles: several trained configurations as one model, by the mean of their probabilities.

`Choice` is what `find_best` found out and wrote, `Chosen` its model on the disk, `Ensemble` the model opened. They
answer to what `Trained` and `Model` answer to, so that prediction needs not know which of the two it has.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoseg.model import CARD, Model, Trained, at
from autoseg.postprocess import PostProcessing, apply
from autoseg.preprocess import PreparedCase
from autoseg.records import SCHEMA_VERSION, AutosegError, load_json, record
from autoseg.restore import Trace
from autoseg.schema import Configuration, Plan
from autoseg.volume import Grid, Volume, canonical_grid

JOIN = " + "


@record
class Member:
    """A trained configuration with its folds."""

    folder: str
    """Where it lies, from the folder of the model.json that names it: `3d_fullres`, or `big/3d_fullres`."""
    folds: tuple[str, ...]
    weights: tuple[str, ...]
    """Hashes of the weights of all folds, those of a cascade's earlier stage last."""


@record
class Candidate:
    """A configuration or a pair that was compared."""

    members: tuple[Member, ...]
    dice: dict[str, float | None]
    """Class that occurs -> mean Dice of the held-out cases, as predicted."""
    mean: float | None
    """Of the classes that occur."""
    difference: float | None = None
    """Of the mean, to the best single configuration; None for that itself. `low` to `high`: its 95 % interval."""
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    """What predicting and scoring a case took when it was validated, by one fold; of a pair the sum."""

    @property
    def name(self) -> str:
        """The folders of its members."""
        return JOIN.join(member.folder for member in self.members)


@record
class Choice:
    """model.json beside the folders of configurations, or of runs: which of them `predict` follows, and why."""

    schema_version: int = SCHEMA_VERSION
    dataset: str
    cases: int
    chosen: int
    """Which of `candidates`."""
    reason: str
    candidates: tuple[Candidate, ...]
    """From the highest mean Dice to the lowest."""
    absent: tuple[str, ...] = ()
    """Classes that no case has; they count for nobody."""
    draws: int
    seed: int
    dice_postprocessed: dict[str, float | None]
    """Class -> mean Dice of the chosen one with post-processing; `foreground` is the mean over classes."""
    postprocessing: PostProcessing

    @property
    def winner(self) -> Candidate:
        """The chosen candidate."""
        return self.candidates[self.chosen]


def mean_of(maps: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of arrays of one shape, taken one at a time; float32."""
    total, count = np.zeros((), np.float32), 0
    for one in maps:
        total = one.astype(np.float32) if count == 0 else np.add(total, one, out=total)
        count += 1
    total /= count
    return total


@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleCase:
    """One case as each of the members reads it."""

    members: tuple[PreparedCase, ...]

    @property
    def trace(self) -> Trace:
        """Of the first member; that of its file is the same for all."""
        return self.members[0].trace


Said = tuple[tuple[np.ndarray, Trace], ...]
"""The logits of each member, and the trace that leads them back to the file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble:
    """Several models, ready to predict, that answer as one `Model`: the mean of their probabilities decides."""

    members: tuple[Model, ...]

    @property
    def plan(self) -> Plan:
        """Of the first member; channels and labels are the same in all."""
        return self.members[0].plan

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """Those of all members and their stages."""
        return tuple(configuration for member in self.members for configuration in member.configurations)

    def prepare(self, case: str, image: Volume, stored: Grid) -> EnsembleCase:
        """As `Model.prepare`, for each member."""
        return EnsembleCase(members=tuple(model.prepare(case, image, stored) for model in self.members))

    def logits(self, case: EnsembleCase, *, step: float = 0.5, mirror: bool = True) -> Said:
        """As `Model.logits`, of each member on its own grid."""
        pairs = zip(self.members, case.members)
        return tuple((model.logits(own, step=step, mirror=mirror), own.trace) for model, own in pairs)

    def labels(self, logits: Said, trace: Trace, rule: PostProcessing | None = None) -> np.ndarray:
        """As `Model.labels`, of the mean probabilities."""
        labels = self.plan.labels
        indices = labels.decide(self.probabilities(logits, trace)).astype(np.int16)
        if rule is not None:
            indices = apply(indices, rule, canonical_grid(trace.stored).spacing_mm)
        return labels.to_values(indices)

    def probabilities(self, logits: Said, trace: Trace) -> np.ndarray:
        """As `Model.probabilities`, the mean of the members'."""
        return mean_of(model.probabilities(*said) for model, said in zip(self.members, logits))


@dataclass(frozen=True, eq=False, kw_only=True)
class Chosen:
    """What a model.json of `find_best` names, found on the disk; used like `Trained`."""

    where: Path
    """The model.json."""
    choice: Choice
    members: tuple[Trained, ...]
    whole: bool
    """Whether with all folds that were compared, and not only some."""
    others: tuple[str, ...] = ()
    """Folders of configurations that have been trained since, so that they were not compared."""

    @property
    def plan(self) -> Plan:
        """Of the first member; channels and labels are the same in all."""
        return self.members[0].plan

    @property
    def name(self) -> str:
        """The configurations."""
        return JOIN.join(member.name for member in self.members)

    def describe(self) -> str:
        """What was chosen among how many, for people."""
        folds = [", ".join(fold.removeprefix("fold_") for fold in member.folds) for member in self.members]
        named = zip(self.choice.winner.members, folds)
        mean = self.choice.winner.mean
        dice = "" if mean is None else f" (mean Dice {mean:.4f}, {self.choice.cases} held-out cases)"
        newer = f"; not compared: {', '.join(self.others)}" if self.others else ""
        kind = "the mean of " if len(self.members) > 1 else ""
        return (
            f"{self.plan.dataset} {kind}{JOIN.join(f'{member.folder}, fold {numbers}' for member, numbers in named)}; "
            f"chosen by find_best among {len(self.choice.candidates)}{dice}, {self.where}{newer}"
        )

    def identity(self) -> tuple[str, ...]:
        """As `Trained.identity`, of all members."""
        return tuple(part for member in self.members for part in member.identity())

    def postprocessing(self) -> tuple[PostProcessing | None, str]:
        """The rule that goes with these very weights, and in words what is done and why."""
        if not self.whole and len(self.members) == 1:
            return self.members[0].postprocessing()
        if not self.whole:
            return None, "none: it was fitted on predictions of all folds"
        return self.choice.postprocessing, self.choice.postprocessing.describe(self.plan.labels)

    def open(self, device: torch.device) -> Model | Ensemble:
        """The model on `device`. Raises AutosegError if weights are damaged or unfit."""
        models = tuple(member.open(device) for member in self.members)
        return models[0] if len(models) == 1 else Ensemble(members=models)


def open_choice(folder: Path, folds: Sequence[str] = ()) -> Chosen | None:
    """What the model.json of `find_best` in `folder` names, None where there is none; folds: only these of each.

    Raises AutosegError if a member is gone or was trained further since: then the comparison no longer holds.
    """
    where = folder / CARD
    if not where.is_file():
        return None
    choice = load_json(Choice, where)
    again = (
        f"give autoseg find_best -d {shlex.quote(choice.dataset)} again, or name one configuration with -c (and --run)"
    )
    members = []
    for member in choice.winner.members:
        if strange := [fold for fold in folds if f"fold_{fold}" not in member.folds]:
            compared = ", ".join(fold.removeprefix("fold_") for fold in member.folds)
            raise AutosegError(
                f"{where} compared fold {compared} of {member.folder}, and fold {', '.join(strange)} had no part in "
                "that; name one configuration with -c (and --run) to predict with it"
            )
        try:
            trained = at(folder / member.folder, folds or [fold.removeprefix("fold_") for fold in member.folds])
        except AutosegError as error:
            raise AutosegError(f"{where} names {member.folder}, which cannot be opened: {error}; {again}") from None
        own, before = member.weights[: len(member.folds)], member.weights[len(member.folds) :]
        if (trained.before.hashes() if trained.before else ()) != before:
            raise AutosegError(
                f"{where} names {member.folder}, whose earlier stage has other weights or folds than when it was "
                f"compared; {again}"
            )
        if not set(trained.folds.values()) <= set(own):
            raise AutosegError(
                f"{where} names {member.folder}, which was trained further since it was compared; {again}"
            )
        members.append(trained)
    first = members[0].plan
    for trained in members[1:]:
        if trained.plan.labels != first.labels or len(trained.plan.sources) != len(first.sources):
            raise AutosegError(f"{where} names configurations of different labels or channels; {again}")
    return Chosen(where=where, choice=choice, members=tuple(members), whole=not folds)


def chosen_at(path: Path, folds: Sequence[str] = ()) -> Trained | Chosen:
    """As `model.at`, and in the folder of a run or of a dataset what `find_best` chose there."""
    # The folder of a configuration has a model.json of its own, beside its folds.
    chosen = open_choice(path, folds) if path.is_dir() and not any(path.glob("fold_*")) else None
    return chosen or at(path, folds)
