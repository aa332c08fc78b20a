"""How a dataset is trained, decided from its fingerprint alone: spacing, network, patch, batch, cascade.

Planning is arithmetic on a few numbers: no torch, no files, the same answer everywhere. A preset is a `Rules` value;
a preset of your own is `dataclasses.replace(PLANNERS["resenc_l"], name="mine", ...)`.
"""

from autoseg.planners.context import refuse_even, with_context
from autoseg.planners.default import plan, refuse_memory
from autoseg.planners.edits import added, difference, edited, keep_edits, overruled, stamped
from autoseg.planners.explain import explain
from autoseg.planners.like import plan_like
from autoseg.planners.prepared import as_prepared, thinning, with_preparation
from autoseg.planners.request import asks, joined, kept, refuse_other_network, request_of, words
from autoseg.planners.rules import PLANNERS, Budget, Rules
from autoseg.planners.sides import says_sides

__all__ = [
    "PLANNERS",
    "Budget",
    "Rules",
    "added",
    "as_prepared",
    "asks",
    "difference",
    "edited",
    "explain",
    "joined",
    "keep_edits",
    "kept",
    "overruled",
    "plan",
    "plan_like",
    "refuse_even",
    "refuse_memory",
    "refuse_other_network",
    "request_of",
    "says_sides",
    "stamped",
    "thinning",
    "with_context",
    "with_preparation",
    "words",
]
