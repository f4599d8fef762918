"""Pictures with sentences that are true of them, read as training asks for them, and how well a CLIP pairs them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from embodied.contracts.errors import InputError

RETRIEVED = 512  # pictures that retrieval is measured on, at most
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Captions:
    """The sentences, numbered."""

    sentences: list[str]
    of_image: list[np.ndarray]  # N arrays of indices into `sentences`
    centres: torch.Tensor  # (K,) mean of the grades each is used for
    spreads: torch.Tensor  # (K,) and their standard deviation


@dataclasses.dataclass(frozen=True)
class CaptionedFrames:
    """N pictures with captions. Only the pictures of a batch are in memory.

    Attributes:
        read: picture numbers (B,) -> (B, H, W, 3) uint8.
        captions: what is true of each.
        grades: (N,) in [0, 1], how far along the task each is, or None.
        episode: (N,) the episode each is of.
    """

    read: Callable[[np.ndarray], np.ndarray]
    captions: Captions
    grades: np.ndarray | None
    episode: np.ndarray

    def __len__(self) -> int:
        return len(self.captions.of_image)


def index_captions(captions: Sequence[str | Sequence[str]], grades: np.ndarray | None) -> Captions:
    """Number the sentences and gather their grades. Raises InputError for a picture without any, or only one in all."""
    rows = [(row,) if isinstance(row, str) else tuple(row) for row in captions]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise InputError(f"captions[{empty[0]}] has no sentence; give each image at least one.")
    sentences = sorted({sentence for row in set(rows) for sentence in row})
    if len(sentences) < 2:
        raise InputError("All captions are the same sentence; a contrast needs at least two.")
    number = {sentence: index for index, sentence in enumerate(sentences)}
    indices = {row: np.unique([number[sentence] for sentence in row]) for row in set(rows)}  # shared by equal rows
    of_image = [indices[row] for row in rows]
    centres = np.zeros(len(sentences))
    spreads = np.zeros(len(sentences))
    if grades is not None:
        flat = np.concatenate(of_image)
        repeated = np.repeat(grades, [len(row) for row in of_image])
        count = np.bincount(flat)
        centres = np.bincount(flat, repeated) / count
        spreads = np.sqrt(np.maximum(np.bincount(flat, repeated**2) / count - centres**2, 0))
    return Captions(sentences, of_image, torch.from_numpy(centres).float(), torch.from_numpy(spreads).float())


def squashed(read: Callable[[np.ndarray], np.ndarray], size: int) -> Callable[[np.ndarray], np.ndarray]:
    """`read` with pictures of size x size pixels, whatever their shape was (bicubic, antialiased, in uint8)."""

    def resized(numbers: np.ndarray) -> np.ndarray:
        frames = read(numbers)
        if frames.shape[1:3] == (size, size):
            return frames
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        small = functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        return small.permute(0, 2, 3, 1).contiguous().numpy()

    return resized


def retrieval(
    see: Callable[[np.ndarray], torch.Tensor],
    say: Callable[[list[str]], torch.Tensor],
    pairs: CaptionedFrames,
    seed: int = 0,
) -> dict[str, Any]:
    """How often the nearest sentence is true of a picture, and the nearest picture fits a sentence.

    Args:
        see: (B, H, W, 3) uint8 -> (B, D) unit vectors; say: K sentences -> (K, D) unit vectors.
        pairs: held out; at most RETRIEVED pictures, drawn by `seed`, are looked at.

    Returns:
        `images`, `episodes`, `sentences`; `image_to_text`: `mean` over episodes with `low` and `high` (95 %, bootstrap
        over episodes) and `chance`; `text_to_image`: `mean` over sentences, and `chance`.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 11]))
    chosen = np.sort(rng.choice(len(pairs), size=min(RETRIEVED, len(pairs)), replace=False))
    parts = [see(pairs.read(part)) for part in np.array_split(chosen, -(-len(chosen) // 32))]
    sentences = pairs.captions.sentences
    cosine = (torch.cat(parts) @ say(sentences).T).cpu().numpy()  # (B, K)
    true = np.zeros(cosine.shape, bool)
    for row, number in enumerate(chosen):
        true[row, pairs.captions.of_image[number]] = True
    right = true[np.arange(len(chosen)), cosine.argmax(1)]
    episodes, group = np.unique(pairs.episode[chosen], return_inverse=True)
    accuracy = np.bincount(group, right) / np.bincount(group)
    means = accuracy[rng.integers(len(accuracy), size=(RESAMPLES, len(accuracy)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    said = np.flatnonzero(true.any(0))
    return {
        "images": len(chosen),
        "episodes": len(episodes),
        "sentences": len(sentences),
        "image_to_text": {
            "mean": float(accuracy.mean()),
            "low": float(low),
            "high": float(high),
            "chance": float(true.mean()),
        },
        "text_to_image": {
            "mean": float(true[cosine.argmax(0)[said], said].mean()),
            "chance": float(true[:, said].mean()),
        },
    }
