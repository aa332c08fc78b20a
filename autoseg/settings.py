"""`--set path.to.field=value` and TOML files: typed changes of a record, checked as if it had been written so."""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autoseg.records import AutosegError, problems

T = TypeVar("T")


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[2, 3]", "d=text"]` -> {"a.b": 1, "c": [2, 3], "d": "text"}; values as in TOML, else plain text."""
    parsed: dict[str, Any] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise AutosegError(f"--set {text!r}: write it as field=value")
        try:
            parsed[path.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[path.strip()] = value.strip()
    return parsed


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as {"path.to.field": value}."""
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise AutosegError(f"{path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise AutosegError(f"{path} is no valid TOML: {error}") from None

    def flat(table: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(flat(content, ""))


def change(value: T, changes: Mapping[str, Any], *, taken: Mapping[str, str] | None = None, where: str = "--set") -> T:
    """The record `value` with `changes` made, validated as a whole.

    A step of a path is a field name, a position in a tuple, or the `name` of a record in a tuple. `taken` maps
    fields that have an option of their own to that option; changing one here is refused, so that nothing can be
    said in two ways. Raises AutosegError that lists the valid fields.
    """
    content = TypeAdapter(type(value)).dump_python(value, mode="json")
    for path, new in changes.items():
        if taken and path in taken:
            raise AutosegError(f"{where} {path}: use the option {taken[path]} for this")
        holder: Any = content
        *steps, last = path.split(".")
        for depth, step in enumerate(steps):
            holder = holder[_place(holder, step, ".".join(steps[: depth + 1]), where)]
        holder[_place(holder, last, path, where)] = new
    try:
        return TypeAdapter(type(value)).validate_python(content)
    except ValidationError as error:
        raise AutosegError(f"{where} asks for something that is not possible:\n{problems(error)}") from None


def _place(holder: Any, step: str, path: str, where: str) -> str | int:
    if isinstance(holder, dict) and step in holder:
        return step
    if isinstance(holder, list):
        named = {entry["name"]: i for i, entry in enumerate(holder) if isinstance(entry, dict) and "name" in entry}
        if step in named:
            return named[step]
        if step.isdigit() and int(step) < len(holder):
            return int(step)
        known: Sequence[str] = [*named] or [str(i) for i in range(len(holder))]
    else:
        known = [*holder] if isinstance(holder, dict) else []
    raise AutosegError(f"{where} {path}: there is no {step!r}; choose one of: {', '.join(known) or 'nothing below it'}")


def fields(value: object, prefix: str = "", taken: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Every (path, present value) that `change` may change in a record, for `--help-fields`."""
    rows: list[tuple[str, str]] = []
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        path, content = f"{prefix}{field.name}", getattr(value, field.name)
        if path in (taken or {}):
            continue
        if dataclasses.is_dataclass(content):
            rows += fields(content, f"{path}.", taken)
        elif isinstance(content, tuple) and content and dataclasses.is_dataclass(content[0]):
            for i, entry in enumerate(content):
                rows += fields(entry, f"{path}.{getattr(entry, 'name', i)}.", taken)
        else:
            rows.append((path, repr(content)))
    return rows
