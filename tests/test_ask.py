"""Asking: orders, votes, the log that nothing is asked twice, budgets, pairs, and the scripted annotator's faults."""

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError, StoreError
from embodied.contracts.preferences import Answer, Segment, Verdict
from embodied.datasets.windows import Runs, SegmentSampler
from embodied.vlm_rewards.annotator_scripted import ScriptedAnnotator, ScriptedConfig
from embodied.vlm_rewards.answer_log import AnswerLog, Budget, BudgetSpent
from embodied.vlm_rewards.ask import (
    AskConfig,
    ask,
    counts,
    decide,
    merge_person,
    position_bias,
    questions,
    unsure_pairs,
    upright,
)
from embodied.vlm_rewards.preference_pairs import draw_pairs

REWARD = np.linspace(0, 1, 400)


def show(row: int, frames: bool) -> Segment:
    return Segment(np.arange(row, row + 3), np.full((3, 2, 2, 3), row % 251, np.uint8) if frames else None)


def some_pairs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(390)[: 2 * count].reshape(count, 2)


class Counting:
    """A scripted annotator that notes what it was asked, with a liking for the first shown, and failures on demand."""

    sees, workers = True, 4

    def __init__(self, first_share: float = 0.0, fail: bool = False, name: str = "counting") -> None:
        self.name = name
        self.identity: Mapping[str, Any] = {"annotator": name, "first": first_share}
        self.asked: list[tuple[int, int, int]] = []
        self._first_share, self.fail, self._lock = first_share, fail, threading.Lock()

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        rows = int(first.rows[0]), int(second.rows[0])
        with self._lock:
            self.asked.append((*rows, sample))
        if self.fail:
            return Verdict(Answer.ABSTAINED, "no answer", final=False)
        likes = np.random.default_rng([*rows, sample]).random() < self._first_share
        return Verdict(Answer.FIRST if likes or rows[0] > rows[1] else Answer.SECOND, "", True, {"raw": str(rows)})


def test_every_pair_is_asked_as_often_as_said_and_nothing_twice(tmp_path: Path) -> None:
    pairs, annotator, log = some_pairs(40), Counting(), AnswerLog(tmp_path / "a.sqlite")
    config = AskConfig(both_orders=0.25, samples=3)
    assert len(questions(40, config)) == 3 * (30 + 2 * 10)
    answers = ask(annotator, "lift", pairs, show, config, log)
    assert (answers.asked, answers.found, len(annotator.asked)) == (150, 0, 150)
    assert len(set(annotator.asked)) == 150
    asked_in_both = ((answers.votes.sum(2) > 0).sum(1) == 2).sum()
    assert asked_in_both == 10
    one_order = answers.votes.sum(2)[(answers.votes.sum(2) > 0).sum(1) == 1]
    assert 8 <= (one_order[:, 1] > 0).sum() <= 22, "the others alternate, so that a bias does not lean one way"
    again = ask(annotator, "lift", pairs, show, config, log)
    assert (again.asked, again.found, len(annotator.asked)) == (0, 150, 150)
    np.testing.assert_array_equal(again.votes, answers.votes)
    assert again.records == answers.records
    assert json.loads(answers.records[0])[0].keys() == {"swapped", "sample", "answer", "raw"}
    ask(annotator, "push", pairs, show, config, log)
    assert len(annotator.asked) == 300, "another task is another question"
    ask(Counting(name="other"), "lift", pairs, show, config, AnswerLog(tmp_path / "a.sqlite"))
    answer, weight = decide(answers.votes)
    np.testing.assert_array_equal(answer, (pairs[:, 1] > pairs[:, 0]).astype(int))
    assert (weight == 1).all()


