"""Raw cases: decode one, and say what is wrong with it.

Faults of the layout are raised when a dataset is opened. Faults of a case are Findings: they come with the decoded
case, so that one decoding serves the check, the fingerprint and the preprocessing.

Decided: labels that differ from their image's grid by less than a tenth of a voxel at every corner are rounding
and lie on the image's grid; more is an error, since only a person can say which header is right. Two cases with the
same image and the same labels are an error (one would leak into the other's validation); the same image with other
labels is a warning. The same means voxel by voxel once decoded, however the files were written.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from autoseg.cases import Case, names
from autoseg.labels import Labels
from autoseg.layout import Dataset
from autoseg.readers import Stored, expected_in_file, files_of, join, not_there, on_grid_of, read_stored, whole_labels
from autoseg.records import AutosegError, hash_text, record
from autoseg.volume import Grid, Volume, mismatch

READ_VERSION = 1
"""Goes up when the same files are decoded differently than before; part of every content hash."""


@record
class Finding:
    """One thing that is wrong with a case ("" for the dataset as a whole), and what to do about it."""

    case: str
    severity: Literal["error", "warning"]
    problem: str
    cure: str


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedCase:
    """A decoded case. `image` and `labels` are None where findings of severity error stood in the way.

    `image` is canonical float32 (C, Z, Y, X), `labels` int16 class indices (Z, Y, X) on the same grid, `stored` the
    grid of the (first) image file.
    """

    case: str
    image: Volume | None
    labels: np.ndarray | None
    stored: Grid | None
    content_hash: str
    findings: tuple[Finding, ...]


def hash_case(dataset: Dataset, case: Case) -> str:
    """Hash of a case's files and of what dataset.json says about them; two parts, image-labels. Decodes nothing.

    Raises AutosegError if a file is missing.
    """
    return f"{hash_image(dataset, case)}-{hash_label(dataset, case)}"


def hash_image(dataset: Dataset, case: Case) -> str:
    """The first part of `hash_case`."""
    return hash_files(case.images, (str(READ_VERSION), str(len(dataset.channel_names))))


def hash_label(dataset: Dataset, case: Case) -> str:
    """The second part of `hash_case`."""
    listed = () if case.annotated is None else (str(case.annotated),)
    said = (str(READ_VERSION), str(dataset.labels.meaning), *listed)
    return hash_files([case.label] if case.label else [], said)


def hash_files(paths: Iterable[str], said: tuple[str, ...]) -> str:
    """Hash of the bytes of all files that reading `paths` reads, and of the texts `said`."""
    parts = list(said)
    for path in map(Path, paths):
        if not path.is_file():
            raise AutosegError(not_there(path))
        for file in files_of(path):
            with file.open("rb") as opened:
                parts.append(hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
    return hash_text(*parts)


def hash_voxels(image: np.ndarray, labels: np.ndarray, annotated: Sequence[str] | None) -> str:
    """Hash of a decoded case, whatever its files: image (C, Z, Y, X) and labels (Z, Y, X); two parts, image-labels."""
    # SHA-256 is the fastest of its kind here: processors have instructions for it.
    parts = (hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in (image, labels))
    first, second = (hash_text(str(array.shape), part) for array, part in zip((image, labels), parts))
    return f"{first}-{hash_text(second, str(annotated))}"


def load_case(dataset: Dataset, case: Case) -> LoadedCase:
    """Decode and check one case. Faults of the data come as findings; nothing is raised for them."""
    findings: list[Finding] = []
    image = stored = labels = None
    parts: list[Stored] = []
    content_hash = ""

    def fault(problem: str, cure: str) -> None:
        found = Finding(case=case.id, severity="error", problem=problem, cure=cure)
        if found not in findings:  # a file that is not there is missed twice
            findings.append(found)

    try:
        content_hash = hash_case(dataset, case)
        channels = len(dataset.channel_names)
        paths = [Path(path) for path in case.images]
        parts = [read_stored(path, channels=expected_in_file(len(paths), channels)) for path in paths]
        image, stored = join(parts, paths, channels)
        if stored.dimension == 3 and not all(part.sized for part in parts):
            problem = "the image does not say its voxel size, 1 mm is taken"
            cure = 'put {"spacing": [z, y, x]} into CASE.json beside it'
            findings.append(Finding(case=case.id, severity="warning", problem=problem, cure=cure))
    except AutosegError as error:
        fault(*problem_and_cure(error))
    label = None
    if case.label is None:
        fault("no label file", f"add labelsTr/{case.id}{dataset.file_ending} or remove the image")
    else:
        try:
            decoded = read_stored(Path(case.label), indices=True)
            # A file that does not say its voxel size was drawn on the image.
            label, _ = whole_labels(on_grid_of(decoded, parts[0]) if parts else decoded, Path(case.label))
        except AutosegError as error:
            fault(*problem_and_cure(error))
    if image is not None:
        found, labels = check_case(case.id, image, label, dataset.labels, dataset.channel_names, case.annotated)
        findings += found
    return LoadedCase(
        case=case.id,
        image=image,
        labels=labels,
        stored=stored,
        content_hash=content_hash,
        findings=tuple(findings),
    )


def problem_and_cure(error: AutosegError | str) -> tuple[str, str]:
    """The two halves of an error message around its first semicolon."""
    problem, _, cure = str(error).partition("; ")
    return problem, cure or "repair the file or remove the case"


def check_case(
    case: str,
    image: Volume,
    label: Volume | None,
    labels: Labels,
    channel_names: Sequence[str],
    annotated: Sequence[str] | None = None,
) -> tuple[tuple[Finding, ...], np.ndarray | None]:
    """Findings of a decoded case, and its labels as int16 class indices (Z, Y, X) on the image's grid.

    `label` (1, Z, Y, X) holds values of the file. The indices are None without label or where an error forbids them.
    annotated: the classes that the label may hold; None: all.
    """
    findings: list[Finding] = []

    def found(severity: Literal["error", "warning"], problem: str, cure: str) -> None:
        findings.append(Finding(case=case, severity=severity, problem=problem, cure=cure))

    for name, channel in zip(channel_names, image.array):
        low, high = float(channel.min()), float(channel.max())
        if fault := not_finite(name, channel):
            found("error", *fault)
        elif low == high:
            found("warning", f"channel {name} has the value {low:g} everywhere", "check that it was exported rightly")
    if label is None:
        return tuple(findings), None
    if difference := mismatch(image.grid, label.grid):
        cure = (
            "resample the label onto the image"
            if difference.startswith(("shape", "dimension"))
            else "copy the image's header to the label if it was drawn on this image, else resample it"
        )
        found("error", f"image and label differ in {difference}", cure)
        return tuple(findings), None
    try:
        indices = labels.to_indices(label.array[0])
    except ValueError:
        unexpected = labels.unexpected(label.array)
        cure = "name them in `labels` of dataset.json, or replace them in the file"
        known = ", ".join(map(str, sorted(labels.allowed)))
        found("error", f"label values {names(map(str, unexpected))}, named are {known}", cure)
        return tuple(findings), None
    if annotated is not None and (extra := labels.not_annotated(indices, annotated)):
        cure = f"add their class to its entry in `annotated` of dataset.json ({', '.join(annotated)}), or remove them"
        found("error", f"label values {names(map(str, extra))}, of classes that are not listed as annotated", cure)
        return tuple(findings), None
    if (indices == labels.ignored).all():
        found("warning", "nothing is annotated: every voxel is ignored", "remove the case, nothing is learnt from it")
    elif not labels.is_foreground(indices).any():
        found("warning", "no foreground: every label is background", "fine if the structure is absent")
    return tuple(findings), indices


def not_finite(name: str, channel: np.ndarray) -> tuple[str, str] | None:
    """Problem and cure of a channel that has voxels which are no numbers; None for a good one."""
    # min and max of an array with NaN are NaN, so no pass over the voxels is needed to find one.
    if np.isfinite((channel.min(), channel.max())).all():
        return None
    count = int(channel.size - np.isfinite(channel).sum())
    return f"channel {name} has {count} voxels that are NaN or infinite", "replace them, for example by 0"


def refuse_not_finite(image: Volume, channel_names: Sequence[str]) -> None:
    """AutosegError if an image (C, Z, Y, X) that is to be predicted has voxels which are no numbers."""
    for name, channel in zip(channel_names, image.array):
        if fault := not_finite(name, channel):
            raise AutosegError("; ".join(fault) + ", in the file of the image")


def check_dataset(dataset: Dataset, hashes: Mapping[str, str]) -> tuple[Finding, ...]:
    """Findings about the dataset as a whole: its notes, and cases that are the same. `hashes`: case -> content."""
    findings = [
        Finding(case="", severity="warning", problem=note, cure="correct dataset.json or look for missing files")
        for note in dataset.notes
    ]
    seen: dict[str, tuple[str, str]] = {}
    for case, content_hash in hashes.items():
        image, _, label = content_hash.partition("-")
        first, first_label = seen.setdefault(image, (case, label))
        if first == case:
            continue
        if label == first_label:
            problem, cure = f"same image and labels as {first}", "remove one of the two"
            findings.append(Finding(case=case, severity="error", problem=problem, cure=cure))
        else:
            problem, cure = f"same image as {first}, other labels", "keep one, or keep both in one fold"
            findings.append(Finding(case=case, severity="warning", problem=problem, cure=cure))
    return tuple(findings)


def findings_table(findings: Sequence[Finding]) -> str:
    """All findings as one table of text, errors first, then by case; the same warning of many cases is one row."""
    if not findings:
        return "no findings"
    ordered = sorted(findings, key=lambda finding: (finding.severity, finding.case))
    rows = [("severity", "case", "problem", "cure")]
    rows_of: dict[tuple[str, ...], list[str]] = {}
    for f in ordered:
        # Every error must be mended, so each has its row.
        row = (f.severity, " ".join(f.problem.split()), f.cure, f.case if f.severity == "error" else "")
        rows_of.setdefault(row, []).append(f.case or "(dataset)")
    rows += [(severity, names(cases), problem, cure) for (severity, problem, cure, _), cases in rows_of.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join((*(cell.ljust(width) for cell, width in zip(row, widths)), row[3])) for row in rows)
