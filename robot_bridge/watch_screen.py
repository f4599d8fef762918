"""A snapshot of the bridge as the lines of a terminal, 80 by 24 and up. Pure: the same snapshot, the same lines."""

import math
import time
from typing import Any

from rich.text import Text

from embodied.robot_bridge.watch_snapshot import Snapshot

_BAR = {  # of the whole first line, to be seen from across the room
    "RUNNING": "bold black on green",
    "ARMED": "bold black on cyan",
    "HOLD": "bold black on yellow",
    "STOPPED": "bold white on red",
    "ESTOP": "bold white on red",
}
_NAME, _NUMBERS = 18, 17  # columns of a joint's line
_OLD = 1.0  # an age that is worth a colour [s]
_HARMLESS = ("runs", "chunks")  # counts that only say that it works
_NEVER = 1e5  # the safety process says this, or more, of what never came [ms]


def screen(snapshot: Snapshot, width: int = 80, height: int = 24, keys: str = "", note: str = "") -> Text:
    """`height` lines, each at most `width` cells wide.

    Args:
        keys: the last lines: what which key does.
        note: stands beside the robot's name.
    """
    width = max(60, min(width, 140))
    foot = [Text(_fit(text, width), style="dim") for text in keys.splitlines()]
    height -= len(foot)
    head = [_title(snapshot, width, note), Text(_fit(snapshot.reason, width), style="yellow")]
    joints = _joints(snapshot, width, max(1, height - len(head) - 9))  # the tables keep six lines, the events two
    tables = _side_by_side(_topics(snapshot, width // 2 - 1), _numbers(snapshot, width - width // 2 - 1), width)
    lines = [*head, *joints, *tables[: height - len(head) - len(joints) - 2]]
    lines = [*lines, *_events(snapshot, width, height - len(lines))][:height]
    return Text("\n").join([*lines, *[Text("")] * (height - len(lines)), *foot])


def _title(snapshot: Snapshot, width: int, note: str) -> Text:
    state = snapshot.state or "no safety process"
    shadow = "shadow: nothing is sent" if snapshot.counts.get("shadow") == "true" else ""
    words = " · ".join(part for part in (state, snapshot.robot, shadow, note) if part)
    text = f"{_fit(words, width - 11):{width - 10}}{time.strftime('%H:%M:%S')} "
    return Text(f" {text[: width - 1]}", style=_BAR.get(state, "bold white on grey37"))


def _joints(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    bar = width - _NAME - _NUMBERS - 2
    heading = f"{'joint':{_NAME}}{'● measured  ○ commanded':^{bar + 2}}{'measured':>8}{'command':>9}"
    lines = [Text(heading, style="dim")]
    shown = len(snapshot.names) if len(snapshot.names) <= room else room - 1
    for j in range(shown):
        at_limit = bool(snapshot.at_limit[j])
        line = Text(f"{_tail(snapshot.names[j], _NAME - 1):{_NAME}}", style="bold red" if at_limit else "")
        low, high = float(snapshot.low[j]), float(snapshot.high[j])
        line.append_text(_bar(float(snapshot.position[j]), float(snapshot.command[j]), low, high, bar, at_limit))
        line.append(f"{_number(snapshot.position[j]):>8}{_number(snapshot.command[j]):>9}")
        lines.append(line)
    if shown < len(snapshot.names):
        stuck = [n for n, at in zip(snapshot.names[shown:], snapshot.at_limit[shown:], strict=True) if at]
        more = f"and {len(snapshot.names) - shown} more" + (f"; at a limit: {', '.join(stuck)}" if stuck else "")
        lines.append(Text(_fit(more, width), style="bold red" if stuck else "dim"))
    return lines


def _bar(position: float, command: float, low: float, high: float, cells: int, at_limit: bool) -> Text:
    """Where a joint is between its limits: the ends are the limits, the marks stop there."""
    line = ["─"] * cells
    line[cells // 2] = "┼"
    for value, mark in ((command, "○"), (position, "●")):
        if math.isfinite(value):
            line[min(cells - 1, max(0, round((value - low) / (high - low) * (cells - 1))))] = mark
    text = Text("├", style="red" if at_limit else "dim")
    for cell in line:
        style = {"●": "bold red" if at_limit else "bold green", "○": "cyan"}.get(cell, "red" if at_limit else "dim")
        text.append(cell, style=style)
    return text.append("┤", style="red" if at_limit else "dim")


def _topics(snapshot: Snapshot, width: int) -> list[Text]:
    name = width - 15
    lines = [Text(f"{'topic':{name}}{'rate':>7}{'age':>8}", style="dim")]
    for topic, seen in snapshot.topics.items():
        never = math.isinf(seen.age)
        line = Text(f"{_tail(topic, name - 1):{name}}", style="dim" if never else "")
        rate, age = (" ", "never") if never else (f"{seen.rate:.0f} Hz" if seen.rate else "", _duration(seen.age))
        quiet = seen.age > _OLD and topic not in snapshot.rare
        lines.append(line.append(f"{rate:>7}{age:>8}", style="yellow" if quiet and not never else None))
    return lines


def _numbers(snapshot: Snapshot, width: int) -> list[Text]:
    """Latencies, what the inputs' ages are to the safety process, and its counts that are not zero."""
    name = width - 16
    lines = [Text(f"{'latency':{name}}{'p50':>8}{'p99':>8}", style="dim")]
    for label, (p50, p99) in snapshot.latencies.items():
        lines.append(Text(f"{_fit(label, name - 1):{name}}{_duration(p50):>8}{_duration(p99):>8}"))
    ages = {key.removesuffix("_age_ms"): _float(v) for key, v in snapshot.counts.items() if key.endswith("_age_ms")}
    counts = {key: _float(v) for key, v in snapshot.counts.items() if not key.endswith("_ms")}
    shown = {key: f"{key.replace('_', ' ')} {value:.0f}" for key, value in counts.items() if value > 0}
    worth = _wrapped("", [text for key, text in shown.items() if key not in _HARMLESS], width)
    aged = _wrapped("age of", [f"{key} {_duration(ms * 1e-3)}" for key, ms in ages.items() if ms < _NEVER], width)
    harmless = _wrapped("", [text for key, text in shown.items() if key in _HARMLESS], width)
    # What matters least comes last: a low terminal cuts it off.
    return [*lines, *(Text(part, style="yellow") for part in worth), *(Text(part) for part in [*aged, *harmless])]


def _wrapped(label: str, parts: list[str], width: int) -> list[str]:
    lines, line = [], label
    for part in parts:
        if len(line) + len(part) + 3 > width and line != label:
            lines.append(line)
            line = " " * len(label)
        separator = " · " if line.strip() and line != label else " " if line else ""
        line += separator + part
    return lines + ([_fit(line, width)] if parts else [])


def _events(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    if room < 2:
        return []
    lines = [Text("─" * width, style="dim")]
    for clock, text in snapshot.events[-(room - 1) :]:
        failed = any(word in text for word in ("failed", "ESTOP", "STOPPED", "refused", "dropped", "error"))
        line = Text().append(f"{clock} ", style="dim")
        lines.append(line.append(_fit(text, width - 9), style="red" if failed else None))
    return lines


def _side_by_side(left: list[Text], right: list[Text], width: int) -> list[Text]:
    column = width // 2 - 1
    lines = []
    for k in range(max(len(left), len(right))):
        line = Text().append_text(left[k] if k < len(left) else Text(""))
        line.append(" " * (column + 2 - line.cell_len))
        lines.append(line.append_text(right[k]) if k < len(right) else line)
    return lines


def line(snapshot: Snapshot) -> str:
    """The snapshot in one line, for a log or a pipe."""
    joints = next(iter(snapshot.topics.values()))
    parts = [snapshot.state or "no word from the safety process", snapshot.reason]
    parts += [f"joints {joints.rate:.0f} Hz"]
    parts += [f"{name} {_duration(p50)}/{_duration(p99)}" for name, (p50, p99) in snapshot.latencies.items()]
    stuck = [name for name, at in zip(snapshot.names, snapshot.at_limit, strict=True) if at]
    parts += [f"at a limit: {', '.join(stuck)}"] if stuck else []
    return " · ".join(part for part in parts if part)


def _number(value: Any) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return -1.0  # words, such as the profile's fingerprint


def _duration(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _fit(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]