def test_failures_are_counted_and_asked_again(tmp_path: Path) -> None:
    log, pairs = AnswerLog(tmp_path / "a.sqlite"), some_pairs(10)
    config = AskConfig(both_orders=0.0)
    failed = ask(Counting(fail=True), "lift", pairs, show, config, log)
    assert failed.reasons == {"no answer": 10}
    assert (decide(failed.votes)[0] == Answer.ABSTAINED).all()
    assert (decide(failed.votes)[1] == 0).all()
    later = Counting()
    assert ask(later, "lift", pairs, show, config, log).asked == 10
    assert counts(failed.votes, decide(failed.votes)[0])["pairs_abstained"] == 10


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    pairs, log = some_pairs(30), AnswerLog(tmp_path / "a.sqlite")
    annotator = Counting()
    annotator.workers = 1  # type: ignore[misc]
    original = annotator.compare

    def stop_after_twelve(*args: Any, **kwargs: Any) -> Verdict:
        if len(annotator.asked) == 12:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    annotator.compare = stop_after_twelve  # type: ignore[method-assign]
    config = AskConfig(both_orders=1.0)
    with pytest.raises(KeyboardInterrupt):
        ask(annotator, "lift", pairs, show, config, log)
    annotator.compare = original  # type: ignore[method-assign]
    assert ask(annotator, "lift", pairs, show, config, log).found == 12
    assert len(set(annotator.asked)) == len(annotator.asked) == 60


@pytest.mark.parametrize(
    ("upright_votes", "swapped_votes", "answer", "weight"),
    [
        ([2, 0, 0, 0], [0, 2, 0, 0], Answer.FIRST, 1.0),
        ([0, 2, 0, 0], [2, 0, 0, 0], Answer.SECOND, 1.0),
        ([1, 0, 0, 0], [1, 0, 0, 0], Answer.NO_PREFERENCE, 1.0),  # always the one shown first: it says nothing
        ([3, 1, 0, 0], [0, 0, 0, 4], Answer.FIRST, 0.5),
        ([1, 0, 2, 0], [0, 0, 0, 0], Answer.NO_PREFERENCE, 1.0),
        ([2, 0, 2, 0], [0, 0, 0, 0], Answer.FIRST, 0.5),
        ([0, 0, 0, 3], [0, 0, 0, 0], Answer.ABSTAINED, 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], Answer.ABSTAINED, 0.0),
    ],
)
def test_votes(upright_votes: list[int], swapped_votes: list[int], answer: Answer, weight: float) -> None:
    votes = np.array([[upright_votes, swapped_votes]], np.int16)
    assert (decide(votes)[0][0], decide(votes)[1][0]) == (answer, weight)


def test_more_votes_and_the_other_order_make_a_noisy_judge_better(tmp_path: Path) -> None:
    """B6's effect: accuracy rises with votes; a liking for one side caps it unless both orders are asked."""
    pairs = some_pairs(190)
    truth = (pairs[:, 1] > pairs[:, 0]).astype(int)

    class Noisy(Counting):
        def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
            rows = int(first.rows[0]), int(second.rows[0])
            draw = np.random.default_rng([*rows, sample, 7]).random(2)
            if draw[0] < 0.2:
                return Verdict(Answer.FIRST)
            return Verdict(Answer.SECOND if (rows[1] > rows[0]) != (draw[1] < 0.25) else Answer.FIRST)

    accuracy = {}
    for both, samples in ((0.0, 1), (0.0, 8), (1.0, 4)):
        log = AnswerLog(tmp_path / f"{both}{samples}.sqlite")
        votes = ask(Noisy(), "t", pairs, show, AskConfig(both_orders=both, samples=samples), log).votes
        accuracy[both, samples] = (decide(votes)[0] == truth).mean()
        if both:
            bias = position_bias(votes)
            assert 0.53 < bias["first_shown"] / bias["sided"] < 0.8
            assert bias["consistent"] < bias["both_orders"] <= 190
    assert accuracy[0.0, 1] < accuracy[0.0, 8] < accuracy[1.0, 4]
    assert accuracy[1.0, 4] > 0.8


