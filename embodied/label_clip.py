"""`embodied label clip`: CLIP's goal-baseline reward for every frame (VLM-RM), or a table over many prompts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import fill, plain_lines, torch_device, write_result
from embodied.contracts.errors import ConfigError
from embodied.label_files import SHIPPED, label_writes, model_files
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelClip:
    """Score every frame with CLIP: how much it looks like the goal prompt rather than the baseline prompt.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set.
        goal: goal prompts; several are averaged.
        baseline: the scene when nothing is achieved.
        regularization: 0: similarity with the goal; 1: only what changes.
        camera: whose frames.
        model: clip-lift (shipped; knows only the Lift scenes), an open_clip name, or a folder.
        pretrained: open_clip's weights tag or a weights file, for a named model.
        precision: fp32, bf16, or fp16 on GPUs.
        device: cpu or cuda; several GPUs: torchrun.
        workers: processes that share the frames, on a CPU.
        sweep: YAML file with goals, baselines, regularizations: a table instead of a label set.
        out: JSON file for the table.
        holdout: share of the episodes left out of the table, for 'label audit --holdout'.
        seed: of that draw.
    """

    store: Positional[Path]
    name: str = ""
    goal: tuple[str, ...] = ()
    baseline: tuple[str, ...] = ()
    regularization: float = 0.5
    camera: str = "side"
    model: str = SHIPPED
    pretrained: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    workers: int = 1
    sweep: Path | None = None
    out: Path | None = None
    holdout: float = 0.0
    seed: int = 0


def touches(config: LabelClip) -> Touches:
    reads = (config.store, *model_files(config.model, config.pretrained))
    if config.sweep is not None:
        return Touches((*reads, config.sweep), (config.out,) if config.out else ())
    return Touches(reads, *label_writes(config.store, config.name)) if config.name else Touches(reads)


def label_clip(config: LabelClip, progress: Progress) -> dict[str, Any]:
    import embodied.vlm_rewards.label_store as rewards
    from embodied.data_info import label_summary
    from embodied.datasets.store import EpisodeStore

    _check_mode(config)
    load = {
        "model": config.model,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "device": torch_device(config.device),
    }
    store = EpisodeStore(config.store)
    if config.sweep is not None:
        return _sweep(config, store, load, progress)
    label = rewards.label_clip(
        store,
        config.name,
        config.camera,
        config.goal,
        config.baseline,
        regularization=config.regularization,
        workers=config.workers,
        progress=progress,
        **load,
    )
    return label_summary(label)


def _check_mode(config: LabelClip) -> None:
    """Raise ConfigError where options of the one form are given to the other."""
    if config.sweep is None:
        if not config.name or not config.goal:
            raise ConfigError("label clip needs --name and --goal, or --sweep FILE for a table over many prompts.")
        if config.out is not None or config.holdout:
            raise ConfigError("--out and --holdout belong to --sweep; without it the scores go into the store.")
    elif config.name or config.goal or config.baseline:
        raise ConfigError("--sweep writes no label set and has its prompts in its file: leave out --name and prompts.")


def _sweep(config: LabelClip, store: Any, load: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from embodied.datasets.transitions import split_episodes
    from embodied.label_audit import known_truth
    from embodied.pipeline import load_yaml
    from embodied.vlm_rewards.clip_sweep import Sweep, sweep_clip
    from embodied.vlm_rewards.label_checks import Episodes

    assert config.sweep is not None
    sweep = fill(Sweep, load_yaml(config.sweep, "sweep", "goals"), str(config.sweep))
    chosen = np.arange(store.num_episodes)
    if config.holdout:
        chosen = split_episodes(store, config.holdout, config.seed)[0]
    episodes = Episodes(store.episode_start[chosen], store.episode_length[chosen], store.success[chosen])
    truth = known_truth(None, store)
    rows = sweep_clip(store, config.camera, sweep, load, episodes, truth, config.workers, progress)
    note = f"Rows stand in the order of {config.sweep.name}. The best of {len(rows)} rows looks better on these "
    note += "episodes than it is: "
    if config.holdout:
        note += f"check it on the others, label audit --holdout {config.holdout:g} --seed {config.seed}."
    else:
        note += "give --holdout SHARE, and check the row you choose with label audit --holdout SHARE."
    result = {
        "store": str(config.store),
        "camera": config.camera,
        "model": config.model,
        "episodes": [int(index) for index in chosen],
        "rows": rows,
        "note": note,
    }
    if config.out:
        write_result(config.out, result)
    return result


def as_text(result: dict[str, Any]) -> str:
    from embodied.label_audit import CHECKS_HEAD, checks_cells, table_lines
    from embodied.vlm_rewards.clip_sweep import prompts_text, spread_text

    if "rows" not in result:
        return "\n".join(plain_lines(result))
    table: list[tuple[str, ...]] = [("goal", "baseline", "regularization", *CHECKS_HEAD, "spread")]
    for row in result["rows"]:
        prompts = (prompts_text(row["goals"]), prompts_text(row["baselines"]))
        table.append((*prompts, f"{row['regularization']:g}", *checks_cells(row), spread_text(row)))
    title = f"{len(result['episodes'])} episodes of {result['store']}, {result['model']}, camera {result['camera']}"
    return "\n".join([title, "", *table_lines(table), "", result["note"]])
