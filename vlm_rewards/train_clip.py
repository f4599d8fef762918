"""Trains one small CLIP on captioned pictures and writes it in open_clip's own folder format.

How to call it:

    from embodied.vlm_rewards.train_clip import train_small_clip

    train_small_clip(
        images,            # (N, 64, 64, 3) uint8
        captions,          # N lists of sentences, each sentence true of its image (one suffices; paraphrases help)
        out_folder,        # must not exist; gets open_clip_config.json, open_clip_model.safetensors, provenance.json
        steps=1500, batch=64, seed=0,
        grades=grades,     # optional (N,) in [0, 1]: how far along the task each image is
        progress=callback, # optional callback(done, total, text)
    )

The folder then loads like any other model: `ClipLabeller(model=str(out_folder))`, or without this package
`open_clip.create_model_and_transforms("local-dir:" + str(out_folder))`.

Without `grades` the loss is CLIP's symmetric cross-entropy (Radford et al. 2021, arXiv 2103.00020, figure 3), except
that a sentence which holds for several images of the batch is a positive for all of them. With `grades` a sentence
may also be half true: see `degree_of_truth`. The grades come from a simulator, so a model trained with them has
been shown the order of the task's stages; say so where its labels are reported.

A model trained here knows the scenes and words it was shown and nothing else.
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

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class SmallClipConfig:
    """Sizes and optimiser of `train_small_clip`. The defaults give a file of about 7.5 MB.

    Attributes:
        embedding_dim: size of the joint embedding.
        image_layers, image_width, image_head_width: open_clip's ModifiedResNet. Convolutions learn small differences
            of position from few images; a ViT of the same cost needs many more.
        text_width, text_layers, text_heads, context_length: open_clip's text transformer. The token table has 49,408
            rows of `text_width`, so this width decides the file size.
        learning_rate, weight_decay, warmup: AdamW with linear warm-up (fraction of the steps) and cosine decay.
        temperature: starting temperature of the contrastive softmax where no grades are given (then learned).
        grade_width: standard deviation of `degree_of_truth`, in grades. Smaller tells neighbouring stages apart
            better and follows noise in the grades more.
        arc: angle between the embeddings of grade 0 and grade 1 that the loss asks for [rad]; below pi the reward
            rises all the way.
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
                "mean": [0.5, 0.5, 0.5],
                "std": [0.25, 0.25, 0.25],
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

    Args:
        grades: (B,); centres, spreads: (K,) mean and standard deviation of the grades each sentence was used for.

    Returns:
        (B, K).
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
    """Each image shifted by up to `max_shift` pixels (edge repeated), with its own brightness, contrast and colours.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, H, W) in [0, 1].
    """
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
    """The sentences as tables: which images each is used for, and around which grade."""

    sentences: list[str]
    of_image: list[np.ndarray]  # N arrays of indices into `sentences`
    centres: torch.Tensor  # (K,)
    spreads: torch.Tensor  # (K,)


def index_captions(captions: Sequence[Sequence[str]], grades: np.ndarray | None) -> Captions:
    """Number the sentences and find the mean and standard deviation of the grades that each was used for."""
    sentences = sorted({sentence for row in captions for sentence in row})
    number = {sentence: index for index, sentence in enumerate(sentences)}
    of_image = [np.array(sorted({number[sentence] for sentence in row}), dtype=np.int64) for row in captions]
    centres = np.zeros(len(sentences))
    spreads = np.zeros(len(sentences))
    if grades is not None:
        count, first, second = (np.zeros(len(sentences)) for _ in range(3))
        for row, grade in zip(of_image, grades, strict=True):
            count[row] += 1
            first[row] += grade
            second[row] += grade**2
        centres = first / count
        spreads = np.sqrt(np.maximum(second / count - centres**2, 0))
    return Captions(sentences, of_image, torch.from_numpy(centres).float(), torch.from_numpy(spreads).float())


