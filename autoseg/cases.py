"""Finding cases: image files -> cases with their channels, labels beside them. Decodes no image.

A fault that concerns all cases goes into `faults`, a line each, and is raised in the end. What is wrong with one case
or one file is kept apart (`Bad`): `predict` does without it, and `check` has more to say than that.
"""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from autoseg.readers import ENDINGS, is_named, not_there, reader_for
from autoseg.records import AutosegError, record

SHOWN = 5
"""How many names an error lists before it only counts."""
LINES = 20
"""The same for faults, a line each."""

Bad = dict[str, str]
"""Case, or name of a file that belongs to none -> what is wrong with it, after a semicolon what to do."""


@record
class Case:
    """One case: its image files, one a channel or one for all, and its label file (None where there is none)."""

    id: str
    images: tuple[str, ...]
    label: str | None = None
    annotated: tuple[str, ...] | None = None
    """The classes that were annotated, where not all were."""


def find_cases(source: Path, channels: int, file_ending: str | None = None) -> tuple[Case, ...]:
    """The cases of an image folder (or the one of a single file), sorted by id, without labels.

    Images are CASE_0000 + ending, one file a channel, or one file with all channels. `file_ending` None takes the one
    that most files have. A single file needs no channel number; its other channels are found beside it.
    Raises AutosegError that lists every fault.
    """
    cases, bad = survey_cases(source, channels, file_ending)
    if bad:
        raise AutosegError(listed(f"{source} cannot be read as a set of cases", as_faults(bad)))
    return cases


def survey_cases(
    source: Path, channels: int, file_ending: str | None = None, ours: Collection[str] = (), cure: str = ""
) -> tuple[tuple[Case, ...], Bad]:
    """As `find_cases`, but what is wrong with single cases or files is returned, and they are left out.

    ours: names of files in the folder that are no images to read. Files of no image format, and hidden ones, are passed
    over. cure: as in `cases_in`. Raises AutosegError if no case is left.
    """
    faults: list[str] = []
    bad: Bad = {}
    if is_named(source):
        cases = single_case(source, channels, faults)
    elif source.is_dir():
        present = endings_in(source, ours)
        ending = file_ending or (present[0] if present else ".nii.gz")
        reader_for(source / f"*{ending}")
        cases = cases_in(source, channels, ending, faults, bad, ours, cure)
        for other in present if file_ending is None else ():
            if other.lower() != ending.lower():
                reason = f"of another kind ({other}) than most images there ({ending}); put it into another folder"
                # .nii.gz ends in no other known ending, and no other ends in it.
                bad |= {file.name: reason for file in files_with(source, other, ours)}
    else:
        raise AutosegError(f"{not_there(source)}; give a folder of images or one image file")
    if faults or not cases:
        raise AutosegError(listed(f"{source} cannot be read as a set of cases", [*faults, *as_faults(bad)]))
    return cases, bad


def single_case(path: Path, channels: int, faults: list[str]) -> tuple[Case, ...]:
    """The case that `path` is the first or only file of."""
    ending = ending_of(path)
    stem = path.name[: -len(ending)]
    if not stem.endswith("_0000"):
        return (Case(id=stem, images=(str(path),)),)
    case = stem.removesuffix("_0000")
    files = [path.with_name(f"{case}_{n:04}{ending}") for n in range(channels)]
    found = [file for file in files if is_named(file)]
    if len(found) not in (1, channels):
        faults.append(f"{case}: {names(file.name for file in files if file not in found)} missing beside {path.name}")
    return (Case(id=case, images=tuple(map(str, found))),)


