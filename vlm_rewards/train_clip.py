"""Trains one small CLIP on captioned pictures and writes it in open_clip's own folder format.

How to call it:

    from embodied.vlm_rewards.train_clip import train_small_clip

    train_small_clip(
        images,            # (N, 64, 64, 3) uint8
        captions,          # per image a sentence that is true of it, or a list of them (paraphrases help)
        out_folder,        # must not exist; gets open_clip_config.json, open_clip_model.safetensors, provenance.json
        steps=1500, batch=64, seed=0,
        grades=grades,     # optional (N,) in [0, 1]: how far along the task each image is
        progress=callback, # optional callback(done, total, text)
    )

The folder then loads like any other model: `ClipEncoder(str(out_folder))`, or without this package
`open_clip.create_model_and_transforms("local-dir:" + str(out_folder))`.

Without `grades` the loss is CLIP's (Radford et al. 2021, arXiv 2103.00020, figure 3), except that a sentence which
holds for several images of the batch is a positive for all of them. With `grades` a sentence may also be half true:
see `degree_of_truth`. Grades come from a simulator, so a model trained with them has been shown the order of the
task's stages: say so where its labels are reported. It knows the scenes and words it was shown and nothing else.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError, TrainingError
from embodied.contracts.provenance import provenance

VOCABULARY = 49408  # size of CLIP's byte-pair vocabulary, which open_clip's default tokenizer uses
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # of values in [0, 1]

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class SmallClipConfig:
    """Sizes and optimiser of `train_small_clip`. The defaults give a file of about 7.5 MB.

    Attributes:
        image_layers, image_width, image_head_width: open_clip's ModifiedResNet: convolutions need few images.
        text_width, text_layers, text_heads, context_length: open_clip's text transformer. The token table has 49,408
            rows of `text_width`, so this width decides the file size.
        learning_rate, weight_decay, warmup: AdamW with linear warm-up (fraction of the steps) and cosine decay.
        temperature: starting temperature of the contrastive softmax where no grades are given (then learned).
        grade_width: standard deviation of `degree_of_truth`, in grades. Smaller tells neighbouring stages apart
            better and follows noise in the grades more.
        arc: wanted angle between the embeddings of grades 0 and 1 [rad]; below pi the reward rises all the way.
        word_dropout: chance that a word is replaced by the embedding of an unknown word, which is zero.
        max_shift: random shift of the image [pixel].
        jitter: random change of brightness, contrast and single colour channels, as a fraction.
    """

    embedding_dim: int = 64
    image_layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    image_width: int = 16
    image_head_width: int = 64
    text_width: int = 48
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    temperature: float = 0.07
    grade_width: float = 0.12
    arc: float = 2.0
    word_dropout: float = 0.1
    max_shift: int = 3
    jitter: float = 0.15

    def open_clip_config(self, image_size: int) -> dict[str, Any]:
        """The content of open_clip_config.json."""
        return {
            "model_cfg": {
                "embed_dim": self.embedding_dim,
                "vision_cfg": {
                    "image_size": image_size,
                    "layers": list(self.image_layers),
                    "width": self.image_width,
                    "head_width": self.image_head_width,
                },
                "text_cfg": {
                    "context_length": self.context_length,
                    "vocab_size": VOCABULARY,
                    "width": self.text_width,
                    "heads": self.text_heads,
                    "layers": self.text_layers,
                },
            },
            "preprocess_cfg": {
                "size": [image_size, image_size],
                "mean": [PIXEL_MEAN] * 3,
                "std": [PIXEL_STD] * 3,
                "interpolation": "bicubic",
                "resize_mode": "squash",
            },
        }


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


class KnownWords(nn.Module):
    """The rows of the token table that the captions use, stood in for the whole table while training.

    Training 49,408 rows for a few dozen words would cost most of the step. Unknown words keep the zero embedding,
    which `dropout` makes the network used to, and which compresses to nothing in a package.
    """

    def __init__(self, tokens: torch.Tensor, width: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.known = tokens.unique()  # sorted; the last two are the start and end marks
        self.row = torch.zeros(VOCABULARY, dtype=torch.long)
        self.row[self.known] = torch.arange(len(self.known))
        self.weight = nn.Parameter(0.02 * torch.randn(len(self.known), width, generator=generator))
        self.dropout = dropout
        self.generator = generator

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        embedded = self.weight[self.row[text]]
        if not self.training or self.dropout == 0:
            return embedded
        kept = torch.rand(text.shape, generator=self.generator) >= self.dropout
        return embedded * (kept | (text >= VOCABULARY - 2))[..., None]

    def whole_table(self) -> torch.Tensor:
        """(49408, width), zero for unknown words."""
        table = torch.zeros(VOCABULARY, self.weight.shape[1])
        table[self.known] = self.weight.detach()
        return table


@dataclasses.dataclass(frozen=True)
class Captions:
    """The sentences, numbered."""

    sentences: list[str]
    of_image: list[np.ndarray]  # N arrays of indices into `sentences`
    centres: torch.Tensor  # (K,) mean of the grades each is used for
    spreads: torch.Tensor  # (K,) and their standard deviation


def index_captions(captions: Sequence[str | Sequence[str]], grades: np.ndarray | None) -> Captions:
    """Number the sentences and gather their grades."""
    rows = [[row] if isinstance(row, str) else list(row) for row in captions]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise InputError(f"captions[{empty[0]}] has no sentence; give each image at least one.")
    sentences = sorted({sentence for row in rows for sentence in row})
    if len(sentences) < 2:
        raise InputError("All captions are the same sentence; a contrast needs at least two.")
    number = {sentence: index for index, sentence in enumerate(sentences)}
    of_image = [np.unique([number[sentence] for sentence in row]) for row in rows]
    centres = np.zeros(len(sentences))
    spreads = np.zeros(len(sentences))
    if grades is not None:
        flat = np.concatenate(of_image)
        repeated = np.repeat(grades, [len(row) for row in of_image])
        count = np.bincount(flat)
        centres = np.bincount(flat, repeated) / count
        spreads = np.sqrt(np.maximum(np.bincount(flat, repeated**2) / count - centres**2, 0))
    return Captions(sentences, of_image, torch.from_numpy(centres).float(), torch.from_numpy(spreads).float())


def check_inputs(
    images: np.ndarray, captions: Sequence[str | Sequence[str]], grades: np.ndarray | None, out: Path
) -> None:
    """Raise InputError for anything that would fail late or teach nothing."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"images must be (N, S, S, 3) uint8, square; got {images.shape} {images.dtype}.")
    if images.shape[1] % 32:
        raise InputError(f"The image side must be a multiple of 32 pixels; got {images.shape[1]}.")
    if len(captions) != len(images):
        raise InputError(f"{len(images)} images but {len(captions)} captions; each image needs its own.")
    if grades is not None and (grades.shape != (len(images),) or not ((grades >= 0) & (grades <= 1)).all()):
        raise InputError(f"grades must be ({len(images)},) numbers in [0, 1]; got shape {grades.shape}.")
    if out.exists():
        raise InputError(f"{out} exists already.\nChoose another folder, or delete this one to train again.")


