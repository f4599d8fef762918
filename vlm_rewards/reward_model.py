"""A reward per frame from preferences between segments: Bradley and Terry's model with ties, an ensemble, calibrated.

The reward of a segment is the sum over its frames, s = k sum_t r(x_t). Rewards that end in a tanh differ by 2 at most,
which would make nobody sure of anything: fitted to answers without errors they run into both ends, and whatever is
better than most becomes alike. So k, how sharply rewards are told apart, is learned with them, per member.

Ties follow Davidson (1970): the log-odds of (first, second, neither) are s1, s2, (s1 + s2) / 2 + log nu, nu learned per
member. Without ties this is Bradley and Terry's P(second) = sigmoid(s2 - s1), the loss of RL-VLM-F and PEBBLE, which
have k = 1.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch import Tensor

from embodied.contracts.errors import ConfigError, InputError, LabelError
from embodied.contracts.preferences import Answer
from embodied.vlm_rewards.reward_networks import SCALES, Ensemble, Rows

TIES, NOISY = ("davidson", "half", "drop"), ("auto", "drop", "flip", "keep")
_SHARP, _SHARPEN = 10.0, 0.01  # k at first, of one frame, and how fast its logarithm is learned
_FORWARD = 256  # frames per pass when scoring: always this many, so that a score does not depend on its neighbours
_BINS = 10


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """How a reward model is fitted.

    Attributes:
        network: `mlp` on vectors, `cnn` or `resnet18` on pictures.
        members: networks in the ensemble; each draws its own start and its own order of the same pairs.
        epochs, patience: at most so many passes; ends when the held-out loss has not fallen for `patience` of them.
        held_out: share of the pairs that nothing is fitted on.
        ties: `davidson` models them, `half` counts each side half, `drop` leaves them out.
        noisy: pairs whose label the ensemble itself contradicts (mean margin below 0): `drop` them and fit again,
            `flip` them, `keep` them, or `auto`: drop them if that lowers the held-out loss.
        margin: by how much the preferred segment should win (in reward) before the loss rests.
        smoothing: share of a label's weight given to the other side.
        frame_weights: weights tried for the pull of each frame's reward towards another label's standardised score;
            the one with the least held-out loss wins. Ignored without such a label.
    """

    network: str = "mlp"
    hidden_sizes: tuple[int, ...] = (256, 256)
    members: int = 5
    learning_rate: float = 3e-4
    batch_size: int = 64
    epochs: int = 200
    patience: int = 15
    held_out: float = 0.15
    ties: str = "davidson"
    noisy: str = "auto"
    margin: float = 0.0
    smoothing: float = 0.0
    frame_weights: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, valid in (("ties", self.ties, TIES), ("noisy", self.noisy, NOISY)):
            if value not in valid:
                raise ConfigError(f"{name} '{value}' is unknown. Valid: {', '.join(valid)}.")
        if self.members < 1 or self.epochs < 1 or not 0 <= self.held_out < 1 or not self.frame_weights:
            raise ConfigError("members and epochs must be at least 1, held_out in [0, 1), frame_weights not empty.")
        if not 0 <= self.smoothing < 0.5 or self.margin < 0:
            raise ConfigError("smoothing must lie in [0, 0.5), margin at or above 0.")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """What a model is fitted on.

    Attributes:
        rows: (P, 2, T) rows of the inputs.
        answer: (P,) 0 first, 1 second, 2 neither (`Answer`); abstentions must be left out before.
        weight: (P,) in [0, 1].
    """

    rows: np.ndarray
    answer: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.answer)

    def take(self, chosen: np.ndarray) -> "Pairs":
        return Pairs(self.rows[chosen], self.answer[chosen], self.weight[chosen])


def preference_loss(
    sums: Tensor, answer: Tensor, weight: Tensor, log_tie: Tensor, margin: float | Tensor = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Weighted cross-entropy of Davidson's model.

    Args:
        sums: (M, B, 2) reward of each segment.
        answer: (M, B) 0, 1 or 2; weight: (M, B).
        log_tie: (M,) log nu; minus infinity without ties. 2 with `ties: half` is told by log_tie being minus infinity:
            half of the weight goes to each side.

    Returns:
        (M,) mean over the batch.
    """
    lead = torch.nn.functional.one_hot(answer, 3)[..., :2].to(sums.dtype)  # of the preferred side
    moved = sums - margin * lead
    tie = moved.mean(-1, keepdim=True) + log_tie[:, None, None]
    log_p = torch.log_softmax(torch.cat([moved, tie], -1), -1)
    side = lead + (answer == 2)[..., None] * torch.where(torch.isinf(log_tie), 0.5, 0.0)[:, None, None]
    other = side.flip(-1)
    target = torch.where(lead.sum(-1, keepdim=True) > 0, (1 - smoothing) * side + smoothing * other, side)
    loss = -(target * log_p[..., :2]).sum(-1)
    modelled = (answer == 2) & ~torch.isinf(log_tie)[:, None]
    loss = loss + torch.where(modelled, -log_p[..., 2], 0.0)
    return (loss * weight).sum(-1) / weight.sum(-1).clamp_min(1e-12)


