"""dataset import: files as they come -> a raw dataset, shown before it is written and checked after.

A dataset appears under its name whole or not at all. Its layout is checked before that, its voxels after: faults of the
data are the user's to mend, at the source or in the copy.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from autoseg.datasets import IMPORTS, PROFILES, Draft, Profile, Request
from autoseg.datasets.importing import overlap_table, staging, write_draft
from autoseg.layout import open_dataset
from autoseg.pipeline.data import Kept, examine, findings_of
from autoseg.raw import findings_table
from autoseg.records import AutosegError
from autoseg.volume import Triple
from autoseg.workspace import NAME, Workspace

ROWS_SHOWN = 20


def import_dataset(
    workspace: Workspace,
    kind: str,
    source: str,
    masks: str | None = None,
    *,
    name: str | None = None,
    channels: tuple[str, ...] = (),
    labels: Mapping[str, int] | None = None,
    order: tuple[str, ...] = (),
    spacing_mm: Triple | None = None,
    profile: str | None = None,
    yes: bool = False,
    workers: int | None = None,
) -> Path:
    """Import a dataset, check it, say what to do next; returns its folder.

    Raises AutosegError, without a trace on the disk, if nothing can be made of the files or the pairs are not
    confirmed; and with the dataset in place if its voxels have faults.
    """
    if kind not in IMPORTS:
        raise AutosegError(f"unknown kind {kind!r}; choose one of:\n{kinds()}")
    for option, value in (("masks", masks), ("order", order), ("spacing_mm", spacing_mm)):
        if value and option not in IMPORTS[kind].takes:
            said = "a folder of masks" if option == "masks" else f"--{option.removesuffix('_mm')}"
            raise AutosegError(f"{said} means nothing for {kind} ({IMPORTS[kind].description}); leave it out")
    known = profile_called(profile) if profile else None
    target = target_folder(workspace, kind, source, name)
    named = dict(labels or {}) or (dict(known.labels) if known and kind in ("masks", "hdf5") else {})
    with staging(target) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        request = Request(
            source=source,
            masks=masks,
            channels=channels or (known.channels if known else ()),
            labels=tuple(named.items()),
            order=order,
            spacing_mm=spacing_mm,
            scratch=scratch,
            workers=workers,
        )
        draft = IMPORTS[kind].find(request)
        if known:
            draft = with_profile(draft, known)
        show(draft, target)
        if draft.guessed and not yes:
            confirm()
        overlaps = write_draft(draft, folder, workers)
        shutil.rmtree(scratch)
        try:
            open_dataset(folder)
        except AutosegError as error:
            raise AutosegError(f"this makes no dataset: {error}".replace(str(folder), target.name)) from None
    dataset = open_dataset(target)
    print(f"Imported: {len(dataset.cases)} training cases in {target}")
    if overlaps:
        print(f"Overlapping structures, decided by --order:\n{overlap_table(overlaps)}")
    findings = findings_of(dataset, examine(dataset, workers, Kept(0)))
    if findings:
        print(findings_table(findings))
    if errors := sum(finding.severity == "error" for finding in findings):
        raise AutosegError(
            f"{target} is written, but has {errors} errors, see the table above; mend its files and run autoseg check, "
            "or mend the source, remove the folder and import again"
        )
    said = dataset.name if target.parent == workspace.root / "raw" else str(target)
    following = workspace.command("plan_and_preprocess", "-d", said)
    print(f"Checked: no errors, {len(findings)} warnings. Next: {following}")
    return target


def kinds() -> str:
    """What can be imported, a line each."""
    return "\n".join(f"  {key}: {entry.description}" for key, entry in IMPORTS.items())


def target_folder(workspace: Workspace, kind: str, source: str, name: str | None) -> Path:
    """Where the dataset goes: a name in the workspace, a path, or what the source is called."""
    text = name or IMPORTS[kind].name(source)
    if text is None:
        raise AutosegError("say how the dataset is to be called, for example -d Dataset001_Knee")
    if NAME.fullmatch(text):
        return workspace.raw(text)
    if "/" in text:
        return Path(text).expanduser().absolute()
    plain = re.fullmatch(r"(\d{1,3})_(\w+)", text)
    hint = f"Dataset{int(plain[1]):03d}_{plain[2]}" if plain else "Dataset001_Name"
    raise AutosegError(f"-d {text!r}: datasets are called like {hint}; or give a path with a / for a folder elsewhere")


def profile_called(name: str) -> Profile:
    """The profile of that name; AutosegError lists the ones there are."""
    if name not in PROFILES:
        raise AutosegError(f"unknown profile {name!r}; choose one of:\n{profiles()}")
    return PROFILES[name]


def profiles() -> str:
    """All profiles, a few lines each."""
    lines = []
    for name, known in PROFILES.items():
        lines.append(f"  {name}: {known.description}")
        lines.append(f"      channels {', '.join(known.channels)}; labels {listed(known.labels)}")
        lines.append(f"      licence {known.licence or 'unknown'}" + (f"; {known.url}" if known.url else ""))
    return "\n".join(lines)


def listed(labels: Mapping[str, int]) -> str:
    """Labels as people give them."""
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def with_profile(draft: Draft, known: Profile) -> Draft:
    """The draft with what the profile knows. Raises AutosegError if channels or label values do not fit it."""
    if len(draft.channels) != len(known.channels):
        raise AutosegError(
            f"the data have {len(draft.channels)} channels, the profile names {', '.join(known.channels)}"
        )
    if any(not isinstance(value, int) for value in draft.labels.values()):
        raise AutosegError("the data have regions, labels of several values, which no profile has; leave out --profile")
    if unknown := sorted(set(draft.labels.values()) - set(known.labels.values())):
        raise AutosegError(f"the data have label values {unknown}, the profile knows {listed(known.labels)}")
    facts = {key: value for key in ("licence", "reference", "url") if (value := getattr(known, key)) is not None}
    notes = draft.notes
    if known.group_by is not None:
        training = [entry.case for entry in draft.entries if entry.part == "Tr"]
        if all(re.search(known.group_by, case) for case in training):
            facts["group_by"] = known.group_by
        else:
            notes += (
                "the names are not those of the profile, so patients are not known: see --group-by when planning",
            )
    return replace(draft, channels=known.channels, labels=dict(known.labels), facts=draft.facts | facts, notes=notes)


def show(draft: Draft, target: Path) -> None:
    """Print what is about to be written."""
    print(f"{target.name}: {len(draft.entries)} {draft.unit}; channels {', '.join(draft.channels)}")
    print(f"labels {listed(draft.labels)}")
    if draft.guessed:
        rows = [("case", *(("image", "mask")[: len(draft.entries[0].shown)]))]
        rows += [(entry.case, *entry.shown) for entry in draft.entries]
        some = rows if len(rows) <= ROWS_SHOWN + 1 else rows[: ROWS_SHOWN + 1]
        widths = [max(len(row[column]) for row in some) for column in range(len(rows[0]))]
        print("\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in some))
        if len(some) < len(rows):
            print(f"  ... and {len(rows) - len(some)} more")
    if draft.left_over:
        print(f"left out, {len(draft.left_over)} files without a clear partner:")
        print("\n".join(f"  {line}" for line in shortened(draft.left_over)))
    for note in draft.notes:
        print(f"note: {note}")


def shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:ROWS_SHOWN], *([f"... and {len(lines) - ROWS_SHOWN} more"] if len(lines) > ROWS_SHOWN else [])]


def confirm() -> None:
    """Ask whether the pairs are right; AutosegError if they are not, or nobody is there to say."""
    try:
        answer = input("Import these pairs? [y/N] ")
    except EOFError:
        raise AutosegError("the pairs were not confirmed; look at them and give --yes") from None
    if answer.strip().lower() not in ("y", "yes"):
        raise AutosegError("nothing was imported; rename files, or give patterns like 'data/*/t1.nii.gz' for each side")