def test_the_unsure_share_goes_to_a_person(tmp_path: Path) -> None:
    votes = np.zeros((10, 2, 4), np.int16)
    votes[:, 0, 0] = [5, 4, 3, 5, 0, 5, 5, 5, 5, 3]
    votes[:, 0, 1] = [0, 1, 2, 0, 0, 0, 0, 0, 0, 3]
    votes[4, 0, 3] = 5
    assert unsure_pairs(votes, 0.3).tolist() == [2, 4, 9]
    assert unsure_pairs(votes, 0.1).tolist() == [4], "abstentions first"
    log = AnswerLog(tmp_path / "a.sqlite")
    pairs = some_pairs(10)
    first = ask(Counting(first_share=1.0), "t", pairs, show, AskConfig(both_orders=0), log)
    person = Counting(name="human:ada")
    chosen = np.array([2, 4])
    merged, who = merge_person(first, ask(person, "t", pairs[chosen], show, AskConfig(both_orders=0), log), chosen)
    assert who.tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    truth = (pairs[:, 1] > pairs[:, 0]).astype(int)
    assert (decide(merged.votes)[0] == truth)[chosen].all()
    assert len(json.loads(merged.records[2])) == 2, "both answers stay on record"
    absent = ask(Counting(fail=True, name="x"), "t", pairs[chosen], show, AskConfig(both_orders=0), log)
    merged, who = merge_person(first, absent, chosen)
    np.testing.assert_array_equal(merged.votes, first.votes)
    assert who.sum() == 0


