"""`embodied label audit`: before anyone trains on a label set, does it rise with true progress?"""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import write_result
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelAudit:
    """Correlate label sets with the simulator's true progress, episode by episode (Spearman).

    Attributes:
        store: an EpisodeStore made by 'embodied sim collect'.
        names: label sets; all by default.
        holdout: share of the episodes to look at, drawn by `seed`; 1 looks at all.
        seed: of the draw.
        env: environment; the store's own by default.
        out: JSON file to write the result to.
    """

    store: Positional[Path]
    names: Positional[tuple[str, ...]] = ()
    holdout: float = 1.0
    seed: int = 0
    env: str | None = None
    out: Path | None = None


def touches(config: LabelAudit) -> Touches:
    labels = tuple(config.store / "labels" / name for name in config.names)
    return Touches((config.store, *labels), (config.out,) if config.out else ())


def label_audit(config: LabelAudit, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import LabelError
    from embodied.datasets.store import EpisodeStore
    from embodied.datasets.transitions import split_episodes
    from embodied.sim.suites import true_progress
    from embodied.vlm_rewards.audit import progress_correlation

    store = EpisodeStore(config.store)
    names = config.names or tuple(store.label_names())
    if not names:
        raise LabelError(f"{config.store} has no label sets. Make one: embodied label clip {config.store} --name ...")
    labels = {name: store.label(name) for name in names}
    truth = true_progress(config.env or store.spec.environment, store)
    episodes = list(range(store.num_episodes))
    if config.holdout != 1.0:
        episodes = [int(i) for i in split_episodes(store, config.holdout, config.seed)[1]]
    start, length = store.episode_start[episodes], store.episode_length[episodes]
    audits = {}
    for done, (name, label) in enumerate(labels.items(), start=1):
        audits[name] = progress_correlation(label.score, truth, start, length).to_json()
        progress(done, len(labels), "label sets compared")
    result = {"store": str(config.store), "episodes": episodes, "labels": audits}
    if config.out:
        write_result(config.out, result)
    return result


def as_text(result: dict[str, Any]) -> str:
    lines = [f"Spearman correlation with true progress, {len(result['episodes'])} episodes", ""]
    lines.append(f"{'label':16s}{'mean':>8s}  {'95 % interval':16s}{'median':>8s}{'pooled':>8s}")
    for name, audit in result["labels"].items():
        interval = f"[{audit['low']:.3f}, {audit['high']:.3f}]"
        lines.append(f"{name:16s}{audit['mean']:8.3f}  {interval:16s}{audit['median']:8.3f}{audit['pooled']:8.3f}")
    return "\n".join(lines)
