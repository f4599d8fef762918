"""Further labellers: sweeps over prompts, goal pictures, a classifier from a few marks, LeRobot's progress sidecar."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

pytest.importorskip("open_clip")

from embodied.cli import main
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards import clip_sweep
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.clip_sweep import Sweep
from embodied.vlm_rewards.frame_table import read_table
from embodied.vlm_rewards.goal_similarity import nearest_cosine, similarity_by
from embodied.vlm_rewards.label_checks import Episodes, check_label
from embodied.vlm_rewards.label_store import label_clip
from embodied.vlm_rewards.success_classifier import (
    PENALTIES,
    Marks,
    fit_classifier,
    folds_of,
    read_marks,
    train_classifier,
)
from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, write_folder

torch.set_num_threads(1)
LENGTHS = (7, 5, 9, 6, 8, 5)  # the last row of each is a final observation
SUCCESS = (1, 0, 1, 0, 1, 0)
PATTERN = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3))


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    """Video that fades from one picture to another, all the way in successful episodes and to a third in the others."""
    writer = StoreWriter(tmp_path / "s", DatasetSpec({}, {"side": ArraySpec((40, 40, 3), "uint8")}, None), {})
    for index, (length, success) in enumerate(zip(LENGTHS, SUCCESS, strict=True)):
        step_valid, terminated, truncated = end_flags(length - 1, length, False)
        share = np.linspace(0, 1 if success else 0.33, length)[:, None, None, None]
        frames = ((1 - share) * PATTERN[0] + share * PATTERN[1]).astype(np.uint8)
        times = np.arange(length) * 0.1
        episode = Episode({}, {"side": frames}, None, step_valid, terminated, truncated, times, success=success == 1)
        writer.write_episode(index, episode)
    return writer.finish(len(LENGTHS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = SmallClipConfig(embedding_dim=16, image_width=8, text_width=8, text_layers=1, text_heads=2)
    path = tmp_path_factory.mktemp("clip") / "tiny"
    write_folder(build_model(config, 32, seed=0), config.open_clip_config(32), {}, path)
    return str(path)


def run(words: list[str], capsys: Any, code: int = 0) -> Any:
    assert main(words) == code
    output = capsys.readouterr()
    return json.loads(output.out) if code == 0 else output.err


# Sweep


def test_sweep_rows_are_what_label_and_audit_find_one_by_one(
    store: EpisodeStore, folder: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "goals: [it is up, [it is high, it is above]]\nbaselines: [it is down, there it is]\nregularizations: [1, 0]\n"
    )
    command = ["label", "clip", store.path, "--sweep", str(tmp_path / "sweep.yaml"), "--model", folder]
    encoded = []
    monkeypatch.setattr(
        clip_sweep, "frame_embeddings", lambda *a, f=clip_sweep.frame_embeddings: encoded.append(1) or f(*a)
    )
    result = run([*command, "--out", str(tmp_path / "t.json"), "--json"], capsys)
    assert len(encoded) == 1
    assert EpisodeStore(store.path).label_names() == []
    rows = [(row["goals"], row["baselines"], row["regularization"]) for row in result["rows"]]
    high = ["it is high", "it is above"]
    assert rows == [  # in the order of the file; a baseline has no say at regularization 0, so that row stands once
        (["it is up"], ["it is down"], 1.0),
        (["it is up"], [], 0.0),
        (["it is up"], ["there it is"], 1.0),
        (high, ["it is down"], 1.0),
        (high, [], 0.0),
        (high, ["there it is"], 1.0),
    ]
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == result["rows"]
    episodes = Episodes(store.episode_start, store.episode_length, store.success)
    for number, (goals, baselines, regularization) in enumerate(rows):
        label = label_clip(store, f"l{number}", "side", goals, baselines, regularization, model=folder)
        expected = check_label(label.score, episodes)
        found = {key: result["rows"][number][key] for key in expected}
        assert json.loads(json.dumps(expected)) == found
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "it is high | it is above" in text
    assert "looks better on these episodes than it is" in text


def test_sweep_leaves_out_the_episodes_that_an_audit_looks_at(
    store: EpisodeStore, folder: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "s.yaml").write_text("goals: [up]\n")
    command = ["label", "clip", store.path, "--sweep", str(tmp_path / "s.yaml"), "--model", folder, "--json"]
    swept = run([*command, "--holdout", "0.34", "--seed", "3"], capsys)
    assert "label audit --holdout 0.34 --seed 3" in swept["note"]
    assert (
        main(["label", "clip", store.path, "--name", "x", "--goal", "up", "--model", folder, "--regularization", "0"])
        == 0
    )
    capsys.readouterr()
    audited = run(["label", "audit", store.path, "--holdout", "0.34", "--seed", "3", "--json"], capsys)
    assert len(audited["episodes"]) == 2
    assert sorted(swept["episodes"] + audited["episodes"]) == list(range(len(LENGTHS)))


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("goals: [a]\nbaseline: [b]\n", [], "unknown key 'baseline'. Did you mean 'baselines'"),
        ("baselines: [b]\n", [], "the key 'goals' is missing"),
        ("goals: []\n", [], "at least one goal"),
        ("goals: [a]\nregularizations: [0.5]\n", [], "needs 'baselines'"),
        ("goals: [a]\nbaselines: [a]\nregularizations: [0.5]\n", [], "have the same embedding"),
        ("goals: [a]\nbaselines: [b]\nregularizations: [2]\n", [], "must lie in [0, 1]"),
        ("goals: ['']\n", [], "no prompt may be empty"),
        ("goals: [3]\n", [], "Expected `str | array`"),
        ("goals: [a]\n", ["--name", "x"], "--sweep writes no label set"),
        ("- a\n", [], "a sweep is a mapping with the key 'goals'"),
    ],
)
def test_bad_sweeps(
    store: EpisodeStore, folder: str, tmp_path: Path, capsys: Any, text: str, words: list[str], message: str
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    command = ["label", "clip", store.path, "--sweep", str(tmp_path / "s.yaml"), "--model", folder, *words]
    assert message in run(command, capsys, 2)
    assert store.group_names("embeddings") == [], "refused before anything was embedded"


def test_a_name_is_needed_without_a_sweep(store: EpisodeStore, capsys: Any) -> None:
    assert "needs --name and --goal" in run(["label", "clip", store.path, "--goal", "up"], capsys, 2)
    assert "belong to --sweep" in run(
        ["label", "clip", store.path, "--name", "x", "--goal", "up", "--holdout", "0.5"], capsys, 2
    )
    with pytest.raises(ConfigError, match="at least one goal"):
        Sweep([], [], []).rows()


# Goal pictures


def test_nearest_cosine_by_hand() -> None:
    goals = np.array([[2.0, 0.0], [0.0, 5.0]])
    frames = np.array([[3.0, 4.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(nearest_cosine(frames, goals), [0.8, 0.0, 1.0, 0.0], atol=1e-12)


def test_goal_similarity_is_one_at_the_goals_and_uses_stored_embeddings(
    store: EpisodeStore, folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_clip(store, "clip", "side", ["up"], model=folder)
    encode, calls = ClipEncoder.encode, []
    monkeypatch.setattr(ClipEncoder, "encode", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels))
    run(["label", "goal", store.path, "--name", "g", "--model", folder, "--json"], capsys)
    assert calls == [3], "only the goal pictures are encoded"
    label = EpisodeStore(store.path).label("g")
    last = store.episode_start + store.episode_length - 1
    won = np.array(SUCCESS) == 1
    np.testing.assert_allclose(label.score[last[won]], 1.0, atol=1e-6)
    assert label.score[last[~won]].max() < 1 - 1e-6
    record = label.provenance
    assert record["labeller"] == "goal"
    assert record["config"]["goals"] == ["episode 0 frame 6", "episode 2 frame 8", "episode 4 frame 7"]
    assert record["config"]["weights_hash"] == ClipEncoder(folder).identity["weights_hash"]
    embeddings = ClipEncoder(folder).embed(store.frames("side")).astype(np.float64)
    np.testing.assert_allclose(label.score, (embeddings @ embeddings[last[won]].T).max(1), atol=1e-6)


def test_goal_similarity_by_a_value_bundle(store: EpisodeStore, tmp_path: Path, capsys: Any) -> None:
    from embodied.policies.bundle import load_value, save_value
    from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators

    encoder = ImageEncoder(EncoderConfig((40, 40), (4, 8), 8), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 8, (16, 16))
    bundle = save_value(tmp_path / "v", heads, encoder, {"camera": "side"}, {"discount": 0.9}, {})
    command = ["label", "goal", store.path, "--bundle", str(bundle), "--goals", "0:2", "--json"]
    run([*command, "--name", "b"], capsys)
    label = EpisodeStore(store.path).label("b")
    states = load_value(bundle).encode(store.frames("side")).astype(np.float64)
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    np.testing.assert_allclose(label.score, states @ states[2], atol=1e-5)
    assert label.provenance["inputs"]["bundle"] == load_value(bundle).fingerprint
    assert label.provenance["config"]["camera"] == "side", "the bundle's own"
    assert "no camera 'front'" in run([*command, "--name", "c", "--camera", "front"], capsys, 2)
    assert "two encoders" in run([*command, "--name", "c", "--model", "clip-lift"], capsys, 2)
    assert "already" in run([*command, "--name", "b"], capsys, 2)


def test_frames_that_cannot_be_decoded_are_marked(store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from embodied.vlm_rewards import goal_similarity

    def readable(store: EpisodeStore, camera: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return store.frames(camera, start, stop), np.arange(start, stop) != 4

    monkeypatch.setattr(goal_similarity, "readable_frames", readable)
    monkeypatch.setattr(goal_similarity, "BLOCK", 6)
    monkeypatch.setattr(EpisodeStore, "has_camera", lambda self, camera: np.arange(6) != 2)
    with pytest.raises(InputError, match="1 of 6 episodes have no pictures of 'side', first episode 2"):
        similarity_by(store, "side", lambda frames: frames.mean((1, 2)), np.ones((1, 3)))
    monkeypatch.setattr(EpisodeStore, "has_camera", lambda self, camera: np.ones(6, bool))
    means = store.frames("side").mean((1, 2))
    scores, valid = similarity_by(store, "side", lambda frames: frames.mean((1, 2)), means[:1])
    assert np.flatnonzero(~valid).tolist() == [4]
    np.testing.assert_allclose(scores, nearest_cosine(means, means[:1]))


# Success classifier


def test_the_classifier_meets_its_equation() -> None:
    """Features at +-1 with equal classes: the weight solves sigmoid(-w) = penalty * w, and the bias is 0."""
    features = np.array([[5.0], [5.0], [3.0], [3.0]])  # centre 4, scale 1
    for penalty in (0.01, 0.1, 1.0):
        found = fit_classifier(features, features[:, 0] > 4, penalty)
        expected: Any = brentq(lambda w, p=penalty: 1 / (1 + np.exp(w)) - p * w, 0, 100)
        assert found.weight[0] == pytest.approx(expected, abs=1e-6)
        assert found.bias == pytest.approx(0, abs=1e-6)
        assert found(np.array([[4.0], [6.0]])) == pytest.approx([0.5, 1 / (1 + np.exp(-2 * expected))], abs=1e-6)
    # The bias is not penalised: with all features equal it is the log odds.
    same = fit_classifier(np.ones((4, 2)), np.array([True, True, True, False]), 1.0)
    assert same(np.ones((1, 2)))[0] == pytest.approx(0.75, abs=1e-6)


def test_folds_hold_whole_episodes_of_both_kinds() -> None:
    episode = np.repeat(np.arange(12), 3)
    success = np.isin(episode, [1, 2, 3, 5, 8, 9])
    marks = Marks(np.arange(36), episode, success)
    fold = folds_of(marks, np.ones(36, bool))
    for number in range(5):
        assert len(np.unique(success[fold == number])) == 2
    assert all(len(np.unique(fold[episode == e])) == 1 for e in range(12))
    assert (folds_of(marks, episode < 6)[episode >= 6] == -1).all()


def test_held_out_figures_tell_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(30), 2)
    success = episode % 2 == 0
    features = rng.normal(size=(60, 20))
    marks = Marks(np.arange(60), episode, success)
    _, noise = train_classifier(features, marks)
    assert noise["held_out"]["separation"]["low"] < 0.5 < noise["held_out"]["separation"]["high"]
    assert 0.25 < noise["held_out"]["accuracy"]["mean"] < 0.75
    features[:, 0] += 6 * success
    classifier, found = train_classifier(features, marks)
    assert found["held_out"]["separation"]["auc"] > 0.95
    assert found["held_out"]["accuracy"]["low"] > 0.85
    assert found["penalty"] in PENALTIES
    assert (found["marks"], found["successes"], found["episodes"]) == (60, 30, 30)
    assert ((classifier(features) > 0.5) == success).mean() > 0.95


def test_an_episode_is_never_judged_by_a_classifier_that_saw_it() -> None:
    """Features that name the episode and nothing else: fitted ones are right everywhere, held-out ones cannot be."""
    episode = np.repeat(np.arange(10), 4)
    success = episode % 2 == 0
    features = np.eye(10)[episode]
    classifier, found = train_classifier(features, Marks(np.arange(40), episode, success))
    assert ((classifier(features) > 0.5) == success).all()
    assert found["held_out"]["accuracy"]["mean"] <= 0.6


def test_label_success_from_marks_and_from_outcomes(
    store: EpisodeStore, folder: str, tmp_path: Path, capsys: Any
) -> None:
    rows = [(e, LENGTHS[e] - 1, s) for e, s in enumerate(SUCCESS)]
    (tmp_path / "m.csv").write_text("episode,frame,success\n" + "".join(f"{e}, {f}, {s}\n" for e, f, s in rows))
    command = ["label", "success", store.path, "--model", folder, "--json"]
    by_hand = run([*command, "--name", "m", "--marks", str(tmp_path / "m.csv")], capsys)
    by_outcome = run([*command, "--name", "o", "--from-success"], capsys)
    assert by_hand["classifier"] == by_outcome["classifier"]
    label = EpisodeStore(store.path).label("m")
    np.testing.assert_array_equal(label.score, EpisodeStore(store.path).label("o").score)
    assert ((label.score >= 0) & (label.score <= 1)).all()
    last = store.episode_start + store.episode_length - 1
    assert label.score[last[::2]].min() > label.score[last[1::2]].max()
    found = label.provenance["config"]["classifier"]
    assert (found["marks"], found["successes"], found["episodes"]) == (6, 3, 6)
    assert found["held_out"]["episodes"] == 6
    assert found["held_out"]["separation"]["auc"] == 1.0, "they fade to different pictures"
    assert label.provenance["inputs"]["marks"]
    lines = [json.dumps({"episode": e, "frame": f, "success": bool(s)}) for e, f, s in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert read_marks(tmp_path / "m.jsonl", store).row.tolist() == last.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("episode,frame,success\n0,1,1\n2,3,1\n", "All 2 marked frames are marked as success"),
        ("episode,frame,success\n0,1,0\n", "All 1 marked frames are marked as failure"),
        ("episode,frame,success\n0,1,1\n0,1,0\n", "line 3: frame 1 of episode 0 is marked twice"),
        ("episode,frame,success\n0,7,1\n", "line 2: .* no frame 7 in episode 0"),
        ("episode,frame,success\n6,0,1\n", "no frame 0 in episode 6"),
        ("episode,frame,sucess\n0,1,1\n", "no column 'sucess'. Did you mean 'success'"),
        ("episode,frame\n0,1\n", "'success' is missing"),
        ("episode,frame,success\n0,1,maybe\n", "line 2: 'success' is 'maybe'; it must be 1 or 0"),
        ("episode,frame,success\n0,-1,1\n", "'frame' is '-1'; it must be a whole number"),
        ("episode,frame,success\n0,1,1,1\n", "line 2 has more cells"),
        ("episode,frame,success\n", "has no rows"),
    ],
)
def test_bad_marks(store: EpisodeStore, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_marks(tmp_path / "m.csv", store)


def test_tables_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"episode": 1, "caption": "a, b"}\n\n{"episode": 0, "caption": "c"}\n')
    columns = {"episode": int, "caption": str}
    assert read_table(path, columns) == [(1, {"episode": 1, "caption": "a, b"}), (3, {"episode": 0, "caption": "c"})]
    (tmp_path / "t.csv").write_text('episode,caption\n1,"a, b"\n')
    assert read_table(tmp_path / "t.csv", columns) == [(2, {"episode": 1, "caption": "a, b"})]
    for text in ("[1]\n", "{\n", '{"episode": true, "caption": "x"}', '{"episode": 1, "caption": ""}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="line 1"):
            read_table(path, columns)
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "absent.csv", columns)


def test_marks_or_outcomes_not_both(store: EpisodeStore, capsys: Any) -> None:
    assert "one of the two" in run(["label", "success", store.path, "--name", "x"], capsys, 2)


# Progress sidecar


def sidecar(path: Path, store: EpisodeStore, drop: int | None = None) -> np.ndarray:
    """A sidecar with its rows in a random order and none for final observations; the scores by row of the store."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(1)
    score = rng.uniform(size=store.num_frames).astype(np.float32)
    keys = [(e, f) for e, length in enumerate(LENGTHS) for f in range(length - 1)]
    keys = [keys[i] for i in rng.permutation(len(keys)) if i != drop]
    columns = {
        "index": np.arange(len(keys)),
        "episode_index": np.array([e for e, _ in keys]),
        "frame_index": np.array([f for _, f in keys]),
        "progress_sparse": np.array([score[store.episode_start[e] + f] for e, f in keys], np.float32),
    }
    parquet.write_table(pyarrow.table(columns), path)
    return score


