"""The edge of reach as files: every number in reach.json, one picture, and a page that explains it."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from embodied.config import write_result
from embodied.report import Page, figure, paragraph, table
from embodied.report_figures import COLOURS, INK, MUTED, _pyplot

INSIDE, EDGE, DATA = COLOURS[0], COLOURS[5], "#cbd5e1"
POINTS = 3000  # of a kind in the map
LEAD = (
    "A value is learned at states that rollouts pass through, and asked for at the states that they lead to. What only "
    "the last step of a rollout leads to is asked for and never learned. Is that the case here, and does it mislead?"
)
PANELS = (
    (
        "Where rollouts end",
        "Recorded states (grey), states that rollouts pass through (blue) and last states that nothing trained is near "
        "(pink), along the two directions in which the data vary most. Pink away from grey: rollouts leave the data.",
    ),
    (
        "Distance to the data",
        "How far a rollout is from the nearest recorded state after each step, in units of the data's spread: the line "
        "is the median, the band holds 80 % of the rollouts.",
    ),
    (
        "Bootstrap targets that are never trained",
        "Share of the states reached with a step that nothing trained is near, were rollouts cut there; the dark bar "
        "is where they are cut. The dotted line is what trained states show themselves. States before the cut "
        "are passed through and trained.",
    ),
    (
        "Do the critics tell the edge apart?",
        "How much the critics disagree at states that are passed through, and at never trained targets. Where the two "
        "lie apart, the least of the critics falls at the edge; where they do not, its values are taken at their word.",
    ),
    (
        "What is believed farther out",
        "Targets of the last step by their distance to the data: the value they are given (line) and the share of them "
        "that is never trained (bars). A line that climbs with the bars draws the policy out.",
    ),
    (
        "Values against true rollouts",
        "Each dot is a state: what the critics promise there against what one true rollout of the policy returns. On "
        "the line they agree; above it they promise too much.",
    ),
)


def write_page(folder: Path, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    """reach.json, reach.png and reach.html in `folder`.

    Args:
        result: of `diagnose reach`. arrays: of `reach.examine`, and `truth`, place -> (said, returned).
        recorded: (F, D) states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder / "reach.json", result)
    picture = draw(result, arrays, recorded)
    temporary = folder / ".reach.png"
    temporary.write_bytes(picture)
    temporary.replace(folder / "reach.png")
    to_page(result, picture).write(folder / "reach.html")


def to_page(result: dict[str, Any], picture: bytes) -> Page:
    page = Page(f"The edge of reach of {Path(result['bundle']).name}", LEAD)
    page.tile(result["verdict"], result["summary"])
    last = result["steps"][-1]
    page.tile(f"{100 * last['untrained']:.0f} %", "of the states that last steps lead to are near nothing trained")
    if truth := result.get("truth"):
        place, worst = max(truth.items(), key=lambda item: item[1]["over"])
        text = f"over-estimation {place} [{worst['low']:.3g}, {worst['high']:.3g}], true returns {worst['true']:.3g}"
        page.tile(f"{worst['over']:+.3g}", text)
    rows = [[check["name"], check["word"], check["text"]] for check in result["checks"]]
    page.section("Verdict", _wide(table(["what", "verdict", "why"], rows)))
    image = base64.b64encode(picture).decode()
    about = "six plots, explained below"
    explained = "".join(
        f"<dt><b>{letter}&ensp;{html.escape(name)}</b></dt><dd>{html.escape(text)}</dd>"
        for letter, (name, text) in zip("abcdef", PANELS, strict=True)
    )
    page.section(
        "What was seen",
        figure(f'<img style="max-width:100%" alt="{about}" src="data:image/png;base64,{image}">'),
        f"<dl>{explained}</dl>",
    )
    page.section("Step by step", table(*_steps(result), numbers=(0, 1, 2, 3, 4, 5)))
    page.section("How it was found", *(paragraph(text) for text in _method(result)))
    return page


def _wide(text: str) -> str:
    return text.replace("<td>", '<td style="white-space:normal">')


