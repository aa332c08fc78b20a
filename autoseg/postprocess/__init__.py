"""Post-processing: steps that change a label map, and the search for those that held-out predictions prove to help."""

from autoseg.postprocess.components import Case, measure
from autoseg.postprocess.report import before_and_after, trials
from autoseg.postprocess.search import choose
from autoseg.postprocess.steps import KINDS, PostProcessing, Step, apply, apply_steps, out_of_reach

__all__ = [
    "KINDS",
    "Case",
    "PostProcessing",
    "Step",
    "apply",
    "apply_steps",
    "before_and_after",
    "choose",
    "measure",
    "out_of_reach",
    "trials",
]
