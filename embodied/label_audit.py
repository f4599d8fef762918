"""`embodied label audit`: before anyone trains on a label set, can it be trusted?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import write_result
from embodied.contracts.errors import InputError, LabelError, suggest
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelAudit:
    """Check label sets side by side: rise, separation of success and failure, truth, agreement; with a verdict each.

    Attributes:
        store: an EpisodeStore.
        names: label sets; all by default.
        against: another store with the same episodes, whose label sets are compared too (joined by episode and frame).
        holdout: share of the episodes to look at, drawn by `seed`; 1 looks at all.
        seed: of the draw.
        env: environment that knows true progress and reward; the store's own by default.
        learner: who will train on it; its preset says how rewards are normalised.
        preset: of the learner; its default preset by default.
        out: JSON file to write the result to.
        report: HTML page to write.
    """

    store: Positional[Path]
    names: Positional[tuple[str, ...]] = ()
    against: Path | None = None
    holdout: float = 1.0
    seed: int = 0
    env: str | None = None
    learner: str = "iql"
    preset: str | None = None
    out: Path | None = None
    report: Path | None = None


def touches(config: LabelAudit) -> Touches:
    labels = tuple(config.store / "labels" / name for name in config.names)
    reads = (config.store, *labels, *([config.against] if config.against else []))
    return Touches(reads, tuple(path for path in (config.out, config.report) if path))


def label_audit(config: LabelAudit, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.store import EpisodeStore
    from embodied.datasets.transitions import split_episodes
    from embodied.vlm_rewards.label_checks import Episodes, agreement, check_label, join_by_key

    store = EpisodeStore(config.store)
    names = config.names or tuple(store.label_names())
    if not names:
        raise LabelError(f"{config.store} has no label sets. Make one: embodied label clip {config.store} --name ...")
    labels = {name: store.label(name) for name in names}
    scores = {name: label.score for name, label in labels.items()}
    if config.against is not None:
        other = EpisodeStore(config.against)
        for name in other.label_names():
            key = f"{name} ({config.against.name})"
            labels[key] = other.label(name)
            try:
                scores[key] = join_by_key(_keys(store), _keys(other), labels[key].score)
            except InputError as error:
                raise InputError(f"--against {config.against}: {error}") from None
    true_progress, true_reward = known_truth(config.env, store)
    chosen = np.arange(store.num_episodes)
    if config.holdout != 1.0:
        chosen = split_episodes(store, config.holdout, config.seed)[1]
    episodes = Episodes(store.episode_start[chosen], store.episode_length[chosen], store.success[chosen])
    checked = {}
    for done, (name, score) in enumerate(scores.items(), start=1):
        trap = _trap(config, store, score, labels[name].alignment, chosen)
        counts = labels[name].provenance.get("counts", {})
        checked[name] = check_label(score, episodes, true_progress, true_reward, trap, counts)
        progress(done, len(scores), "label sets checked")
    result = {
        "store": str(config.store),
        "episodes": [int(index) for index in chosen],
        "labels": checked,
        "agreement": agreement(scores, episodes),
    }
    if config.report:
        from embodied.label_audit_page import write_page

        write_page(config.report, result, scores, episodes)
    if config.out:
        write_result(config.out, result)
    return result


def _keys(store: Any) -> list[tuple[str, int]]:
    """(source id, frame number in the episode) of every frame."""
    pairs = zip(store.source_ids, store.episode_length, strict=True)
    return [(source, frame) for source, length in pairs for frame in range(length)]


def known_truth(env: str | None, store: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """True progress and true reward (F,) where the environment knows them; the source's own reward otherwise.

    Args:
        env: environment that is asked; the store's own by default.
    """
    from embodied.sim import suites

    name = env or store.spec.environment
    if env is not None or name in suites.ENVIRONMENTS:
        return suites.true_progress(name, store), suites.true_reward(name, store)
    if store.spec.has_reward:
        # A step's own reward belongs to the frame it leads to, as a label's score does.
        return None, np.concatenate([[0.0], store.read("reward")[:-1]])
    return None, None


def _trap(config: LabelAudit, store: Any, score: np.ndarray, alignment: str, chosen: np.ndarray) -> dict[str, Any]:
    """The termination trap for the rewards as the learner will see them."""
    from embodied.datasets.transitions import transitions
    from embodied.policies.normalize import normalize_rewards
    from embodied.policies.train import LEARNERS
    from embodied.vlm_rewards.label_checks import termination_trap

    if store.spec.action is None:
        return termination_trap(score, np.zeros(len(score), bool), np.full(len(score), -1))
    if config.learner not in LEARNERS:
        raise InputError(f"--learner '{config.learner}' is unknown.{suggest(config.learner, LEARNERS)}")
    _, _, presets, default = LEARNERS[config.learner]
    preset = config.preset or default
    if preset not in presets:
        raise InputError(f"--preset: {config.learner} has no preset '{preset}'.{suggest(preset, presets)}")
    method = getattr(presets[preset], "reward_normalization", "none")
    index = transitions(store, None)
    reward = score[index.next_frame if alignment == "post" else index.frame]
    if np.ptp(reward) > 0:
        reward, _ = normalize_rewards(reward, method, index.episode)
    kept = np.isin(index.episode, chosen)
    seen = f"as {config.learner} with preset '{preset}' sees them"
    return termination_trap(reward[kept], index.masks[kept] == 0, store.success[index.episode[kept]], seen)


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{len(result['episodes'])} episodes of {result['store']}", ""]
    rows = [("label", "verdict", *CHECKS_HEAD)]
    rows += [(name, checks["verdict"], *checks_cells(checks)) for name, checks in result["labels"].items()]
    lines += table_lines(rows)
    for pair in result["agreement"]:
        first, second = pair["labels"]
        lines.append(f"{first} and {second}: Spearman over all frames {pair['pooled']:.2f}")
    for name, checks in result["labels"].items():
        lines += ["", f"{name}: {checks['verdict']}", *(f"  - {reason}" for reason in checks["reasons"])]
    return "\n".join(lines)


CHECKS_HEAD: tuple[str, ...] = ("AUC final frame", "rise in success", "in failure", "true progress", "EPIC")


def checks_cells(checks: dict[str, Any]) -> tuple[str, ...]:
    """What `check_label` found, under CHECKS_HEAD."""
    return (
        interval_text(checks["final"], "auc"),
        interval_text(checks["orientation"]["success"]),
        interval_text(checks["orientation"]["failure"]),
        interval_text(checks["progress"]),
        "-" if checks["epic"] is None else f"{checks['epic']:.2f}",
    )


def table_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def interval_text(found: dict[str, Any] | None, key: str = "mean") -> str:
    """`estimate [low, high]`, or a dash where there is none."""
    return "-" if found is None else f"{found[key]:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