def build_model(config: SmallClipConfig, image_size: int, seed: int) -> Any:
    """An untrained open_clip CLIP; the same seed gives the same weights and leaves the global generator alone."""
    try:
        from open_clip.model import CLIP
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "clip", "Training a CLIP") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**config.open_clip_config(image_size)["model_cfg"])


def make_optimizer(model: nn.Module, config: SmallClipConfig, steps: int) -> tuple[Any, Any]:
    """AdamW (decay on matrices only) and its warm-up-then-cosine schedule."""
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


def write_folder(model: Any, opened: dict[str, Any], record: dict[str, Any], out: Path) -> None:
    """The three files, whole or not at all. Matrices are stored as float16; open_clip copies them into float32."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        halved = tensor.is_floating_point() and tensor.ndim >= 2
        tensors[name] = (tensor.half() if halved else tensor).contiguous().clone()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "open_clip_model.safetensors")
    (partial / "open_clip_model.safetensors").chmod(0o644)  # safetensors makes it private to its owner
    (partial / "open_clip_config.json").write_text(json.dumps(opened, indent=2) + "\n")
    (partial / "provenance.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    os.replace(partial, out)


def train_small_clip(
    images: np.ndarray,
    captions: Sequence[str | Sequence[str]],
    out_folder: str | Path,
    steps: int = 1500,
    batch: int = 64,
    seed: int = 0,
    grades: np.ndarray | None = None,
    config: SmallClipConfig | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a small CLIP on captioned images and write it as an open_clip folder.

    Args:
        images: (N, S, S, 3) uint8; S a multiple of 32, 64 in the shipped model.
        captions: N sentences, or N lists of sentences of which each step draws one.
        out_folder: created whole at the end; must not exist.
        steps, batch: gradient steps and images per step; 1,500 of 64 take about five minutes on one core.
        seed: of weights, batches and augmentation; on one machine the same seed gives the same file.
        grades: (N,) in [0, 1], how far along the task each image is; None to use the captions alone.
        config: sizes and optimiser.
        progress: called every 10 steps with (done, total, text).

    Returns:
        The loss of each step.

    Raises:
        InputError: shapes, captions or grades that do not fit, or an existing folder.
        ConfigError: steps or batch too small.
        TrainingError: the loss became NaN.
        MissingExtraError: open_clip is not installed.
    """
    config = config or SmallClipConfig()
    out = Path(out_folder)
    grades = None if grades is None else np.asarray(grades, dtype=np.float64)
    check_inputs(images, captions, grades, out)
    if steps < 1 or batch < 2:
        raise ConfigError(f"steps must be at least 1 and batch at least 2; got {steps} and {batch}.")
    table = index_captions(captions, grades)
    model = build_model(config, images.shape[1], seed)
    losses = fit(model, images, table, grades, config, steps, batch, seed, progress or (lambda done, total, text: None))
    record = provenance(
        "train_small_clip",
        {**dataclasses.asdict(config), "steps": steps, "batch": batch, "seed": seed, "uses_grades": grades is not None},
        {},
        num_images=len(images),
        captions=table.sentences,
        final_loss=float(np.mean(losses[-20:])),
    )
    write_folder(model, config.open_clip_config(images.shape[1]), record, out)
    return losses