def _steps(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["step", "still going", "distance to the data", "never trained if cut here", "value", "critics' spread"]
    rows = []
    for row in result["steps"]:
        distance = "-" if row["distance"] is None else f"{row['distance']['median']:.3f}"
        numbers = ["-" if row[name] is None else f"{row[name]:.4g}" for name in ("value", "spread")]
        share = "-" if row["step"] == 0 else f"{100 * row['untrained']:.0f} %"
        rows.append([str(row["step"]), f"{100 * row['alive']:.0f} %", distance, share, *numbers])
    return head, rows


def _method(result: dict[str, Any]) -> list[str]:
    kind = "the simulator itself" if result["true_dynamics"] else "learned dynamics"
    texts = [
        f"{result['rollouts']} rollouts of {result['rollout_steps']} steps with the trained policy "
        f"({result['learner']}) from recorded states, in {kind} ({result['dynamics']}).",
        "One half of the rollouts and the recorded states stand for what is trained; the other half is asked about. A "
        "state counts as trained if something trained is as near as it is for 99 % of the states passed through. "
        "Rollouts in training were more, and of earlier policies too: shares here are an upper estimate.",
        f"Of recorded bootstrap targets, {100 * result['recorded']['untrained']:.2f} % are the last frame of a cut "
        "episode and no step's beginning.",
        "Values are the least over the critics for an action that the policy draws.",
    ]
    if result.get("truth"):
        texts.append(
            f"True rollouts last {result['true_steps']} steps at most; what comes later would weigh under 1 %. Rewards "
            "are normalised as in training"
            + (", and the policy's entropy is counted as the values count it." if result["temperature"] else ".")
        )
    if result["penalty"]:
        texts.append(
            f"This learner's values are of rewards less {result['penalty']:g} times the dynamics' doubt; true rollouts "
            "are paid in full, so that honest values lie below them."
        )
    return texts


def draw(result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> bytes:
    """PNG of the six panels."""
    pyplot = _pyplot()
    picture, axes = pyplot.subplots(3, 2, figsize=(11.0, 12.2), gridspec_kw={"hspace": 0.42, "wspace": 0.26})
    panels = (_map, _distance, _untrained, _spread, _believed, _truth)
    for place, (axis, panel, (title, _)) in enumerate(zip(axes.flat, panels, PANELS, strict=True)):
        axis.set_title(f"{'abcdef'[place]}  {title}", pad=8, fontsize=10.5)
        panel(axis, result, arrays, recorded)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=130, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    pyplot.close(picture)
    return buffer.getvalue()


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)


def _map(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    """Two principal components of the recorded states, each number in units of its spread."""
    mean, scale = recorded.mean(0), np.maximum(recorded.std(0), 1e-6)
    scaled = (recorded - mean) / scale
    _, vectors = np.linalg.eigh(np.cov(scaled.T).reshape(scaled.shape[1], -1))
    plane = vectors[:, ::-1][:, :2] if scaled.shape[1] > 1 else np.array([[1.0, 0.0]])
    rng = np.random.default_rng(0)
    states = (arrays["states"] - mean) / scale
    groups = [
        (scaled, DATA, "recorded", 9, POINTS),
        (states[arrays["step"] < result["rollout_steps"]], INSIDE, "passed through", 4, POINTS // 2),
        (states[arrays["edge"]], EDGE, "last, never trained", 9, POINTS),
    ]
    for points, colour, name, size, most in groups:
        chosen = points[rng.permutation(len(points))[:most]] @ plane
        axis.scatter(*chosen.T, s=size, color=colour, alpha=0.6, linewidths=0, label=name, rasterized=True)
    every = np.concatenate([scaled, states]) @ plane
    low, high = np.quantile(every, [0.0005, 0.9995], axis=0)  # a few wild states must not shrink the rest to a dot
    room = 0.06 * np.maximum(high - low, 1e-6)
    axis.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    axis.set_xlabel("first direction [spreads of the data]")
    axis.set_ylabel("second direction")
    legend = axis.legend(fontsize=8.5, loc="best", frameon=True, framealpha=0.85, edgecolor="none", markerscale=2.2)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)


def _distance(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    rows = [row for row in result["steps"] if row["distance"]]
    steps = [row["step"] for row in rows]
    low, middle, high = ([row["distance"][name] for row in rows] for name in ("low", "median", "high"))
    axis.fill_between(steps, low, high, color=INSIDE, alpha=0.18, linewidth=0)
    axis.plot(steps, middle, "o-", color=INSIDE, markersize=4)
    axis.set(ylim=(0, None), xticks=steps if len(steps) < 12 else steps[:: len(steps) // 8])
    axis.set_xlabel("step of the rollout")
    axis.set_ylabel("distance [spreads of the data]")


def _untrained(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    rows = result["steps"][1:]
    steps, shares = [row["step"] for row in rows], [100 * row["untrained"] for row in rows]
    colours = ["#f5b8d3"] * (len(rows) - 1) + [EDGE]
    axis.bar(steps, shares, 0.62, color=colours)
    for step, share in zip(steps, shares, strict=True):
        axis.annotate(f"{share:.0f}", (step, share), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    axis.axhline(1.0, color=INK, linewidth=0.9, linestyle=":")
    axis.set(ylim=(0, max([*shares, 5.0]) * 1.18), xticks=steps if len(steps) < 12 else steps[:: len(steps) // 8])
    axis.grid(axis="x", visible=False)
    axis.set_xlabel("step at which rollouts are cut")
    axis.set_ylabel("never trained [%]")


def _spread(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    inside, edge = arrays["step"] < result["rollout_steps"], arrays["edge"]
    spread = np.maximum(arrays["spread"], 1e-9)
    if not edge.any() or spread.max() <= 1e-9:
        _say(axis, "no target is beyond what is trained" if not edge.any() else "one critic alone has no spread")
        return
    low, high = np.quantile(spread[inside | edge], [0.002, 0.998])
    bins = np.geomspace(low, max(high, 1.01 * low), 26)
    for chosen, colour, name in ((inside, INSIDE, "passed through"), (edge, EDGE, "never trained")):
        weights = np.full(int(chosen.sum()), 100.0 / chosen.sum())
        axis.hist(np.clip(spread[chosen], *bins[[0, -1]]), bins, weights=weights, color=colour, alpha=0.5, label=name)
        axis.axvline(np.median(spread[chosen]), color=colour, linewidth=1.6)
    axis.set_xscale("log")
    axis.legend(fontsize=8.5, loc="best")
    axis.set_xlabel("standard deviation over the critics")
    axis.set_ylabel("states [%]")


def _believed(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    bins = result["by_distance"]
    if not bins:
        _say(axis, "no rollout reaches its last step")
        return
    places = np.arange(len(bins))
    other = axis.twinx()
    axis.bar(places, [100 * b["untrained"] for b in bins], 0.62, color=EDGE, alpha=0.35)
    other.plot(places, [b["value"] for b in bins], "o-", color=INK, markersize=4)
    other.axhline(result["value"]["inside"], color=INSIDE, linewidth=1.2, linestyle="--")
    other.annotate(
        "median where rollouts pass", (places[-1] + 0.45, result["value"]["inside"]), (0, 4),
        textcoords="offset points", ha="right", fontsize=8.5, color=INSIDE,
    )  # fmt: skip
    axis.set(ylim=(0, 105), xticks=places)
    axis.set_xticklabels([f"{b['distance']:.2g}" for b in bins])
    axis.grid(axis="x", visible=False)
    other.grid(visible=False)
    other.spines["right"].set_visible(False)
    other.margins(y=0.15)
    axis.set_xlabel("distance to the data, median of each eighth")
    axis.set_ylabel("never trained [%]", color=EDGE)
    other.set_ylabel("value", color=INK)


def _truth(axis: Any, result: dict[str, Any], arrays: dict[str, Any], recorded: np.ndarray) -> None:
    pairs = arrays.get("truth", {})
    if not pairs:
        _say(axis, "not asked for: --env names the true environment")
        return
    for (place, (said, returned)), colour in zip(pairs.items(), (INSIDE, EDGE), strict=False):
        name = f"{'passed through' if place == 'inside' else 'never trained'}: {result['truth'][place]['over']:+.3g}"
        axis.scatter(returned, said, s=14, color=colour, alpha=0.55, linewidths=0, label=name)
    every = np.concatenate([np.concatenate(pair) for pair in pairs.values()])
    ends = [every.min(), every.max()]
    axis.plot(ends, ends, color=INK, linewidth=0.9, linestyle=":")
    axis.legend(fontsize=8.5, loc="best", title="mean over-estimation", title_fontsize=8.5)
    axis.set_xlabel("return of a true rollout")
    axis.set_ylabel("value that the critics give")
