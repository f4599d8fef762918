"""Scores of others: every layout of CSV, NumPy and JSON, folders of curves, what is refused, and normalisation."""

import json
from pathlib import Path

import numpy as np
import pytest

from embodied.compare_normalize import normalized
from embodied.compare_read import pick, read_runs
from embodied.contracts.errors import InputError


def table(path: Path | list[Path], at: str = "last", **settings: str | None) -> dict[str, dict[str, list[float]]]:
    runs = read_runs(path if isinstance(path, list) else [path], **settings)
    return {a: {t: v.tolist() for t, v in tasks.items()} for a, tasks in pick(runs, at)[0].items()}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_long_csv_with_and_without_steps(tmp_path: Path) -> None:
    final = write(tmp_path / "a.csv", "Algo,env,seed,score\nX,t,1,3\nX,t,0,2\nY,t,0,5\n")
    assert table(final) == {"X": {"t": [2.0, 3.0]}, "Y": {"t": [5.0]}}  # in the order of the seeds
    curves = write(tmp_path / "b.csv", "algorithm,task,seed,step,return\nX,t,0,20,4\nX,t,0,10,7\nX,t,1,10,1\n")
    assert table(curves) == {"X": {"t": [4.0, 1.0]}}
    assert table(curves, "best") == {"X": {"t": [7.0, 1.0]}}
    assert table(curves, "common") == {"X": {"t": [7.0, 1.0]}}
    assert table(curves, "15") == {"X": {"t": [7.0, 1.0]}}
    two = write(tmp_path / "c.csv", "algorithm,score,reward\nX,1,9\nX,2,8\n")
    assert table(two, metric="reward") == {"X": {"": [9.0, 8.0]}}


def test_wide_csv_of_tasks_or_of_algorithms(tmp_path: Path) -> None:
    tasks = write(tmp_path / "mine.csv", "seed,reach,push\n0,0.5,0.1\n1,0.7,\n")
    assert table(tasks) == {"mine": {"reach": [0.5, 0.7], "push": [0.1]}}
    assert list(table([Path(f"Ours={tasks}")])) == ["Ours"]
    named = write(tmp_path / "b.csv", "algorithm,reach,push\nX,0.5,0.1\nX,0.7,0.2\nY,0,1\n")
    assert table(named)["X"] == {"reach": [0.5, 0.7], "push": [0.1, 0.2]}
    published = write(tmp_path / "c.csv", "task,IQL,TD3+BC\nhopper,66.3,59.3\nwalker,78.3,83.7\n")
    assert table(published) == {
        "IQL": {"hopper": [66.3], "walker": [78.3]},
        "TD3+BC": {"hopper": [59.3], "walker": [83.7]},
    }