def fit(
    model: Any,
    images: np.ndarray,
    table: Captions,
    grades: np.ndarray | None,
    config: SmallClipConfig,
    steps: int,
    batch: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """The training loop. Leaves `model` whole and in evaluation mode; returns the losses."""
    import open_clip

    generator = torch.Generator().manual_seed(seed)
    tokens = open_clip.SimpleTokenizer(context_length=config.context_length)(table.sentences)  # (K, context)
    words = KnownWords(tokens, config.text_width, config.word_dropout, generator)
    full_embedding, model.token_embedding = model.token_embedding, words
    if grades is None:
        model.logit_scale.data.fill_(math.log(1 / config.temperature))
    else:
        # Cosines along an arc of this angle then have the curvature of degree_of_truth; a learned scale could drift
        # to a tiny arc with huge logits, where noise is as large as the signal.
        model.logit_scale.data.fill_(-2 * math.log(config.grade_width * config.arc))
        model.logit_scale.requires_grad_(False)
    optimizer, scheduler = make_optimizer(model, config, steps)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        chosen = rng.choice(len(images), size=min(batch, len(images)), replace=False)
        drawn = np.unique([rng.choice(table.of_image[i]) for i in chosen])
        truth = truth_of(chosen, drawn, table, grades, config.grade_width)  # (B, K)
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255
        pixels = (augment(pixels, config.max_shift, config.jitter, generator) - PIXEL_MEAN) / PIXEL_STD
        seen = model.encode_image(pixels, normalize=True)  # (B, D)
        said = model.encode_text(tokens[drawn], normalize=True)  # (K, D)
        loss = contrastive_loss(model.logit_scale.exp() * seen @ said.T, truth)
        if not torch.isfinite(loss):
            raise TrainingError(f"The loss is {loss.item()} at step {step}; lower learning_rate (nothing was written).")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        losses.append(loss.item())
        if step % 10 == 9 or step == steps - 1:
            progress(step + 1, steps, f"loss {np.mean(losses[-20:]):.3f}")
    full_embedding.weight.data.copy_(words.whole_table())
    model.token_embedding = full_embedding
    model.eval()
    return losses


def truth_of(
    chosen: np.ndarray, drawn: np.ndarray, table: Captions, grades: np.ndarray | None, width: float
) -> torch.Tensor:
    """(B, K) targets of the images `chosen` and the sentences `drawn`: `degree_of_truth`, or 0 and 1 without grades."""
    if grades is None:
        return torch.from_numpy(np.stack([np.isin(drawn, table.of_image[i]) for i in chosen])).float()
    of_images = torch.from_numpy(grades[chosen]).float()
    return degree_of_truth(of_images, table.centres[drawn], table.spreads[drawn], width)
