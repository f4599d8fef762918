"""The report's figures as SVG text. Each function draws what it is given and computes nothing but layout."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import MissingExtraError

COLOURS = ("#2563eb", "#059669", "#d97706", "#7c3aed", "#64748b", "#db2777", "#0891b2")
INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
WIDTH = 9.2  # of every figure [inch]; the page scales it


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "the report") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # the page's own font, and text that can be searched
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GRID,
            "axes.labelcolor": MUTED,
            "axes.titlesize": 9.5,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )
    return pyplot


def _svg(figure: Any) -> str:
    """The figure as SVG that scales with the page; element ids are made unique to it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = text.replace("'DejaVu Sans'", "inherit").replace("DejaVu Sans", "inherit")
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}_"  # several figures stand in one page
    text = re.sub(r'id="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def label_over_episode(frames: np.ndarray, scores: Mapping[str, np.ndarray], control_dt: float, title: str) -> str:
    """A film strip above the scores of the same episode.

    Args:
        frames: (K, H, W, 3) uint8 pictures, evenly spaced from the first step to the last.
        scores: name -> (n,) score per frame; each is drawn on its own scale, from its least to its greatest value.
        control_dt: seconds per step.
    """
    pyplot = _pyplot()
    length = len(next(iter(scores.values())))
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(WIDTH, 3.0), height_ratios=[1, 2], sharex=True, gridspec_kw={"hspace": 0.04}
    )
    at = np.linspace(0, length - 1, len(frames))
    span = (length - 1) / max(1, len(frames) - 1)
    for picture, step in zip(frames, at, strict=True):
        top.imshow(
            picture, extent=(step - span / 2 * 0.94, step + span / 2 * 0.94, 0, 1), aspect="auto", interpolation="none"
        )
    top.set(ylim=(0, 1), yticks=[])
    top.axis("off")
    for index, (name, score) in enumerate(scores.items()):
        low, high = float(score.min()), float(score.max())
        scaled = (score - low) / (high - low if high > low else 1.0)
        style = {"color": COLOURS[index], "linestyle": "-" if index == 0 else "--"}
        bottom.plot(np.arange(length), scaled, label=f"{name} ({low:.2f} to {high:.2f})", **style)
    for step in at:
        bottom.axvline(step, color=GRID, linewidth=0.8, zorder=0)
    bottom.set(xlim=(at[0] - span / 2, at[-1] + span / 2), ylim=(-0.05, 1.12), yticks=[0, 1])
    bottom.set_yticklabels(["least", "greatest"])
    ticks = np.arange(0, length, max(1, round(1.0 / control_dt) if control_dt else 10))
    bottom.set_xticks(ticks, [f"{step * control_dt:g}" if control_dt else str(step) for step in ticks])
    bottom.set_xlabel("time in the episode [s]" if control_dt else "step")
    bottom.grid(axis="x", visible=False)
    bottom.legend(loc="upper left", ncols=len(scores), fontsize=8.5)
    top.set_title(title)
    return _svg(figure)


