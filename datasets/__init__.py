"""Where datasets come from; no image files live here.

A source writes a raw dataset in nnU-Net's layout. To add one, write a module beside this one with a settings record
and a function like `Make`, and enter it in SOURCES.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoseg.datasets.levelset import VesselSettings, make_dataset


class Make(Protocol):
    """Writes `cases` training and `test_cases` test cases to a new `folder`; the same ones for the same seed."""

    def __call__(
        self,
        folder: Path,
        settings: Any,
        cases: int,
        test_cases: int,
        seed: int,
        *,
        workers: int | None = None,
        quiet: bool = False,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """One way to get a dataset: what it is in a line, its settings as they are unless changed, and what makes it."""

    description: str
    settings: Any
    """A record; its fields may be changed by `dataclasses.replace`."""
    make: Make


SOURCES: dict[str, Source] = {
    "vessels": Source(
        description="synthetic 3D vessels among bright spheres and plates, learnable on a CPU in minutes",
        settings=VesselSettings(),
        make=make_dataset,
    ),
    "vessels_2d": Source(
        description="synthetic 2D vessels among bright discs and bars, learnable on a CPU in seconds",
        settings=VesselSettings(
            dimension=2,
            shape=(1, 128, 128),
            spacing_mm=(1.0, 0.8, 0.8),
            tubes=(2, 3),
            radius_mm=(1.8, 3.0),
            spheres=(8, 11),
            plates=(1, 2),
        ),
        make=make_dataset,
    ),
}

__all__ = ["SOURCES", "Make", "Source", "VesselSettings"]
