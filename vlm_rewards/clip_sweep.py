"""Many CLIP rewards over one pass of the encoder: which prompts and which regularization score these frames well?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.clip_reward import PromptReward
from embodied.vlm_rewards.embeddings import Progress, frame_embeddings
from embodied.vlm_rewards.label_checks import Episodes, check_label
from embodied.vlm_rewards.label_store import fill_scores

Prompts = str | list[str]  # one sentence, or several that are averaged


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried: every goal with every baseline at every regularization.

    Attributes:
        goals: each a prompt, or a list of prompts that are averaged.
        baselines: the same; none where only regularization 0 is tried.
        regularizations: each in [0, 1]. At 0 the baseline has no say, so there is one row per goal.
    """

    goals: list[Prompts]
    baselines: list[Prompts] = dataclasses.field(default_factory=list)
    regularizations: list[float] = dataclasses.field(default_factory=lambda: [0.0])

    def rows(self) -> list[tuple[list[str], list[str], float]]:
        """(goal prompts, baseline prompts, regularization) in the order given, goals first. Raises ConfigError."""
        if not self.goals or not self.regularizations:
            raise ConfigError("A sweep needs at least one goal and one regularization.")
        if not self.baselines and any(self.regularizations):
            raise ConfigError("A sweep with a regularization above 0 needs 'baselines'.")
        found: list[tuple[list[str], list[str], float]] = []
        for goal in map(_listed, self.goals):
            for baseline in [_listed(b) for b in self.baselines] or [[]]:
                for regularization in self.regularizations:
                    row = (goal, baseline if regularization else [], float(regularization))
                    if row not in found:
                        found.append(row)
        return found


def _listed(prompts: Prompts) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def sweep_clip(
    store: EpisodeStore,
    camera: str,
    sweep: Sweep,
    load: dict[str, Any],
    episodes: Episodes,
    truth: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    workers: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Score every frame with each row of a sweep, and check the scores. No label set is written.

    The encoder runs once, or not at all where the store has its embeddings.

    Args:
        load: arguments of `ClipEncoder`.
        episodes: those that are looked at.
        truth: (F,) true progress and (F,) true reward, where they are known.
        workers: as in `frame_embeddings`.

    Returns:
        Per row of the sweep, in its order: `goals`, `baselines`, `regularization`, and `check_label`'s findings.

    Raises:
        ConfigError: a row that is no reward, before anything is embedded; errors of `frame_embeddings`.
    """
    rows = sweep.rows()
    store.frames(camera, 0, 0)  # before the model is loaded
    encoder = ClipEncoder(**load)
    rewards = [PromptReward(encoder, *row) for row in rows]
    embeddings, valid = frame_embeddings(store, camera, encoder, load, workers, progress)
    return [
        {**reward.config, **check_label(fill_scores(store, reward.of(embeddings), valid), episodes, *truth)}
        for reward in rewards
    ]


def spread_text(checks: dict[str, Any]) -> str:
    """The standard deviation of all scores, and the share of it that lies inside episodes."""
    return f"{checks['spread']['std']:.3f} ({checks['spread']['within']:.0%} within)"


def prompts_text(prompts: Sequence[str]) -> str:
    """Prompts as one cell of a table."""
    return " | ".join(prompts) or "-"
