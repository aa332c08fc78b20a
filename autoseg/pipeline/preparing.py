"""Prepared cases of a plan: which there are, which other plans have made the same way, and making the rest."""

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from autoseg import store
from autoseg.cases import Case
from autoseg.layout import Dataset
from autoseg.merging import renumber
from autoseg.own import own
from autoseg.parallel import map_cases, raise_failures
from autoseg.preprocess import PREPROCESS_VERSION, Cropped, crop_to_content, lost_labels, prepare_each
from autoseg.raw import load_case
from autoseg.records import AutosegError, hash_text, load_json, to_json
from autoseg.schema import CaseFingerprint, ChannelNorm, Configuration, Fingerprint, Plan, Preparation
from autoseg.store import stored_key, write_case
from autoseg.workspace import Workspace

PEAK_PER_BYTE = 16
"""Peak memory of decoding and preparing a case over the decoded bytes of its images: 12 was measured on int16."""


def bytes_needed(case: Case) -> int:
    """Rough peak memory of one case. gzip ends with the decoded size, modulo 4 GiB; other formats hardly compress."""
    total = 0
    for path in map(Path, case.images):
        if not path.is_file():
            continue
        total += path.stat().st_size
        if path.suffix == ".gz" and path.stat().st_size > 4:
            with path.open("rb") as file:
                file.seek(-4, os.SEEK_END)
                total += int.from_bytes(file.read(4), "little")
    return PEAK_PER_BYTE * total


def plan_in(folder: Path, broken_too: bool) -> Plan | None:
    """The plan in a plan folder; None if there is none, and with `broken_too` also if it cannot be read."""
    try:
        return load_json(Plan, folder / "plan.json") if (folder / "plan.json").is_file() else None
    except AutosegError:
        if broken_too:
            return None
        raise


def unprepared(
    folder: Path, cases: Iterable[str], plan: Plan, configuration: Configuration, fingerprint: Fingerprint
) -> list[str]:
    """Those of `cases` that are not prepared in `folder`, or not as `plan` says for `configuration`; sorted."""
    facts = {entry.case: entry for entry in fingerprint.cases}
    source = plan.configuration(configuration.prepared)
    return [
        name
        for name in sorted(set(cases))
        if name not in facts or stored_key(folder, name) != case_key(plan, source, facts[name])
    ]


def case_key(plan: Plan, configuration: Configuration, facts: CaseFingerprint) -> str:
    """Hash of all that decides how one case is prepared: its content, the plan's say in it, the code's version."""
    said = (
        PREPROCESS_VERSION,
        # As it always was for canonical plans, so that their cases need not be prepared again.
        plan.axis_order if plan.orientation == "canonical" else (plan.orientation, *plan.axis_order),
        [_said(channel) for channel in plan.channels],
        plan.labels.meaning,
        configuration.dimension,
        configuration.spacing_mm,
        to_json(configuration.resampling),
        configuration.patch,
        *([] if plan.preparation == Preparation() else [_asked(plan.preparation), _code(plan.preparation.function)]),
    )
    return hash_text(facts.content_hash, repr(said))


def _asked(preparation: Preparation) -> str:
    """A preparation for a key; as `_said`."""
    left_out = {"thin"} if preparation.thin == Preparation().thin else None
    return TypeAdapter(Preparation).dump_json(preparation, indent=2, exclude=left_out).decode() + "\n"


def _code(function: str | None) -> str:
    """The source of a user's preprocessing, so that what an earlier state of it prepared is prepared again."""
    if function is None:
        return ""
    try:
        return inspect.getsource(own(function, "preprocessing"))
    except (OSError, TypeError):  # an object, or compiled
        return ""


def warn_of_lost_labels(counts: Mapping[str, tuple[int, int]]) -> None:
    """Say of which cases the crops of a plan lose labels. counts: case -> labelled voxels that are cut away, and all.

    Raises AutosegError where there are several, and nothing is left of any.
    """
    lost = {case: numbers for case, numbers in counts.items() if numbers[0]}
    if len(lost) > 1 and all(away == every for away, every in counts.values()):
        raise AutosegError(
            f"the crops cut every labelled voxel away from all {len(lost)} cases prepared now that have any, so there "
            "is nothing to learn; give others with --crop"
        )
    if lost:
        worst, (away, every) = max(lost.items(), key=lambda item: item[1][0] / item[1][1])
        print(
            f"warning: the crops cut labels away from {len(lost)} of the cases prepared now, most from {worst}: "
            f"{away} of {every} labelled voxels ({away / every:.1%}); such voxels are never learnt nor predicted"
        )