def cases_in(
    folder: Path, channels: int, ending: str, faults: list[str], bad: Bad, ours: Collection[str] = (), cure: str = ""
) -> tuple[Case, ...]:
    """The good cases of a folder of images CASE_0000 + ending; the others come into `bad`.

    cure: what to do about another number of channels; without one, what helps where dataset.json says it.
    """
    files = files_with(folder, ending, ours)
    if not files:
        present = endings_in(folder)
        found = f"it holds {', '.join(present)}; correct file_ending" if present else "it holds no images"
        faults.append(f"{folder.name}: no file ends in {ending}; {found}")
        return ()
    pattern = re.compile(r"(.+)_(\d{4})")
    by_case: dict[str, dict[int, Path]] = {}
    for file in files:
        if match := pattern.fullmatch(file.name[: -len(ending)]):
            by_case.setdefault(match[1], {})[int(match[2])] = file
        else:
            better = file.name[: -len(ending)] + "_0000" + file.name[-len(ending) :]
            bad[file.name] = f"no channel number in its name, in {folder.name}; rename it to {better}, or remove it"
    # One file a case may hold all channels. Where any case has more, each must have all.
    together = all(set(numbers) == {0} for numbers in by_case.values())
    for case, numbers in by_case.items():
        lacking = [] if together else [n for n in range(channels) if n not in numbers]
        extra = [number for number in numbers if number >= channels]
        if lacking:
            bad[case] = f"missing {names(f'{case}_{n:04}{ending}' for n in lacking)} in {folder.name}"
        if extra:
            more = f"{names(numbers[n].name for n in extra)} in {folder.name}, but there are {channels} channels"
            bad[case] = f"{bad[case]}, and {more}" if case in bad else more
        if case in bad:
            bad[case] += f"; {cure or 'correct the numbers or channel_names, or remove the case'}"
    good = sorted(by_case.keys() - bad.keys())
    return tuple(Case(id=c, images=tuple(str(by_case[c][n]) for n in sorted(by_case[c]))) for c in good)


def paired_cases(folder: Path, channels: int, ending: str, faults: list[str], bad: Bad) -> tuple[Case, ...]:
    """The cases of imagesTr with their labels of labelsTr."""
    images, labels = folder / "imagesTr", folder / "labelsTr"
    for part in (images, labels):
        if not part.is_dir():
            near = [p.name for p in folder.iterdir() if p.is_dir() and p.name.lower().startswith(part.name[:5].lower())]
            faults.append(
                f"{part.name}: no such folder"
                + (f"; rename {near[0]}?" if near else f"; put the {part.name[:-2]} there")
            )
    if faults:
        return ()
    cases = cases_in(images, channels, ending, faults, bad)
    by_case = {file.name[: -len(ending)]: file for file in files_with(labels, ending)}
    if cases and not by_case:
        found = ", ".join(endings_in(labels)) or "nothing"
        faults.append(
            f"labelsTr: no file ends in {ending}, found is {found}; labels must be CASE{ending}, like the images"
        )
    known = {case.id for case in cases} | bad.keys()
    # An image without a number is named above; its label is no second fault.
    known |= {name[: -len(ending)] for name in bad if name.endswith(ending)}
    if cases or bad:
        known |= left_out(images, ending, known, bad)
    for name in sorted(by_case.keys() - known) if cases or bad else ():
        if re.sub(r"_\d{4}$", "", name) in known:
            bad[f"{name}{ending}"] = (
                f"a label with a channel number, in labelsTr; labels are CASE{ending}, without _0000"
            )
        else:
            bad[name] = f"label without image in imagesTr; add {name}_0000{ending} or remove the label"
    return tuple(
        Case(id=case.id, images=case.images, label=str(by_case[case.id]) if case.id in by_case else None)
        for case in cases
    )


def left_out(images: Path, ending: str, known: Collection[str], bad: Bad) -> set[str]:
    """Cases that have images of other endings alone and would be left out without a word; they come into `bad`."""
    found: set[str] = set()
    for other in endings_in(images):
        cases = {
            file.name: re.sub(r"_\d{4}$", "", file.name[: -len(other)])
            for file in files_with(images, other)
            if not file.name.lower().endswith(ending.lower())
        }
        if strange := [name for name, case in cases.items() if case not in known]:
            bad[f"*{other}"] = (
                f"{len(strange)} files in {images.name} end in {other}, where dataset.json says {ending}: "
                f"{names(strange)}; convert them, or move them out of {images.name}"
            )
            found |= {cases[name] for name in strange}
    return found


