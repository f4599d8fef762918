"""What `embodied compare` prints for people: one line per algorithm, task and pair."""

from typing import Any

LONGEST = 40  # lines of a table of tasks
METRICS = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap"}


def score_lines(result: dict[str, Any]) -> list[str]:
    """Aggregates, probabilities of improvement, the table of tasks, and the notes."""
    scores = result["scores"]
    count = len(scores["tasks"])
    width = max(map(len, scores["aggregates"])) + 2
    what = f"{count} task{'s' if count > 1 else ''}, 95 % intervals over runs{' and tasks' * scores['resample_tasks']}"
    lines = [f"over {what} ({described(scores)})", "", " " * width + "".join(f"{t:24s}" for t in METRICS.values())]
    for name, metrics in scores["aggregates"].items():
        lines.append(f"{name:{width}s}" + "".join(f"{interval(metrics[m]):24s}" for m in METRICS).rstrip())
    if scores["improvement"]:
        lines += ["", "probability of improvement"]
        width_pair = max(map(len, scores["improvement"])) + 2
        lines += [f"{pair:{width_pair}s}{interval(value)}" for pair, value in scores["improvement"].items()]
    lines += ["", *task_lines(scores)]
    for name, runs in scores.get("runs_needed", {}).items():
        need = "one run says nothing about that" if runs is None else f"{runs} runs per task"
        lines.append(f"{name}: IQM to ± {scores['precision']:g} takes {need}")
    return lines + [f"note: {note}" for note in scores["notes"]]


def task_lines(scores: dict[str, Any]) -> list[str]:
    """Mean and standard deviation per task; of curves, the last and the best."""
    unit = "" if scores["table_unit"] == "score" else f", {scores['table_unit']}"
    lines = [f"mean ± standard deviation over runs (ddof {scores['ddof']}{unit})"]
    best = scores.get("best", {})
    rows = [
        (name, task, cell, best.get(name, {}).get(task))
        for name, tasks in scores["table"].items()
        for task, cell in tasks.items()
    ]
    name_width = max(len(row[0]) for row in rows) + 2
    task_width = max(len(row[1]) for row in rows) + 2
    for name, task, cell, top in rows[:LONGEST]:
        text = f"{name:{name_width}s}{task:{task_width}s}{cell['printed']}  ({cell['runs']} runs)"
        lines.append(text + (f"   {scores['at']}; best of each run {top['printed']}" if top else ""))
    if len(rows) > LONGEST:
        lines.append(f"... and {len(rows) - LONGEST} more; --out or --json has them all")
    return lines


def adastop_lines(found: dict[str, Any]) -> list[str]:
    """The verdict on every pair, and the runs it still takes."""
    words = {"equal": "no difference found", "open": "open"}
    lines = [f"AdaStop, {found['looks']} looks of {found['group']} runs, any false verdict at most {found['alpha']:g}"]
    for item in found["decisions"]:
        verdict = item["verdict"]
        said = words.get(verdict) or f"{item[verdict]} is better"
        bound = "" if item["boundary"] is None else f", boundary {item['boundary']:.3g}"
        lines.append(
            f"{item['first']} - {item['second']}: {said} (look {item['look']}, mean difference "
            f"{item['statistic']:+.3g}{bound})"
        )
    if found["needs"]:
        wanted = ", ".join(f"{count} more runs of {name}" for name, count in found["needs"].items())
        return [*lines, f"undecided: needs {wanted}"]
    used = ", ".join(f"{name} {count}" for name, count in found["runs_used"].items())
    return [*lines, f"decided; runs looked at: {used}"]


def described(scores: dict[str, Any]) -> str:
    """How the scores came about, in a few words."""
    rule = scores["normalization"]["rule"]
    scale = "not normalized" if rule == "none" else f"normalized: {rule}"
    return f"{scale}; at {scores['at']}; bootstrap of {scores['resamples']}, seed {scores['seed']}"


def interval(value: dict[str, float | None], digits: int = 3) -> str:
    """`0.895 [0.876, 0.911]`; `0.895 [no interval]` where one run is all there is."""
    if value["low"] is None or value["high"] is None:
        return f"{_number(value['estimate'], digits)} [no interval]"
    ends = f"{_number(value['low'], digits)}, {_number(value['high'], digits)}"
    return f"{_number(value['estimate'], digits)} [{ends}]"


def _number(value: float | None, digits: int) -> str:
    assert value is not None
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.1f}"
