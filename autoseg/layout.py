"""nnU-Net's folder layout: dataset.json, imagesTr, labelsTr -> a raw dataset. Decodes no image.

A dataset that is not laid out as it should be is refused with a list of all its faults, each with what to do.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.cases import Bad, Case, as_faults, endings_in, listed, listed_cases, names, paired_cases
from autoseg.labels import Labels
from autoseg.merging import annotated_as
from autoseg.readers import reader_for
from autoseg.records import AutosegError, record


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
    """The file ending of dataset.json in small letters, in which results are written, or a fault with those found."""
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
        return ending.lower()
    return ""


def missing(key: str, content: Mapping[str, Any], example: str) -> str:
    """The fault of a key that is absent, with the key that may have been meant."""
    near = difflib.get_close_matches(key.lower(), [str(k).lower() for k in content], n=1, cutoff=0.75)
    hint = next((f" ({k!r} is not read; rename it)" for k in content if near and str(k).lower() == near[0]), "")
    return f'{key}: missing{hint}; add "{key}": {example}'


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
