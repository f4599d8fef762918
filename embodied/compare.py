"""`embodied compare`: results side by side: aggregates with intervals, paired differences, a sequential test."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.compare_read import MEASURES
from embodied.config import check_result_path, write_result
from embodied.contracts.errors import InputError, suggest
from embodied.progress import Progress
from embodied.statistics import CONFIDENCE, Interval, difference, wilson
from embodied.verbs import Touches

THRESHOLDS = 101  # of a performance profile
LONGEST_LIST = 12  # tasks that the text names one by one


@dataclasses.dataclass(frozen=True)
class Compare:
    """Set results side by side: of 'embodied eval' from the same initial states, or scores and curves of others.

    Attributes:
        results: [NAME=]PATH each: JSON of 'embodied eval', CSV, npz, npy, JSON, or a folder of curves.
        reference: what the others are held against; else the first.
        out: JSON file; or a folder for JSON, PNG and HTML.
        layout: how a folder's files are named, for example {algorithm}/{task}_{seed}.csv.
        metric: column with the score; for 'embodied eval' success or episode_return.
        at: of a curve: last, common, best, best-mean or a step.
        normalize: none, d4rl, a number to divide by, or a file (task, random, reference).
        target: of the optimality gap.
        ddof: of standard deviations: 1, or 0 as many papers print.
        digits: of printed means.
        precision: wanted half width of the IQM's interval: how many runs does it take?
        resample_tasks: intervals over tasks too.
        resamples: of the bootstrap.
        seed: equal input and seed give equal numbers.
        adastop: test all pairs in sequence, runs by seed.
        group: new runs per look of that test.
        looks: of that test, at most.
        alpha: chance of any false verdict.
    """

    results: Positional[tuple[Path, ...]]
    reference: str | None = None
    out: Path | None = None
    layout: str | None = None
    metric: str | None = None
    at: str = "last"
    normalize: str = "none"
    target: float = 1.0
    ddof: int = 1
    digits: int = 1
    precision: float | None = None
    resample_tasks: bool = False
    resamples: int = 20_000
    seed: int = 0
    adastop: bool = False
    group: int = 5
    looks: int = 5
    alpha: float = 0.05


def touches(config: Compare) -> Touches:
    from embodied.compare_read import split_name

    return Touches(tuple(split_name(path)[1] for path in config.results), (config.out,) if config.out else ())


def compare(config: Compare, progress: Progress) -> dict[str, Any]:
    """Our own results: success and paired differences. All results: aggregates over runs and tasks, with intervals."""
    from embodied.compare_read import is_result, split_name

    _check(config)
    paths = [split_name(path)[1] for path in config.results]
    ours = all(is_result(path) or not path.exists() for path in paths)
    groups = by_environment(paths) if ours else {}
    policies = read_results(tuple(paths)) if len(groups) == 1 else None
    result: dict[str, Any] = paired(config, policies) if policies is not None else {}
    if len(groups) > 1:
        result["environments"] = {env: paired(config, read_results(tuple(files))) for env, files in groups.items()}
    scores = statistics(config, progress)
    if policies is None:
        result["reference"] = _reference(config, list(scores["aggregates"]))
    result["scores"] = scores
    if config.adastop:
        result["adastop"] = sequential(config, scores["values"])
    if config.out and config.out.suffix == ".json":
        write_result(config.out, result)
    elif config.out:
        from embodied.compare_page import write_page

        write_page(config.out, result)
    return result if policies is None else result | {"policies": policies}


def paired(config: Compare, policies: dict[str, Any]) -> dict[str, Any]:
    """Success of every policy in one environment, or its return, and its paired difference from the reference."""
    reference, key = _reference(config, list(policies)), measure(policies)
    result = {
        "reference": reference,
        "measure": key,
        key: {name: policy[key] for name, policy in policies.items()},
        "against": {
            name: _against(policies[reference], policy, key) for name, policy in policies.items() if name != reference
        },
    }
    if config.precision is not None and key == "success":
        result["episodes_needed"] = {
            name: episodes_needed(policy["success"]["estimate"], config.precision) for name, policy in policies.items()
        }
    return result


def measure(policies: dict[str, Any]) -> str:
    """`success` where the environment has a rule of it, else `episode_return`."""
    for key in MEASURES:
        if all(key in policy for policy in policies.values()):
            return key
    raise InputError("Success was judged in some of these results and not in others: evaluate them together.")


def by_environment(paths: list[Path]) -> dict[str, list[Path]]:
    """Result files by the environment they were run in; each environment is a task of the aggregates."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(read_result(path)["env"], []).append(path)
    return groups


