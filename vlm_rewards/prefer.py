"""Offline RL-VLM-F: pairs from a fixed dataset, answers, preferences kept with the store, a reward model, a label set.

Wang et al. 2024, arXiv 2402.03681, and Venkataraman et al. 2024 for the offline case.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.preferences import Annotator, Answer, Segment
from embodied.contracts.provenance import provenance
from embodied.datasets.labels import LabelWriter
from embodied.datasets.preferences import Preferences, preference_names, read_preferences, write_preferences
from embodied.datasets.store import EpisodeStore, Label
from embodied.datasets.windows import SegmentSampler
from embodied.vlm_rewards.answer_log import AnswerLog
from embodied.vlm_rewards.ask import Answers, AskConfig, ask, counts, decide, merge_person, position_bias, unsure_pairs
from embodied.vlm_rewards.preference_files import FileAnnotator
from embodied.vlm_rewards.preference_pairs import draw_pairs
from embodied.vlm_rewards.reward_model import Pairs, RewardModel, RewardModelConfig, fit_reward_model
from embodied.vlm_rewards.reward_networks import Rows

Report = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class PreferConfig:
    """Which pairs are asked about.

    Attributes:
        pairs: how many.
        length: frames of a segment; 1 compares single frames, as RL-VLM-F does.
        strategy: `uniform`, `stratified` (spread over episodes and time), or in rounds where the model of the answers
            so far is least sure: `disagreement`, `entropy`; their first round is stratified.
        rounds: of an informed strategy.
        person_share: share of the pairs, those the votes are least sure of, that is passed on to a person.
    """

    pairs: int = 200
    length: int = 1
    strategy: str = "stratified"
    rounds: int = 4
    person_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length < 1 or self.rounds < 1:
            raise ConfigError("pairs, length and rounds must be at least 1.")


class CameraRows:
    """A store's camera by row, read when asked for."""

    def __init__(self, store: EpisodeStore, camera: str) -> None:
        self._store, self._name = store, f"observation/images/{camera}"
        self.shape = (store.num_frames, *store.spec.images[camera].shape)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return self._store.read_rows(self._name, np.asarray(rows))


def state_rows(store: EpisodeStore, keys: tuple[str, ...] = ()) -> np.ndarray:
    """(F, D) the named observations side by side; by default all that a robot could measure. InputError names a key."""
    chosen = keys or tuple(key for key, spec in store.spec.observations.items() if not spec.privileged)
    for key in chosen:
        if key not in store.spec.observations:
            raise InputError(f"{store.path} has no observation '{key}'; it has {', '.join(store.spec.observations)}.")
    if not chosen:
        raise InputError(f"{store.path} has no observations beside pictures; use --inputs pixels.")
    return np.concatenate([store.read(f"observation/{key}").reshape(store.num_frames, -1) for key in chosen], 1)


def show_segments(store: EpisodeStore, camera: str, length: int) -> Callable[[int, bool], Segment]:
    """(first row, with frames) -> segment."""

    def show(row: int, frames: bool) -> Segment:
        rows = np.arange(row, row + length)
        return Segment(rows, store.read_rows(f"observation/images/{camera}", rows) if frames else None)

    return show


def gather(
    store: EpisodeStore,
    name: str,
    task: str,
    camera: str,
    annotator: Annotator,
    config: PreferConfig,
    asking: AskConfig,
    log: AnswerLog,
    person: Annotator | None = None,
    fit: Callable[[Pairs], RewardModel] | None = None,
    inputs: Rows | None = None,
    report: Report = lambda done, total, text: None,
) -> Preferences:
    """Draw pairs, ask about them, and keep the preferences with the store under `name`.

    A killed call goes on when made again: pairs are a function of the configuration and answers are in the log. Pairs
    that a file holds are asked as they stand there.

    Args:
        person: who is asked about the unsure share.
        fit, inputs: model of the answers so far, for the informed strategies.
    """
    if name in preference_names(store):
        return read_preferences(store, name)
    if config.person_share and person is None:
        raise ConfigError("A share of the pairs goes to a person, but no person is named.")
    show = show_segments(store, camera, config.length)
    if isinstance(annotator, FileAnnotator):
        pairs = annotator.pairs[: config.pairs]
        answers = ask(annotator, task, pairs, show, asking, log, report)
    elif config.strategy in ("disagreement", "entropy"):
        pairs, answers = _in_rounds(store, task, annotator, config, asking, log, show, fit, inputs, report)
    else:
        sampler = SegmentSampler(store, config.length, seed=config.seed)
        pairs = draw_pairs(sampler, config.length, config.pairs, config.strategy, config.seed)
        answers = ask(annotator, task, pairs, show, asking, log, report)
    who = np.zeros(len(pairs), np.int8)
    if person is not None and config.person_share:
        chosen = unsure_pairs(answers.votes, config.person_share, config.seed)
        by_person = ask(person, task, pairs[chosen], show, dataclasses.replace(asking, samples=1), log, report)
        answers, who = merge_person(answers, by_person, chosen)
    answer, weight = decide(answers.votes)
    settings = {"pairs": dataclasses.asdict(config), "asking": dataclasses.asdict(asking), "camera": camera}
    record = provenance("label prefer", {**settings, "annotator": dict(annotator.identity), "task": task}, {})
    record |= {"annotator": annotator.name, "dataset_fingerprint": store.fingerprint}
    record["counts"] = counts(answers.votes, answer) | {"asked": answers.asked, "found": answers.found}
    record |= {"abstentions": answers.reasons, "position_bias": position_bias(answers.votes)}
    found = Preferences(
        task,
        camera,
        config.length,
        pairs[:, 0],
        pairs[:, 1],
        answer,
        answers.votes,
        weight,
        who,
        (annotator.name, *([person.name] if person else [])),
        answers.records,
        record,
    )
    write_preferences(store, name, found)
    return found


