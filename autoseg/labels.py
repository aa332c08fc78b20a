"""Labels: what the integers of a label file mean, and the only place that knows.

Files may hold any integers. Inside, labels are indices 0 (background), 1, 2, ... in the order of `names`;
predictions are written back with the original values. `UNSEEN` marks voxels outside the image content.
Arrays may be numpy arrays or torch tensors: only methods that both share are used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoseg.records import AutosegError, record

UNSEEN = -1


@record
class Labels:
    """Class names and the integer that each has in the files; position 0 is the background.

    `names` and `values` run in parallel. Regions (several values a name) and an ignore label are refused.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or len(self.names) < 2:
            raise ValueError("labels need a background and at least one class, each with one value")
        if len(set(self.values)) != len(self.values) or len(set(self.names)) != len(self.names):
            raise ValueError(f"label names and values must each be unique, got {dict(zip(self.names, self.values))}")

    @classmethod
    def from_dataset(cls, labels: Mapping[str, Any]) -> "Labels":
        """Read the `labels` entry of dataset.json: name -> integer; the background comes first whatever its place.

        Raises AutosegError for regions, an ignore label, a missing background or a value that is no integer.
        """
        if "ignore" in labels:
            raise AutosegError(
                "dataset.json has an ignore label, which this version does not support yet; "
                "remove it from `labels` and map its voxels to a class"
            )
        plain: dict[str, int] = {}
        for name, value in labels.items():
            if isinstance(value, list | tuple):
                raise AutosegError(
                    f"dataset.json: label {name!r} is a region ({value}); regions are not supported yet: "
                    "give each class one value of its own"
                )
            if not isinstance(value, int) or isinstance(value, bool):
                raise AutosegError(f"dataset.json: label {name!r} must be an integer, found {value!r}")
            plain[name] = value
        if "background" not in plain:
            raise AutosegError('dataset.json: `labels` must name the background, for example {"background": 0, ...}')
        names = ("background", *(name for name in plain if name != "background"))
        try:
            return cls(names=names, values=tuple(plain[name] for name in names))
        except ValueError as error:
            raise AutosegError(f"dataset.json: {error}") from None

    @property
    def count(self) -> int:
        """Number of classes, background included."""
        return len(self.names)

    @property
    def heads(self) -> int:
        """Number of output channels that a network needs."""
        return len(self.names)

    @property
    def foreground(self) -> Sequence[int]:
        """Indices of the foreground classes."""
        return range(1, len(self.names))

    def unexpected(self, found: np.ndarray) -> list[int]:
        """Values of `found` (any shape, as stored in a file) that no class has."""
        return sorted(set(np.unique(found).tolist()) - set(self.values))

    def to_indices(self, stored: np.ndarray) -> np.ndarray:
        """Stored values -> int16 class indices, same shape. Raises ValueError for values that no class has."""
        values = np.asarray(self.values)
        order = np.argsort(values)
        place = np.searchsorted(values, stored, sorter=order).clip(0, len(values) - 1)
        indices = order[place].astype(np.int16)
        if not np.array_equal(values[indices], stored):
            raise ValueError(f"unexpected label values {self.unexpected(stored)}; expected {sorted(self.values)}")
        return indices

    def to_values(self, indices: np.ndarray) -> np.ndarray:
        """Class indices -> stored values, same shape, in the smallest of uint8, int16 and int32 that holds them all."""
        kind = next(
            kind
            for kind in (np.uint8, np.int16, np.int32)
            if all(np.iinfo(kind).min <= value <= np.iinfo(kind).max for value in self.values)
        )
        return np.asarray(self.values, dtype=kind)[indices]

    def decode(self, logits: Any) -> Any:
        """Logits (heads, ...) -> class indices (...), for numpy arrays and torch tensors alike."""
        return logits.argmax(0)

    def probabilities(self, logits: Any) -> Any:
        """Logits (heads, ...) -> probabilities of the same shape: softmax, since the classes exclude each other."""
        if isinstance(logits, np.ndarray):
            weights = np.exp(logits - logits.max(0))
            return weights / weights.sum(0)
        return logits.softmax(0)
