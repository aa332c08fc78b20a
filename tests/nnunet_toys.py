"""The models that nnU-Net made of synthetic cases (tests/data/nnunet/README.md), and ways to alter them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoseg.interop.nnunet_weights import NUMPY_TYPES

DATA = Path(__file__).parent / "data" / "nnunet"
IMAGE = [DATA / "toy_0000.nii.gz", DATA / "toy_0001.nii.gz"]
CASCADE, RESIDUAL, REGIONS = (
    DATA / f"{name}.zip" for name in ("Dataset001_Cascade", "Dataset002_Residual", "Dataset003_Regions")
)
LOWRES, FULLRES = "nnUNetTrainer__nnUNetPlans__3d_lowres", "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"


def unpacked(toy: Path, folder: Path) -> Path:
    """The results folder of a toy, below `folder`."""
    with zipfile.ZipFile(toy) as archive:
        archive.extractall(folder)
    return folder / toy.stem


def model_in(results: Path) -> Path:
    """The only model folder of a results folder."""
    (model,) = results.glob("*__*__*")
    return model


def zipped(folder: Path, target: Path) -> Path:
    """A zip of everything below `folder`."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return target


def altered(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in its place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint of the toys."""
    with torch.serialization.safe_globals(NUMPY_TYPES):
        return torch.load(path, weights_only=True)


def altered_checkpoint(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint in its place."""
    content = checkpoint(path)
    change(content)
    torch.save(content, path)


def agreement(labels: np.ndarray, other: np.ndarray) -> tuple[float, dict[int, float]]:
    """Share of equal voxels, and the Dice of each value that `other` has in more than 1000 voxels."""
    assert labels.shape == other.shape
    large = [int(value) for value in np.unique(other) if value and (other == value).sum() > 1000]
    dice = {
        value: float(
            2 * ((labels == value) & (other == value)).sum() / ((labels == value).sum() + (other == value).sum())
        )
        for value in large
    }
    return float((labels == other).mean()), dice