def _in_rounds(
    store: EpisodeStore,
    task: str,
    annotator: Annotator,
    config: PreferConfig,
    asking: AskConfig,
    log: AnswerLog,
    show: Callable[[int, bool], Segment],
    fit: Callable[[Pairs], RewardModel] | None,
    inputs: Rows | None,
    report: Report,
) -> tuple[np.ndarray, Answers]:
    """Pairs and answers of all rounds, each round's chosen by a model of the rounds before."""
    if fit is None or inputs is None:
        raise ConfigError(f"pair strategy '{config.strategy}' needs a reward model's inputs.")
    sampler = SegmentSampler(store, config.length, seed=config.seed)
    sizes = [len(part) for part in np.array_split(np.arange(config.pairs), config.rounds)]
    pairs, parts = np.empty((0, 2), np.int64), []
    for number, size in enumerate(size for size in sizes if size):
        strategy, model = "stratified", None
        if number:
            answer, weight = decide(np.concatenate([part.votes for part in parts]))
            known = np.flatnonzero(answer <= Answer.NO_PREFERENCE)
            model = fit(Pairs(pairs[known][..., None] + np.arange(config.length), answer[known], weight[known]))
            strategy = config.strategy
        margins = _log_odds(model, inputs) if model else None
        more = draw_pairs(sampler, config.length, size, strategy, config.seed, number, pairs, margins)
        parts.append(
            ask(annotator, task, more, show, dataclasses.replace(asking, seed=asking.seed + number), log, report)
        )
        pairs = np.concatenate([pairs, more])
    reasons: dict[str, int] = {}
    for part in parts:
        for reason, count in part.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    votes = np.concatenate([part.votes for part in parts])
    records = tuple(record for part in parts for record in part.records)
    return pairs, Answers(votes, records, sum(p.asked for p in parts), sum(p.found for p in parts), reasons)


def _log_odds(model: RewardModel, inputs: Rows) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: model.margins(inputs, rows) / model.temperature


def training_pairs(preferences: Preferences) -> Pairs:
    """What a reward model learns from: pairs that were compared and count."""
    chosen = np.flatnonzero(preferences.compared & (preferences.weight > 0))
    return Pairs(preferences.rows(chosen), preferences.answer[chosen].astype(np.int64), preferences.weight[chosen])


def label_by_preferences(
    store: EpisodeStore,
    name: str,
    preferences: Preferences,
    inputs: Rows,
    inputs_config: Mapping[str, Any],
    config: RewardModelConfig,
    frame_label: np.ndarray | None = None,
    report: Report = lambda done, total, text: None,
) -> tuple[Label, RewardModel, dict[str, Any]]:
    """Fit a reward model and write its score of every frame as the label set `name`.

    Channels: `std`, the standard deviation over the ensemble. Fitting is deterministic, so a killed call made again
    ends with the same bytes.

    Args:
        inputs_config: what `inputs` are, for provenance.

    Returns:
        The label set, the model, and the fit's report, which also stands in the provenance.
    """
    model, found = fit_reward_model(inputs, training_pairs(preferences), config, frame_label)
    settings = {"inputs": dict(inputs_config), "model": dataclasses.asdict(config), "task": preferences.task}
    settings |= {"annotators": list(preferences.annotators), "scale": model.scale, "fit": found}
    record = provenance("label prefer", settings, {"dataset": store.fingerprint})
    record |= {"labeller": "preference", "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, name, record)
    for index, start, stop in writer.blocks():
        scores, spread = model.score(inputs, np.arange(start, stop))
        writer.write_block(index, scores, std=spread)
        report(stop, store.num_frames, "frames scored")
    counted = {key: int(n) for key, n in preferences.provenance.get("counts", {}).items()}
    return writer.finish(frames=store.num_frames, abstentions=counted.get("pairs_abstained", 0)), model, found


def truth_of(store: EpisodeStore, source: str) -> np.ndarray:
    """(F,) true reward of every frame: the label set `source`, or `source` itself for the store's own reward.

    The store's reward belongs to the step at a frame; here it is moved to the frame it was paid for, the next one.
    """
    if source != "source":
        return store.label(source).score
    if not store.spec.has_reward:
        raise InputError(f"{store.path} has no reward of its own; name a label set.")
    reward = store.read("reward")
    moved = np.concatenate([[0.0], reward[:-1]]).astype(np.float32)
    moved[store.episode_start] = 0.0
    return moved
