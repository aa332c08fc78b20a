"""check and plan_and_preprocess: raw dataset -> fingerprint -> plan -> prepared cases.

Each file is decoded once: the same decoding serves the check, the fingerprint and, where memory allows, the
preprocessing of every configuration. A second run decodes only what is missing or changed.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoseg import bundle, records, settings
from autoseg.crops import Crop
from autoseg.fingerprint import Measured, measure_case, summarise
from autoseg.labels import Labels
from autoseg.layout import Case, Dataset, open_dataset
from autoseg.merging import merge, seen_as
from autoseg.own import own
from autoseg.parallel import Outcome, free_memory, map_cases, raise_failures
from autoseg.pipeline.preparing import bytes_needed, plan_in, preprocess
from autoseg.planners import (
    PLANNERS,
    as_prepared,
    explain,
    joined,
    keep_edits,
    kept,
    plan,
    plan_like,
    refuse_other_network,
    request_of,
    says_sides,
    stamped,
    thinning,
    with_context,
    with_preparation,
    words,
)
from autoseg.preprocess import Cropped, crop_to_content
from autoseg.raw import Finding, check_dataset, findings_table, hash_case, load_case
from autoseg.records import AutosegError, load_json, save_json, sole_writer, to_json
from autoseg.schema import Fingerprint, Plan, Preparation, Request, Run
from autoseg.splits import Splits, make_splits, read_splits
from autoseg.workspace import Workspace

PLAN_OPTIONS = {
    "name": "--plan",
    "preset": "--preset",
    "network": "--network",
    "gpu_memory_gb": "--gpu-memory",
    "planned": "--discard-edits",
    "request": "that says it",
    "configurations.2d.context": "--context",
    "preparation.combined": "--combine",
    "preparation.crops": "--crop",
    "preparation.thin": "--thin",
    "labels.parts": "--merge",
}
"""Plan fields that have an option of their own."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Examined:
    """One decoded case: what the check found, what the fingerprint needs, and the voxels if memory allows."""

    findings: tuple[Finding, ...]
    measured: Measured | None
    cropped: Cropped | None


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of plan_and_preprocess, which fit has too.

    What is None or empty, down to `changes`, is as it was asked for when a plan of that name was made; see `Request`.
    """

    name: str = "default"
    preset: str | None = None
    """The first time: unet."""
    network: str | None = None
    """In place of the preset's: `name(key=value, ...)` or `package.module:Name`."""
    gpu_memory_gb: float | None = None
    spacing_mm: tuple[float, float, float] | None = None
    context: int | None = None
    """Slices that 2D networks see; the first time: one."""
    crops: tuple[Crop, ...] = ()
    combine: str | None = None
    """`rss`: all channels become one, the root of the sum of their squares."""
    thin: tuple[int, ...] = ()
    """So many neighbouring slices become one; or a number of voxels for each axis (Z, Y, X)."""
    merge: Mapping[str, Sequence[str]] | None = None
    """Class -> labels that become one, see `merging.merge`."""
    like: Path | None = None
    """A model whose plan is taken over: a model file, the folder of a configuration, or of a fold."""
    changes: Mapping[str, Any] | None = None
    configurations: tuple[str, ...] = ()
    """What to preprocess; empty: what `choose` says, or all."""
    choose: Callable[[Plan], Sequence[str]] | None = None
    discard_edits: bool = False
    """Whether what was edited in plan.json by hand gives way to the new plan."""
    keep: bool = False
    """Whether a plan of that name stays as it is, if neither the data nor what is asked for have changed since."""
    group_by: str | None = None
    test_fraction: float = 0.0
    workers: int | None = None

    def request(self) -> Request:
        """What the planner is asked for."""
        return Request(
            preset=self.preset,
            network=self.network,
            gpu_memory_gb=self.gpu_memory_gb,
            spacing_mm=self.spacing_mm,
            context=self.context,
            crops=self.crops,
            combine=self.combine,
            thin=self.thin,
            merge={name: tuple(parts) for name, parts in (self.merge or {}).items()},
            like=None if self.like is None else str(self.like.absolute()),
            changes={field: json.dumps(value) for field, value in (self.changes or {}).items()},
        )


