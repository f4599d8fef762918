"""Ask an annotator about pairs of segments, keep every answer, and say what it is worth.

Each pair is asked in one order or in both, once or several times, and decided by vote (B6: voting removes noise, the
other order removes a liking for one side). Nothing is dropped: no preference and abstentions are answers too.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.contracts.preferences import Annotator, Answer, Segment, Verdict
from embodied.vlm_rewards.answer_log import AnswerLog, question_key

ShowSegment = Callable[[int, bool], Segment]
Report = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """How often each pair is asked.

    Attributes:
        both_orders: share of the pairs that are shown in both orders; the others alternate.
        samples: questions per pair and order.
    """

    both_orders: float = 0.5
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.both_orders <= 1:
            raise ConfigError(f"both_orders {self.both_orders} must lie in [0, 1].")
        if self.samples < 1:
            raise ConfigError(f"samples {self.samples} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Question:
    """Pair `pair`, shown the other way round if `swapped`, for the `sample`-th time."""

    pair: int
    swapped: bool
    sample: int


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What came of asking.

    Attributes:
        votes: (P, 2, 4) int16 as in `Preferences`.
        records: per pair, JSON text of the list of its questions with answer, reason and the annotator's record.
        asked, found: questions that were put, and that the log could answer.
        reasons: reason of abstention -> count.
    """

    votes: np.ndarray
    records: tuple[str, ...]
    asked: int
    found: int
    reasons: dict[str, int]


def questions(pairs: int, config: AskConfig) -> list[Question]:
    """All questions about so many pairs, in the order in which they are put. A function of its arguments alone."""
    order = np.random.default_rng(config.seed).permutation(pairs)
    both = np.zeros(pairs, bool)
    both[order[: round(config.both_orders * pairs)]] = True
    found = []
    for pair in range(pairs):
        swaps = (False, True) if both[pair] else (bool(order[pair] % 2),)
        found += [Question(pair, swapped, sample) for sample in range(config.samples) for swapped in swaps]
    return found


