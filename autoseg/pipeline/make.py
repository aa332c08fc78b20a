"""dataset make: write a raw dataset from one of the sources."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg import settings
from autoseg.datasets import SOURCES, Source
from autoseg.records import AutosegError
from autoseg.workspace import Workspace

NUMBERS = {"vessels": "Dataset900_Vessels", "vessels_2d": "Dataset901_Vessels2D"}


def source_called(name: str) -> Source:
    """The source of that name; AutosegError lists the ones there are."""
    if name not in SOURCES:
        listed = "\n".join(f"  {key}: {source.description}" for key, source in SOURCES.items())
        raise AutosegError(f"unknown source {name!r}; choose one of:\n{listed}")
    return SOURCES[name]


def describe_source_fields(name: str) -> None:
    """Print the fields of a source's settings that --set takes."""
    print("\n".join(f"{path} = {value}" for path, value in settings.fields(source_called(name).settings)))


def make_dataset(
    workspace: Workspace,
    name: str,
    folder: Path | None,
    cases: int,
    test_cases: int,
    seed: int,
    changes: Mapping[str, Any],
) -> Path:
    """Write the dataset and return its folder: `folder`, or the source's own name in the workspace."""
    source = source_called(name)
    target = folder or workspace.raw(NUMBERS[name])
    source.make(target, settings.change(source.settings, changes), cases, test_cases, seed)
    print(f"Made: {cases} training and {test_cases} test cases in {target}")
    return target