class RewardModel:
    """A fitted ensemble.

    Attributes:
        temperature: margins divided by it are calibrated log-odds.
        scale: the range of a score, in words.
    """

    def __init__(self, ensemble: Ensemble, mean: Tensor, std: Tensor, temperature: float = 1.0) -> None:
        self.ensemble, self.mean, self.std, self.temperature = ensemble, mean, std, temperature
        self.scale = SCALES[ensemble.kind]

    def prepare(self, values: np.ndarray) -> Tensor:
        """Rows as the networks take them: vectors standardised by the store's statistics, pictures as they are."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return (tensor.float() - self.mean) / self.std if self.ensemble.kind == "mlp" else tensor

    @torch.no_grad()
    def members(self, inputs: Rows, rows: np.ndarray) -> np.ndarray:
        """(N,) rows -> (M, N) reward of every member. A row's reward is the same in whatever company."""
        found = np.empty((len(self.ensemble), len(rows)), np.float32)
        for start in range(0, len(rows), _FORWARD):
            chosen = rows[start : start + _FORWARD]
            padded = np.concatenate([chosen, np.repeat(chosen[-1:], _FORWARD - len(chosen))])
            x = self.prepare(inputs[padded])
            rewards = self.ensemble.rewards(x.expand(len(self.ensemble), *x.shape))
            found[:, start : start + len(chosen)] = rewards[:, : len(chosen)].numpy()
        return found

    def score(self, inputs: Rows, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) rows -> mean over members and their standard deviation, (N,) float32 each."""
        rewards = self.members(inputs, rows)
        return rewards.mean(0), rewards.std(0)

    def margins(self, inputs: Rows, rows: np.ndarray) -> np.ndarray:
        """(P, 2, T) rows -> (M, P) reward of the second segment less the first's."""
        unique, index = np.unique(rows, return_inverse=True)
        sums = self.members(inputs, unique)[:, index.reshape(rows.shape)].sum(-1)
        return sums[..., 1] - sums[..., 0]

    def probabilities(self, inputs: Rows, rows: np.ndarray) -> np.ndarray:
        """(P,) calibrated probability that the second segment is the better one."""
        return _sigmoid(self.margins(inputs, rows).mean(0) / self.temperature)

    def save(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write `config.json` and `model.safetensors` into a new folder. LabelError if it exists."""
        if folder.exists():
            raise LabelError(f"{folder} exists already. Name another folder for the reward model.")
        temporary = folder.with_name(f".{folder.name}.partial")
        temporary.mkdir(parents=True, exist_ok=True)
        tensors = {f"network/{name}": value.detach().contiguous() for name, value in self.ensemble.parameters.items()}
        save_file(tensors | {"mean": self.mean, "std": self.std}, temporary / "model.safetensors")
        e = self.ensemble
        config = {"kind": "reward_model", "network": e.kind, "shape": e.shape, "hidden_sizes": e.hidden_sizes}
        config |= {"members": len(e), "temperature": self.temperature, "scale": self.scale}
        config["provenance"] = dict(provenance)
        (temporary / "config.json").write_text(json.dumps(config, indent=1))
        temporary.rename(folder)


def load_reward_model(folder: Path) -> tuple[RewardModel, dict[str, Any]]:
    """A saved model and its config. InputError if the folder holds none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        if config["kind"] != "reward_model":
            raise KeyError("kind")
        ensemble = Ensemble(config["network"], config["shape"], config["hidden_sizes"], range(config["members"]))
        for name, value in ensemble.parameters.items():
            value.data.copy_(tensors[f"network/{name}"])
        return RewardModel(ensemble, tensors["mean"], tensors["std"], float(config["temperature"])), config
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} is no reward model of 'embodied label prefer': {error}.") from None