def statistics(config: Compare, progress: Progress) -> dict[str, Any]:
    """Tables, aggregates, profiles and probabilities of improvement of everything in the files."""
    from embodied import compare_aggregate as bootstrap
    from embodied.compare_normalize import normalized
    from embodied.compare_read import has_curves, pick, read_runs

    runs = read_runs(config.results, config.layout, config.metric)
    raw, notes = pick(runs, config.at)
    table, rule = normalized(raw, config.normalize)
    tasks = [task for task in next(iter(table.values())) if all(task in scores for scores in table.values())]
    if not tasks:
        raise InputError(f"No task is common to all of: {', '.join(table)}. They cannot be set side by side.")
    if left := sorted({task for scores in table.values() for task in scores} - set(tasks)):
        some = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
        notes.append(f"{len(left)} tasks that not every algorithm has are in the table only: {some}")
    matrices = {name: [scores[task] for task in tasks] for name, scores in table.items()}
    notes += _notes(matrices, tasks, config)
    percent = 1.0 if config.normalize == "none" else 100.0
    steps = len(matrices) + len(matrices) * (len(matrices) - 1) // 2
    aggregates, profiles = {}, {}
    ends = [np.quantile(np.concatenate([v for rows in matrices.values() for v in rows]), q) for q in (0, 1)]
    thresholds = np.linspace(min(0.0, *ends), max(*ends, 1e-9), THRESHOLDS)
    for done, (name, rows) in enumerate(matrices.items(), start=1):
        aggregates[name] = bootstrap.aggregates(
            rows, name, config.seed, config.resamples, config.target, config.resample_tasks
        )
        profiles[name] = bootstrap.profile(rows, thresholds, name, config.seed)
        progress(done, steps, "bootstrap")
    improvements = {}
    for done, (first, second) in enumerate(itertools.combinations(matrices, 2), start=len(matrices) + 1):
        improvements[f"{first} > {second}"] = bootstrap.improvement(
            matrices[first], matrices[second], f"{first}>{second}", config.seed, config.resamples
        )
        progress(done, steps, "bootstrap")

    def tabled(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        scaled = {name: {task: percent * v for task, v in row.items()} for name, row in scores.items()}
        return {name: bootstrap.summary(row, config.ddof, config.digits) for name, row in scaled.items()}

    result = {
        "at": config.at,
        "normalization": rule,
        "table_unit": "score" if percent == 1.0 else "normalized score x 100",
        "ddof": config.ddof,
        "confidence": CONFIDENCE,
        "resamples": config.resamples,
        "seed": config.seed,
        "resample_tasks": config.resample_tasks,
        "target": config.target,
        "tasks": tasks,
        "notes": notes,
        "table": tabled(table),
        "aggregates": aggregates,
        "improvement": improvements,
        "profiles": {"thresholds": thresholds.tolist(), **profiles},
        "values": {name: {task: v.tolist() for task, v in row.items()} for name, row in table.items()},
    }
    if has_curves(runs) and config.at != "best":
        result["best"] = tabled(normalized(pick(runs, "best")[0], config.normalize)[0])
    if config.precision is not None:
        result["runs_needed"] = {
            name: bootstrap.runs_needed(rows, config.precision, "iqm", config.seed) if min(map(len, rows)) > 1 else None
            for name, rows in matrices.items()
        }
        result["precision"] = config.precision
    return result


def sequential(config: Compare, values: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """AdaStop over the runs that there are; what is missing is said, not guessed."""
    from embodied.adastop import adastop

    tasks = [task for task in next(iter(values.values())) if all(task in rows for rows in values.values())]
    tables = {}
    for name, rows in values.items():
        complete = min(len(rows[task]) for task in tasks)
        tables[name] = np.array([rows[task][:complete] for task in tasks]).T  # (R, M)
    try:
        verdict = adastop(tables, config.group, config.looks, config.alpha, seed=config.seed)
    except ValueError as error:
        raise InputError(f"--adastop: {error}") from None
    settings = {"group": config.group, "looks": config.looks, "alpha": config.alpha, "seed": config.seed}
    return {**settings, "tasks": tasks, **verdict.to_json()}


def episodes_needed(rate: float, precision: float) -> int:
    """Least initial states for a Wilson interval of that half width, were the success rate what it is now."""
    low, high = 0, 1
    while _wilson_width(rate, high) > precision:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _wilson_width(rate, middle) <= precision else (middle, high)
    return high


def _wilson_width(rate: float, episodes: int) -> float:
    interval = wilson(round(rate * episodes), episodes)
    return (interval.high - interval.low) / 2


def _check(config: Compare) -> None:
    if config.ddof not in (0, 1) or config.digits < 0 or config.resamples < 100:
        raise InputError("--ddof is 0 or 1, --digits at least 0, --resamples at least 100.")
    if not config.results:
        raise InputError("compare needs at least one result file of 'embodied eval --out'.")
    if config.precision is not None and not 0 < config.precision < np.inf:
        raise InputError(f"--precision {config.precision}: a half width above 0 is wanted.")
    if config.out and config.out.suffix == ".json":
        check_result_path(config.out)
    elif config.out and config.out.is_file():
        raise InputError(f"--out {config.out} is a file; name a folder, or a file that ends in .json.")


def _reference(config: Compare, names: list[str]) -> str:
    reference = config.reference or names[0]
    if reference not in names:
        raise InputError(f"--reference: no policy '{reference}' in these results.{suggest(reference, names)}")
    return reference


def _notes(matrices: dict[str, list[np.ndarray]], tasks: list[str], config: Compare) -> list[str]:
    """What a reader of the intervals must know."""
    notes = []
    counts = {name: {len(values) for values in rows} for name, rows in matrices.items()}
    if few := [name for name, sizes in counts.items() if max(sizes) == 1]:
        notes.append(f"one run each, so no interval over runs: {', '.join(few)}")
    if uneven := [name for name, sizes in counts.items() if len(sizes) > 1]:
        notes.append(f"tasks with more runs weigh more in the IQM of: {', '.join(uneven)}")
        if config.resample_tasks:
            raise InputError(f"--resample-tasks needs as many runs on every task; {uneven[0]} has {counts[uneven[0]]}.")
    least = min(min(sizes) for sizes in counts.values())
    if 1 < least <= 5:
        notes.append(f"with {least} runs a nominal 95 % interval holds the truth less often: about 91 % with 5")
    return notes


def read_results(paths: tuple[Path, ...]) -> dict[str, Any]:
    """Name -> policy of all result files. InputError where a file is none, or was run from other initial states."""
    policies: dict[str, Any] = {}
    first: tuple[Path, Any] | None = None
    if not paths:
        raise InputError("compare needs at least one result file of 'embodied eval --out'.")
    for path in paths:
        data = read_result(path)
        design = (data["env"], data["initial_seeds"])
        if first is not None and design != first[1]:
            raise InputError(f"{path} and {first[0]} were run from different initial states; they cannot be compared.")
        first = first or (path, design)
        for name, policy in data["policies"].items():
            if name in policies:
                raise InputError(f"{path}: a policy '{name}' stands in an earlier file too. Name them with NAME=...")
            policies[name] = policy
    return policies


def read_result(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
        if not {"env", "initial_seeds", "policies"} <= set(data):
            raise ValueError("keys are missing")
        return data
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. Make it: embodied eval ... --out {path}") from None
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{path} is no result of 'embodied eval': {error}.") from None


def outcomes(policy: dict[str, Any], key: str = "success") -> np.ndarray:
    """(S, N) of a policy in a result file: 0 or 1, or returns."""
    return np.array([seed[key] for seed in policy["seeds"]])


def _against(reference: dict[str, Any], policy: dict[str, Any], key: str) -> dict[str, Any]:
    rates = key == "success"
    return {
        "difference": difference(outcomes(reference, key), outcomes(policy, key), rates=rates).to_json(),
        "intervals_overlap": Interval(**reference[key]).overlaps(Interval(**policy[key])),
    }


def as_text(result: dict[str, Any]) -> str:
    from embodied.compare_text import adastop_lines, score_lines

    lines: list[str] = []
    if "policies" in result:
        lines = [f"{MEASURES[result['measure']]} with 95 % intervals", "", *table(result["policies"]), ""]
        rates = result["measure"] == "success"
        for name, item in result["against"].items():
            gap = {end: (100 if rates else 1) * value for end, value in item["difference"].items()}
            apart = "intervals overlap" if item["intervals_overlap"] else "intervals do not overlap"
            lines.append(
                f"{result['reference']} - {name}: {gap['estimate']:+.1f}{' points' if rates else ''} "
                f"[{gap['low']:+.1f}, {gap['high']:+.1f}], {apart}"
            )
        for name, count in result.get("episodes_needed", {}).items():
            lines.append(f"{name}: {count} initial states would give the precision that is wanted")
    for env, part in result.get("environments", {}).items():
        lines += [f"{env}: {_one_line(part)}"]
    if "policies" not in result or any(len(policy["seeds"]) > 1 for policy in result["policies"].values()):
        lines += [*([""] if lines else []), *score_lines(result)]
    if "adastop" in result:
        lines += ["", *adastop_lines(result["adastop"])]
    return "\n".join(lines)


def _one_line(part: dict[str, Any]) -> str:
    key = part["measure"]
    return "; ".join(f"{name} {shown(interval, key).strip()}" for name, interval in part[key].items())


def table(policies: dict[str, Any]) -> list[str]:
    """One line per policy, and one per training seed below it."""
    lines, key = [], measure(policies)
    for name, policy in policies.items():
        lines.append(f"{name:20s}{shown(policy[key], key)}")
        if len(policy["seeds"]) > 1:
            lines += [f"  seed {s['seed']:<13}{shown(s['interval'], key)}" for s in policy["seeds"]]
    return lines


def shown(interval: dict[str, float], key: str) -> str:
    """An interval of that measure, as text."""
    if key == "success":
        return f"{100 * interval['estimate']:5.1f} %  [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
    return f"{interval['estimate']:8.1f}  [{interval['low']:.1f}, {interval['high']:.1f}]"