def check_inputs(images: np.ndarray, captions: Sequence[Sequence[str]], grades: np.ndarray | None, out: Path) -> None:
    """Raise InputError for anything that would fail late or teach nothing."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"images must be (N, S, S, 3) uint8, square; got {images.shape} {images.dtype}.")
    if images.shape[1] % 32:
        raise InputError(f"The image side must be a multiple of 32 pixels; got {images.shape[1]}.")
    if len(captions) != len(images):
        raise InputError(f"{len(images)} images but {len(captions)} caption lists; give one list per image.")
    for index, row in enumerate(captions):
        if isinstance(row, str) or not row:
            raise InputError(f"captions[{index}] must be a list with at least one sentence; got {row!r}.")
    if len({sentence for row in captions for sentence in row}) < 2:
        raise InputError("All captions are the same sentence; a contrast needs at least two.")
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
    captions: Sequence[Sequence[str]],
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
        captions: N lists of sentences that hold for the image. Each step uses one of them, drawn at random.
        out_folder: created whole at the end; must not exist.
        steps: gradient steps; 1,500 of batch 64 take about five minutes on one core.
        batch: images per step.
        seed: of the weights, batches and augmentation; the same machine gives the same file for the same seed.
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
    opened = config.open_clip_config(images.shape[1])
    model = build_model(config, images.shape[1], seed)
    import open_clip  # after build_model, which words the error where it is absent

    generator = torch.Generator().manual_seed(seed)
    table = index_captions(captions, grades)
    tokens = open_clip.SimpleTokenizer(context_length=config.context_length)(table.sentences)  # (K, context)
    words = KnownWords(tokens, config.text_width, config.word_dropout, generator)
    full_embedding, model.token_embedding = model.token_embedding, words
    if grades is None:
        model.logit_scale.data.fill_(math.log(1 / config.temperature))
    else:
        # Cosines along an arc of this angle then have the curvature of degree_of_truth; a learned scale would drift
        # to a tiny arc with huge logits, where noise is as large as the signal.
        model.logit_scale.data.fill_(-2 * math.log(config.grade_width * config.arc))
        model.logit_scale.requires_grad_(False)
    losses = fit(model, images, table, tokens, grades, config, (steps, batch, seed), generator, progress)
    full_embedding.weight.data.copy_(words.whole_table())
    model.token_embedding = full_embedding
    record = provenance(
        "train_small_clip",
        {**dataclasses.asdict(config), "steps": steps, "batch": batch, "seed": seed, "uses_grades": grades is not None},
        {},
        num_images=len(images),
        captions=table.sentences,
        final_loss=float(np.mean(losses[-20:])),
    )
    write_folder(model, opened, record, out)
    return losses


def fit(
    model: Any,
    images: np.ndarray,
    table: Captions,
    tokens: torch.Tensor,
    grades: np.ndarray | None,
    config: SmallClipConfig,
    schedule: tuple[int, int, int],
    generator: torch.Generator,
    progress: Progress | None,
) -> list[float]:
    """The training loop; `schedule` is (steps, batch, seed). Leaves `model` in evaluation mode."""
    steps, batch, seed = schedule
    optimizer, scheduler = make_optimizer(model, config, steps)
    mean, std = 0.5, 0.25  # as in open_clip_config
    losses: list[float] = []
    model.train()
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        chosen = rng.choice(len(images), size=min(batch, len(images)), replace=False)
        drawn = np.unique([rng.choice(table.of_image[i]) for i in chosen])
        if grades is None:
            truth = torch.from_numpy(np.stack([np.isin(drawn, table.of_image[i]) for i in chosen])).float()
        else:
            truth = degree_of_truth(
                torch.from_numpy(grades[chosen]).float(),
                table.centres[drawn],
                table.spreads[drawn],
                config.grade_width,
            )
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255
        pixels = (augment(pixels, config.max_shift, config.jitter, generator) - mean) / std
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
        if progress and (step % 10 == 9 or step == steps - 1):
            progress(step + 1, steps, f"loss {np.mean(losses[-20:]):.3f}")
    model.eval()
    return losses
