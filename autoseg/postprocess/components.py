"""What the search remembers of a case: its label maps, compressed, and a table of components.

A component here is one of a single index; those of a union of indices consist of whole ones that touch.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from autoseg.labels import Labels
from autoseg.volume import bounding_box


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """What the search remembers of one case: compressed label maps, and a table of the components of one index each."""

    truth: bytes
    prediction: bytes
    shape: tuple[int, ...]
    flat: bool
    """Whether it is a 2D image."""
    spacing_mm: tuple[float, ...]
    scored: np.ndarray
    """(R,) whether each class but the background was annotated."""
    true: np.ndarray
    """(R,) voxels of each class in the truth."""
    owner: np.ndarray
    """(n,) index of each component."""
    size: np.ndarray
    """(n,) voxels."""
    counted: np.ndarray
    """(n,) voxels that the truth does not ignore."""
    hits: np.ndarray
    """(n, values) voxels of each index in the truth."""
    edges: np.ndarray
    """(m, 2) components that touch."""

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Truth and prediction, cropped to the box that holds both."""
        return _unpack(self.truth, self.shape), _unpack(self.prediction, self.shape)


def measure(
    truth: np.ndarray,
    prediction: np.ndarray,
    labels: Labels,
    spacing_mm: Sequence[float],
    scored: Sequence[bool] | None = None,
) -> Case:
    """Take the measure of a case: label maps (Z, Y, X) of one shape, indices as of `labels`, spacing in mm (Z, Y, X).

    scored: whether each class but the background was annotated, None: all. Raises ValueError if the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    flat = truth.shape[0] == 1
    box = bounding_box((truth > 0) | (prediction > 0)).slices()
    truth, prediction = truth[box], prediction[box]
    components, count = cc3d.connected_components(prediction, connectivity=26, return_N=True)
    edges = np.array(sorted(cc3d.region_graph(components, connectivity=26)), dtype=np.int64).reshape(-1, 2) - 1
    inside = components > 0
    component = components[inside].astype(np.int64) - 1
    owner = np.zeros(count, dtype=np.int64)
    owner[component] = prediction[inside]
    values = len(labels.stored)
    joint = np.bincount(component * (values + 1) + truth[inside], minlength=count * (values + 1))
    hits = joint.reshape(count, values + 1)
    whole = np.bincount(truth.ravel(), minlength=values + 1)
    return Case(
        truth=_pack(truth),
        prediction=_pack(prediction),
        shape=truth.shape,
        flat=flat,
        spacing_mm=tuple(spacing_mm),
        scored=np.asarray((True,) * len(labels.members) if scored is None else scored, dtype=bool),
        true=np.array([whole[list(members)].sum() for members in labels.members]),
        owner=owner,
        size=hits.sum(1),
        counted=hits[:, :values].sum(1),
        hits=hits[:, :values],
        edges=edges,
    )


def _pack(labels: np.ndarray) -> bytes:
    return zlib.compress(np.ascontiguousarray(labels, dtype=np.int16).tobytes(), 1)


def _unpack(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(packed), dtype=np.int16).reshape(shape)