def correlations(audits: Mapping[str, Mapping[str, Any]], wanted: float = 0.7) -> str:
    """One row per label set: a dot per episode, the mean with its interval, and the line that is asked for."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.7 + 0.62 * len(audits)))
    rng = np.random.default_rng(0)  # vertical jitter only
    left = min([0.0, *(v for audit in audits.values() for v in audit["per_episode"] if v is not None)]) - 0.05
    for row, (name, audit) in enumerate(audits.items()):
        values = np.array([value for value in audit["per_episode"] if value is not None])
        colour = COLOURS[row % len(COLOURS)]
        axes.scatter(values, row + rng.uniform(-0.17, 0.17, len(values)), s=16, color=colour, alpha=0.35, linewidths=0)
        axes.plot(
            [audit["low"], audit["high"]], [row, row], color=colour, linewidth=5, alpha=0.9, solid_capstyle="round"
        )
        axes.plot(audit["mean"], row, "o", color="white", markersize=4)
        axes.text(1.04, row, f"mean {audit['mean']:.2f}", va="center", fontsize=9, color=colour)
        axes.text(left - 0.02, row, name, va="center", ha="right", fontsize=9.5)
    axes.axvline(wanted, color=INK, linewidth=0.9, linestyle=":")
    axes.text(wanted, -0.62, f"{wanted:g}", ha="center", fontsize=8.5, color=MUTED)
    axes.set(xlim=(left, 1.02), ylim=(len(audits) - 0.45, -0.55), yticks=[])
    axes.set_xlabel("Spearman correlation with true progress, one dot per episode")
    axes.spines["left"].set_visible(False)
    return _svg(figure)


def scores_by_outcome(
    scores: Mapping[str, np.ndarray], rows: Sequence[np.ndarray], success: np.ndarray, points: int = 50
) -> str:
    """One panel per label set: every episode's score over its own duration, thin, and the median of each outcome.

    Args:
        scores: name -> (F,) score per frame.
        rows: frame indices of each episode.
        success: (E,) 1, 0 or -1 for unknown.
    """
    pyplot = _pyplot()
    columns = min(2, len(scores))
    height = -(-len(scores) // columns)
    figure, panels = pyplot.subplots(height, columns, figsize=(WIDTH, 2.6 * height), squeeze=False)
    share = np.linspace(0, 1, points)
    for axes, (name, score) in zip(panels.flat, scores.items(), strict=False):
        for outcome, word, colour in (
            (-1, "outcome unknown", COLOURS[4]),
            (0, "failure", COLOURS[2]),
            (1, "success", COLOURS[1]),
        ):
            chosen = [row for row, was in zip(rows, success, strict=True) if was == outcome]
            if not chosen:
                continue
            curves = np.stack([np.interp(share, np.linspace(0, 1, len(row)), score[row]) for row in chosen])
            for curve in curves[:40]:
                axes.plot(share, curve, color=colour, linewidth=0.6, alpha=0.25)
            axes.plot(share, np.median(curves, 0), color=colour, linewidth=2.4, label=f"{word} ({len(chosen)})")
        axes.set_title(name)
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        axes.set_xticklabels(["start", "middle", "end"])
        axes.set_ylabel("score")
        axes.legend(loc="best", fontsize=8)
    for axes in list(panels.flat)[len(scores) :]:
        axes.axis("off")
    figure.tight_layout()
    return _svg(figure)


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Mapping[str, Sequence[str]]) -> str:
    """One panel per run and metric; a thin line per seed, a thick one for their mean.

    Args:
        runs: name -> lines of metrics.jsonl; a value is a number or a list with one per seed.
        metrics: name -> which of them to draw.
    """
    pyplot = _pyplot()
    panels = [(run, metric) for run in runs for metric in metrics[run]]
    columns = min(4, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(WIDTH, 1.9 * rows), squeeze=False)
    for axes, (run, metric) in zip(grid.flat, panels, strict=False):
        steps = [line["step"] for line in runs[run] if metric in line]
        values = np.array([np.atleast_1d(line[metric]) for line in runs[run] if metric in line])  # (T, S)
        colour = COLOURS[list(runs).index(run) % len(COLOURS)]
        if values.shape[1] > 1:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, values.mean(1), color=colour)
        axes.set_title(f"{run}: {metric.replace('_', ' ')}")
        axes.tick_params(labelsize=7.5)
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.tight_layout()
    return _svg(figure)


def success(policies: Mapping[str, Mapping[str, Any]], wire: Mapping[str, Any] | None = None) -> str:
    """One row per policy: a dot per training seed, the success over all with its 95 % interval; the wire last."""
    pyplot = _pyplot()
    rows = [(name, p["success"], [s["interval"]["estimate"] for s in p["seeds"]]) for name, p in policies.items()]
    if wire:
        rows.append(("over ROS 2 topics", wire, []))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.6 + 0.48 * len(rows)))
    for row, (name, interval, seeds) in enumerate(rows):
        colour = COLOURS[row % len(COLOURS)]
        axes.plot([interval["low"], interval["high"]], [row, row], color=colour, linewidth=6, solid_capstyle="round")
        axes.plot(interval["estimate"], row, "o", color="white", markersize=5)
        if len(seeds) > 1:
            axes.plot(seeds, np.full(len(seeds), row + 0.27), "|", color=colour, markersize=6, alpha=0.8)
        axes.text(-0.02, row, name, va="center", ha="right", fontsize=9.5)
        text = f"{100 * interval['estimate']:.0f} %  [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"
        axes.text(1.03, row, text, va="center", fontsize=9, color=colour)
    axes.set(xlim=(0, 1.01), ylim=(len(rows) - 0.4, -0.6), yticks=[])
    axes.set_xticks(np.linspace(0, 1, 6), [f"{100 * x:.0f} %" for x in np.linspace(0, 1, 6)])
    axes.spines["left"].set_visible(False)
    return _svg(figure)


def latencies(samples: Mapping[str, Sequence[float]]) -> str:
    """One histogram per measured span [ms], with its median and 99th percentile marked."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, len(samples), figsize=(WIDTH, 2.1), squeeze=False)
    for index, (axes, (name, values)) in enumerate(zip(grid[0], samples.items(), strict=True)):
        array = np.asarray(values, np.float64)
        median, slow = np.quantile(array, [0.5, 0.99])
        axes.hist(np.minimum(array, slow * 1.3), bins=40, color=COLOURS[index % len(COLOURS)], alpha=0.85)
        for value, text in ((median, "median"), (slow, "99 %")):
            axes.axvline(value, color=INK, linewidth=0.9, linestyle=":")
            axes.text(value, axes.get_ylim()[1] * 1.01, f"{text} {value:.1f}", fontsize=8, ha="center", color=MUTED)
        axes.set_title(name.replace("_", " "), pad=16)
        axes.set_xlabel("[ms]")
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return _svg(figure)


