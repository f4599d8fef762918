"""Preferences of others: every format, joined by key, against the figures that were measured with other tools."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.contracts.preferences import Answer, Segment
from embodied.vlm_rewards.preference_files import FileAnnotator, PairLabels, join_pairs, read_pair_labels
from embodied.vlm_rewards.preference_report import accuracy, agreement, by_difficulty, cycles, true_sides

DATA = Path(__file__).parents[1].parent / "shared" / "data"
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def labels(first: list[int], second: list[int], answer: list[int]) -> PairLabels:
    return PairLabels(np.array(first)[:, None], np.array(second)[:, None], np.array(answer, np.int8))


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_people_and_reward_agree_as_measured_on_all_tasks() -> None:
    """Traps 1 and 2: 13 tasks x 2,000 pairs listed in different order; joined by row every figure is wrong."""
    facts = json.loads((DATA / "pref-unirlhf-human-script" / "facts.json").read_text())
    assert len(facts) == 13
    for task, known in facts.items():
        found = read_pair_labels(DATA / "pref-unirlhf-human-script" / f"{task}.npz")
        measured = agreement(found["human"], found["script"])
        assert measured["pairs"] == known["n"]
        assert measured["both_decided"] == known["both_decisive"]
        assert measured["ties"] == known["human_ties"]
        assert measured["other_ties"] == known["script_ties"]
        share = measured["agree"] / measured["both_decided"]
        assert round(share, 3) == round(known["agreement_joined_by_pair"], 3), task
        decided = (found["human"].answer <= 1) & (found["script"].answer <= 1)
        by_row = (found["human"].answer == found["script"].answer)[decided].mean()
        assert round(float(by_row), 3) == round(known["agreement_joined_by_row_WRONG"], 3), task


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_preference_transformer_labels_with_more_indices_than_labels() -> None:
    facts = json.loads((DATA / "pref-pt-human" / "facts.json").read_text())
    for task, known in facts.items():
        found = read_pair_labels(DATA / "pref-pt-human" / f"{task}.npz")["human"]
        assert np.bincount(found.answer, minlength=3).tolist() == [known["first"], known["second"], known["tie"]]
        assert found.ignored == known["index_shape"][0] - known["labels"]


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_ipl_segments_carry_the_same_labels_as_preference_transformer() -> None:
    found = read_pair_labels(DATA / "pref-ipl-segments" / "Lift" / "num100_q50_human_train.npz")["human"]
    assert found.segments is not None
    assert found.segments.shape == (100, 2, 50, 49)
    other = read_pair_labels(DATA / "pref-pt-human" / "Lift_ph.npz")["human"]
    np.testing.assert_array_equal(found.answer, other.answer)


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_judgements_of_a_vision_language_model_have_the_stated_accuracy() -> None:
    """388 LIBERO pairs: 0.649 with ties counted wrong, 0.710 on decided ones; and no liking for one side."""
    from preference_labels import read_libero  # type: ignore[import-not-found]

    answer, truth, shown_first = read_libero(DATA / "vlm-judgements-libero" / "gvl_eval_20250901_221330.json")
    measured = accuracy(answer, truth)
    assert (measured["pairs"], measured["ties"]) == (388, 33)
    assert round(measured["correct"] / measured["pairs"], 6) == 0.649485
    assert round(measured["correct"] / measured["decided"], 6) == 0.709859
    for side, known in ((True, 0.6485), (False, 0.6505)):
        part = accuracy(answer[shown_first == side], truth[shown_first == side])
        assert round(part["correct"] / part["pairs"], 4) == known


def test_pairs_are_joined_by_key_in_either_order() -> None:
    mine = labels([1, 3, 5, 9], [2, 4, 6, 8], [0, 1, 0, 0])
    other = labels([4, 1, 5], [3, 2, 6], [0, 0, 2])
    assert join_pairs(mine, other).tolist() == [0, 1, 2, -1]
    assert agreement(mine, other) == {"pairs": 3, "both_decided": 2, "agree": 2, "ties": 0, "other_ties": 1}
    with pytest.raises(InputError, match="occurs twice"):
        join_pairs(mine, labels([1, 2], [2, 1], [0, 1]))
    with pytest.raises(InputError, match="occurs twice"):
        join_pairs(labels([1, 1], [2, 2], [0, 1]), other)


def test_accuracy_counts_what_takes_no_side() -> None:
    truth = np.array([0, 1, 1, 0, 2], np.int8)
    answer = np.array([0, 0, 2, 3, 0], np.int8)
    assert accuracy(answer, truth) == {"pairs": 4, "decided": 2, "correct": 1, "ties": 1, "abstained": 1}


def test_difficulty_is_the_true_difference() -> None:
    difference = np.linspace(-1, 1, 101)
    answer = true_sides(difference)
    answer[np.abs(difference) < 0.2] = Answer.SECOND  # wrong for half of the hard ones
    bins = by_difficulty(answer, difference, 5)
    assert [b["pairs"] for b in bins] == [20] * 5, "the pair without a difference is left out"
    assert bins[0]["correct"] == 10
    assert [b["correct"] for b in bins[1:]] == [20] * 4
    assert all(a["high"] <= b["low"] for a, b in itertools.pairwise(bins))


def test_cycles_are_counted() -> None:
    circle = ([0, 1, 2], [1, 2, 0], [0, 0, 0])
    assert cycles(np.array(circle[0]), np.array(circle[1]), np.array(circle[2])) == {"triples": 1, "cyclic": 1}
    assert cycles(np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([0, 0, 1])) == {"triples": 1, "cyclic": 0}
    assert cycles(np.array([0, 1]), np.array([1, 2]), np.array([0, 0])) == {"triples": 0, "cyclic": 0}
    rng = np.random.default_rng(0)
    a, b = np.triu_indices(14, 1)
    random = cycles(a, b, rng.integers(2, size=len(a)))
    assert random["triples"] == 14 * 13 * 12 // 6
    assert 0.12 < random["cyclic"] / random["triples"] < 0.4, "a quarter by chance"


TABLE = """first_episode,first_frame,second_episode,second_frame,answer,annotator
0,3,1,4,first,ada
1,0,0,2,neither,ada
0,3,1,4,1,bob
"""


def test_tables_answer_for_a_store(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(TABLE)
    assert set(read_pair_labels(path)) == {"ada", "bob"}
    starts, steps = np.array([0, 10]), np.arange(20)
    with pytest.raises(InputError, match="labels of ada, bob: say whose"):
        FileAnnotator(path, "", steps, starts)
    ada = FileAnnotator(path, "ada", steps, starts)
    assert ada.pairs.tolist() == [[3, 14], [10, 2]]
    one, two = Segment(np.array([3])), Segment(np.array([14]))
    assert ada.compare("t", one, two).answer is Answer.FIRST
    assert ada.compare("t", two, one).answer is Answer.SECOND
    assert ada.compare("t", two, Segment(np.array([5]))).reason == "not in the file"
    lines = [dict(zip(TABLE.splitlines()[0].split(","), row.split(","), strict=True)) for row in TABLE.splitlines()[1:]]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    again = read_pair_labels(tmp_path / "p.jsonl")["ada"]
    np.testing.assert_array_equal(again.answer, read_pair_labels(path)["ada"].answer)
    np.savez(tmp_path / "s.npz", index_1=[3, 5, 7], index_2=[4, 6, 8], label=[0, -1])
    flat = FileAnnotator(tmp_path / "s.npz", "", np.arange(100, 120), starts)
    assert flat.pairs.tolist() == [[103, 104], [105, 106]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", TABLE.replace("first,ada", "left,ada"), "line 2: answer 'left' is none of"),
        ("p.csv", TABLE.replace("answer", "verdict"), "line 2 lacks answer"),
        ("p.csv", "first_episode,first_frame\n", "holds no preferences"),
        ("p.jsonl", "[1]", "line 1 is no object"),
        ("p.jsonl", "{", "cannot be read"),
        ("p.txt", "", "are read from"),
        ("p.npz", "not a zip", "no readable .npz"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_pair_labels(tmp_path / name)
    with pytest.raises(InputError, match="is no file"):
        read_pair_labels(tmp_path / "absent.csv")


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    for arrays, message in (
        ({"x": [1]}, "no format of preferences known"),
        ({"index_1": [1], "index_2": [2], "label": [0.3]}, "label 0 is 0.3"),
        ({"index_1": [1], "index_2": [2], "label": [0, 1]}, "2 labels for 1 pairs"),
        ({"human_label": [0], "script_label": [0]}, "lacks what its format needs"),
    ):
        values: dict[str, Any] = {key: np.array(value) for key, value in arrays.items()}
        np.savez(tmp_path / "p.npz", **values)
        with pytest.raises(InputError, match=message):
            read_pair_labels(tmp_path / "p.npz")
