"""`embodied label prefer` from the command line: scripted, over HTTP, from a file; killed and run again; its page."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.preferences import Answer
from embodied.datasets.preferences import read_preferences
from embodied.datasets.store import EpisodeStore

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import add_label, make_episode, write_store
from vlm_peer import Peer, status


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EpisodeStore:
    """Six episodes; `truth` is a function of the first joint, and the side camera is as bright as `truth` is high."""
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    episodes = []
    for index in range(6):
        episode = make_episode(index)
        level = np.tanh(episode.observations["joint_position"][:, 0])
        bright = np.round(127 + 120 * level).astype(np.uint8)
        episode.images["side"] = np.broadcast_to(bright[:, None, None, None], (len(bright), 8, 8, 3)).copy()  # type: ignore[index]
        episodes.append(episode)
    made = write_store(tmp_path / "s.zarr", episodes)
    joint = made.read("observation/joint_position")[:, 0]
    add_label(made, "truth", np.tanh(joint).astype(np.float32))
    return EpisodeStore(made.path)


def run(store: EpisodeStore, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any], str]:
    code = main(["label", "prefer", store.path, "--json", *flags])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.strip() else {}, captured.err


SMALL = ("--fit", "members", "2", "epochs", "40", "hidden_sizes", "32", "learning_rate", "0.003")


def test_scripted_preferences_become_a_label_that_follows_the_truth(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--name", "p", "--annotator", "scripted:truth", "--pairs", "250", "--inputs", "state", *SMALL)
    code, result, _ = run(
        store,
        capsys,
        *flags,
        "--ask",
        "mistakes",
        "0.1",
        "--model",
        str(tmp_path / "m"),
        "--report",
        str(tmp_path / "r.html"),
    )
    assert code == 0
    assert result["preferences"]["counts"]["pairs_first"] + result["preferences"]["counts"]["pairs_second"] == 250
    again = EpisodeStore(store.path)
    label, truth = again.label("p"), again.label("truth").score
    assert np.corrcoef(label.score, truth)[0, 1] > 0.85
    assert label.channels["std"].shape == truth.shape
    assert label.provenance["labeller"] == "preference"
    assert label.provenance["config"]["scale"] == "tanh: (-1, 1)"
    preferences = read_preferences(again, "p")
    assert preferences.provenance["config"]["annotator"]["mistakes"] == "0.1"
    page = (tmp_path / "r.html").read_text()
    for text in ("Does it like one side?", "The reward model", "Most confident contradictions", "Least sure"):
        assert text in page
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    code, _, error = run(store, capsys, *flags)
    assert code == 2
    assert "has the label set 'p'" in error
    code, result, _ = run(store, capsys, *flags, "--report", str(tmp_path / "again.html"))
    assert code == 0
    shown = (tmp_path / "again.html").read_text()
    assert re.findall(r"<t[dh][^>]*>([^<]*)<", shown) == re.findall(r"<t[dh][^>]*>([^<]*)<", page)


def test_a_run_that_ended_after_asking_goes_on_without_asking(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with Peer() as peer:
        ask = ("--name", "p", "--task", "to be bright", "--annotator", f"openai:m@{peer.url}", "--pairs", "30")
        assert run(store, capsys, *ask, "--inputs", "none", "--ask", "stages", "one")[0] == 0
        asked = len(peer.requests)
        assert asked == 45
        code, result, _ = run(store, capsys, *ask, "--inputs", "state", *SMALL)
        assert code == 0
        assert len(peer.requests) == asked
        assert result["fit"]["held_out"]["pairs"] == 4
    code, result, _ = run(
        store, capsys, "--name", "q", "--report", str(Path(store.path).parent / "q.html"),
        "--task", "to be bright", "--annotator", f"openai:m@{peer.url}", "--pairs", "30",
        "--inputs", "none", "--ask", "stages", "one",
    )  # fmt: skip
    assert code == 0
    assert result["preferences"]["counts"]["found"] == asked, "the server is gone; every answer is known"
    page = (Path(store.path).parent / "q.html").read_text()
    assert "Does it agree with others?" in page
    assert "100 % [" in page


def test_what_a_model_sees_decides(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    with Peer(lambda number, attempt: status(500) if number % 5 == 0 else None) as peer:
        code, result, _ = run(
            store, capsys, "--name", "v", "--task", "to be bright", "--annotator", f"openai:m@{peer.url}",
            "--pairs", "40", "--inputs", "none", "--ask", "length", "3", "frames_shown", "2", "pause", "0.01",
        )  # fmt: skip
    assert code == 0
    found = read_preferences(EpisodeStore(store.path), "v")
    truth = store.label("truth").score[found.rows()].sum(-1)
    right = (found.answer == Answer.SECOND) == (truth[:, 1] > truth[:, 0])
    assert right[found.decided].mean() > 0.9
    assert result["preferences"]["position_bias"]["both_orders"] > 10
    assert "sk-" not in json.dumps(result)


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with Peer() as peer:
        code, result, _ = run(
            store, capsys, "--name", "v", "--task", "t", "--annotator", f"openai:m@{peer.url}", "--dry-run",
            "--ask", "both_orders", "1.0", "samples", "2", "price_in", "1.0", "price_out", "4.0", "max_cost", "0.1",
        )  # fmt: skip
        assert code == 0
        assert (result["pairs"], result["questions"], result["calls"]) == (200, 800, 1600)
        assert result["within_budget"] is False
        assert peer.requests == []


def test_informed_rounds_and_a_file(store: EpisodeStore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, _ = run(
        store, capsys, "--name", "e", "--annotator", "scripted:truth", "--pairs", "60", "--inputs", "state", *SMALL,
        "--ask", "strategy", "entropy", "rounds", "3",
    )  # fmt: skip
    assert code == 0
    found = read_preferences(EpisodeStore(store.path), "e")
    gap = np.abs(np.diff(store.label("truth").score[found.rows()].sum(-1), axis=1))[:, 0]
    assert gap[20:].mean() < gap[:20].mean(), "later rounds ask about closer pairs"
    with open(tmp_path / "f.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["first_episode", "first_frame", "second_episode", "second_frame", "answer"])
        table.writerows([0, k, 1, 30 - k, ("first", "second", "neither")[k % 3]] for k in range(25))
    code, _result, _ = run(
        store,
        capsys,
        "--name",
        "f",
        "--annotator",
        f"file:{tmp_path / 'f.csv'}",
        "--inputs",
        "none",
        "--ask",
        "both_orders",
        "0",
    )
    assert code == 0
    found = read_preferences(EpisodeStore(store.path), "f")
    np.testing.assert_array_equal(found.answer, np.arange(25) % 3)
    assert found.second[4] == 31 + 26


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--annotator", "gpt"), "must start with one of openai"),
        (("--annotator", "openai:x", "--task", "t"), "must be openai:MODEL@URL"),
        (("--annotator", "scripted:absent"), "no label set 'absent'"),
        (("--annotator", "scripted:truth", "--ask", "mistake", "0.1"), "unknown setting 'mistake'"),
        (("--annotator", "scripted:truth", "--fit", "ties", "none"), "ties 'none' is unknown"),
        (("--annotator", "scripted:truth", "--camera", "front"), "no camera 'front'"),
        (("--annotator", "scripted:truth", "--ask", "length", "40"), "No episode has the 40 rows"),
        (("--annotator", "openai:m@http://127.0.0.1:9", "--task", ""), "--task is needed"),
        (("--annotator", "file:absent.csv",), "absent.csv is no file"),
    ],
)  # fmt: skip
def test_bad_flags_are_named_and_nothing_is_written(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    code, _, error = run(store, capsys, "--name", "p", "--inputs", "state", "--pairs", "20", *flags)
    assert code == 2
    assert message in error
    assert EpisodeStore(store.path).label_names() == ["truth"]
    assert EpisodeStore(store.path).group_names("preferences") == []