def test_budgets_hold_under_threads_and_over_runs(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.sqlite")
    budget = Budget(log, "job", max_calls=50, max_cost=1.0)
    made: list[int] = []

    def spend() -> None:
        for _ in range(40):
            try:
                with budget.call(0.03) as booked:
                    time.sleep(0.0005)
                    booked["cost"] = 0.02
                    made.append(1)
            except BudgetSpent:
                return

    threads = [threading.Thread(target=spend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls, cost = budget.spent()
    assert calls == len(made) <= 50
    assert 0.9 < cost <= 1.0
    with pytest.raises(BudgetSpent, match="budget of 1 spent"):
        budget.call(0.03).__enter__()
    assert Budget(log, "another", max_calls=1).spent() == (0, 0.0)


def test_a_call_that_never_returned_counts_in_full(tmp_path: Path) -> None:
    budget = Budget(AnswerLog(tmp_path / "a.sqlite"), "job", max_cost=1.0)
    with pytest.raises(RuntimeError), budget.call(0.7):
        raise RuntimeError
    later = Budget(AnswerLog(tmp_path / "a.sqlite"), "job", max_cost=1.0)
    assert later.spent() == (1, 0.7)
    with pytest.raises(BudgetSpent):
        later.call(0.4).__enter__()


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not a database, and longer than a header of sixteen bytes")
    with pytest.raises(InputError, match="is no log of answers"):
        AnswerLog(tmp_path / "x")
    assert (tmp_path / "x").read_text().startswith("not a database")
    log = AnswerLog(tmp_path / "ok")
    assert sqlite3.connect(log.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def scripted(**settings: Any) -> np.ndarray:
    """Answers of the scripted annotator about 600 pairs."""
    annotator = ScriptedAnnotator(REWARD, ScriptedConfig(**settings), "truth")
    pairs = np.random.default_rng(3).integers(390, size=(600, 2))
    return np.array([annotator.compare("t", show(a, False), show(b, False)).answer for a, b in pairs])


def test_the_scripted_annotator_errs_as_told() -> None:
    exact = scripted()
    assert set(exact) <= {0, 1, 2}
    for share in (0.1, 0.25, 0.5):
        wrong = (scripted(mistakes=share) != exact)[exact < 2].mean()
        assert abs(wrong - share) < 3 * np.sqrt(share * (1 - share) / 600)
    assert (scripted(tie_threshold=0.3) == 2).mean() > 0.1
    assert (scripted(skip_threshold=1.5) == Answer.ABSTAINED).mean() > 0.2
    boltzmann = scripted(rationality=2.0)
    assert 0.05 < (boltzmann != exact).mean() < 0.4
    assert (scripted(rationality=50.0) != exact).mean() < 0.05


def test_the_scripted_annotator_is_the_same_in_either_order_and_at_any_time() -> None:
    annotator = ScriptedAnnotator(REWARD, ScriptedConfig(mistakes=0.5, rationality=3.0), "truth")
    for a, b in [(3, 90), (200, 10), (7, 300)]:
        one = annotator.compare("t", show(a, False), show(b, False))
        assert annotator.compare("t", show(b, False), show(a, False)).answer is one.answer.swapped
        assert annotator.compare("t", show(a, False), show(b, False)) == one


def test_two_truths_never_share_an_answer(tmp_path: Path) -> None:
    """Rows of one store mean other frames in another: a log that both use must keep them apart."""
    log, pairs = AnswerLog(tmp_path / "a.sqlite"), some_pairs(20)
    upward = ask(ScriptedAnnotator(REWARD, ScriptedConfig(), "truth"), "t", pairs, show, AskConfig(), log)
    downward = ask(ScriptedAnnotator(-REWARD, ScriptedConfig(), "truth"), "t", pairs, show, AskConfig(), log)
    assert downward.found == 0
    np.testing.assert_array_equal(decide(downward.votes)[0], 1 - decide(upward.votes)[0])


def test_myopia_sees_the_end() -> None:
    reward = np.zeros(20)
    reward[0], reward[12] = 1.0, 0.8  # first segment: a high start; second: a lower end
    first, second = Segment(np.arange(0, 3)), Segment(np.arange(10, 13))
    assert ScriptedAnnotator(reward, ScriptedConfig(), "t").compare("", first, second).answer is Answer.FIRST
    assert ScriptedAnnotator(reward, ScriptedConfig(myopia=0.5), "t").compare("", first, second).answer is Answer.SECOND
    with pytest.raises(ConfigError, match="mistakes must lie"):
        ScriptedConfig(mistakes=1.2)


EPISODES = Runs(np.arange(0, 2000, 50), np.full(40, 50))


@pytest.mark.parametrize("strategy", ["uniform", "stratified"])
def test_pairs_are_new_whole_and_repeatable(strategy: str) -> None:
    sampler = SegmentSampler(EPISODES, 8, seed=1)
    pairs = draw_pairs(sampler, 8, 300, strategy, seed=1)
    assert pairs.shape == (300, 2)
    assert (np.abs(pairs[:, 0] - pairs[:, 1]) >= 8).all()
    assert (pairs // 50 == (pairs + 7) // 50).all(), "within one episode"
    keys = {tuple(sorted(map(int, pair))) for pair in pairs}
    assert len(keys) == 300
    np.testing.assert_array_equal(pairs, draw_pairs(sampler, 8, 300, strategy, seed=1))
    more = draw_pairs(sampler, 8, 300, strategy, seed=1, start=1, taken=pairs)
    assert not keys & {tuple(sorted(map(int, pair))) for pair in more}
    if strategy == "stratified":
        per_episode = np.bincount(pairs.ravel() // 50, minlength=40)
        assert per_episode.min() >= 10, "600 segments over 40 episodes: each gets its share"
        assert np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1] < 0.2, "partners are not neighbours"


def test_informed_pairs_are_those_the_model_is_least_sure_of() -> None:
    sampler = SegmentSampler(EPISODES, 1, seed=1)

    def margins(rows: np.ndarray) -> np.ndarray:
        difference = (rows[:, 1, 0] - rows[:, 0, 0]) / 200
        return np.stack([difference, difference + np.where(rows[:, 0, 0] < 300, 3.0, 0.0)])

    entropy = draw_pairs(sampler, 1, 30, "entropy", seed=0, margins=margins)
    uniform = draw_pairs(sampler, 1, 30, "uniform", seed=0)
    assert np.abs(np.diff(entropy)).mean() < 0.5 * np.abs(np.diff(uniform)).mean()
    disagreement = draw_pairs(sampler, 1, 30, "disagreement", seed=0, margins=margins)
    assert (disagreement[:, 0] < 300).mean() > 0.9
    with pytest.raises(ConfigError, match="needs a model"):
        draw_pairs(sampler, 1, 30, "entropy", seed=0)
    with pytest.raises(StoreError, match="different pairs of 1 frames were found"):
        draw_pairs(SegmentSampler(Runs(np.array([0]), np.array([4])), 1), 1, 30, "uniform", seed=0)


def test_upright_turns_swapped_votes_round() -> None:
    votes = np.array([[[1, 0, 0, 0], [0, 3, 1, 1]]], np.int16)
    assert upright(votes).tolist() == [[4, 0, 1, 1]]


sys.setswitchinterval(1e-4)  # threads interleave more, so that a missing lock shows
