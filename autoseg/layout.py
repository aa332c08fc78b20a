"""nnU-Net's folder layout: dataset.json, imagesTr, labelsTr -> the cases of a raw dataset. Decodes no image.

A dataset that is not laid out as it should be is refused with a list of all its faults, each with what to do. Faults of
one case or one file are kept apart (`Bad`): `predict` does without it, and `check` has more to say than that.
"""

import difflib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.labels import Labels
from autoseg.merging import annotated_as
from autoseg.readers import ENDINGS, reader_for
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


@record
class Dataset:
    """An opened raw dataset. `notes` are oddities of dataset.json that do no harm."""

    name: str
    folder: str
    channel_names: tuple[str, ...]
    labels: Labels
    file_ending: str
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()
    group_by: str | None = None
    """Pattern of the cases of one patient, as for --group-by."""

    def annotated(self, labels: Labels | None = None) -> dict[str, tuple[str, ...]]:
        """Case -> classes that were annotated in it; only of cases where not all were.

        labels: those of a plan, of which some may be merged; None: as in the files.
        """
        listed = {case.id: case.annotated for case in self.cases if case.annotated is not None}
        return listed if labels is None else annotated_as(listed, self.labels, labels)

    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the labels, one line each; nothing for plain classes annotated everywhere."""
        partly, lines = self.annotated(), self.labels.remarks()
        if not partly:
            return lines
        whole = len(self.cases) - len(partly)
        counts = {name: whole + sum(name in listed for listed in partly.values()) for name in self.labels.names[1:]}
        in_words = ", ".join(f"{name} in {count}" for name, count in counts.items())
        return (*lines, f"{len(partly)} of {len(self.cases)} cases are annotated in part: {in_words}")


def open_dataset(folder: Path) -> Dataset:
    """Open a raw dataset folder: dataset.json, imagesTr, labelsTr. No image is decoded.

    Raises AutosegError that lists every fault of dataset.json and of the layout, each with its cure.
    """
    dataset, bad = survey_dataset(folder)
    if bad:
        raise AutosegError(listed(f"{folder} is not laid out as it should be", as_faults(bad)))
    return dataset


def survey_dataset(folder: Path) -> tuple[Dataset, Bad]:
    """As `open_dataset`, but what is wrong with single cases or files is returned, and they are left out.

    Raises AutosegError that lists the other faults: of dataset.json, and of what concerns all cases.
    """
    if not folder.is_dir():
        raise AutosegError(f"{folder} is no folder; give the folder that holds dataset.json")
    content = read_description(folder)
    faults: list[str] = []
    channel_names = read_channels(content, faults)
    labels = read_label_names(content, faults)
    ending = read_ending(content, folder, faults)
    group_by = content.get("group_by")
    if not isinstance(group_by, str | None):
        faults.append(
            f'group_by: must be a regular expression like "(patient[0-9]+)", found {json.dumps(group_by)[:80]}'
        )
    if faults:
        raise AutosegError(listed(f"{folder / 'dataset.json'} has faults", faults))
    assert labels is not None

    bad: Bad = {}
    if "dataset" in content:
        cases = listed_cases(content["dataset"], folder, len(channel_names), faults, bad)
    else:
        cases = paired_cases(folder, len(channel_names), ending, faults, bad)
    if not faults and "annotated" in content:
        cases = with_annotated(cases, content["annotated"], labels, faults, bad)
    if faults:
        raise AutosegError(listed(f"{folder} is not laid out as it should be", [*faults, *as_faults(bad)]))
    notes = list(labels.ambiguities())
    if not bad and content.get("numTraining", len(cases)) != len(cases):
        notes.append(f"dataset.json says numTraining {content['numTraining']}, found are {len(cases)} cases")
    dataset = Dataset(
        name=folder.resolve().name,
        folder=str(folder),
        channel_names=channel_names,
        labels=labels,
        file_ending=ending,
        cases=cases,
        notes=tuple(notes),
        group_by=group_by,
    )
    return dataset, bad


def read_description(folder: Path) -> dict[str, Any]:
    """The content of dataset.json; AutosegError if it is missing or no JSON object."""
    path = folder / "dataset.json"
    if not path.is_file():
        near = [p for p in (*folder.glob("*.json"), *folder.glob("*/dataset.json")) if p.name.lower() == "dataset.json"]
        hint = f" (there is {near[0]})" if near else ""
        raise AutosegError(
            f"{folder} has no dataset.json{hint}; it must name channel_names, labels and file_ending, for example "
            '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise AutosegError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise AutosegError(f"{path} must hold an object {{...}}, found {type(content).__name__}")
    return content


def read_channels(content: Mapping[str, Any], faults: list[str]) -> tuple[str, ...]:
    """Channel names in order, from `channel_names` (or the older `modality`): {"0": name, ...} or a list."""
    named = content.get("channel_names", content.get("modality"))
    if named is None:
        faults.append(missing("channel_names", content, '{"0": "CT"}'))
        return ()
    if isinstance(named, dict):
        if sorted(named) != sorted(str(n) for n in range(len(named))):
            faults.append(
                f'channel_names: the keys must be "0", "1", ... without gaps, found {", ".join(map(repr, named))}'
            )
            return ()
        named = [named[str(n)] for n in range(len(named))]
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        faults.append(f'channel_names: must be like {{"0": "CT"}}, found {json.dumps(named)[:80]}')
        return ()
    return tuple(named)


def read_label_names(content: Mapping[str, Any], faults: list[str]) -> Labels | None:
    """Labels of dataset.json, or None and a fault."""
    named = content.get("labels")
    if named is None:
        faults.append(missing("labels", content, '{"background": 0, "liver": 1}'))
    elif not isinstance(named, dict) or not named:
        faults.append(f'labels: must be like {{"background": 0, "liver": 1}}, found {json.dumps(named)[:80]}')
    elif all(key.isdigit() and isinstance(name, str) for key, name in named.items()):
        turned = json.dumps({name: int(key) for key, name in named.items()})
        faults.append(f"labels: must go from name to value, not from value to name; write {turned}")
    else:
        try:
            return Labels.from_dataset(named, content.get("regions_class_order"))
        except AutosegError as error:
            faults.append(str(error).removeprefix("dataset.json: "))
    return None


def labels_in(folder: Path) -> tuple[Labels, dict[str, tuple[str, ...]]]:
    """Labels of the dataset.json in `folder`, and case -> annotated classes of the cases where not all are.

    Nothing else in it is looked at. Raises AutosegError that lists all faults of these entries.
    """
    content, faults = read_description(folder), list[str]()
    labels = read_label_names(content, faults)
    annotated = {} if labels is None else read_annotated(content.get("annotated", {}), labels, faults)
    if labels is None or faults:
        raise AutosegError(listed(f"{folder / 'dataset.json'} has faults", faults))
    return labels, annotated


def read_ending(content: Mapping[str, Any], folder: Path, faults: list[str]) -> str:
    """The file ending of dataset.json, or a fault that names the endings found."""
    ending = content.get("file_ending")
    if ending is None:
        present = endings_in(folder / "imagesTr")
        faults.append(missing("file_ending", content, json.dumps(present[0] if present else ".nii.gz")))
    elif not isinstance(ending, str):
        faults.append(f"file_ending: must be a text, found {json.dumps(ending)}")
    elif not ending.startswith("."):
        faults.append(f'file_ending: must begin with a dot; write ".{ending}"')
    else:
        try:
            reader_for(Path(f"x{ending}"))
        except AutosegError as error:
            faults.append(f"file_ending {ending!r}{str(error).removeprefix(f'x{ending}')}")
        return ending
    return ""


def missing(key: str, content: Mapping[str, Any], example: str) -> str:
    """The fault of a key that is absent, with the key that may have been meant."""
    near = difflib.get_close_matches(key.lower(), [str(k).lower() for k in content], n=1, cutoff=0.75)
    hint = next((f" ({k!r} is not read; rename it)" for k in content if near and str(k).lower() == near[0]), "")
    return f'{key}: missing{hint}; add "{key}": {example}'


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
    source: Path, channels: int, file_ending: str | None = None, ours: Collection[str] = ()
) -> tuple[tuple[Case, ...], Bad]:
    """As `find_cases`, but what is wrong with single cases or files is returned, and they are left out.

    ours: names of files in the folder that are no images to read. Files of no image format, and hidden ones, are passed
    over. Raises AutosegError if no case is left.
    """
    faults: list[str] = []
    bad: Bad = {}
    if source.is_file():
        cases = single_case(source, channels, faults)
    elif source.is_dir():
        present = endings_in(source, ours)
        ending = file_ending or (present[0] if present else ".nii.gz")
        reader_for(source / f"*{ending}")
        cases = cases_in(source, channels, ending, faults, bad, ours)
        for other in present if file_ending is None else ():
            if other.lower() != ending.lower():
                reason = f"of another kind ({other}) than most images there ({ending}); put it into another folder"
                # .nii.gz ends in no other known ending, and no other ends in it.
                bad |= {file.name: reason for file in files_with(source, other, ours)}
    else:
        raise AutosegError(f"{source} does not exist; give a folder of images or one image file")
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
    found = [file for file in files if file.is_file()]
    if len(found) not in (1, channels):
        faults.append(f"{case}: {names(file.name for file in files if file not in found)} missing beside {path.name}")
    return (Case(id=case, images=tuple(map(str, found))),)


def cases_in(
    folder: Path, channels: int, ending: str, faults: list[str], bad: Bad, ours: Collection[str] = ()
) -> tuple[Case, ...]:
    """The good cases of a folder of images CASE_0000 + ending; the others come into `bad`."""
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
            more = f"{names(numbers[n].name for n in extra)} in {folder.name}, but channel_names has {channels} entries"
            bad[case] = f"{bad[case]}, and {more}" if case in bad else more
        if case in bad:
            bad[case] += "; correct the numbers or channel_names, or remove the case"
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
        absent = [str(path) for path in paths if not path.is_file()]
        if absent:
            wrong.append(f"its entry in `dataset` lists {names(absent)}, which do not exist")
        if wrong:
            bad[case] = ", and ".join(wrong)
            continue
        files = [str(path) for path in paths]
        cases.append(Case(id=case, images=tuple(files[: len(images)]), label=files[-1] if label else None))
    return tuple(cases)


def with_annotated(
    cases: tuple[Case, ...], entries: Any, labels: Labels, faults: list[str], bad: Bad
) -> tuple[Case, ...]:
    """The cases with what `annotated` of dataset.json says of them: {case: [class, ...]}, all classes where nothing."""
    listing = read_annotated(entries, labels, faults)
    if unknown := sorted(set(listing) - {case.id for case in cases} - bad.keys()):
        faults.append(f"annotated: {names(unknown)} without images; correct the name or remove the entry")
    never = [name for name in labels.names[1:] if all(name not in listing.get(case.id, (name,)) for case in cases)]
    if cases and never and not faults and not bad:
        faults.append(f"annotated: no case has {names(never)}; add a case that has, or remove the class from labels")
    return tuple(replace(case, annotated=listing.get(case.id)) for case in cases)


def read_annotated(entries: Any, labels: Labels, faults: list[str]) -> dict[str, tuple[str, ...]]:
    """Case -> classes annotated in it, of the cases where they are not all; in the order of `labels`."""
    classes = labels.names[1:]
    if not isinstance(entries, dict):
        faults.append(f'annotated: must be like {{"case_1": ["{classes[0]}"]}}, found {json.dumps(entries)[:80]}')
        return {}
    listing = {}
    for case, entry in entries.items():
        if not isinstance(entry, list) or not entry or any(name not in classes for name in entry):
            faults.append(
                f"annotated: {case} must list one or more of {', '.join(classes)}, found {json.dumps(entry)[:80]}"
            )
        elif set(entry) != set(classes):
            listing[case] = tuple(name for name in classes if name in entry)
    return listing


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
    return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]


def ending_of(path: Path) -> str:
    """The ending of a file as it is written, with the dots of endings like .nii.gz."""
    reader_for(path)
    known = next(ending for ending in ENDINGS if path.name.lower().endswith(ending))
    return path.name[-len(known) :]


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
