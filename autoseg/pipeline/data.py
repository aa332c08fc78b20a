"""check and plan_and_preprocess: raw dataset -> fingerprint -> plan -> prepared cases.

Each file is decoded once: the same decoding serves the check, the fingerprint and, where memory allows, the
preprocessing of every configuration. A second run decodes only what is missing or changed.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg import records
from autoseg.cases import Bad, Case
from autoseg.fingerprint import Measured, measure_case, summarise
from autoseg.layout import Dataset, survey_dataset
from autoseg.merging import merge, seen_as
from autoseg.outliers import of_another_scale, without_a_class
from autoseg.parallel import Outcome, free_memory, map_cases, raise_failures
from autoseg.pipeline.changes import refuse_other_dataset, unchanged_fingerprint
from autoseg.pipeline.planning import PlanOptions, check_request, choose_splits, holds, make_plan, wanted_of
from autoseg.pipeline.preparing import bytes_needed, plan_in, preprocess
from autoseg.planners import explain, joined, kept, refuse_other_network, words
from autoseg.preprocess import Cropped, crop_to_content
from autoseg.raw import Finding, check_dataset, findings_table, hash_voxels, load_case, problem_and_cure
from autoseg.records import AutosegError, refuse_unwritable, save_json, sole_writer
from autoseg.schema import Plan, Request
from autoseg.workspace import Workspace


@dataclass(frozen=True, eq=False, kw_only=True)
class Examined:
    """One decoded case: what the check found, what the fingerprint needs, and the voxels if memory allows."""

    findings: tuple[Finding, ...]
    measured: Measured | None
    cropped: Cropped | None
    voxels: str = ""
    """Hash of what was decoded; "" where the case could not be."""


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
        voxels = hash_voxels(loaded.image.array, loaded.labels, case.annotated)
        return Examined(findings=loaded.findings, measured=measured, cropped=keep.offer(cropped), voxels=voxels)

    return map_cases(
        one,
        dataset.cases,
        name=lambda case: case.id,
        what="check and measure",
        workers=workers,
        cost=bytes_needed,
    )


def findings_of(dataset: Dataset, outcomes: Sequence[Outcome[Examined]], bad: Bad | None = None) -> list[Finding]:
    """All findings of the layout, the cases and the dataset as a whole; a crash of the check is a finding too."""
    findings: list[Finding] = []
    for case, reason in (bad or {}).items():
        problem, cure = problem_and_cure(reason)
        findings.append(Finding(case=case, severity="error", problem=problem, cure=cure))
    for outcome in outcomes:
        if outcome.value is not None:
            findings += outcome.value.findings
        else:
            findings.append(
                Finding(case=outcome.case, severity="error", problem=outcome.reason(), cure="repair or remove the case")
            )
    findings += check_dataset(dataset, {o.case: o.value.voxels for o in outcomes if o.value and o.value.voxels})
    measured = [outcome.value.measured for outcome in outcomes if outcome.value and outcome.value.measured]
    facts = [each.facts for each in measured]
    if len({each.dimension for each in measured}) == 1:
        findings += of_another_scale(facts, flat=measured[0].dimension == 2)
    if len(facts) == len(outcomes) and not bad:
        findings += without_a_class(facts, dataset.labels)
    return findings


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Print all findings; AutosegError if one of them is an error."""
    if findings:
        print(findings_table(findings))
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise AutosegError(f"{errors} errors in the dataset, see the table above; nothing was written")


def refused_in_planning(
    dataset: Dataset, folder: Path, prepared: Path, outcomes: Sequence[Outcome[Examined]]
) -> list[Finding]:
    """What plan_and_preprocess would refuse in a dataset whose cases are all good, by trying it; nothing is written."""
    measured = [outcome.value.measured for outcome in outcomes if outcome.value and outcome.value.measured]

    def plan() -> None:
        facts = summarise(dataset.name, dataset.channel_names, measured)
        make_plan(facts, dataset.labels, PlanOptions(), Request(), {}, None)

    found = []
    for step in (lambda: choose_splits(dataset, folder, prepared, PlanOptions()), plan):
        try:
            step()
        except AutosegError as error:
            problem, cure = problem_and_cure(error)
            found.append(Finding(case="", severity="error", problem=problem, cure=cure))
    return found


def check(workspace: Workspace, dataset_text: str, workers: int | None = None) -> None:
    """Decode and check every case, print a table of all findings. Raises AutosegError on errors; writes nothing."""
    name, folder = workspace.dataset(dataset_text)
    dataset, bad = survey_dataset(folder)
    for remark in dataset.remarks():
        print(f"Labels: {remark}")
    outcomes = examine(dataset, workers, Kept(0))
    findings = findings_of(dataset, outcomes, bad)
    if all(finding.severity == "warning" for finding in findings):
        findings += refused_in_planning(dataset, folder, workspace.prepared(name), outcomes)
    refuse_errors(findings)
    print(f"{dataset.name}: {len(dataset.cases)} cases checked, no errors, {len(findings)} warnings")


def plan_and_preprocess(workspace: Workspace, dataset_text: str, options: PlanOptions) -> Plan:
    """Check, fingerprint, plan, split and preprocess a dataset; do only what is missing or changed.

    Raises AutosegError on errors in the data, on an unknown configuration, or when cases fail (the others are done).
    """
    name, folder = workspace.dataset(dataset_text)
    dataset, bad = survey_dataset(folder)
    for remark in dataset.remarks():
        print(f"Labels: {remark}")
    check_request(options.request)
    prepared, planned = workspace.prepared(name), workspace.plan_folder(name, options.name)
    refuse_unwritable(prepared)
    before = plan_in(planned, broken_too=options.discard_edits)
    earlier, request = Request(), options.request
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
    known = prepared / "fingerprint.json"
    fingerprint = None if bad else unchanged_fingerprint(dataset, known, options.workers)
    cropped: dict[str, Cropped] = {}
    if fingerprint is None:
        refuse_other_dataset(workspace, name, folder)
        if not bad:
            choose_splits(dataset, folder, prepared, options)  # what it refuses is refused before hours of work
        outcomes = examine(dataset, options.workers, Kept(free_memory() // 4))
        refuse_errors(findings_of(dataset, outcomes, bad))
        examined = raise_failures(outcomes, "check")
        cropped = {e.cropped.case: e.cropped for e in examined if e.cropped is not None}
        fingerprint = summarise(name, dataset.channel_names, [e.measured for e in examined if e.measured is not None])
    else:
        print(f"{name}: raw data unchanged since the last run, fingerprint reused")
    with sole_writer(prepared):  # whatever planning refuses, nothing is measured twice
        workspace.remember(name, folder)
        records.remove_leftovers(prepared, (known.name,))
        save_json(fingerprint, known)

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
        splits, changes = choose_splits(dataset, folder, prepared, options)
        for line in changes:
            print(f"Folds: {line}")
        planned.mkdir(exist_ok=True)
        records.remove_leftovers(prepared, ("splits.json",))
        records.remove_leftovers(planned, ("plan.json",))
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
