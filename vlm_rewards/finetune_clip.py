"""Fine-tunes any open_clip model on captioned pictures, with its own transform and tokenizer.

The loss is `train_contrastive.contrastive_loss`, that of `train_clip`. Weights are kept in float32, in
open_clip's own folder format.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.contracts.provenance import provenance
from embodied.vlm_rewards.caption_pairs import CaptionedFrames
from embodied.vlm_rewards.clip_encoder import hash_weights, load_open_clip, locate
from embodied.vlm_rewards.train_contrastive import (
    Progress,
    augment,
    check_run,
    fit,
    judge,
    make_optimizer,
    set_scale,
    write_folder,
)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Optimiser of `finetune_clip`.

    Attributes:
        learning_rate, weight_decay, warmup: AdamW with linear warm-up (fraction of the steps) and cosine decay. Much
            larger rates than 1e-5 destroy what a pre-trained model knows.
        grade_width, arc: as in `SmallClipConfig`, used where there are grades.
        max_shift, jitter: random shift of the picture [pixel of the camera] and change of its colours, as a fraction.
    """

    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.1
    grade_width: float = 0.12
    arc: float = 2.0
    max_shift: int = 3
    jitter: float = 0.15


def finetune_clip(
    pairs: CaptionedFrames,
    model: str,
    pretrained: str,
    out_folder: str | Path,
    inputs: Mapping[str, Any],
    steps: int,
    batch: int,
    seed: int,
    held_out: CaptionedFrames | None = None,
    config: FinetuneConfig | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """Fine-tune `model` and write it as a folder that open_clip and `ClipEncoder` load.

    Args:
        pairs: with pictures of any size; the model's own transform brings them to its own.
        model, pretrained: as in `ClipEncoder`.
        inputs: for the provenance: what the pictures and captions are.
        held_out: pairs to measure retrieval on, before and after.

    Returns:
        The loss of each step, and `retrieval` before and after (each None without `held_out`).

    Raises:
        ConfigError, InputError, MissingExtraError: as `load_open_clip`, or an existing folder.
        TrainingError: the loss became NaN.
    """
    config, out = config or FinetuneConfig(), Path(out_folder)
    check_run(out, steps, batch)
    name, _ = locate(model, pretrained)
    clip, transform, tokenizer = load_open_clip(model, pretrained, "fp32", device)
    import open_clip

    start = hash_weights(clip)
    before = judge(clip, transform, tokenizer, held_out, device, seed)
    generator = torch.Generator().manual_seed(seed)

    def prepare(frames: np.ndarray) -> torch.Tensor:
        """The model's own transform of pictures that are shifted and coloured at random."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        changed = augment(pixels, config.max_shift, config.jitter, generator)
        return transform((changed * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    clip.requires_grad_(True)
    set_scale(clip, pairs.grades is not None, config.grade_width, config.arc)
    optimizer, scheduler = make_optimizer(clip, config, steps)
    tokens = tokenizer(pairs.captions.sentences)
    report = progress or (lambda done, total, text: None)
    with torch.random.fork_rng(devices=[]):  # dropout, in the models that have it
        torch.manual_seed(seed)
        losses = fit(
            clip, pairs, tokens, prepare, optimizer, scheduler, steps, batch, seed, config.grade_width, report, device
        )
    found = {"before": before, "after": judge(clip, transform, tokenizer, held_out, device, seed)}
    settings = {**dataclasses.asdict(config), "model": model, "pretrained": pretrained}
    record = provenance(
        "finetune_clip",
        {**settings, "steps": steps, "batch": batch, "seed": seed, "uses_grades": pairs.grades is not None},
        {"weights": start},
        num_images=len(pairs),
        captions=pairs.captions.sentences,
        final_loss=float(np.mean(losses[-20:])),
        retrieval=found,
        trained_on=dict(inputs),
    )
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in transform.config.items()}
    opened = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    write_folder(clip, opened, record, out, halve=False, tokenizer=tokenizer)
    return losses, found
