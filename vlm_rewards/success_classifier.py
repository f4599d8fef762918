"""Success as a probability, learned from a handful of marked frames: L2 logistic regression on CLIP embeddings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from embodied.contracts.errors import InputError
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards.frame_table import read_table
from embodied.vlm_rewards.label_checks import RESAMPLES, separation

PENALTIES = tuple(10.0**power for power in range(-4, 2))  # of the squared weights, per mark
UNCHOSEN = 1e-2  # where there are too few episodes to choose a penalty
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Marks:
    """Frames that someone, or an episode's outcome, calls success or not.

    Attributes:
        row: (M,) frame in the store.
        episode: (M,) its episode.
        success: (M,) bool.
    """

    row: np.ndarray
    episode: np.ndarray
    success: np.ndarray

    def __post_init__(self) -> None:
        positives = int(self.success.sum())
        if positives == 0 or positives == len(self.success):
            which = "success" if positives else "failure"
            raise InputError(
                f"All {len(self.success)} marked frames are marked as {which}; a classifier needs both.\n"
                "Mark frames of the other kind too, also in successful episodes before the task is done."
            )


def read_marks(path: Path, store: EpisodeStore) -> Marks:
    """Marks from CSV or JSON lines with `episode`, `frame` (in the episode, from 0) and `success` (1 or 0).

    Raises:
        InputError: unreadable (see `read_table`), a frame the store has not, one that is marked twice, one class only.
    """
    rows, episodes, success = [], [], []
    for line, mark in read_table(path, {"episode": int, "frame": int, "success": bool}):
        episode, frame = mark["episode"], mark["frame"]
        if episode >= store.num_episodes or frame >= store.episode_length[episode]:
            raise InputError(f"{path} line {line}: {store.path} has no frame {frame} in episode {episode}.")
        row = int(store.episode_start[episode]) + frame
        if row in rows:
            raise InputError(f"{path} line {line}: frame {frame} of episode {episode} is marked twice.")
        rows.append(row)
        episodes.append(episode)
        success.append(mark["success"])
    return Marks(np.array(rows), np.array(episodes), np.array(success, bool))


def final_marks(store: EpisodeStore) -> Marks:
    """The final frame of every episode whose outcome is known. Raises InputError where only one outcome occurs."""
    known = np.flatnonzero(store.success >= 0)
    if len(known) == 0:
        raise InputError(f"{store.path} has no episode of known outcome; mark frames and give --marks FILE.")
    return Marks((store.episode_start + store.episode_length - 1)[known], known, store.success[known] == 1)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """p(success) = sigmoid((x - centre) / scale · weight + bias). centre, weight: (D,) float64."""

    centre: np.ndarray
    scale: float
    weight: np.ndarray
    bias: float

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, D) -> (N,) float64 in [0, 1]."""
        return expit((np.asarray(embeddings, np.float64) - self.centre) / self.scale @ self.weight + self.bias)


def fit_classifier(embeddings: np.ndarray, success: np.ndarray, penalty: float) -> Classifier:
    """The minimum of mean log loss + penalty / 2 * |weight|², by L-BFGS in float64. The bias is free.

    CLIP embeddings of one scene are close together, so they are centred and divided by their root mean squared
    distance from the centre: the penalty means the same for every encoder.

    Args:
        embeddings: (M, D); success: (M,) bool with both values.
    """
    features = np.asarray(embeddings, np.float64)
    centre = features.mean(0)
    features = features - centre
    scale = float(np.sqrt((features**2).sum(1).mean())) or 1.0
    features /= scale
    signs = np.where(success, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parameters[:-1], parameters[-1]
        margins = signs * (features @ weight + bias)
        slope = -signs * expit(-margins) / len(signs)
        value = np.logaddexp(0.0, -margins).mean() + 0.5 * penalty * weight @ weight
        return float(value), np.append(features.T @ slope + penalty * weight, slope.sum())

    found: Any = minimize(
        loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-7}
    )
    return Classifier(centre, scale, found.x[:-1], float(found.x[-1]))


