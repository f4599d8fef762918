"""Metrics for other tools, written by their own packages where they are installed, and read back from their files."""

import glob
import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, MissingExtraError
from embodied.policies.loggers import loggers
from embodied.policies.loop import read_metrics
from embodied.policies.train import TransitionData, make_config, train

ROWS = [(10, {"loss": [1.0, 2.0], "value": [0.5, -0.5]}), (20, {"loss": [0.25, 4.0], "value": [0.75, -0.75]})]


def write(kind: str, out: Path, names: tuple[str, ...] = ("seed_000", "seed_001")) -> None:
    with loggers([kind], out, names, {"discount": 0.99}) as log:
        assert log is not None
        for step, row in ROWS:
            log(step, row)


def test_no_tool_is_no_log_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    with loggers([], tmp_path, ["seed_000"], {}) as log:
        assert log is None
    with pytest.raises(ConfigError, match=r"no 'tensorbord'. Did you mean 'tensorboard'"):
        write("tensorbord", tmp_path)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=f"--log {kind} needs the package '{kind}'"):
        write(kind, tmp_path)


def test_tensorboard_has_a_run_per_policy(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path)
    for index, name in enumerate(("seed_000", "seed_001")):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        found = [(e.step, e.value) for e in events.Scalars("loss")]
        assert found == [(step, row["loss"][index]) for step, row in ROWS]


def test_wandb_offline_keeps_a_run_per_policy_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write("wandb", tmp_path)
    folders = glob.glob(str(tmp_path / "wandb" / "offline-run-*"))
    assert len({folder.rsplit("-", 1)[1] for folder in folders}) == 2
    assert all(glob.glob(folder + "/*.wandb") for folder in folders)


def test_trackio_has_a_run_per_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "store", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store", raising=False)
    assert trackio is not None
    write("trackio", tmp_path / "project")
    (file,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    found = [(name, step, json.loads(metrics)["loss"]) for name, step, metrics in rows]
    assert found == [("seed_000", 10, 1.0), ("seed_000", 20, 0.25), ("seed_001", 10, 2.0), ("seed_001", 20, 4.0)]


def test_a_run_sends_what_metrics_jsonl_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `train`, with a tool that notes what it is given."""
    seen: dict[str, list] = {}

    def note(out: Path, name: str, settings: object) -> tuple:
        seen[name] = []
        return lambda step, row: seen[name].append({"step": step, **row}), lambda: seen[name].append("closed")

    monkeypatch.setitem(__import__("embodied.policies.loggers", fromlist=["x"]).WRITERS, "notes", note)
    rng = np.random.default_rng(0)
    numbers = np.arange(50)
    data = TransitionData(
        rng.normal(size=(51, 3)).astype(np.float32),
        rng.uniform(-1, 1, (51, 2)).astype(np.float32),
        numbers,
        numbers + 1,
        np.ones(50, np.float32),
        np.ones(50, np.float32),
    )
    config = make_config("bc", overrides={"hidden_sizes": (8,), "batch_size": 8})
    train("bc", data, config, [0, 4], 20, tmp_path, log_every=10, log=["notes"])
    rows = read_metrics(tmp_path)
    for index, name in enumerate(("seed_000", "seed_004")):
        expected = [{k: v if k == "step" else v[index] for k, v in row.items()} for row in rows]
        assert seen[name] == [*expected, "closed"]
