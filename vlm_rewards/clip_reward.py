"""CLIP rewards: how well a frame fits a goal sentence, sharpened by a baseline sentence (VLM-RM).

Rocamonde et al. 2023, "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning",
arXiv 2310.12921, definition 1. Frozen CLIP; nothing is learned here.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.vlm_rewards.clip_encoder import ClipEncoder


def goal_baseline_reward(
    image_embeddings: np.ndarray, goal: np.ndarray, baseline: np.ndarray | None = None, regularization: float = 0.0
) -> np.ndarray:
    """Goal-baseline regularized reward: 1 - |P (x - g)|^2 / 2, P = a d d^T / |d|^2 + (1 - a) I, d = g - b.

    P acts on x - g, not on x: it projects onto the line *through* g and b. a = 0 is the cosine (for unit g), and needs
    no baseline; a = 1 keeps only the coordinate along the line, a parabola with its maximum of 1 at g.

    Args:
        image_embeddings: (N, D) unit vectors x.
        goal: (D,) g; baseline: (D,) b.
        regularization: a in [0, 1].

    Returns:
        (N,) float64.

    Raises:
        ConfigError: a outside [0, 1], or above 0 with no baseline or one equal to the goal.
    """
    if not 0.0 <= regularization <= 1.0:
        raise ConfigError(f"regularization must lie in [0, 1]; got {regularization}.")
    offset = np.asarray(image_embeddings, np.float64) - np.asarray(goal, np.float64)  # (N, D)
    squared = np.einsum("nd,nd->n", offset, offset)
    if regularization == 0.0:
        return 1.0 - 0.5 * squared
    if baseline is None:
        raise ConfigError("regularization above 0 needs a baseline prompt; give one, or set regularization to 0.")
    direction = np.asarray(goal, np.float64) - np.asarray(baseline, np.float64)
    length = np.linalg.norm(direction)
    if length < 1e-6:
        raise ConfigError("Goal and baseline prompts have the same embedding; use sentences that differ in meaning.")
    along = offset @ (direction / length)  # (N,) the part of x - g that P keeps whole
    across = squared - along**2  # the part that P shrinks by 1 - a
    return 1.0 - 0.5 * (along**2 + (1.0 - regularization) ** 2 * across)


class PromptReward:
    """The reward that goal and baseline prompts make of image embeddings.

    Several prompts are averaged and the mean is normalised again, unlike the reference code, so that
    regularization 0 is a cosine for any number of prompts.

    Args:
        encoder: of the frames that are scored.
        goals: goal prompts, state sentences ("the cube is lifted above the table").
        baselines: neutral or opposite descriptions of the scene; needed for regularization above 0.
        regularization: strength in [0, 1]; see `goal_baseline_reward`.

    Attributes:
        config: what decides a score beside the encoder. JSON-able.

    Raises:
        ConfigError: no goal, an empty prompt, or a regularization that does not fit.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        goals: Sequence[str],
        baselines: Sequence[str] = (),
        regularization: float = 0.0,
    ) -> None:
        if not goals or any(not prompt.strip() for prompt in [*goals, *baselines]):
            raise ConfigError("CLIP labelling needs at least one goal prompt, and no prompt may be empty.")
        self.unknown_words = encoder.unknown_words([*goals, *baselines])
        if self.unknown_words:
            model = encoder.identity["model"]
            warnings.warn(f"{model} was not trained on the words {', '.join(self.unknown_words)}.", stacklevel=2)
        self._goal = _mean_prompt(encoder, goals)
        self._baseline = _mean_prompt(encoder, baselines) if baselines else None
        self._regularization = regularization
        # Wrong combinations are errors now, not after an hour of embedding.
        goal_baseline_reward(self._goal[None], self._goal, self._baseline, regularization)
        self.config: dict[str, Any] = {
            "goals": list(goals),
            "baselines": list(baselines),
            "regularization": regularization,
            "unknown_words": self.unknown_words,
        }

    def of(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, D) unit vectors -> (N,) float32 rewards."""
        return goal_baseline_reward(embeddings, self._goal, self._baseline, self._regularization).astype(np.float32)


class ClipLabeller:
    """Scores frames with CLIP. Satisfies `contracts.protocols.Labeller`; arguments as `ClipEncoder`, `PromptReward`."""

    def __init__(self, encoder: ClipEncoder, reward: PromptReward) -> None:
        self._encoder, self._reward = encoder, reward
        self.config: dict[str, Any] = {**encoder.identity, **reward.config}

    def score(self, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N,) float32 rewards."""
        return self._reward.of(self._encoder.embed(frames))


def _mean_prompt(encoder: ClipEncoder, prompts: Sequence[str]) -> np.ndarray:
    mean = encoder.embed_text(prompts).mean(0)
    return mean / np.linalg.norm(mean)