def fit_reward_model(
    inputs: Rows, pairs: Pairs, config: RewardModelConfig, frame_label: np.ndarray | None = None
) -> tuple[RewardModel, dict[str, Any]]:
    """Fit on pairs; nothing but early stopping, calibration and `frame_weights` sees the held-out ones.

    Args:
        inputs: rows of the store: (F, D) vectors or (F, H, W, 3) pictures.
        frame_label: (F,) another label's score, towards which each frame's reward may be pulled (B7, T-REG).

    Returns:
        The model, and a report: `held_out` (see `judge`), `epochs`, `noisy` (share of the training pairs whose mean
        margin is below zero, what was done with them), `frame_weight` with the held-out losses it was chosen by.

    Raises:
        LabelError: fewer than 10 pairs take a side.
    """
    if config.ties == "drop":
        pairs = pairs.take(np.flatnonzero(pairs.answer != Answer.NO_PREFERENCE))
    if int((pairs.answer <= Answer.SECOND).sum()) < 10:
        raise LabelError(
            f"Only {int((pairs.answer <= Answer.SECOND).sum())} pairs take a side; a reward model needs at least 10.\n"
            "Ask more pairs, or see in --report why the annotator abstained."
        )
    train, held_out = split_pairs(pairs, config.held_out, config.seed)
    pull = None
    if frame_label is not None:
        spread = float(frame_label.std())
        pull = (frame_label - frame_label.mean()) / (spread if spread > 0 else 1.0)
    tried = {}
    for weight in config.frame_weights if pull is not None and len(held_out) else (0.0,):
        model, odds, epochs = _fit(inputs, train, held_out, config, pull, weight)
        loss = float(_losses(model, inputs, held_out, odds).mean()) if len(held_out) else 0.0
        tried[weight] = (loss, model, epochs)
    frame_weight = min(tried, key=lambda weight: tried[weight][0])
    _, model, epochs = tried[frame_weight]
    report: dict[str, Any] = {"frame_weight": frame_weight, "frame_weight_losses": {w: t[0] for w, t in tried.items()}}
    report["noisy"] = {"share": 0.0, "done": "keep"}
    if config.noisy != "keep":
        contradicted = contradicted_pairs(model, inputs, train)
        report["noisy"]["share"] = float(contradicted.mean())
        if contradicted.any():
            flip = config.noisy == "flip"
            cleaned = _flip(train, contradicted) if flip else train.take(np.flatnonzero(~contradicted))
            # Wrong labels among the held-out pairs would end this fit early: they punish being sure of what is right.
            watched = held_out.take(np.flatnonzero(~contradicted_pairs(model, inputs, held_out)))
            again, _, more = _fit(inputs, cleaned, watched, config, pull, frame_weight)
            losses = [_calibrated_loss(m, inputs, held_out) for m in (model, again)]
            report["noisy"] |= {"held_out_loss": {"keep": losses[0], "flip" if flip else "drop": losses[1]}}
            if config.noisy != "auto" or losses[1] < losses[0]:
                model, epochs = again, more
                report["noisy"]["done"] = "flip" if flip else "drop"
    model.temperature = calibrate(model, inputs, held_out)
    report |= {"pairs": len(train), "epochs": epochs, "temperature": model.temperature}
    report["held_out"] = judge(model, inputs, held_out, majority(train.answer))
    return model, report


def contradicted_pairs(model: RewardModel, inputs: Rows, pairs: Pairs) -> np.ndarray:
    """(P,) bool: pairs with a side whose label the mean margin of the ensemble speaks against (B4)."""
    margin = model.margins(inputs, pairs.rows).mean(0)
    return ((pairs.answer == Answer.SECOND) & (margin < 0)) | ((pairs.answer == Answer.FIRST) & (margin > 0))