def listed_cases(entries: Any, folder: Path, channels: int, faults: list[str], bad: Bad) -> tuple[Case, ...]:
    """The good cases of the entry `dataset` of dataset.json: {case: {"images": [...], "label": ...}}.

    Paths are absolute or relative to the dataset folder; $NAMES of the environment are filled in.
    """
    if not isinstance(entries, dict) or not entries:
        faults.append('dataset: must be like {"case_1": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}')
        return ()
    cases = []
    for case, entry in sorted(entries.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not all(isinstance(p, str) for p in (*images, label or "")):
            bad[case] = 'its entry in `dataset` must be like {"images": ["a.nii.gz"], "label": "b.nii.gz"}'
            continue
        wrong = []
        if Path(case).name != case:
            wrong.append("its name in `dataset` cannot be that of a file; leave out slashes")
        if len(images) not in (1, channels):
            wrong.append(f"its entry in `dataset` lists {len(images)} images for {channels} channel_names")
        paths = [folder / os.path.expandvars(p) for p in (*images, *([label] if label else []))]
        absent = [str(path) for path in paths if not is_named(path)]
        if absent:
            wrong.append(f"its entry in `dataset` lists {names(absent)}, which do not exist")
        if wrong:
            bad[case] = ", and ".join(wrong)
            continue
        files = [str(path) for path in paths]
        cases.append(Case(id=case, images=tuple(files[: len(images)]), label=files[-1] if label else None))
    return tuple(cases)


def files_with(folder: Path, ending: str, ours: Collection[str] = ()) -> list[Path]:
    """Files of a folder with an ending in whatever case, sorted; hidden files and those called `ours` are left out."""
    return sorted(f for f in visible(folder) if f.name.lower().endswith(ending.lower()) and f.name not in ours)


def endings_in(folder: Path, ours: Collection[str] = ()) -> list[str]:
    """Known endings (and JPEG's) of the files in a folder that are not `ours`, most frequent first."""
    if not folder.is_dir():
        return []
    known = (*ENDINGS, ".jpg", ".jpeg", ".dcm")
    files = [file.name.lower() for file in visible(folder) if file.name not in ours]
    found = [next((e for e in known if file.endswith(e)), "") for file in files]
    return sorted({ending for ending in found if ending}, key=lambda ending: (-found.count(ending), ending))


def visible(folder: Path) -> list[Path]:
    """The files of a folder that are not hidden."""
    return [file for file in folder.iterdir() if is_named(file) and not file.name.startswith(".")]


def ending_of(path: Path) -> str:
    """The ending of a file as it is written, with the dots of endings like .nii.gz."""
    reader_for(path)
    known = next(ending for ending in ENDINGS if path.name.lower().endswith(ending))
    return path.name[-len(known) :]


def result_name(case: str, like: Path) -> str:
    """What a result is called that is written in the format of `like`: its ending in small letters, whatever its own.

    Files are read whatever the case of their ending, but written by programs that know the small ones only.
    """
    return f"{case}{ending_of(like).lower()}"


def names(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def as_faults(bad: Bad) -> list[str]:
    """A line a case or file, in order."""
    return [f"{name}: {bad[name]}" for name in sorted(bad)]


def listed(what: str, faults: Sequence[str]) -> str:
    """A heading and a line a fault; of very many the first, and how many more there are."""
    more = [f"and {len(faults) - LINES} more"] if len(faults) > LINES else []
    return f"{what}:\n" + "\n".join(f"  {fault}" for fault in [*faults[:LINES], *more])