def calibration(bins: Sequence[Sequence[float]]) -> str:
    """Confidence against accuracy, one dot per bin, its area the number of pairs.

    Args:
        bins: [confidence, accuracy, count] of each.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 2.8))
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.9, linestyle=":")
    confidence, accuracy, count = np.array(bins, float).T
    axes.plot(confidence, accuracy, color=COLOURS[0], linewidth=1.0, alpha=0.5)
    axes.scatter(confidence, accuracy, s=20 + 160 * count / count.max(), color=COLOURS[0], alpha=0.8, linewidths=0)
    for x, y, n in zip(confidence, accuracy, count, strict=True):
        axes.annotate(f"{n:.0f}", (x, y), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=7.5)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.1))
    axes.set_xlabel("how sure the model is")
    axes.set_ylabel("how often it is right")
    return _svg(figure)


def accuracy_by_difficulty(bins: Sequence[Mapping[str, Any]], intervals: Sequence[tuple[float, float]]) -> str:
    """One bar per bin of the true difference, the hardest first, with its interval.

    Args:
        bins: `low`, `high`, `correct`, `decided` of each.
        intervals: of correct / decided.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 2.4))
    for place, (part, (low, high)) in enumerate(zip(bins, intervals, strict=True)):
        share = part["correct"] / max(part["decided"], 1)
        axes.bar(place, share, width=0.62, color=COLOURS[0], alpha=0.85)
        axes.plot([place, place], [low, high], color=INK, linewidth=1.4)
    axes.axhline(0.5, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_xticks(range(len(bins)), [f"up to {part['high']:.2g}" for part in bins])
    axes.set(ylim=(0, 1.05))
    axes.set_xlabel("true difference between the two segments, the hardest first")
    axes.set_ylabel("right, of decided pairs")
    axes.grid(axis="x", visible=False)
    return _svg(figure)


def pairs_of_pictures(pairs: Sequence[tuple[np.ndarray, np.ndarray]], captions: Sequence[str], columns: int = 4) -> str:
    """A grid of pairs: the first picture, the second, and a caption above.

    Args:
        pairs: (H, W, 3) uint8 each.
    """
    pyplot = _pyplot()
    rows = -(-len(pairs) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(WIDTH, 1.62 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (first, second), caption in zip(grid.flat, pairs, captions, strict=False):
        gap = np.full((first.shape[0], max(2, first.shape[1] // 16), 3), 255, np.uint8)
        axes.imshow(np.concatenate([first, gap, second], 1), interpolation="none")
        axes.set_title(caption, fontsize=8)
    figure.tight_layout(pad=0.4)
    return _svg(figure)
