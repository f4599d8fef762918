"""Edits lose nothing: episodes, labels, findings, missing cameras; and a killed edit goes on."""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embodied.cli import main
from embodied.contracts.errors import EmbodiedError, InputError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets import edit as edit_module
from embodied.datasets.doctor import leak_findings
from embodied.datasets.edit import merge, select, split, split_by_fractions, split_by_value
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.pieces import cut
from embodied.datasets.store import EpisodeStore
from embodied.datasets.where import where
from embodied.datasets.write_store import StoreWriter

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import SPEC, add_label, make_episode, write_store

COUNT = 10
ACTION = SPEC.action or ActionSpec(())
FINDINGS = [
    Finding("frame-count", "warning", "about the whole"),
    Finding("odd", "note", "about one", episode=4),
    Finding("episode-left-out", "error", "left out: it was empty", episode=4),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Ten episodes of different length; 8 is 2 again, 5 has no pictures of one camera; two label sets."""
    episodes = [make_episode(index, steps=6 + index) for index in range(COUNT)]
    episodes[8] = dataclasses.replace(episodes[2], source_id="demo_2 again")
    del episodes[5].images["wrist"]
    episodes[9].success = None
    made = write_store(tmp_path_factory.mktemp("edit") / "s", episodes, findings=FINDINGS)
    add_label(made, "clip", np.random.default_rng(0).normal(size=made.num_frames).astype(np.float32), {"goal": "up"})
    add_label(made, "value", np.arange(made.num_frames, dtype=np.float32))
    return EpisodeStore(made.path)


def told(episode: Episode) -> str:
    """A digest of everything an episode holds."""
    digest = hashlib.sha256()
    arrays: dict[str, Any] = {**episode.observations, **episode.images}
    for name in ("action", "step_valid", "terminated", "truncated", "timestamp", "reward"):
        arrays[name] = getattr(episode, name)
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    return digest.hexdigest() + str((episode.instruction, episode.success, episode.source_id))


def content(store: EpisodeStore) -> Counter[str]:
    """The multiset of episodes with their labels."""
    labels = {name: store.label(name) for name in store.label_names()}
    found: Counter[str] = Counter()
    for index in range(store.num_episodes):
        rows = slice(int(store.episode_start[index]), int((store.episode_start + store.episode_length)[index]))
        scores = [
            (name, label.score[rows].tobytes(), label.channels["confidence"][rows].tobytes())
            for name, label in labels.items()
        ]
        found[told(store.episode(index)) + str(scores)] += 1
    return found


def test_split_then_merge_is_the_same_set_of_episodes_and_labels(store: EpisodeStore, tmp_path: Path) -> None:
    parts = split_by_fractions(store, (0.5, 0.3, 0.2), seed=3)
    paths = [tmp_path / name for name in "xyz"]
    edited = split(store, dict(zip(paths, parts, strict=True)), {})
    assert [e.store.num_episodes for e in edited] == [5, 3, 2]
    assert sum((content(e.store) for e in edited), Counter()) == content(store)
    back = merge([e.store for e in edited], tmp_path / "back")
    assert (back.labels, back.labels_left) == (["clip", "value"], {})
    assert content(back.store) == content(store)
    assert int((~back.store.has_camera("wrist")).sum()) == 1
    assert list(leak_findings([e.store for e in edited])) == []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99))
def test_fractions_share_out_every_episode_once(store: EpisodeStore, weights: list[int], seed: int) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    parts = split_by_fractions(store, fractions, seed)
    assert sorted(episode for part in parts for episode in part) == list(range(COUNT))
    assert all(part == sorted(part) and part for part in parts)
    # Equal episodes stay together, and no part is further from its share than that and rounding explain.
    assert any({2, 8} <= set(part) for part in parts)
    shares = np.array([len(part) for part in parts]) - np.array(fractions) * COUNT
    assert shares.min() > -1.01
    assert parts == split_by_fractions(store, fractions, seed)


def test_other_seeds_split_otherwise(store: EpisodeStore) -> None:
    assert len({str(split_by_fractions(store, (0.5, 0.5), seed)) for seed in range(8)}) > 4
    with pytest.raises(InputError, match="their sum 1"):
        split_by_fractions(store, (0.5, 0.6), 0)
    with pytest.raises(InputError, match="has 9 episodes that differ; they cannot be split into 10"):
        split_by_fractions(store, [0.1] * 10, 0)


def test_split_by_value(store: EpisodeStore) -> None:
    assert split_by_value(store, "success") == {
        "success": [1, 3, 5, 7],
        "failure": [0, 2, 4, 6, 8],
        "unknown": [9],
    }
    by_task = split_by_value(store, "instruction")
    assert list(by_task) == ["lift the cube", "push the cube"]
    assert sorted(episode for part in by_task.values() for episode in part) == list(range(COUNT))


def test_a_filter_and_its_complement_are_the_whole(store: EpisodeStore, tmp_path: Path) -> None:
    condition = 'success == true and length >= 9 or mean("value") > 100'
    kept, left = where(store, condition), where(store, f"not ({condition})")
    assert 0 < len(kept) < COUNT
    assert sorted(kept + left) == list(range(COUNT))
    both = [select(store, tmp_path / str(i), part, "data filter", {}).store for i, part in enumerate((kept, left))]
    assert content(both[0]) + content(both[1]) == content(store)


@pytest.mark.parametrize(
    ("text", "episodes"),
    [
        ("success == true", [1, 3, 5, 7]),
        ("success == unknown", [9]),
        ("success != true", [0, 2, 4, 6, 8, 9]),
        ("length > 14 or episode in [0, 2]", [0, 2, 9]),
        ("8 <= length < 10", [1, 2, 8]),
        ("'push' in instruction", [2, 3, 6, 7, 8]),
        ("return == 1 and not terminated", []),
        ("return > 0", [1, 3, 5, 7, 9]),
        ("duration >= 1.35 and truncated", []),
        ("steps * 2 - 1 == -(-13)", [1]),
        ("not has_camera(\"wrist\")", [5]),
        ('last("value") == 6', [0]),
        ("source_id == 'demo_2 again'", [8]),
        ("'return' in instruction", []),
    ],
)  # fmt: skip
def test_where(text: str, episodes: list[int], store: EpisodeStore) -> None:
    assert where(store, text) == episodes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("succes == true", "Did you mean 'success'"),
        ("length >", "cannot be read"),
        ("length", "must be true or false"),
        ("__import__('os').system('true') == 0", "is not known here"),
        ("().__class__.__bases__ == 1", "is not known here"),
        ("[x for x in source_id] == 1", "is not known here"),
        ("(lambda: 1)() == 1", "is not known here"),
        ("2 ** 99999999 > 1", "is not known here"),
        ("'a' * 999999999 == 'b'", "is no number"),
        ("length / 0 > 1", "division by zero"),
        ("length > 'x'", "not supported"),
        ('mean("nothing") > 0', "no label set 'nothing'"),
        ('eval("1") == 1', "no function 'eval'"),
        ("(" * 900 + "1" + ")" * 900, "cannot be read"),
        ("length > 1" + " " * 3000, "at most 2000"),
        ("length is 3", "use =="),
    ],
)
def test_where_knows_nothing_else(text: str, words: str, store: EpisodeStore) -> None:
    with pytest.raises(EmbodiedError) as error:
        where(store, text)
    assert words in str(error.value)


def test_lineage_findings_and_label_provenance_go_along(store: EpisodeStore, tmp_path: Path) -> None:
    first = select(store, tmp_path / "a", [4, 5, 6], "data filter", {"where": "x"}).store
    second = select(first, tmp_path / "b", [0, 2], "data drop", {}).store
    record = second.attributes["provenance"]
    assert [entry["fingerprint"] for entry in record["lineage"]] == [store.fingerprint, first.fingerprint]
    assert record["lineage"][1]["provenance"]["config"]["where"] == "x"
    assert record["inputs"] == {"parent_0": first.fingerprint}
    assert record["source_attributes"] == {"robot": "none"}
    assert (second.attributes["source"], second.attributes["licence"]) == ("made up", "CC0-1.0")
    assert [(f.check, f.episode) for f in second.findings] == [
        ("frame-count", None),
        ("odd", 0),
        ("episode-left-out", None),
    ]
    assert second.findings[2].message == "episode 4 of made up was left out: it was empty"
    label = second.label("clip")
    assert label.provenance["dataset_fingerprint"] == second.fingerprint
    assert label.provenance["derived_from"] == [{"dataset_fingerprint": first.fingerprint, "counts": {}}]
    origin = first.label("clip").provenance["derived_from"]
    assert origin == [{"dataset_fingerprint": store.fingerprint, "counts": {"abstentions": 1}}]
    assert (label.provenance["labeller"], label.provenance["config"]) == ("test", {"goal": "up"})


def test_merge_takes_labels_that_were_made_alike_and_says_what_it_left(store: EpisodeStore, tmp_path: Path) -> None:
    other = write_store(tmp_path / "o", [make_episode(index) for index in (20, 21)])
    add_label(other, "clip", np.zeros(62, np.float32), {"goal": "up"})
    add_label(other, "value", np.zeros(62, np.float32), {"another": "model"})
    add_label(other, "mine", np.zeros(62, np.float32))
    merged = merge([store, EpisodeStore(other.path)], tmp_path / "m")
    assert merged.labels == ["clip"]
    assert "differ in config" in merged.labels_left["value"]
    assert "has no label set of that name" in merged.labels_left["mine"]
    assert len(merged.store.label("clip").provenance["derived_from"]) == 2
    np.testing.assert_array_equal(
        merged.store.label("clip").score, np.concatenate([store.label("clip").score, np.zeros(62, np.float32)])
    )
    with pytest.raises(InputError, match="would be there twice"):
        merge([store, other, store], tmp_path / "n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control_dt": 0.05}, "control_dt: 0.1 and 0.05"),
        ({"images": {"side": SPEC.images["side"]}}, "'wrist' is only in the first"),
        ({"action": dataclasses.replace(ACTION, names=("right", "left"))},
         "'action' names: ['left', 'right'] and ['right', 'left']"),
        ({"observations": {**SPEC.observations, "joint_position": ArraySpec((3,), unit="deg")}},
         "'joint_position' unit: rad and deg"),
    ],
)  # fmt: skip
def test_merge_says_what_differs(change: dict[str, Any], words: str, store: EpisodeStore, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, **change)
    episode = make_episode(30)
    episode.images = {camera: episode.images[camera] for camera in spec.images}
    other = write_store(tmp_path / "o", [episode], spec)
    with pytest.raises(InputError) as error:
        merge([store, other], tmp_path / "m")
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_merged_environments_are_named_in_a_note(store: EpisodeStore, tmp_path: Path) -> None:
    other = write_store(tmp_path / "o", [make_episode(30)], dataclasses.replace(SPEC, environment="made/Other"))
    merged = merge([store, other], tmp_path / "m").store
    assert merged.spec.environment == ""
    assert any("made/Up, made/Other" in f.message for f in merged.findings)


def test_cut_keeps_rows_and_knows_its_new_end() -> None:
    episode = make_episode(1, steps=20)
    head, tail = cut(episode, 0, 8), cut(episode, 8, None)
    assert (len(head), len(tail)) == (8, 13)
    for part in (head, tail):
        part.check(SPEC)
    assert head.truncated.nonzero()[0].tolist() == [7]
    assert not head.step_valid[-1]
    assert (head.success, tail.success) == (None, True)
    assert tail.terminated.nonzero()[0].tolist() == [11]
    assert tail.timestamp[0] == 0
    for camera, pictures in episode.images.items():
        joined = np.concatenate([np.asarray(head.images[camera]), np.asarray(tail.images[camera])])
        np.testing.assert_array_equal(joined, pictures)
    assert cut(episode, 0, None) is episode


# ---- interrupted ---------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an error that anything catches."""


def test_a_killed_split_goes_on_where_it_was(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {tmp_path / "a": [0, 1, 2, 8], tmp_path / "b": [3, 4], tmp_path / "c-d": [5, 6, 7, 9]}
    write, join, carry = StoreWriter.write_episode, StoreWriter.finish, edit_module._carry
    calls = Counter()

    def stop_at(name: str, count: int, real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            calls[name] += 1
            if calls[name] == count:
                raise Killed
            return real(*arguments, **more)

        return call

    for where_, number in (("write", 3), ("finish", 2), ("carry", 2), ("carry", 3)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write_episode", stop_at("write", number if where_ == "write" else 0, write))
            patch.setattr(StoreWriter, "finish", stop_at("finish", number if where_ == "finish" else 0, join))
            patch.setattr(edit_module, "_carry", stop_at("carry", number if where_ == "carry" else 0, carry))
            with pytest.raises(Killed):
                split(store, parts, {"seed": 1})
    edited = split(store, parts, {"seed": 1})
    straight = split(store, {tmp_path / "u" / p.name: e for p, e in parts.items()}, {"seed": 1})
    assert [e.store.fingerprint for e in edited] == [e.store.fingerprint for e in straight]
    assert all(content(a.store) == content(b.store) for a, b in zip(edited, straight, strict=True))
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.labels-partial"))
    with pytest.raises(StoreError, match="exists already"):
        split(store, parts, {"seed": 1})
    with pytest.raises(StoreError, match="exists already"):
        split(store, parts, {"seed": 2})


# ---- the verbs -----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["data", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["data", *map(str, words)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.strip().splitlines()) <= 3
    return output.err


def test_verbs(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s, a, b = store.path, tmp_path / "train", tmp_path / "test"
    result = run(capsys, "split", s, a, b, "--fractions", "0.8", "0.2")
    assert [part["episodes"] for part in result["parts"]] == [8, 2]
    assert result["parts"][0]["labels"] == ["clip", "value"]
    assert run(capsys, "merge", a, b, tmp_path / "both", "--labels", "clip")["labels"] == ["clip"]
    kept = run(capsys, "filter", s, tmp_path / "long", "--where", "length >= 10")
    assert (kept["episodes"], kept["left_out"]) == (6, 4)
    dropped = run(capsys, "drop", s, tmp_path / "less", "--episodes", "0,3:6", "--keys", "object", "wrist")
    assert (dropped["episodes"], dropped["left_out"]) == (6, 4)
    less = EpisodeStore(tmp_path / "less")
    assert (list(less.spec.observations), list(less.spec.images)) == (["joint_position"], ["side"])
    assert less.source_ids == ["demo_1", "demo_2", "demo_6", "demo_7", "demo_2 again", "demo_9"]
    by = run(capsys, "split", s, *(tmp_path / f"by{i}" for i in range(3)), "--by", "success")
    assert [(part["of"], part["episodes"]) for part in by["parts"]] == [("success", 4), ("failure", 5), ("unknown", 1)]
    assert main(["data", "filter", s, str(tmp_path / "x"), "--where", "success == true"]) == 0
    text = capsys.readouterr().out
    assert "x: 4 episodes" in text
    assert "label sets: clip, value" in text


def test_mistakes(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s, out = store.path, tmp_path / "out"
    assert "needs --fractions or --by" in fails(capsys, "split", s, out)
    assert "--by success finds 3 (success, failure, unknown); 1 stores" in fails(
        capsys, "split", s, out, "--by", "success"
    )
    assert "named twice" in fails(capsys, "split", s, out, out, "--fractions", "0.5", "0.5")
    assert "two stores and the one to make" in fails(capsys, "merge", s, out)
    assert "nothing to leave out" in fails(capsys, "drop", s, out)
    assert "has no 'wirst'. Did you mean 'wrist'" in fails(capsys, "drop", s, out, "--keys", "wirst")
    assert "episodes 0 to 9; '10' is not" in fails(capsys, "drop", s, out, "--episodes", "10")
    assert "'x' is no number" in fails(capsys, "drop", s, out, "--episodes", "1,x")
    assert "no episode would be left" in fails(capsys, "drop", s, out, "--episodes", "0:10")
    assert "holds for none of 10 episodes" in fails(capsys, "filter", s, out, "--where", "length > 99")
    assert "read and written by the same command" in fails(capsys, "filter", s, s, "--where", "length > 9")
    assert "no label set 'clap'" in fails(capsys, "filter", s, out, "--where", "length > 9", "--labels", "clap")
    assert not out.exists()
    assert not Path(f"{out}.partial").exists()
