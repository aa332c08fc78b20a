"""autoseg: from a folder of medical images and masks to the best segmentation model that the data allow.

Public names are imported on first use, so that `import autoseg` costs neither torch nor SimpleITK.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoseg.predictor import Prediction, Predictor, load
    from autoseg.records import AutosegError

__version__ = "0.1.0"
__all__ = ["AutosegError", "Prediction", "Predictor", "__version__", "load"]

_PLACES = {
    "AutosegError": "autoseg.records",
    "Prediction": "autoseg.predictor",
    "Predictor": "autoseg.predictor",
    "load": "autoseg.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'autoseg' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