def folds_of(marks: Marks, chosen: np.ndarray) -> np.ndarray:
    """(M,) fold of each mark in `chosen` (bool), -1 for the others: whole episodes, both kinds in each if it can be.

    Episodes are dealt out in turn, those with only failures after those with a success.
    """
    episodes = np.unique(marks.episode[chosen])
    has_success = np.array([marks.success[chosen & (marks.episode == e)].any() for e in episodes])
    order = episodes[np.argsort(~has_success, kind="stable")]
    fold = np.full(len(marks.row), -1)
    for position, episode in enumerate(order):
        fold[chosen & (marks.episode == episode)] = position % min(FOLDS, len(order))
    return fold


def predict_held_out(
    embeddings: np.ndarray,
    marks: Marks,
    chosen: np.ndarray,
    fit: Callable[[np.ndarray], Classifier],
) -> np.ndarray:
    """(M,) probability of each mark in `chosen` by a classifier that saw no mark of its fold; NaN where none could.

    Args:
        fit: makes the classifier from a (M,) bool of marks.
    """
    fold = folds_of(marks, chosen)
    predicted = np.full(len(marks.row), np.nan)
    for number in range(fold.max() + 1):
        rest = chosen & (fold != number)
        if len(np.unique(marks.success[rest])) == 2:
            predicted[fold == number] = fit(rest)(embeddings[fold == number])
    return predicted


def choose_penalty(embeddings: np.ndarray, marks: Marks, chosen: np.ndarray) -> float:
    """The penalty of PENALTIES with the least cross-validated log loss, the greater of two; UNCHOSEN without folds."""
    best, least = UNCHOSEN, np.inf
    for penalty in PENALTIES:
        predicted = predict_held_out(
            embeddings,
            marks,
            chosen,
            lambda rest, p=penalty: fit_classifier(embeddings[rest], marks.success[rest], p),
        )
        seen = ~np.isnan(predicted)
        if not seen.any():
            return UNCHOSEN
        right = np.where(marks.success[seen], predicted[seen], 1 - predicted[seen])
        if (loss := float(-np.log(np.maximum(right, 1e-12)).mean())) <= least:
            best, least = penalty, loss
    return best


def train_classifier(embeddings: np.ndarray, marks: Marks) -> tuple[Classifier, dict[str, Any]]:
    """Fit all marks, with the penalty chosen by cross-validation over episodes.

    Args:
        embeddings: (M, D) of the marked frames.

    Returns:
        The classifier, and for the provenance: `marks`, `successes`, `episodes`, `penalty`, `held_out`. The latter is
        nested cross-validation over episodes, in which the penalty is chosen without the episodes it is judged on:
        `accuracy` (mean over episodes, with a bootstrap interval) and `separation` (AUC over episodes of the mean
        probability of their success marks and of their other marks); None where too few episodes are marked.
    """
    every = np.ones(len(marks.row), bool)

    def fit(rest: np.ndarray) -> Classifier:
        return fit_classifier(embeddings[rest], marks.success[rest], choose_penalty(embeddings, marks, rest))

    penalty = choose_penalty(embeddings, marks, every)
    found = {
        "marks": len(marks.row),
        "successes": int(marks.success.sum()),
        "episodes": len(np.unique(marks.episode)),
        "penalty": penalty,
        "held_out": _judge(predict_held_out(embeddings, marks, every, fit), marks),
    }
    return fit_classifier(embeddings, marks.success, penalty), found


def _judge(predicted: np.ndarray, marks: Marks) -> dict[str, Any] | None:
    seen = ~np.isnan(predicted)
    if not seen.any():
        return None
    episodes = np.unique(marks.episode[seen])
    right = (predicted > 0.5) == marks.success
    accuracy = np.array([right[seen & (marks.episode == e)].mean() for e in episodes])
    rng = np.random.default_rng(0)
    means = accuracy[rng.integers(len(accuracy), size=(RESAMPLES, len(accuracy)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    values, outcome = [], []
    for episode in episodes:
        for kind in (True, False):
            here = seen & (marks.episode == episode) & (marks.success == kind)
            if here.any():
                values.append(predicted[here].mean())
                outcome.append(int(kind))
    return {
        "episodes": len(episodes),
        "accuracy": {"mean": float(accuracy.mean()), "low": float(low), "high": float(high)},
        "separation": separation(np.array(values), np.array(outcome)),
    }
