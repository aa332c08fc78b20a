"""What an architecture has beside its stages: options, declared as a record and read from a specification.

Norm, activation and dropout are those of each paper unless a specification says otherwise; a name or a number that
makes no sense is refused before anything is built from it.
"""

from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from autoseg.records import problems, record
from autoseg.schema import NetworkSpec

T = TypeVar("T")

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of activations that are dropped in training."""


@record
class Options:
    """What most architectures let one choose; see `parts.NORMS` and `parts.ACTIVATIONS` for the names."""

    norm: str = "batch"
    activation: str = "relu"
    dropout: Share = 0.0


def read_options(kind: type[T], spec: NetworkSpec) -> T:
    """The options of `spec` as a record of class `kind`. Raises ValueError, with all problems, if they are not that."""
    try:
        return TypeAdapter(kind).validate_python(spec.options)
    except ValidationError as error:
        raise ValueError(f"the options of the network {spec.name!r} are wrong:\n{problems(error)}") from None
