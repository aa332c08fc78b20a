"""Where datasets come from; no image files live here.

A source makes a raw dataset in nnU-Net's layout from nothing: a module with a settings record and a function like
`Make`, entered in SOURCES. An import turns files that are there into one: a module with a function `find` from Request
to Draft (see importing), entered in IMPORTS. What is known about a public dataset is an entry of PROFILES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoseg.datasets import decathlon, folders, hdf5, masks, nnunet
from autoseg.datasets.importing import Draft, Request
from autoseg.datasets.levelset import VesselSettings, make_dataset
from autoseg.datasets.profiles import PROFILES, Profile


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


@dataclass(frozen=True, kw_only=True)
class Import:
    """One way to turn files into a dataset: what it takes, in a line, and what finds the cases."""

    description: str
    find: Callable[[Request], Draft]
    takes: tuple[str, ...] = ()
    """What it heeds beyond the source, channels and labels: masks, order, spacing_mm."""
    name: Callable[[str], str | None] = lambda source: None
    """The dataset name that follows from the source, if one does."""


IMPORTS: dict[str, Import] = {
    "msd": Import(
        description="a task of the Medical Segmentation Decathlon: its folder or .tar",
        find=decathlon.find,
        name=decathlon.dataset_name,
    ),
    "nnunet": Import(description="a raw dataset of nnU-Net v2, as it is", find=nnunet.find, name=nnunet.dataset_name),
    "folders": Import(description="IMAGES and MASKS in any naming", find=folders.find, takes=("masks",)),
    "masks": Import(
        description="IMAGES and MASKS with one binary mask a structure", find=masks.find, takes=("masks", "order")
    ),
    "train-val": Import(description="FOLDER/{train,val}/{images,masks}; the split is kept", find=folders.find_split),
    "hdf5": Import(
        description="image and label arrays in HDF5 files", find=hdf5.find, takes=("masks", "order", "spacing_mm")
    ),
}

__all__ = [
    "IMPORTS",
    "PROFILES",
    "SOURCES",
    "Draft",
    "Import",
    "Make",
    "Profile",
    "Request",
    "Source",
    "VesselSettings",
]
