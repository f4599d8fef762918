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
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.contracts.provenance import provenance
from embodied.vlm_rewards.caption_pairs import CaptionedFrames, index_captions
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

VOCABULARY = 49408  # size of CLIP's byte-pair vocabulary, which open_clip's default tokenizer uses
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # of values in [0, 1]


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


def check_inputs(images: np.ndarray, captions: Sequence[str | Sequence[str]], grades: np.ndarray | None) -> None:
    """Raise InputError for anything that would fail late or teach nothing."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"images must be (N, S, S, 3) uint8, square; got {images.shape} {images.dtype}.")
    if len(captions) != len(images):
        raise InputError(f"{len(images)} images but {len(captions)} captions; each image needs its own.")
    if grades is not None and (grades.shape != (len(images),) or not ((grades >= 0) & (grades <= 1)).all()):
        raise InputError(f"grades must be ({len(images)},) numbers in [0, 1]; got shape {grades.shape}.")


def build_model(config: SmallClipConfig, image_size: int, seed: int) -> Any:
    """An untrained open_clip CLIP; the same seed gives the same weights and leaves the global generator alone."""
    try:
        from open_clip.model import CLIP
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "clip", "Training a CLIP") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**config.open_clip_config(image_size)["model_cfg"])


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
    grades = None if grades is None else np.asarray(grades, dtype=np.float64)
    check_inputs(images, captions, grades)
    pairs = CaptionedFrames(
        lambda numbers: images[numbers], index_captions(captions, grades), grades, np.zeros(len(images), np.int64)
    )
    losses, _ = train_on_pairs(pairs, images.shape[1], out_folder, {}, steps, batch, seed, None, config, progress)
    return losses


def train_on_pairs(
    pairs: CaptionedFrames,
    image_size: int,
    out_folder: str | Path,
    inputs: Mapping[str, Any],
    steps: int,
    batch: int,
    seed: int,
    held_out: CaptionedFrames | None = None,
    config: SmallClipConfig | None = None,
    progress: Progress | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """`train_small_clip` on pictures that are read as they are needed.

    Args:
        pairs: with pictures of image_size x image_size pixels, a multiple of 32.
        inputs: for the provenance: what the pictures and captions are.
        held_out: pairs to measure retrieval on, before and after.

    Returns:
        The loss of each step, and `retrieval` before and after (each None without `held_out`).

    Raises:
        As `train_small_clip`.
    """
    config, out = config or SmallClipConfig(), Path(out_folder)
    check_run(out, steps, batch)
    if image_size % 32 or image_size < 32:
        raise InputError(f"The image side must be a multiple of 32 pixels; got {image_size}.")
    model = build_model(config, image_size, seed)
    tokenizer = _tokenizer(config)

    def judged() -> dict[str, Any] | None:
        return judge(model, lambda frames: _pixels(frames)[1], tokenizer, held_out, "cpu", seed)

    before = judged()
    losses = fit_small(model, pairs, config, steps, batch, seed, progress or (lambda done, total, text: None))
    found = {"before": before, "after": judged()}
    record = provenance(
        "train_small_clip",
        {
            **dataclasses.asdict(config),
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "uses_grades": pairs.grades is not None,
        },
        {},
        num_images=len(pairs),
        captions=pairs.captions.sentences,
        final_loss=float(np.mean(losses[-20:])),
        retrieval=found,
        trained_on=dict(inputs),
    )
    write_folder(model, config.open_clip_config(image_size), record, out)
    return losses, found


def _tokenizer(config: SmallClipConfig) -> Any:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=config.context_length)


def _pixels(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) in [0, 1], and the same normalised as the model wants it."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    return pixels, (pixels - PIXEL_MEAN) / PIXEL_STD


def fit_small(
    model: Any,
    pairs: CaptionedFrames,
    config: SmallClipConfig,
    steps: int,
    batch: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train a small model. Leaves `model` whole and in evaluation mode; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    tokens = _tokenizer(config)(pairs.captions.sentences)  # (K, context)
    words = KnownWords(tokens, config.text_width, config.word_dropout, generator)
    full_embedding, model.token_embedding = model.token_embedding, words
    set_scale(model, pairs.grades is not None, config.grade_width, config.arc)
    if pairs.grades is None:
        model.logit_scale.data.fill_(math.log(1 / config.temperature))

    def prepare(frames: np.ndarray) -> torch.Tensor:
        return (augment(_pixels(frames)[0], config.max_shift, config.jitter, generator) - PIXEL_MEAN) / PIXEL_STD

    optimizer, scheduler = make_optimizer(model, config, steps)
    losses = fit(model, pairs, tokens, prepare, optimizer, scheduler, steps, batch, seed, config.grade_width, progress)
    full_embedding.weight.data.copy_(words.whole_table())
    model.token_embedding = full_embedding
    return losses
