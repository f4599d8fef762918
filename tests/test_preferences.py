"""Preference sets: kept whole with a store, read back the same, refused where they do not belong."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import LabelError
from embodied.contracts.preferences import Answer, Segment
from embodied.datasets.preferences import Preferences, preference_names, read_preferences, write_preferences
from embodied.datasets.store import EpisodeStore

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import make_episode, write_store


def made_preferences(store: EpisodeStore, count: int = 6, length: int = 3, **changes: Any) -> Preferences:
    rng = np.random.default_rng(0)
    starts = store.episode_start[rng.integers(store.num_episodes, size=(count, 2))] + rng.integers(20, size=(count, 2))
    answer = np.arange(count) % 4
    votes = np.zeros((count, 2, 4), np.int16)
    votes[np.arange(count), 0, answer] = 2
    values = {
        "task": "lift the cube",
        "camera": "side",
        "length": length,
        "first": starts[:, 0],
        "second": starts[:, 1],
        "answer": answer.astype(np.int8),
        "votes": votes,
        "weight": np.linspace(0, 1, count, dtype=np.float32),
        "annotator": np.zeros(count, np.int8),
        "annotators": ("scripted",),
        "records": [f'{{"raw": "Ünïcode {i}"}}' for i in range(count)],
        "provenance": {
            "annotator": "scripted",
            "config": {},
            "dataset_fingerprint": store.fingerprint,
            "code_version": "1",
        },
    }
    return Preferences(**(values | changes))


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    return write_store(tmp_path / "s.zarr", [make_episode(i) for i in range(3)])


def test_what_was_written_is_read(store: EpisodeStore) -> None:
    written = made_preferences(store)
    write_preferences(store, "asked", written)
    assert preference_names(store) == ["asked"]
    found = read_preferences(store, "asked")
    for field in dataclasses.fields(Preferences):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(written, field.name), field.name)
    assert found.decided.tolist() == [True, True, False, False, True, True]
    assert found.compared.tolist() == [True, True, True, False, True, True]
    assert found.rows(np.array([2])).tolist() == [
        [[r + k for k in range(3)] for r in (written.first[2], written.second[2])]
    ]
    assert [p.name for p in Path(store.path).parent.iterdir()] == ["s.zarr"], "nothing half-written beside the store"


def test_a_set_is_never_overwritten(store: EpisodeStore) -> None:
    write_preferences(store, "asked", made_preferences(store))
    with pytest.raises(LabelError, match="has a preference set 'asked' already"):
        write_preferences(store, "asked", made_preferences(store, count=3))
    assert len(read_preferences(store, "asked")) == 6
    with pytest.raises(LabelError, match=r"no preference set 'aksed'\. Did you mean 'asked'"):
        read_preferences(store, "aksed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": np.array([-1, 0, 0])}, "outside the 93 frames"),
        ({"second": np.array([0, 29, 0])}, "crosses the end of an episode"),
        ({"answer": np.array([0, 4, 0], np.int8)}, "none of FIRST"),
        ({"annotator": np.array([0, 1, 0], np.int8)}, "none of the 1 annotators"),
        ({"weight": np.array([0, 1, 1.5], np.float32)}, r"outside \[0, 1\]"),
        ({"votes": np.zeros((3, 4), np.int16)}, "'votes' has shape"),
        ({"records": ["{}"]}, "1 records for 3 pairs"),
        ({"provenance": {"annotator": "x", "config": {}, "dataset_fingerprint": "x"}}, "lacks 'code_version'"),
        (
            {"provenance": {"annotator": "x", "config": {}, "dataset_fingerprint": "x", "code_version": "1"}},
            "names another dataset",
        ),
    ],
)
def test_what_does_not_fit_is_refused(store: EpisodeStore, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        write_preferences(store, "asked", made_preferences(store, count=3, **changes))
    assert preference_names(store) == []


def test_the_last_frame_of_an_episode_may_end_a_segment(store: EpisodeStore) -> None:
    last = np.array([28, 59, 90])  # episodes of 31 frames, segments of 3
    write_preferences(store, "asked", made_preferences(store, count=3, first=last, second=last))
    assert read_preferences(store, "asked").rows().max() == 92


def test_content_is_what_an_annotator_sees() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    one, same = Segment(np.array([3, 4]), frames), Segment(np.array([7, 8]), frames.copy())
    assert one.content == same.content
    frames_other = frames.copy()
    frames_other[1, 0, 0, 0] = 1
    assert Segment(one.rows, frames_other).content != one.content
    assert Segment(one.rows, frames.reshape(4, 2, 4, 3)).content != one.content, "the shape counts"
    assert Segment(np.array([3, 4])).content != Segment(np.array([3, 5])).content
    assert [answer.swapped for answer in Answer] == [
        Answer.SECOND,
        Answer.FIRST,
        Answer.NO_PREFERENCE,
        Answer.ABSTAINED,
    ]
