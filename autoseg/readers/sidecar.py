"""Voxel sizes of formats that have none: a file `<case>.json` beside the image, {"spacing": [z, y, x]} in millimetres.

Of a 2D image the two numbers are [y, x]. The file may be named with the channel number or without; one without serves
all channels. Pictures often have a JSON file of some other program beside them, so for them one without the entry
`spacing` is passed over; beside a TIFF it is an error, since a misspelt entry would silently give 1 mm.
"""

import json
import math
import re
from pathlib import Path

from autoseg.records import AutosegError
from autoseg.volume import Grid


def find(path: Path, strict: bool) -> Path | None:
    """The JSON file with the spacing of `path`; None if there is none.

    strict: whether every JSON file of that name is meant to be one, else only those with the entry `spacing`.
    """
    candidates = (path.with_suffix(".json"), path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json"))
    return next((file for file in candidates if file.is_file() and (strict or says_spacing(file))), None)


def says_spacing(file: Path) -> bool:
    """Whether a JSON file has the entry `spacing`, right or wrong."""
    return b'"spacing"' in file.read_bytes()


def read(path: Path, strict: bool) -> tuple[float, ...] | None:
    """Spacing (Z, Y, X) or (Y, X) in mm from the file beside `path`, None without one; AutosegError if it is wrong."""
    beside = find(path, strict)
    if beside is None:
        return None
    try:
        spacing = [abs(float(s)) for s in json.loads(beside.read_text())["spacing"]]
    except (ValueError, TypeError, KeyError):
        spacing = []
    if len(spacing) not in (2, 3) or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise AutosegError(f'{beside} must hold {{"spacing": [z, y, x]}} with positive numbers in mm, or [y, x]')
    return tuple(spacing)


def stage(temporary: Path, path: Path, grid: Grid, strict: bool) -> None:
    """Put beside `temporary`, which will move to `path`, what reading `path` needs to get the spacing of `grid` back.

    Nothing where the files there say it already, nor for 2D images of 1 mm, which is what is taken without a word.
    Raises AutosegError if the file of another program is in the way.
    """
    spacing = grid.spacing_mm[3 - grid.dimension :]
    file = path.with_suffix(".json")
    try:
        there = read(path, strict)
    except AutosegError:
        there = ()
    if there == spacing or (there is None and spacing == (1.0, 1.0)):
        return
    if file.is_file() and not says_spacing(file):
        raise AutosegError(
            f"the spacing of {path.name} belongs into {file}, and that file is another program's; move it away, or "
            "write to another folder"
        )
    temporary.with_suffix(".json").write_text(json.dumps({"spacing": spacing}) + "\n")