def _said(channel: ChannelNorm) -> str:
    """The normalisation of a channel for a key: without fields that came later and say nothing, as in earlier keys."""
    left_out = {"outliers"} if channel.outliers is None else None
    return TypeAdapter(ChannelNorm).dump_json(channel, indent=2, exclude=left_out).decode() + "\n"


def share_prepared(workspace: Workspace, plan: Plan, configuration: Configuration, fingerprint: Fingerprint) -> None:
    """Take over cases that another plan of the dataset has prepared the same way; the patch does not matter to them.

    A patch decides only how arrays are laid out in the file, for speed.
    """
    here = workspace.cases(plan.dataset, plan.name, configuration.name)
    others = {
        (folder / c.name, c.patch)
        for folder in workspace.prepared(plan.dataset).glob("*/")
        if folder.name != plan.name and (other := plan_in(folder, broken_too=True)) is not None
        for c in other.configurations
        if c.dimension == configuration.dimension
    }
    taken: Counter[str] = Counter()
    for facts in fingerprint.cases:
        key = case_key(plan, configuration, facts)
        if stored_key(here, facts.case) == key:
            continue
        for folder, patch in sorted(others):
            if stored_key(folder, facts.case) == case_key(plan, replace(configuration, patch=patch), facts):
                store.share_case(folder, here, facts.case, key)
                taken[str(folder)] += 1
                break
    for source, count in taken.items():
        print(f"{configuration.name}: {count} prepared cases shared with {source}")


def preprocess(
    workspace: Workspace,
    dataset: Dataset,
    plan: Plan,
    configurations: Sequence[Configuration],
    fingerprint: Fingerprint,
    cropped: Mapping[str, Cropped],
    workers: int | None,
) -> None:
    """Prepare every case for every configuration that has data of its own, where that is not done already.

    `cropped` holds cases that are already decoded. Raises AutosegError that names every case that failed.
    """
    names = dict.fromkeys(configuration.prepared for configuration in configurations)
    apart = [plan.configuration(name) for name in names]
    folders = {c.name: workspace.cases(plan.dataset, plan.name, c.name) for c in apart}
    keys = {(c.name, facts.case): case_key(plan, c, facts) for c in apart for facts in fingerprint.cases}

    for configuration in apart:
        store.remove_leftovers(folders[configuration.name])
        share_prepared(workspace, plan, configuration, fingerprint)

    def pending(case: Case) -> list[Configuration]:
        return [c for c in apart if stored_key(folders[c.name], case.id) != keys[c.name, case.id]]

    def one(case: Case) -> tuple[int, int]:
        source = cropped.get(case.id)
        if source is None:
            loaded = load_case(dataset, case)
            errors = [finding.problem for finding in loaded.findings if finding.severity == "error"]
            if loaded.image is None or loaded.labels is None or loaded.stored is None:
                raise AutosegError("; ".join(errors) or "the case could not be read")
            source = crop_to_content(case.id, loaded.image, loaded.labels, loaded.stored)
        source = replace(source, labels=renumber(source.labels, dataset.labels, plan.labels))
        todo = pending(case)
        for configuration, ready in zip(todo, prepare_each(source, plan, todo)):
            write_case(folders[configuration.name], ready, keys[configuration.name, case.id], patch=configuration.patch)
            lost = lost_labels(source, ready.trace.crop, plan.labels) if plan.preparation.crops else (0, 0)
        return lost

    work = [case for case in dataset.cases if pending(case)]
    done = len(dataset.cases) - len(work)
    if done:
        print(f"{done} of {len(dataset.cases)} cases are prepared already")
    if work:
        outcomes = map_cases(
            one,
            work,
            name=lambda case: case.id,
            what="preprocess",
            workers=workers,
            cost=bytes_needed,
        )
        warn_of_lost_labels(dict(zip((case.id for case in work), raise_failures(outcomes, "preprocess"))))
    for configuration in apart:
        print(f"Prepared: {len(dataset.cases)} cases in {folders[configuration.name]}")
