"""What every training of a CLIP shares: the loss with soft targets, the loop, and open_clip's folder format."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embodied.contracts.errors import ConfigError, InputError, TrainingError
from embodied.datasets.prefetch import Prefetcher
from embodied.vlm_rewards.caption_pairs import CaptionedFrames, Captions, retrieval

Progress = Callable[[int, int, str], None]


def degree_of_truth(grades: torch.Tensor, centres: torch.Tensor, spreads: torch.Tensor, width: float) -> torch.Tensor:
    """How true each sentence is of each image, in (0, 1].

    T[i, k] = exp(-(grade_i - centre_k)^2 / (2 (width^2 + spread_k^2))). A sentence used for one stage is true there
    and fades with distance; a sentence used throughout ("a robot arm and a cube") is true everywhere. A softmax of
    scaled cosines can meet such targets exactly when the embeddings lie on an arc whose angle is proportional to the
    grade, since cos(x) is 1 - x^2/2 to second order. That is what makes the reward rise with the grade.

    grades: (B,); centres, spreads: (K,) mean and standard deviation of the grades each sentence was used for.
    """
    distance = grades[:, None] - centres[None, :]
    return torch.exp(-0.5 * distance**2 / (width**2 + spreads[None, :] ** 2))


def contrastive_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies against soft targets.

    Args:
        logits: (B, K) scaled cosines.
        truth: (B, K) non-negative, with a positive entry in each row and column; rows (columns) are normalised to 1.

    Returns:
        Scalar. With a square identity `truth` this is CLIP's loss.
    """
    by_image = truth / truth.sum(1, keepdim=True)
    by_text = truth / truth.sum(0, keepdim=True)
    image_to_text = -(by_image * logits.log_softmax(1)).sum(1).mean()
    text_to_image = -(by_text * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * (image_to_text + text_to_image)


def truth_of(
    chosen: np.ndarray, drawn: np.ndarray, table: Captions, grades: np.ndarray | None, width: float
) -> torch.Tensor:
    """(B, K) targets of the images `chosen` and the sentences `drawn`: `degree_of_truth`, or 0 and 1 without grades."""
    if grades is None:
        return torch.from_numpy(np.stack([np.isin(drawn, table.of_image[i]) for i in chosen])).float()
    of_images = torch.from_numpy(grades[chosen]).float()
    return degree_of_truth(of_images, table.centres[drawn], table.spreads[drawn], width)


def augment(images: torch.Tensor, max_shift: int, jitter: float, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], each shifted (edge repeated) and with its own brightness, contrast and colours."""
    count, _, height, width = images.shape
    shift = torch.randint(-max_shift, max_shift + 1, (2, count), generator=generator)
    rows = (torch.arange(height)[None] + shift[0][:, None]).clamp_(0, height - 1)
    columns = (torch.arange(width)[None] + shift[1][:, None]).clamp_(0, width - 1)
    which = torch.arange(count)[:, None, None]
    shifted = images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def factor(*shape: int) -> torch.Tensor:
        return 1 + jitter * (2 * torch.rand(shape, generator=generator) - 1)

    mean = shifted.mean((1, 2, 3), keepdim=True)
    contrasted = (shifted - mean) * factor(count, 1, 1, 1) + mean * factor(count, 1, 1, 1)
    coloured = contrasted * (1 + 0.5 * (factor(count, 3, 1, 1) - 1))
    return coloured.clamp_(0, 1)


def set_scale(model: Any, graded: bool, grade_width: float, arc: float) -> None:
    """Fix the scale of the cosines where there are grades; it is learned where there are none."""
    if graded:
        # Cosines along an arc of this angle then have the curvature of degree_of_truth; a learned scale could drift
        # to a tiny arc with huge logits, where noise is as large as the signal.
        model.logit_scale.data.fill_(-2 * math.log(grade_width * arc))
        model.logit_scale.requires_grad_(False)


def make_optimizer(model: nn.Module, config: Any, steps: int) -> tuple[Any, Any]:
    """AdamW (decay on matrices only) and its warm-up-then-cosine schedule.

    config: has `learning_rate`, `weight_decay` and `warmup`.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    warmup = max(1, round(config.warmup * steps))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def check_run(out: Path, steps: int, batch: int) -> None:
    """Raise InputError where `out` exists, ConfigError where nothing could be learned."""
    if out.exists():
        raise InputError(f"{out} exists already.\nChoose another folder, or delete this one to train again.")
    if steps < 1 or batch < 2:
        raise ConfigError(f"steps must be at least 1 and batch at least 2; got {steps} and {batch}.")


def fit(
    model: Any,
    pairs: CaptionedFrames,
    tokens: torch.Tensor,
    prepare: Callable[[np.ndarray], torch.Tensor],
    optimizer: Any,
    scheduler: Any,
    steps: int,
    batch: int,
    seed: int,
    grade_width: float,
    progress: Progress,
    device: str = "cpu",
) -> list[float]:
    """The training loop of any open_clip model, left in evaluation mode. The next batches are read meanwhile.

    Args:
        tokens: (K, context) of all sentences.
        prepare: (B, H, W, 3) uint8 -> what `model.encode_image` takes.

    Returns:
        The loss of each step.
    """

    def load(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures drawn for a step, one sentence each, and the pictures themselves: by seed and step alone."""
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        chosen = rng.choice(len(pairs), size=min(batch, len(pairs)), replace=False)
        drawn = np.unique([rng.choice(pairs.captions.of_image[i]) for i in chosen])
        return chosen, drawn, pairs.read(chosen)

    losses: list[float] = []
    model.train()
    with Prefetcher(load, steps) as batches:
        for step in range(steps):
            chosen, drawn, frames = batches(step)
            truth = truth_of(chosen, drawn, pairs.captions, pairs.grades, grade_width).to(device)  # (B, K)
            seen = model.encode_image(prepare(frames).to(device), normalize=True)  # (B, D)
            said = model.encode_text(tokens[drawn].to(device), normalize=True)  # (K, D)
            loss = contrastive_loss(model.logit_scale.exp() * seen @ said.T, truth)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The loss is {loss.item()} at step {step}; lower learning_rate (nothing was written)."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            model.logit_scale.data.clamp_(0, math.log(100))
            losses.append(loss.item())
            if step % 10 == 9 or step == steps - 1:
                progress(step + 1, steps, f"loss {np.mean(losses[-20:]):.3f}")
    model.eval()
    return losses


def judge(
    model: Any,
    prepare: Callable[[np.ndarray], torch.Tensor],
    tokenizer: Any,
    pairs: CaptionedFrames | None,
    device: str,
    seed: int,
) -> dict[str, Any] | None:
    """`retrieval` of a model in evaluation mode, which it is left in; None without pairs."""
    if pairs is None:
        return None
    model.eval()
    with torch.inference_mode():
        return retrieval(
            lambda frames: model.encode_image(prepare(frames).to(device), normalize=True),
            lambda sentences: model.encode_text(tokenizer(sentences).to(device), normalize=True),
            pairs,
            seed,
        )


def write_folder(
    model: Any, opened: dict[str, Any], record: dict[str, Any], out: Path, halve: bool = True, tokenizer: Any = None
) -> None:
    """The three files, and a Hugging Face tokenizer's own, whole or not at all.

    halve: store matrices as float16, which open_clip copies into float32. The small steps of fine-tuning would be lost.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        halved = halve and tensor.is_floating_point() and tensor.ndim >= 2
        tensors[name] = (tensor.half() if halved else tensor).contiguous().clone()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "open_clip_model.safetensors")
    (partial / "open_clip_model.safetensors").chmod(0o644)  # safetensors makes it private to its owner
    (partial / "open_clip_config.json").write_text(json.dumps(opened, indent=2) + "\n")
    (partial / "provenance.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(partial)
    os.replace(partial, out)
