"""A comparison as files: every number in compare.json, one picture, and a page of tables around it."""

import base64
import html
import io
import shutil
from pathlib import Path
from typing import Any

from embodied.compare_read import MEASURES
from embodied.compare_text import METRICS, adastop_lines, described, interval
from embodied.config import write_result
from embodied.report_figures import COLOURS, GRID, INK, MUTED, _pyplot

MOST_PAIRS = 15  # in the picture; the tables have them all
NAME = 26  # letters of an algorithm's name in the picture
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e5e7eb; text-align: left; white-space: nowrap; }
th { color: #6b7280; font-weight: 500; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
p, li { max-width: 48rem; } .note { color: #6b7280; }
"""


def write_page(folder: Path, result: dict[str, Any]) -> None:
    """compare.json, compare.png and compare.html in `folder`, all of them or none that is new."""
    picture = draw(result)
    page = to_html(result, picture)
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder / "compare.json", result)
    for name, data in (("compare.png", picture), ("compare.html", page.encode())):
        temporary = folder / f".{name}"
        try:
            temporary.write_bytes(data)
            shutil.move(temporary, folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


# ---- the picture --------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> bytes:
    """PNG: the four aggregates with intervals, performance profiles, probabilities of improvement."""
    pyplot = _pyplot()
    with pyplot.rc_context({"text.parse_math": False}):  # a name may hold dollar signs
        return _draw(pyplot, result)


def _draw(pyplot: Any, result: dict[str, Any]) -> bytes:
    scores = result["scores"]
    names = list(scores["aggregates"])
    pairs = _pairs(scores["improvement"], result["reference"], names)
    lower = max(2.6, 0.8 + 0.34 * len(pairs)) + (0.1 * len(names) if len(names) > 4 else 0)
    upper = 0.9 + 0.34 * len(names)
    figure = pyplot.figure(figsize=(11, upper + lower + 0.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[upper, lower], hspace=0.06)
    panels = top.subplots(1, len(METRICS), sharey=True)
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        _intervals(axes, {name: scores["aggregates"][name][metric] for name in names}, names)
        axes.set_title(title + (" (lower is better)" if metric == "optimality_gap" else ""))
    left, right = bottom.subplots(1, 2, width_ratios=[3, 2] if pairs else [1, 0.01])
    _profiles(left, scores["profiles"], names)
    if pairs:
        _improvements(right, pairs)
    else:
        right.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _intervals(axes: Any, values: dict[str, dict[str, float | None]], names: list[str]) -> None:
    for row, name in enumerate(names):
        value, colour = values[name], COLOURS[row % len(COLOURS)]
        if value["low"] is not None:
            axes.barh(row, value["high"] - value["low"], 0.55, value["low"], color=colour, alpha=0.55)  # type: ignore[operator]
        axes.plot([value["estimate"]] * 2, [row - 0.275, row + 0.275], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.use_sticky_edges = False  # bars stand clear of the frame
    axes.xaxis.set_major_locator(_pyplot().MaxNLocator(4))
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)


def _profiles(axes: Any, profiles: dict[str, Any], names: list[str]) -> None:
    thresholds = profiles["thresholds"]
    lines = []
    for place, name in enumerate(names):
        colour = COLOURS[place % len(COLOURS)]
        style = "-" if place < len(COLOURS) else "--"
        lines += axes.plot(thresholds, profiles[name]["estimate"], style, color=colour)
        axes.fill_between(
            thresholds, profiles[name]["low"], profiles[name]["high"], color=colour, alpha=0.15, linewidth=0
        )
    axes.set_title("performance profiles, pointwise 95 % bands")
    axes.set(xlim=(thresholds[0], thresholds[-1]), ylim=(-0.02, 1.02))
    axes.set_xlabel("score τ")
    axes.set_ylabel("share of runs above τ")
    labels, small = [_short(name) for name in names], {"fontsize": 8}
    if len(names) <= 4:
        axes.legend(lines, labels, loc="best", **small)
    else:  # below, clear of the curves
        axes.legend(lines, labels, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2, borderaxespad=0, **small)


def _improvements(axes: Any, pairs: dict[str, dict[str, float | None]]) -> None:
    for row, value in enumerate(pairs.values()):
        if value["low"] is not None:
            axes.barh(row, value["high"] - value["low"], 0.5, value["low"], color=COLOURS[4], alpha=0.45)  # type: ignore[operator]
        axes.plot([value["estimate"]] * 2, [row - 0.25, row + 0.25], color=INK, linewidth=1.6)
    axes.axvline(0.5, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_yticks(range(len(pairs)), ["\n> ".join(map(_short, pair.split(" > "))) for pair in pairs], color=INK)
    axes.tick_params(axis="y", labelsize=7.5, length=0)
    rows = max(len(pairs), 3)  # one bar alone must not fill the panel
    axes.set(xlim=(-0.02, 1.02), ylim=(rows - 0.4, -0.6))
    axes.set_title("probability of improvement")
    axes.grid(axis="y", visible=False)
    axes.spines["bottom"].set_color(GRID)


def _pairs(improvement: dict[str, Any], reference: str, names: list[str]) -> dict[str, Any]:
    """All pairs, or those with the reference where there are too many to read."""
    if len(improvement) <= MOST_PAIRS:
        return improvement
    kept = {pair: value for pair, value in improvement.items() if reference in pair.split(" > ")}
    return dict(list(kept.items())[:MOST_PAIRS])


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


# ---- the page -----------------------------------------------------------------------------------------


def to_html(result: dict[str, Any], picture: bytes) -> str:
    """One self-contained page."""
    scores = result["scores"]
    tasks = scores["tasks"]
    over = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    image = base64.b64encode(picture).decode()
    parts = [
        f"<h1>{html.escape(', '.join(scores['aggregates']))}</h1>",
        f"<p>Over {over}; {html.escape(described(scores))}; 95 % percentile intervals of a stratified bootstrap over "
        f"runs{' and tasks' if scores['resample_tasks'] else ''}.</p>",
        f'<img alt="aggregates, profiles and probabilities of improvement" src="data:image/png;base64,{image}">',
        "<h2>Aggregates</h2>",
        _table(
            ["algorithm", *METRICS.values()],
            [[name, *(interval(values[m]) for m in METRICS)] for name, values in scores["aggregates"].items()],
        ),
    ]
    if scores["improvement"]:
        rows = [[pair, interval(value)] for pair, value in scores["improvement"].items()]
        parts += ["<h2>Probability of improvement</h2>", _table(["pair", "probability"], rows)]
    parts += [f"<h2>Mean ± standard deviation over runs (ddof {scores['ddof']})</h2>", _task_table(scores)]
    if key := result.get("measure"):
        word = MEASURES[key]
        rows = [[name, interval(value)] for name, value in result[key].items()]
        parts += [f"<h2>{word.capitalize()}, 95 % intervals</h2>", _table(["policy", word], rows)]
        rows = [[f"{result['reference']} − {name}", interval(v["difference"])] for name, v in result["against"].items()]
        parts += ["<h2>Paired differences on the same initial states</h2>", _table(["pair", "difference"], rows)]
    if scores.get("runs_needed"):
        rows = [[name, "unknown" if n is None else str(n)] for name, n in scores["runs_needed"].items()]
        parts += [
            f"<h2>Runs per task for an IQM to ± {scores['precision']:g}</h2>",
            _table(["algorithm", "runs"], rows),
        ]
    if result.get("adastop"):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in adastop_lines(result["adastop"]))
        parts += ["<h2>Sequential test</h2>", f"<ul>{lines}</ul>"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in scores["notes"]]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _task_table(scores: dict[str, Any]) -> str:
    """A row per task, a column per algorithm; of curves the last and the best beside each other."""
    names = list(scores["table"])
    tasks = list(dict.fromkeys(task for rows in scores["table"].values() for task in rows))
    best = scores.get("best", {})
    unit = "" if scores["table_unit"] == "score" else f" [{scores['table_unit']}]"
    head = [f"task{unit}"]
    for name in names:
        head += [f"{name}, {scores['at']}", f"{name}, best of each run"] if best else [name]
    rows = []
    for task in tasks:
        cells = [task or "–"]
        for name in names:
            cells.append(_cell(scores["table"][name].get(task)))
            if best:
                cells.append(_cell(best.get(name, {}).get(task)))
        rows.append(cells)
    return _table(head, rows)


def _cell(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{value['printed']} ({value['runs']})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        marked = [(' class="number"' if place and tag == "td" else "", html.escape(c)) for place, c in enumerate(cells)]
        return "<tr>" + "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in marked) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(head, "th")}{body}</table></div>'
