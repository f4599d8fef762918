"""What the verbs that label read and write, as the pipeline needs to know it."""

from pathlib import Path

import embodied

SHIPPED = "clip-lift"


def model_files(model: str, pretrained: str) -> tuple[Path, ...]:
    """The files or folders of a CLIP model that lie on this machine, as an input of a verb."""
    shipped = Path(embodied.__file__).parent / "vlm_rewards" / SHIPPED
    weights = [shipped] if model == SHIPPED else [Path(model)] if Path(model).is_dir() else []
    if Path(pretrained).is_file():
        weights.append(Path(pretrained))
    return tuple(weights)


def label_writes(store: Path, name: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What a verb that writes the label set `name` writes, and where it keeps unfinished work."""
    return (store / "labels" / name,), (Path(f"{store}.labels-partial") / name,)
