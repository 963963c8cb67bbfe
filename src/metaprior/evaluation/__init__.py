"""Accuracy and calibration of a learner on new tasks: the report, calibration, rejection and plots."""

from metaprior.evaluation.figures import Figure, figure_of, title_of
from metaprior.evaluation.protocol import LEVELS, TASKS, Units, evaluate, integral_transform, score, summarise
from metaprior.evaluation.report import Report

__all__ = [
    "LEVELS", "TASKS", "Figure", "Report", "Units", "evaluate", "figure_of", "integral_transform", "score", "summarise",
    "title_of",
]  # fmt: skip
