"""`autoseg.load`: a trained model as a Python object, for notebooks and servers.

It goes through the functions of `autoseg predict` and gives the same labels. No process is started, no file written, no
global state changed, no random number drawn: what is loaded is read only, so threads may share it. Calls of several
threads run side by side, each with memory of its own, and share the threads of torch.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from autoseg.devices import choose_device
from autoseg.ensemble import Chosen, Ensemble, chosen_at
from autoseg.model import Model, Trained, channels_wanted, other_dimension
from autoseg.postprocess import PostProcessing, out_of_reach
from autoseg.raw import refuse_not_finite
from autoseg.readers import Stored, expected_in_file, join, read_stored
from autoseg.readers.itk import stored_of
from autoseg.records import AutosegError
from autoseg.schema import Plan
from autoseg.volume import Grid, canonical_grid, from_canonical


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """What a model says of one image, on the image's own axes: (Z, Y, X), or (Y, X) of a 2D image."""

    labels: np.ndarray
    """Integers, with the values of the label files that the model was trained on."""
    probabilities: np.ndarray | None
    """float32 (classes, Z, Y, X), the background first, if they were asked for; before post-processing."""
    grid: Grid
    """Shape, spacing, origin and direction of the image; a 2D image has Z = 1 there."""
    seconds: dict[str, float]
    """What reading, preparing, computing and restoring took."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictor:
    """A loaded model; made by `load`."""

    trained: Trained | Chosen
    """Its plan, configuration, folds and cross-validated scores."""
    model: Model | Ensemble
    rule: PostProcessing | None
    """The post-processing that belongs to these weights."""

    @property
    def labels(self) -> dict[str, int]:
        """Class -> its value in the predicted labels."""
        return dict(zip(self.model.plan.labels.names, self.model.plan.labels.values))

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that an image must have, in their order."""
        return self.model.plan.sources

    def predict(
        self,
        image: Any,
        *,
        spacing: Sequence[float] | None = None,
        probabilities: bool = False,
        mirror: bool = True,
        step: float = 0.5,
        postprocess: bool = True,
    ) -> Prediction:
        """Segment one image.

        image: the path of a file, or a list of paths, one a channel; a SimpleITK image, or a list of them; or a numpy
        array (Z, Y, X) or (C, Z, Y, X) with `spacing` in mm, in the order of its spatial axes. For a model of 2D
        images the arrays are (Y, X) or (C, Y, X). An array has no orientation: its axes are taken to run to the
        patient's superior, posterior and left side, in this order.
        mirror: average over mirror images too; step: distance of tiles as a share of the patch.

        Raises AutosegError for an image that cannot be read or does not fit the model.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"):
            parts, names = _decoded(image, spacing, self.model.plan)
            volume, stored = join(parts, names, len(self.channels), channels_wanted(self.model.plan))
            refuse_not_finite(volume, self.channels)
            if odd := other_dimension(stored, self.model.plan, self.model.configurations):
                warnings.warn(f"{names[0].name} {odd}", stacklevel=2)
        with _timed(seconds, "prepare"):
            case: Any = self.model.prepare("image", volume, stored)
        with _timed(seconds, "compute"):
            logits: Any = self.model.logits(case, step=step, mirror=mirror)
        with _timed(seconds, "restore"):
            rule, grid = self.rule if postprocess else None, canonical_grid(stored)
            for left_out in out_of_reach(rule.steps if rule else (), grid.spacing_mm, grid.shape[0] == 1):
                done = left_out.describe(self.model.plan.labels)
                warnings.warn(f"{done} is left out: the voxels of the image are too fine for that", stacklevel=2)
            labels = self.model.labels(logits, case.trace, rule)
            maps = None
            if probabilities:
                maps = _back(self.model.probabilities(logits, case.trace), stored)
            return Prediction(labels=_back(labels, stored), probabilities=maps, grid=stored, seconds=seconds)


def load(path: str | Path, *, device: str = "auto", folds: Sequence[int | str] = ()) -> Predictor:
    """Load a model file, the folder of a configuration or of a fold, or of a run: what `find_best` chose in it.

    folds: those to use, for example (0, 1); by default all that were cross-validated. device: auto, cuda, cuda:1, mps
    or cpu. Raises AutosegError that says what is wrong with the file or folder.
    """
    trained = chosen_at(Path(path).expanduser(), [str(fold) for fold in folds])
    rule, _ = trained.postprocessing()
    return Predictor(trained=trained, model=trained.open(choose_device(device)), rule=rule)


def _decoded(image: Any, spacing: Sequence[float] | None, plan: Plan) -> tuple[list[Stored], list[Path]]:
    """The parts of one case, and what errors call them."""
    if isinstance(image, np.ndarray):
        return [_of_array(image, spacing, plan)], [Path("array")]
    if spacing is not None:
        raise AutosegError("`spacing` goes with arrays; files and SimpleITK images have their own")
    parts = [image] if isinstance(image, str | Path | sitk.Image) else list(image)
    names = [Path(part) if isinstance(part, str | Path) else Path(f"channel_{n}") for n, part in enumerate(parts)]
    expected = expected_in_file(len(parts), len(plan.sources))
    decoded = []
    for part, name in zip(parts, names):
        if isinstance(part, str | Path):
            decoded.append(read_stored(name, channels=expected, cure=channels_wanted(plan)))
        elif isinstance(part, sitk.Image):
            decoded.append(stored_of(part, name))
        else:
            raise AutosegError(
                f"an image is a path, a SimpleITK image, a list of either, or a numpy array, not {type(part).__name__}"
            )
    if not decoded:
        raise AutosegError("there is no image: the list is empty")
    return decoded, names


def _of_array(array: np.ndarray, spacing: Sequence[float] | None, plan: Plan) -> Stored:
    axes, channels = plan.dimension, len(plan.sources)
    form = "(Z, Y, X)" if axes == 3 else "(Y, X)"
    if spacing is None or len(spacing) != axes or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise AutosegError(f"an array needs its `spacing` {form}, {axes} lengths in mm, not {spacing}")
    if array.dtype.kind not in "iufb":
        raise AutosegError(f"an array of {array.dtype} is no image; give numbers")
    if array.ndim == axes and channels == 1:
        array = array[None]
    if array.ndim != axes + 1 or len(array) != channels or not array.size:
        raise AutosegError(
            f"the model reads arrays {form.replace('(', '(C, ')} of {channels} channels "
            f"({', '.join(plan.sources)}), not of shape {array.shape}"
        )
    array = array.reshape(channels, *(1,) * (3 - axes), *array.shape[1:])
    z, y, x = (*(1.0,) * (3 - axes), *(float(s) for s in spacing))
    return Stored(array=array, grid=Grid(shape=array.shape[1:], spacing_mm=(z, y, x), dimension=axes))


def _back(array: np.ndarray, stored: Grid) -> np.ndarray:
    """Array (..., Z, Y, X) on the canonical grid -> on the image's own axes, without Z for 2D images."""
    own: np.ndarray = from_canonical(array, stored)
    return own[..., 0, :, :] if stored.dimension == 2 else own


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started
