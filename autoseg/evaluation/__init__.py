"""Evaluation: metrics of a case, summaries of many, and (in `plots` and `overlay`) pictures."""

from autoseg.evaluation.folders import evaluate_folders, evaluate_pairs, score_labels
from autoseg.evaluation.metrics import DEFAULT_TOLERANCE_MM, METRICS, CaseScore, Metric, score_case
from autoseg.evaluation.summary import ClassSummary, Mean, Summary, save_summary, summarise, table

__all__ = [
    "evaluate_folders",
    "evaluate_pairs",
    "score_case",
    "score_labels",
    "summarise",
    "save_summary",
    "table",
    "CaseScore",
    "ClassSummary",
    "Mean",
    "Metric",
    "Summary",
    "METRICS",
    "DEFAULT_TOLERANCE_MM",
]