def split_pairs(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs. The same two segments, asked twice or in the other order, fall on one side."""
    first, second = pairs.rows[:, 0, 0], pairs.rows[:, 1, 0]
    keys = np.stack([np.minimum(first, second), np.maximum(first, second)], 1)
    unique, group = np.unique(keys, axis=0, return_inverse=True)
    count = round(share * len(unique))
    held = np.zeros(len(unique), bool)
    held[np.random.default_rng(seed).permutation(len(unique))[:count]] = True
    chosen = held[group.ravel()]
    return pairs.take(np.flatnonzero(~chosen)), pairs.take(np.flatnonzero(chosen))


def majority(answer: np.ndarray) -> int:
    """The side that is preferred more often: what one would always answer without looking."""
    return int((answer == Answer.SECOND).sum() > (answer == Answer.FIRST).sum())


def judge(model: RewardModel, inputs: Rows, pairs: Pairs, guess: int) -> dict[str, Any]:
    """Accuracy on pairs with a side, the baseline's, and calibration.

    Returns:
        `pairs`, `correct`, `majority_correct` (always answering `guess`), `log_loss`, `ece` (expected calibration
        error over ten bins of confidence), `bins` ([confidence, accuracy, count]).
    """
    decided = pairs.take(np.flatnonzero(pairs.answer <= Answer.SECOND))
    if not len(decided):
        return {"pairs": 0, "correct": 0, "majority_correct": 0, "log_loss": None, "ece": None, "bins": []}
    p_second = model.probabilities(inputs, decided.rows)
    said = (p_second > 0.5).astype(int)
    right = said == decided.answer
    confidence = np.maximum(p_second, 1 - p_second)
    of_label = np.where(decided.answer == Answer.SECOND, p_second, 1 - p_second)
    place = np.clip(((confidence - 0.5) * 2 * _BINS).astype(int), 0, _BINS - 1)
    bins = [
        [float(confidence[place == k].mean()), float(right[place == k].mean()), int((place == k).sum())]
        for k in range(_BINS)
        if (place == k).any()
    ]
    return {
        "pairs": len(decided),
        "correct": int(right.sum()),
        "majority_correct": int((decided.answer == guess).sum()),
        "log_loss": float(-np.log(np.clip(of_label, 1e-12, 1)).mean()),
        "ece": float(sum(n * abs(c - a) for c, a, n in bins) / len(decided)),
        "bins": bins,
    }


def calibrate(model: RewardModel, inputs: Rows, pairs: Pairs) -> float:
    """The temperature with the least log loss on decided pairs; 1 where there are fewer than ten."""
    signed = _signed_margins(model, inputs, pairs)
    if len(signed) < 10:
        return 1.0
    found: Any = minimize_scalar(
        lambda log_t: float(np.logaddexp(0, -signed / np.exp(log_t)).mean()), bounds=(-12.0, 8.0), method="bounded"
    )
    return float(np.exp(found.x))


def _calibrated_loss(model: RewardModel, inputs: Rows, pairs: Pairs) -> float:
    """Log loss on decided pairs at the best temperature: two models compared by what they know, not by how loud."""
    signed = _signed_margins(model, inputs, pairs)
    return float(np.logaddexp(0, -signed / calibrate(model, inputs, pairs)).mean()) if len(signed) else 0.0


def _signed_margins(model: RewardModel, inputs: Rows, pairs: Pairs) -> np.ndarray:
    """(n,) mean margin of the decided pairs, positive where it agrees with the label."""
    decided = pairs.take(np.flatnonzero(pairs.answer <= Answer.SECOND))
    if not len(decided):
        return np.zeros(0)
    margin = model.margins(inputs, decided.rows).mean(0)
    return np.where(decided.answer == Answer.SECOND, margin, -margin).astype(np.float64)


def _flip(pairs: Pairs, chosen: np.ndarray) -> Pairs:
    return Pairs(pairs.rows, np.where(chosen, 1 - pairs.answer, pairs.answer), pairs.weight)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _losses(model: RewardModel, inputs: Rows, pairs: Pairs, odds: Tensor) -> np.ndarray:
    """(M,) loss of each member, without margin or smoothing."""
    unique, index = np.unique(pairs.rows, return_inverse=True)
    sums = model.members(inputs, unique)[:, index.reshape(pairs.rows.shape)].sum(-1)
    answer = torch.from_numpy(pairs.answer.astype(np.int64)).expand(len(sums), -1)
    weight = torch.from_numpy(pairs.weight.astype(np.float32)).expand(len(sums), -1)
    log_tie, log_sharp = odds.detach()
    return preference_loss(log_sharp.exp()[:, None, None] * torch.from_numpy(sums), answer, weight, log_tie).numpy()


def _fit(
    inputs: Rows,
    train: Pairs,
    held_out: Pairs,
    config: RewardModelConfig,
    pull: np.ndarray | None,
    frame_weight: float,
) -> tuple[RewardModel, Tensor, int]:
    """Model, log nu and log k (2, M), and how many passes gave the least held-out loss."""
    seeds = [config.seed * 1000 + m for m in range(config.members)]
    ensemble = Ensemble(config.network, inputs.shape[1:], config.hidden_sizes, seeds)
    used, index = np.unique(train.rows, return_inverse=True)
    places = torch.from_numpy(index.reshape(train.rows.shape))
    values = inputs[used]
    mean, std = torch.zeros(()), torch.ones(())
    if config.network == "mlp":
        mean = torch.from_numpy(values.astype(np.float64).mean(0)).float()
        std = torch.from_numpy(values.astype(np.float64).std(0)).float().clamp_min(1e-6)
    model = RewardModel(ensemble, mean, std)
    data = model.prepare(values)
    target = None if pull is None else torch.from_numpy(pull[used].astype(np.float32))
    answer = torch.from_numpy(train.answer.astype(np.int64))
    weight = torch.from_numpy(train.weight.astype(np.float32))
    ties = config.ties == "davidson" and bool((train.answer == Answer.NO_PREFERENCE).any())
    log_tie = torch.zeros(config.members) if ties else torch.full((config.members,), -torch.inf)
    bounded = model.scale != "unbounded"
    log_sharp = torch.full((config.members,), np.log(_SHARP / train.rows.shape[2]) if bounded else 0.0)
    groups: list[dict[str, Any]] = [{"params": list(ensemble.parameters.values())}]
    groups += [{"params": [log_tie.requires_grad_()]}] if ties else []
    groups += [{"params": [log_sharp.requires_grad_()], "lr": _SHARPEN}] if bounded else []
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
    orders = [np.random.default_rng(seed) for seed in seeds]
    best, best_epoch, kept = np.inf, 0, _copy(ensemble, log_tie, log_sharp)
    for epoch in range(1, config.epochs + 1):
        order = torch.from_numpy(np.stack([rng.permutation(len(train)) for rng in orders]))
        for start in range(0, len(train), config.batch_size):
            batch = order[:, start : start + config.batch_size]  # (M, B)
            rows = places[batch]  # (M, B, 2, T)
            rewards = ensemble.rewards(data[rows.flatten(1)]).view(rows.shape)
            sharp = log_sharp.exp()[:, None, None]
            sums, margin = sharp * rewards.sum(-1), sharp * config.margin
            loss = preference_loss(sums, answer[batch], weight[batch], log_tie, margin, config.smoothing)
            if target is not None and frame_weight:
                loss = loss + frame_weight * (rewards - target[rows]).square().mean((1, 2, 3))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
        if not len(held_out):
            best_epoch, kept = epoch, (ensemble.parameters, torch.stack([log_tie, log_sharp]).detach())
            continue
        now = float(_losses(model, inputs, held_out, torch.stack([log_tie, log_sharp])).mean())
        if now < best - 1e-5:
            best, best_epoch, kept = now, epoch, _copy(ensemble, log_tie, log_sharp)
        elif epoch - best_epoch >= config.patience:
            break
    ensemble.parameters = kept[0]
    return model, kept[1], best_epoch


def _copy(ensemble: Ensemble, *odds: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: value.detach().clone() for name, value in ensemble.parameters.items()}, torch.stack(odds).detach()