def test_import_joins_by_key_and_carries_progress_to_final_observations(
    store: EpisodeStore, tmp_path: Path, capsys: Any
) -> None:
    score = sidecar(tmp_path / "p.parquet", store)
    command = ["label", "import", store.path, "--file", str(tmp_path / "p.parquet"), "--json"]
    result = run([*command, "--name", "p"], capsys)
    assert result["carried_final_observations"] == len(LENGTHS)
    last = store.episode_start + store.episode_length - 1
    score[last] = score[last - 1]
    label = EpisodeStore(store.path).label("p")
    np.testing.assert_array_equal(label.score, score)
    assert label.provenance["labeller"] == "progress sidecar"
    assert label.provenance["inputs"]["file"]
    assert "progress_dense" in run([*command, "--name", "q", "--column", "progress_dense"], capsys, 2)


def test_import_counts_what_is_missing(store: EpisodeStore, tmp_path: Path, capsys: Any) -> None:
    sidecar(tmp_path / "p.parquet", store, drop=8)  # episode 1, frame 2
    command = ["label", "import", store.path, "--name", "p", "--file", str(tmp_path / "p.parquet")]
    assert f"for 1 of {sum(LENGTHS)} frames" in (error := run(command, capsys, 2))
    assert "first episode 1, frame 2" in error
    assert EpisodeStore(store.path).label_names() == []
