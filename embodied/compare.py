"""`embodied compare`: results of `embodied eval` side by side: intervals, differences, whether they overlap."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import write_result
from embodied.contracts.errors import InputError, suggest
from embodied.progress import Progress
from embodied.statistics import Interval, difference
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Compare:
    """Set results of 'embodied eval' side by side; all must be of the same initial states.

    Attributes:
        results: JSON files that 'embodied eval --out' wrote.
        reference: the policy that the others are held against; the first by default.
        out: JSON file to write the result to.
    """

    results: Positional[tuple[Path, ...]]
    reference: str | None = None
    out: Path | None = None


def touches(config: Compare) -> Touches:
    return Touches(config.results, (config.out,) if config.out else ())


def compare(config: Compare, progress: Progress) -> dict[str, Any]:
    """Success of every policy, and for each against the reference: paired difference, and whether intervals overlap."""
    policies = read_results(config.results)
    reference = config.reference or next(iter(policies))
    if reference not in policies:
        raise InputError(f"--reference: no policy '{reference}' in these results.{suggest(reference, policies)}")
    against = {name: _against(policies[reference], policy) for name, policy in policies.items() if name != reference}
    result = {
        "reference": reference,
        "success": {name: policy["success"] for name, policy in policies.items()},
        "against": against,
    }
    if config.out:
        write_result(config.out, result)
    return result | {"policies": policies}


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


def outcomes(policy: dict[str, Any]) -> np.ndarray:
    """(S, N) 0 or 1 of a policy in a result file."""
    return np.array([seed["success"] for seed in policy["seeds"]])


def _against(reference: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    return {
        "difference": difference(outcomes(reference), outcomes(policy)).to_json(),
        "intervals_overlap": Interval(**reference["success"]).overlaps(Interval(**policy["success"])),
    }


def as_text(result: dict[str, Any]) -> str:
    lines = ["success with 95 % intervals", "", *table(result["policies"]), ""]
    for name, item in result["against"].items():
        gap = item["difference"]
        apart = "intervals overlap" if item["intervals_overlap"] else "intervals do not overlap"
        lines.append(
            f"{result['reference']} - {name}: {100 * gap['estimate']:+.1f} points "
            f"[{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}], {apart}"
        )
    return "\n".join(lines)


def table(policies: dict[str, Any]) -> list[str]:
    """One line per policy, and one per training seed below it."""
    lines = []
    for name, policy in policies.items():
        lines.append(f"{name:20s}{_percent(policy['success'])}")
        if len(policy["seeds"]) > 1:
            lines += [f"  seed {s['seed']:<13}{_percent(s['interval'])}" for s in policy["seeds"]]
    return lines


def _percent(interval: dict[str, float]) -> str:
    return f"{100 * interval['estimate']:5.1f} %  [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