class Kept:
    """Decoded cases that are kept between fingerprint and preprocessing, up to a number of bytes."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._lock = threading.Lock()

    def offer(self, cropped: Cropped) -> Cropped | None:
        """The case if it still fits, else None."""
        size = cropped.image.nbytes + cropped.labels.nbytes
        with self._lock:
            if size > self.left:
                return None
            self.left -= size
        return cropped


def examine(dataset: Dataset, workers: int | None, keep: Kept) -> list[Outcome[Examined]]:
    """Decode every case once: check it, measure it, keep its voxels if they fit."""

    def one(case: Case) -> Examined:
        loaded = load_case(dataset, case)
        if loaded.image is None or loaded.labels is None or loaded.stored is None:
            return Examined(findings=loaded.findings, measured=None, cropped=None)
        cropped = crop_to_content(case.id, loaded.image, loaded.labels, loaded.stored)
        measured = measure_case(cropped, dataset.labels, loaded.content_hash, len(dataset.cases), case.annotated)
        return Examined(findings=loaded.findings, measured=measured, cropped=keep.offer(cropped))

    return map_cases(
        one,
        dataset.cases,
        name=lambda case: case.id,
        what="check and measure",
        workers=workers,
        cost=bytes_needed,
    )


def findings_of(dataset: Dataset, outcomes: Sequence[Outcome[Examined]]) -> list[Finding]:
    """All findings of the cases and of the dataset as a whole; a crash of the check is a finding too."""
    findings: list[Finding] = []
    for outcome in outcomes:
        if outcome.value is not None:
            findings += outcome.value.findings
        else:
            findings.append(
                Finding(case=outcome.case, severity="error", problem=outcome.reason(), cure="repair or remove the case")
            )
    hashes = {o.case: o.value.measured.facts.content_hash for o in outcomes if o.value and o.value.measured}
    return findings + list(check_dataset(dataset, hashes))


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Print all findings; AutosegError if one of them is an error."""
    if findings:
        print(findings_table(findings))
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise AutosegError(f"{errors} errors in the dataset, see the table above; nothing was written")


def check(workspace: Workspace, dataset_text: str, workers: int | None = None) -> None:
    """Decode and check every case, print a table of all findings. Raises AutosegError on errors; writes nothing."""
    _, folder = workspace.dataset(dataset_text)
    dataset = open_dataset(folder)
    for remark in dataset.remarks():
        print(f"Labels: {remark}")
    findings = findings_of(dataset, examine(dataset, workers, Kept(0)))
    refuse_errors(findings)
    print(f"{dataset.name}: {len(dataset.cases)} cases checked, no errors, {len(findings)} warnings")


