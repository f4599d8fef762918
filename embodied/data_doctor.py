"""`embodied data doctor`: what is wrong with stores, and what to do about it."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches

EPISODES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class DataDoctor:
    """Look for everything that has bitten users of recordings; several stores are also compared with each other.

    Exit code 1 if an error is found (with --strict also for a warning), else 0. Nothing is changed.

    Attributes:
        stores: EpisodeStores.
        repair: write a repaired copy of the one store here; must not exist.
        drop_constant: with --repair, also leave out observations that never change.
        deep: read every byte and compare it with the hash that was written.
        strict: warnings count as errors.
    """

    stores: Positional[tuple[Path, ...]]
    repair: Path | None = None
    drop_constant: bool = False
    deep: bool = False
    strict: bool = False


def touches(config: DataDoctor) -> Touches:
    if config.repair is None:
        return Touches(config.stores)
    return Touches(config.stores, (config.repair,), (Path(f"{config.repair}.partial"),))


def data_doctor(config: DataDoctor, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import ConfigError
    from embodied.datasets.doctor import examine, leak_findings
    from embodied.datasets.finding import SEVERITIES
    from embodied.datasets.repair import repair
    from embodied.datasets.store import EpisodeStore

    if not config.stores:
        raise ConfigError("data doctor needs a store.\nFor example: embodied data doctor recordings.zarr")
    if config.repair and len(config.stores) > 1:
        raise ConfigError(
            f"--repair takes one store, found {len(config.stores)}. Merge them first: embodied data merge"
        )
    if config.drop_constant and not config.repair:
        raise ConfigError("--drop-constant says what --repair leaves out; name the repaired store: --repair NEW_STORE")
    stores = [EpisodeStore(path) for path in config.stores]
    examined = {store.path: examine(store, config.deep, progress) for store in stores}
    between = list(leak_findings(stores)) if len(stores) > 1 else []
    everything = [*(finding for found in examined.values() for finding in found), *between]
    counts = {severity: sum(f.severity == severity for f in everything) for severity in SEVERITIES}
    result: dict[str, Any] = {
        "stores": {
            store.path: {
                "episodes": store.num_episodes,
                "frames": store.num_frames,
                "findings": [finding.to_json() for finding in examined[store.path]],
            }
            for store in stores
        },
        "between_stores": [finding.to_json() for finding in between],
        "counts": counts,
        "failed": bool(counts["error"] or (config.strict and counts["warning"])),
    }
    if config.repair:
        new, done = repair(stores[0], config.repair, config.drop_constant, progress)
        result["repair"] = {"store": new.path, "episodes": new.num_episodes, "frames": new.num_frames, "done": done}
    return result


def exit_code(result: dict[str, Any]) -> int:
    return int(result["failed"])


def as_text(result: dict[str, Any]) -> str:
    lines = []
    for path, store in result["stores"].items():
        lines += [f"{path}: {store['episodes']} episodes, {store['frames']} frames", *_grouped(store["findings"]), ""]
    if result["between_stores"]:
        lines += ["between the stores", *_grouped(result["between_stores"]), ""]
    counts = result["counts"]
    lines.append(", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts.items()) + ".")
    if repair := result.get("repair"):
        lines += [f"Repaired: {repair['store']}, {repair['episodes']} episodes, {repair['frames']} frames."]
        lines += [f"  {line}" for line in repair["done"]] or ["  nothing to repair: a copy"]
    return "\n".join(lines)


def _grouped(findings: list[dict[str, Any]]) -> list[str]:
    """Findings of one check together: the first few episodes, how many more, and the advice once."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in findings:
        groups.setdefault((finding["severity"], finding["check"]), []).append(finding)
    lines = []
    for (severity, check), group in groups.items():
        lines.append(f"  {severity:8s} {check}")
        for finding in group[:EPISODES_SHOWN]:
            where = "" if finding["episode"] is None else f"episode {finding['episode']}: "
            lines.append(f"           {where}{finding['message']}")
        if more := group[EPISODES_SHOWN:]:
            episodes = [str(f["episode"]) for f in more if f["episode"] is not None]
            shown = f" (episodes {', '.join(episodes[:8])}{', ...' if len(episodes) > 8 else ''})" if episodes else ""
            lines.append(f"           and {len(more)} more{shown}; --json lists all")
        lines += [f"           > {advice}" for advice in dict.fromkeys(f["advice"] for f in group) if advice][:2]
    return lines or ["  nothing to complain about"]
