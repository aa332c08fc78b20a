"""What people write for fields: `--set path.to.field=value`, TOML files, durations.

Changes of a record are typed and checked as if it had been written so.
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autoseg.records import AutosegError, problems

T = TypeVar("T")

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
"""Units of durations in seconds, largest first."""


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[2, 3]", "d=text"]` -> {"a.b": 1, "c": [2, 3], "d": "text"}; values as in TOML, else plain text.

    Raises AutosegError for text of another form, and for a field that is given twice.
    """
    parsed: dict[str, Any] = {}
    for text in assignments:
        path, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not path:
            raise AutosegError(f"--set {text!r}: write it as field=value")
        if path in parsed:
            raise AutosegError(f"{path} is given twice; leave one out")
        try:
            parsed[path] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[path] = value
    return parsed


def in_json(changes: Mapping[str, Any]) -> dict[str, str]:
    """Field -> its value as JSON, as a plan remembers what was set."""
    return {path: json.dumps(value) for path, value in changes.items()}


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name(key=value, ...)` -> the name and its options; values as in `parse`.

    Raises AutosegError for text of another form.
    """
    found = re.fullmatch(r"\s*([\w.:+-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not found:
        raise AutosegError(f"{text!r}: write it as name or name(key=value, ...)")
    name, inner = found[1], found[2] or ""
    parts = re.split(r",(?![^\[]*\])", inner) if inner.strip() else []
    if odd := [part.strip() for part in parts if not re.match(r"\s*\w+\s*=\s*\S", part)]:
        raise AutosegError(f"{text!r}: {odd[0]!r} is no option; write it as key=value")
    try:
        return name, parse(parts)
    except AutosegError as error:
        raise AutosegError(f"{text!r}: {error}") from None


def parse_sum(text: str) -> tuple[tuple[float, str, dict[str, Any]], ...]:
    """`2*name(key=value) + name` -> (factor, name, options) of each term; the factor is 1 where none is written.

    Raises AutosegError for text of another form and for factors that are not above 0.
    """
    terms = []
    for term in re.split(r"\+(?![^(]*\))", text):
        factor, star, call = term.partition("*") if "*" in term.partition("(")[0] else ("", "", term)
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf:
            raise AutosegError(
                f"{text!r}: {factor.strip()!r} is no number above 0; write a term as 0.5*name(key=value)"
            )
        if not call.strip():
            raise AutosegError(f"{text!r}: a term is missing; write a sum as dice+focal(gamma=2)")
        terms.append((weight, *parse_call(call)))
    return tuple(terms)


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
    fields that have an option of their own to that option; changing one here, or a part of it, is refused, so that
    nothing can be said in two ways. Raises AutosegError that lists the valid fields.
    """
    content = TypeAdapter(type(value)).dump_python(value, mode="json")
    for path, new in changes.items():
        holder: Any = content
        *steps, last = path.split(".")
        for whole in accumulate((*steps, last), "{}.{}".format):
            if taken and whole in taken:
                raise AutosegError(f"{where} {path}: use the option {taken[whole]} for this")
        for depth, step in enumerate(steps):
            holder = holder[_place(holder, step, ".".join(steps[: depth + 1]), where)]
        holder[_place(holder, last, path, where)] = new
    try:
        return TypeAdapter(type(value)).validate_python(content)
    except ValidationError as error:
        raise AutosegError(f"{where} asks for something that is not possible:\n{problems(error)}") from None


def parse_duration(text: str, option: str) -> float:
    """`2h`, `90m`, `1h30m`, `45s`, `1.5h`, `2d` -> seconds. Raises AutosegError that names `option` for all else.

    A number without a unit is refused: some programs mean hours by it, others minutes or seconds.
    """
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch("".join(f"(?:{number}{unit})?" for unit in UNITS), text.replace(" ", "").lower())
    seconds = sum(float(part) * UNITS[unit] for part, unit in zip(found.groups(), UNITS) if part) if found else 0.0
    if seconds <= 0:
        raise AutosegError(f"{option} {text!r}: write a duration with its units, for example 2h, 90m, 1h30m, 45s or 2d")
    return seconds


def say_duration(seconds: float) -> str:
    """Seconds as `parse_duration` reads them, to the second, the largest units first: 5400 -> `1h30m`."""
    left, said = round(seconds), ""
    for unit, size in UNITS.items():
        count, left = divmod(left, size)
        said += f"{count}{unit}" if count else ""
    return said or "0s"


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