def ask(
    annotator: Annotator,
    task: str,
    pairs: np.ndarray,
    show: ShowSegment,
    config: AskConfig,
    log: AnswerLog,
    report: Report = lambda done, total, text: None,
) -> Answers:
    """Put every question that the log cannot answer.

    An annotator may have two more methods: `watch(known, total)`, told how many questions there are and how many of
    them need no asking, and `stop()`, told that nobody waits for answers any more: what it is asked must then return
    soon, and not final.

    Args:
        pairs: (P, 2) first rows.
        show: (first row, with frames) -> segment; called from several threads.
        report: (done, total, what) after each question.
    """
    listed = questions(len(pairs), config)
    verdicts: list[Verdict | None] = [None] * len(listed)
    found = 0
    watch, stop = getattr(annotator, "watch", None), getattr(annotator, "stop", None)
    if watch:
        watch(0, len(listed))

    def put(index: int) -> tuple[int, Verdict, bool]:
        question = listed[index]
        first, second = (show(int(row), annotator.sees) for row in pairs[question.pair])
        if question.swapped:
            first, second = second, first
        key = question_key(annotator, task, first, second, question.sample)
        if (known := log.find(key)) is not None:
            return index, known, True
        verdict = annotator.compare(task, first, second, question.sample)
        if verdict.final:
            log.keep(key, verdict, annotator.name)
        return index, verdict, False

    def take(outcome: tuple[int, Verdict, bool]) -> None:
        nonlocal found
        index, verdict, known = outcome
        verdicts[index], found = verdict, found + known
        done = sum(verdict is not None for verdict in verdicts)
        if watch and known:
            watch(found, len(listed))
        report(done, len(listed), verdict.reason or verdict.answer.name.lower().replace("_", " "))

    if annotator.workers <= 1:
        for index in range(len(listed)):
            take(put(index))
    else:
        with concurrent.futures.ThreadPoolExecutor(annotator.workers) as pool:
            try:
                for future in concurrent.futures.as_completed([pool.submit(put, i) for i in range(len(listed))]):
                    take(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                if stop:
                    stop()  # a person may take for ever; the pool waits for its threads
                raise
    votes = np.zeros((len(pairs), 2, len(Answer)), np.int16)
    records: list[list[dict[str, Any]]] = [[] for _ in pairs]
    reasons: dict[str, int] = {}
    for question, verdict in zip(listed, verdicts, strict=True):
        assert verdict is not None
        votes[question.pair, int(question.swapped), verdict.answer] += 1
        if verdict.answer is Answer.ABSTAINED:
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
        records[question.pair].append(
            {"swapped": question.swapped, "sample": question.sample, "answer": verdict.answer.name.lower()}
            | ({"reason": verdict.reason} if verdict.reason else {})
            | dict(verdict.record)
        )
    texts = tuple(json.dumps(record) for record in records)
    return Answers(votes, texts, len(listed) - found, found, dict(sorted(reasons.items(), key=lambda item: -item[1])))


def upright(votes: np.ndarray) -> np.ndarray:
    """(P, 2, 4) votes as shown -> (P, 4) votes about (first, second)."""
    return votes[:, 0] + votes[:, 1][:, [answer.swapped for answer in Answer]]


def decide(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The opinion of each pair and its weight, (P,) each.

    The side with more votes wins. No preference where that is even, or where most found neither better; abstained where
    every question was. The weight of a side is its lead over its votes: 1 if unanimous.
    """
    total = upright(votes).astype(np.int64)
    first, second, neither = total[:, 0], total[:, 1], total[:, 2]
    compared = first + second + neither
    answer = np.where(second > first, Answer.SECOND, Answer.FIRST)
    answer = np.where((first == second) | (neither > first + second), Answer.NO_PREFERENCE, answer)
    answer = np.where(compared == 0, Answer.ABSTAINED, answer).astype(np.int8)
    weight = np.where(answer <= Answer.SECOND, np.abs(first - second) / np.maximum(compared, 1), 1.0)
    return answer, np.where(compared == 0, 0.0, weight).astype(np.float32)


def unsure_pairs(votes: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """The `share` of the pairs to pass on to a person: abstentions, then those nearest to an even vote (B10).

    Returns:
        Sorted indices; ties are broken by `seed`.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"The share of pairs for a person is {share}; it must lie in [0, 1].")
    total = upright(votes).astype(np.float64)
    sided = total[:, 0] + total[:, 1]
    lean = np.abs(total[:, 1] - total[:, 0]) / np.maximum(total[:, :3].sum(1), 1)
    doubt = np.where(sided + total[:, 2] == 0, -1.0, lean)
    order = np.lexsort((np.random.default_rng(seed).random(len(votes)), doubt))
    return np.sort(order[: round(share * len(votes))])


def position_bias(votes: np.ndarray) -> dict[str, Any]:
    """Does it like one side? Counts for an honest share, and agreement with itself in the other order.

    Returns:
        `sided` questions that took a side and `first_shown` of them that took the one shown first; `both_orders`:
        pairs with a side in each order, and `consistent` of them where it is the same one.
    """
    sided = votes[:, :, :2].sum((0, 1))
    lean = votes[:, :, Answer.SECOND].astype(int) - votes[:, :, Answer.FIRST]
    both = (lean[:, 0] != 0) & (lean[:, 1] != 0)
    return {
        "sided": int(sided.sum()),
        "first_shown": int(sided[0]),
        "both_orders": int(both.sum()),
        "consistent": int((both & (np.sign(lean[:, 0]) == -np.sign(lean[:, 1]))).sum()),
    }


def counts(votes: np.ndarray, answer: np.ndarray) -> dict[str, int]:
    """Questions by answer, and pairs by opinion."""
    by_question = votes.sum((0, 1))
    found = {f"questions_{a.name.lower()}": int(by_question[a]) for a in Answer}
    return found | {f"pairs_{a.name.lower()}": int((answer == a).sum()) for a in Answer}


def merge_person(answers: Answers, person: Answers, chosen: Sequence[int] | np.ndarray) -> tuple[Answers, np.ndarray]:
    """Let a person's answers about the `chosen` pairs count instead; records of both stay.

    Returns:
        The merged answers and (P,) int8: 1 where the person had the last word. Where the person abstained too, the
        first annotator's votes stay.
    """
    votes, records, who = answers.votes.copy(), list(answers.records), np.zeros(len(answers.votes), np.int8)
    for index, pair in enumerate(chosen):
        records[pair] = json.dumps(json.loads(records[pair]) + json.loads(person.records[index]))
        if person.votes[index, :, : Answer.ABSTAINED].any():
            votes[pair], who[pair] = person.votes[index], 1
    reasons = dict(answers.reasons)
    for reason, number in person.reasons.items():
        reasons[reason] = reasons.get(reason, 0) + number
    merged = Answers(votes, tuple(records), answers.asked + person.asked, answers.found + person.found, reasons)
    return merged, who