def plan_and_preprocess(workspace: Workspace, dataset_text: str, options: PlanOptions) -> Plan:
    """Check, fingerprint, plan, split and preprocess a dataset; do only what is missing or changed.

    Raises AutosegError on errors in the data, on an unknown configuration, or when cases fail (the others are done).
    """
    name, folder = workspace.dataset(dataset_text)
    dataset = open_dataset(folder)
    for remark in dataset.remarks():
        print(f"Labels: {remark}")
    prepared, planned = workspace.prepared(name), workspace.plan_folder(name, options.name)
    before = plan_in(planned, broken_too=options.discard_edits)
    earlier, request = Request(), options.request()
    if before is not None:
        if not options.discard_edits:
            refuse_other_network(before, request)
        earlier = kept(before, request)
    if said := words(earlier):
        print(
            f"As asked for before: {said} (an option given again changes it; to plan as if for the first time, delete "
            f"{planned / 'plan.json'})"
        )
    request = joined(earlier, request)
    labels = merge(dataset.labels, request.merge)
    fingerprint = unchanged_fingerprint(dataset, prepared / "fingerprint.json", options.workers)
    cropped: dict[str, Cropped] = {}
    if fingerprint is None:
        outcomes = examine(dataset, options.workers, Kept(free_memory() // 4))
        refuse_errors(findings_of(dataset, outcomes))
        examined = raise_failures(outcomes, "check")
        cropped = {e.cropped.case: e.cropped for e in examined if e.cropped is not None}
        fingerprint = summarise(name, dataset.channel_names, [e.measured for e in examined if e.measured is not None])
    else:
        print(f"{name}: raw data unchanged since the last run, fingerprint reused")

    if options.discard_edits:
        before = None
    edits: dict[str, str] = {}
    if options.keep and before is not None and holds(before, request, fingerprint, labels):
        made = before
    else:
        facts = seen_as(fingerprint, dataset.labels, labels)
        made, edits = make_plan(facts, labels, options, request, earlier.changes, before)
    chosen = [made.configuration(name) for name in wanted_of(made, options)]

    with sole_writer(prepared):
        splits = choose_splits(dataset, folder, prepared, options)
        workspace.remember(name, folder)
        planned.mkdir(exist_ok=True)
        records.remove_leftovers(prepared, ("fingerprint.json", "splits.json"))
        records.remove_leftovers(planned, ("plan.json",))
        save_json(fingerprint, prepared / "fingerprint.json")
        save_json(splits, prepared / "splits.json")
        save_json(made, planned / "plan.json")
        print(explain(made))
        print(f"\nPlan: {planned / 'plan.json'}")
        for line in edits.values():
            print(f"{line}; --discard-edits lets the planner decide")
        if left_out := sorted({case.id for case in dataset.cases} - set(splits.fold("all").train) - set(splits.test)):
            print(
                f"warning: {len(left_out)} cases are in no fold and will not be used, for example {left_out[0]}; "
                "complete the folds that were given, or delete the file below for new ones"
            )
        print(f"Folds: {len(splits.folds)}, locked test cases: {len(splits.test)} ({prepared / 'splits.json'})")
        preprocess(workspace, dataset, made, chosen, fingerprint, cropped, options.workers)
    return made


def wanted_of(made: Plan, options: PlanOptions) -> tuple[str, ...]:
    """The configurations of a plan that are to be prepared."""
    if options.configurations:
        return options.configurations
    return tuple(c.name for c in made.configurations) if options.choose is None else tuple(options.choose(made))


def unchanged_fingerprint(dataset: Dataset, path: Path, workers: int | None) -> Fingerprint | None:
    """The fingerprint at `path` if it belongs to exactly these files; None if anything has changed since."""
    if not path.is_file():
        return None
    old = load_json(Fingerprint, path)
    if [case.case for case in old.cases] != [case.id for case in dataset.cases]:
        return None
    if old.channel_names != dataset.channel_names:
        return None
    # One without positions is of an earlier version; they matter only where a class is named after a side.
    if any(case.across is None for case in old.cases) and says_sides(dataset.labels):
        return None
    if any(case.voxels is None for case in old.cases):  # of an earlier version too; losses weigh classes by them
        return None
    outcomes = map_cases(
        lambda case: hash_case(dataset, case),
        dataset.cases,
        name=lambda case: case.id,
        what="look for changes",
        finishes=False,
        workers=workers,
    )
    return old if [outcome.value for outcome in outcomes] == [case.content_hash for case in old.cases] else None


def holds(plan: Plan, request: Request, fingerprint: Fingerprint, labels: Labels) -> bool:
    """Whether a plan was made as asked, from these very data and labels."""
    same = plan.data_hash == fingerprint.data_hash() and plan.labels == labels
    return same and request_of(plan) == request


def make_plan(
    fingerprint: Fingerprint,
    labels: Labels,
    options: PlanOptions,
    request: Request,
    earlier: Mapping[str, str],
    before: Plan | None,
) -> tuple[Plan, dict[str, str]]:
    """The plan for a fingerprint with the changes of --set made and validated, and name -> line for each edit kept.

    `labels`: of the plan; the fingerprint counts them so. `earlier`: the changes of `request` that were asked for
    before. `before`: an earlier plan, whose edits by hand are kept; they are later than `earlier`, and what is asked
    for now is later than they.
    """
    preset = request.preset or "unet"
    if preset not in PLANNERS:
        raise AutosegError(f"unknown preset {preset!r}; choose one of {', '.join(PLANNERS)}")
    source = None if request.like is None else plan_at(Path(request.like))
    preparation = Preparation(crops=request.crops) if source is None else source.preparation
    if request.combine not in (None, "rss"):
        raise AutosegError(f"--combine {request.combine}: channels are combined by rss, the root of the sum of squares")
    if request.combine is not None:
        preparation = replace(preparation, combined=fingerprint.channel_names)
    if request.thin:
        preparation = replace(preparation, thin=thinning(request.thin, fingerprint))
    measured = as_prepared(fingerprint, preparation)
    needs = None
    if request.network is not None:
        from autoseg.networks.footprint import needs_of

        needs = needs_of(request.network, len(measured.channel_names), labels.heads)
    made = plan(
        measured,
        labels,
        PLANNERS[preset],
        gpu_memory_gb=request.gpu_memory_gb,
        spacing_mm=request.spacing_mm,
        name=options.name,
        needs=needs,
    )
    if source is None:
        made = with_preparation(made, preparation, fingerprint)
    else:
        made = plan_like(source, measured, labels, made, Path(request.like or "").name)
    if request.context is not None:
        # One of before holds for the 2D configurations, whatever is prepared now.
        made = with_context(made, request.context, () if options.context is None else wanted_of(made, options))
    made = replace(made, data_hash=fingerprint.data_hash())
    fresh = made = settings.change(
        made,
        {field: json.loads(value) for field, value in earlier.items()},
        taken=PLAN_OPTIONS,
        where="--set (as before; to forget it, delete plan.json)",
    )
    edits: dict[str, str] = {}
    if before is not None:
        made, edits = keep_edits(before, fresh)
    made = settings.change(made, options.changes or {}, taken=PLAN_OPTIONS)
    if made.preparation.function is not None:
        own(made.preparation.function, "preprocessing")
    return replace(stamped(made, fresh, edits), request=request), edits


def plan_at(path: Path) -> Plan:
    """The plan of the model at `path`: a model file, or the folder of a fold or of a configuration with folds."""
    if not path.is_dir():
        return bundle.read(path).content.plan
    found = [path / "run.json", *sorted(path.glob("fold_*/run.json"))]
    for run in found:
        if run.is_file():
            return load_json(Run, run).plan
    raise AutosegError(f"--like {path} holds no run.json; give a model file, or the folder of a fold")


def describe_plan_fields(workspace: Workspace, dataset_text: str, plan_name: str) -> None:
    """Print the fields of a dataset's plan that --set takes, with their present values."""
    name, _ = workspace.dataset(dataset_text)
    path = workspace.plan_folder(name, plan_name) / "plan.json"
    made = load_json(Plan, path)
    print(
        "\n".join(
            f"{field} = {value}" for field, value in settings.fields(replace(made, reasons=()), taken=PLAN_OPTIONS)
        )
    )


def choose_splits(dataset: Dataset, raw: Path, prepared: Path, options: PlanOptions) -> Splits:
    """Folds given with the raw data, else those made before, else new ones.

    Raises AutosegError if folds exist and the options ask for others: runs may already rest on them.
    """
    cases = [case.id for case in dataset.cases]
    group_by = options.group_by or dataset.group_by
    for given in (raw / "splits.json", raw / "splits_final.json", prepared / "splits_final.json"):
        if given.is_file():
            if options.test_fraction:
                raise AutosegError(f"{given} already says which cases are held out; leave out --test-fraction")
            return read_splits(given, cases, group_by)
    wanted = make_splits(cases, group_by=group_by, test_fraction=options.test_fraction)
    existing = prepared / "splits.json"
    if not existing.is_file():
        return wanted
    old = read_splits(existing, cases)
    asked = options.group_by is not None or options.test_fraction > 0 or old.group_by != group_by
    if asked and to_json(old) != to_json(wanted):
        raise AutosegError(f"{existing} holds other folds, which runs may rest on; delete it to make new ones")
    return old