def test_numpy_arrays(tmp_path: Path) -> None:
    scores = np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "a.npz", X=scores, Y=scores + 1, tasks=np.array(["u", "v"]))
    assert table(tmp_path / "a.npz")["Y"] == {"u": [1.0, 3.0, 5.0], "v": [2.0, 4.0, 6.0]}
    np.save(tmp_path / "X.npy", np.stack([scores, scores[::-1]], -1))  # (runs, tasks, evaluations)
    assert table(tmp_path / "X.npy")["X"]["task 0"] == [4.0, 2.0, 0.0]
    np.save(tmp_path / "bad.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_runs([tmp_path / "bad.npy"])


def test_json_of_others_and_of_our_own_evaluations(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps({"X": {"t": {"0.1": {"5": [1, 2]}}, "u": [3, 4]}, "Y": [[1, 2], [3, 4]]}))
    assert table(tmp_path / "a.json") == {
        "X": {"t": [1.0, 2.0], "u": [3.0, 4.0]},
        "Y": {"task 0": [1.0, 3.0], "task 1": [2.0, 4.0]},
    }
    write(tmp_path / "b.json", json.dumps({"X": {"t": {"0.1": [1], "0.2": [2]}}}))
    with pytest.raises(InputError, match="2 sets of scores"):
        read_runs([tmp_path / "b.json"])
    seeds = [{"seed": s, "success": [s, 1], "episode_return": [2.0, 4.0]} for s in (1, 0)]
    own = {"env": "Lift", "initial_seeds": [5, 6], "policies": {"p": {"seeds": seeds}}}
    write(tmp_path / "own.json", json.dumps(own))
    assert table(tmp_path / "own.json") == {"p": {"Lift": [0.5, 1.0]}}
    assert table(tmp_path / "own.json", metric="episode_return") == {"p": {"Lift": [3.0, 3.0]}}
    with pytest.raises(InputError, match="no measure 'speed'"):
        read_runs([tmp_path / "own.json"], metric="speed")


def test_folders_of_curves_in_the_layouts_of_others(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path / f"d3/IQL_hopper-v0_{seed}_2022/environment.csv", f"1,1000,{seed}\n2,2000,{seed + 5}\n")
        write(tmp_path / f"mine/X/reach/s{seed}.csv", f"step,score\n0,{seed}\n")
    write(tmp_path / "d3/notes.csv", "algorithm,score\nZ,1\n")
    assert table(tmp_path / "d3") == {"IQL": {"hopper-v0": [5.0, 6.0]}}
    assert table(tmp_path / "mine", layout="{algorithm}/{task}/s{seed}.csv") == {"X": {"reach": [0.0, 1.0]}}
    (tmp_path / "td3").mkdir()
    np.save(tmp_path / "td3" / "TD3_Ant-v1_0.npy", np.array([1.0, 9.0, 2.0]))
    np.save(tmp_path / "td3" / "TD3_Ant-v1_1.npy", np.array([1.0, 7.0, 8.0]))
    assert table(tmp_path / "td3", "best-mean") == {"TD3": {"Ant-v1": [9.0, 7.0]}}
    write(tmp_path / "tdmpc/sac/reach.csv", "step,success,seed\n0,0,1\n10,1,1\n0,0,2\n")
    assert table(tmp_path / "tdmpc") == {"sac": {"reach": [1.0, 0.0]}}
    with pytest.raises(InputError, match="no file is named like"):
        read_runs([tmp_path / "mine"], layout="{task}.json")
    with pytest.raises(InputError, match=r"unknown field \{sed\}"):
        read_runs([tmp_path / "mine"], layout="{task}_{sed}.csv")


def test_what_a_reader_must_know_is_noted(tmp_path: Path) -> None:
    """Runs that end at different steps, and a resumed run's repeated lines: the later counts."""
    path = write(tmp_path / "a.csv", "algorithm,seed,step,score\nX,0,1,5\nX,0,2,6\nX,0,2,7\nX,1,1,8\n")
    values, notes = pick(read_runs([path]), "last")
    assert values["X"][""].tolist() == [7.0, 8.0]
    assert any("different steps in 1 cases" in note for note in notes)
    assert any("1 evaluations stand twice" in note for note in notes)
    assert not any("different steps" in note for note in pick(read_runs([path]), "common")[1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("1,2,3,4\n", "has no head"),
        ("algorithm,seed,score\nX,0,1\nX,0,2\n", "2 scores and no steps"),
        ("algorithm,seed,score\nX,0,nan\n", "not finite"),
        ("algorithm,seed,score\nX,0,high\n", "line 2: 'high'"),
        ("algorithm,note\nX,good\n", "no column holds scores"),
        ("algorithm,seed,score\n", "holds no scores"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_runs([write(tmp_path / "a.csv", text)])


def test_more_that_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "algorithm,seed,score\nX,0,1\nY,0,1\n")
    with pytest.raises(InputError, match="stands there twice"):
        read_runs([path, path])
    with pytest.raises(InputError, match="several algorithms"):
        read_runs([Path(f"Z={path}")])
    with pytest.raises(InputError, match="no column 'points'"):
        read_runs([path], metric="points")
    with pytest.raises(InputError, match="Did you mean 'best'"):
        pick(read_runs([path]), "bst")
    with pytest.raises(InputError, match="no such file"):
        read_runs([tmp_path / "none.csv"])
    with pytest.raises(InputError, match="scores are read from"):
        read_runs([write(tmp_path / "a.xlsx", "")])


def test_normalisation(tmp_path: Path) -> None:
    scores = {"X": {"hopper-medium-v2": np.array([-20.272305, 3234.3]), "antmaze-umaze-v2": np.array([0.5, 1.0])}}
    found, record = normalized(scores, "d4rl")
    np.testing.assert_allclose(found["X"]["hopper-medium-v2"], [0, 1])
    np.testing.assert_allclose(found["X"]["antmaze-umaze-v2"], [0.5, 1])  # not those of ant
    assert record["tasks"]["antmaze-umaze-v2"] == {"random": 0.0, "reference": 1.0}
    assert normalized(scores, "none")[0] is scores
    np.testing.assert_allclose(normalized(scores, "100")[0]["X"]["antmaze-umaze-v2"], [0.005, 0.01])
    for name, text in (
        ("r.json", '{"hopper-medium-v2": [0, 10], "antmaze-umaze-v2": [1, 2]}'),
        ("r.csv", "task,random,reference\nhopper-medium-v2,0,10\nantmaze-umaze-v2,1,2\n"),
    ):
        found, _ = normalized(scores, str(write(tmp_path / name, text)))
        np.testing.assert_allclose(found["X"]["antmaze-umaze-v2"], [-0.5, 0])
    with pytest.raises(InputError, match="no reference scores for 'Lift'"):
        normalized({"X": {"Lift": np.ones(1)}}, "d4rl")
    with pytest.raises(InputError, match="has no reference scores for 'antmaze"):
        normalized(scores, str(write(tmp_path / "s.json", '{"walker": [0, 1]}')))
    with pytest.raises(InputError, match="give no scale"):
        normalized(scores, "0")
    with pytest.raises(InputError, match="neither none, d4rl"):
        normalized(scores, "atari")
    with pytest.raises(InputError, match="cannot be read as reference"):
        normalized(scores, str(write(tmp_path / "bad.json", "[1]")))
