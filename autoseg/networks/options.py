"""The options of a network specification, checked: a plan is edited by hand, and may come from elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autoseg.schema import NetworkSpec, Option

Limits = tuple[float, float] | tuple[str, ...]
"""The lowest and the highest number, or the words to choose from."""


def read_options(spec: NetworkSpec, defaults: Mapping[str, Option], limits: Mapping[str, Limits]) -> dict[str, Any]:
    """The options of `spec` by name; what it does not state is as in `defaults`.

    Raises ValueError for a name that is not in `defaults`, a value of another type, or one outside `limits`.
    """
    if unknown := sorted(set(spec.options) - set(defaults)):
        raise ValueError(f"the network {spec.name!r} has no option {unknown[0]!r}; it has {', '.join(defaults)}")
    found = {**defaults, **spec.options}
    for name, value in found.items():
        where = f"option {name} of the network {spec.name!r}"
        if not _alike(value, defaults[name]):
            raise ValueError(f"{where}: {value!r} should be of the kind of {defaults[name]!r}")
        allowed = limits.get(name, ())
        if isinstance(value, str):
            if allowed and value not in allowed:
                raise ValueError(f"{where}: choose one of {', '.join(map(str, allowed))}, found {value!r}")
        elif allowed:
            low, high = allowed
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(low <= number <= high for number in numbers):  # type: ignore[operator]
                raise ValueError(f"{where}: between {low} and {high}, found {value!r}")
    return found


def with_options(
    spec: NetworkSpec, stated: Mapping[str, Any], defaults: Mapping[str, Option], limits: Mapping[str, Limits]
) -> NetworkSpec:
    """`spec` with all options written out: those `stated`, the others as in `defaults`. Raises as `read_options`."""
    return replace(spec, options=read_options(replace(spec, options=dict(stated)), defaults, limits))


def _alike(value: Option, default: Option) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
