"""`embodied label clip`: CLIP's goal-baseline reward for every frame (VLM-RM)."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import embodied
from embodied.config import torch_device
from embodied.progress import Progress
from embodied.verbs import Touches

SHIPPED = "clip-lift"


@dataclasses.dataclass(frozen=True)
class LabelClip:
    """Score every frame with CLIP: how much it looks like the goal prompt rather than the baseline prompt.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set.
        goal: goal prompts; several are averaged.
        baseline: baseline prompts, what the scene looks like when nothing is achieved.
        regularization: 0 is plain similarity with the goal, 1 only counts what changes from baseline to goal.
        camera: whose frames.
        model: clip-lift (shipped; knows only the Lift scenes), an open_clip name such as ViT-B-32, or a folder.
        pretrained: open_clip's weights tag or a weights file, for a named model.
        precision: of the weights: fp32; bf16, faster where the processor computes in it; fp16 on GPUs.
        device: cpu or cuda; for several GPUs start with torchrun.
        workers: processes that share the frames, on a CPU: one per core.
    """

    store: Positional[Path]
    name: str
    goal: tuple[str, ...]
    baseline: tuple[str, ...] = ()
    regularization: float = 0.5
    camera: str = "side"
    model: str = SHIPPED
    pretrained: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    workers: int = 1


def touches(config: LabelClip) -> Touches:
    shipped = Path(embodied.__file__).parent / "vlm_rewards" / SHIPPED
    weights = [shipped] if config.model == SHIPPED else [Path(config.model)] if Path(config.model).is_dir() else []
    if Path(config.pretrained).is_file():
        weights.append(Path(config.pretrained))
    label = config.store / "labels" / config.name
    return Touches((config.store, *weights), (label,), (Path(f"{config.store}.labels-partial") / config.name,))


def label_clip(config: LabelClip, progress: Progress) -> dict[str, Any]:
    import embodied.vlm_rewards.label_store as rewards
    from embodied.data_info import label_summary
    from embodied.datasets.store import EpisodeStore

    label = rewards.label_clip(
        EpisodeStore(config.store),
        config.name,
        config.camera,
        config.goal,
        config.baseline,
        regularization=config.regularization,
        model=config.model,
        pretrained=config.pretrained,
        precision=config.precision,
        device=torch_device(config.device),
        workers=config.workers,
        progress=progress,
    )
    return label_summary(label)
