"""The HTML page of `embodied label audit`: a verdict per label set, and what it rests on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied import report_figures
from embodied.label_audit import interval_text
from embodied.report import Page, figure, paragraph, table

LEAD = "Before anyone trains on these labels: do they rise where the task is done, and tell success from failure?"


def write_page(path: Path, result: dict[str, Any], scores: Mapping[str, np.ndarray], episodes: Any) -> None:
    """Write the page.

    Args:
        result: what `label audit` returns.
        scores: label -> (F,) score per frame.
        episodes: `label_checks.Episodes` that were looked at.
    """
    page = Page(f"Labels of {Path(result['store']).name}", LEAD)
    labels = result["labels"]
    for name, checks in labels.items():
        page.tile(checks["verdict"], f"label set '{name}': {checks['reasons'][0]}")
    page.section(
        "Verdicts",
        table(["label", "verdict", "reasons"], [[n, c["verdict"], "; ".join(c["reasons"])] for n, c in labels.items()]),
    )
    page.section(
        "Scores over an episode",
        paragraph("A thin line per episode (at most 40 of each outcome), a thick one for the median."),
        figure(report_figures.scores_by_outcome(scores, episodes.rows(), episodes.success)),
    )
    page.section("Success and failure", *_separation(labels))
    if known := {name: checks["progress"] for name, checks in labels.items() if checks["progress"]}:
        page.section("True progress", figure(report_figures.correlations(known)))
    page.section("Values", _values(labels))
    if result["agreement"]:
        rows = [
            [*pair["labels"], f"{pair['pooled']:.2f}", "-" if pair["within"] is None else f"{pair['within']:.2f}"]
            for pair in result["agreement"]
        ]
        head = ["label", "and label", "Spearman, all frames", "mean within an episode"]
        page.section("Do they agree?", table(head, rows, numbers=(2, 3)))
    page.section(
        "Ends and signs",
        table(["label", "for the learner"], [[n, c["termination"]["reason"]] for n, c in labels.items()]),
    )
    page.write(path)


def _separation(labels: Mapping[str, Any]) -> list[str]:
    head = [
        "label",
        "AUC, final frame",
        "AUC, mean",
        "rise in success",
        "rise in failure",
        "EPIC distance to the truth",
    ]
    rows = [
        [
            name,
            interval_text(checks["final"], "auc"),
            interval_text(checks["mean"], "auc"),
            interval_text(checks["orientation"]["success"]),
            interval_text(checks["orientation"]["failure"]),
            "-" if checks["epic"] is None else f"{checks['epic']:.2f}",
        ]
        for name, checks in labels.items()
    ]
    text = (
        "AUC: the probability that a success outscores a failure; 0.5 is chance, below it the label points the wrong "
        "way. Rise: Spearman correlation of the score with the step, mean over episodes. Brackets: 95 % intervals "
        "(AUC: Newcombe's; rise: bootstrap over episodes). EPIC distance: 0 equal, 0.71 unrelated, 1 opposite."
    )
    return [paragraph(text), table(head, rows, numbers=(1, 2, 3, 4, 5))]


def _values(labels: Mapping[str, Any]) -> str:
    head = [
        "label",
        "least",
        "greatest",
        "deviation",
        "within an episode",
        "at the least",
        "at the greatest",
        "above 0",
    ]
    rows = []
    for name, checks in labels.items():
        moves = checks["spread"]
        numbers = [f"{moves[key]:.3g}" for key in ("min", "max", "std", "within")]
        rows.append([name, *numbers, *(f"{moves[key]:.0%}" for key in ("at_low", "at_high", "positive"))])
    return table(head, rows, numbers=tuple(range(1, 8)))
