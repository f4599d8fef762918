"""The verb on scores of others: published tables to the printed digit, reference IQMs, files written, AdaStop, text."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.cli import main
from embodied.compare import Compare, as_text, compare, episodes_needed
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.statistics import wilson

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")


def write(path: Path, scores: dict[str, np.ndarray]) -> Path:
    np.savez(path, **scores)  # type: ignore[arg-type]
    return path


def two(runs: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"good": rng.normal(0.8, 0.1, (runs, 3)), "bad": rng.normal(0.3, 0.1, (runs, 3))}


@real
@pytest.mark.parametrize(("folder", "name"), [("eval-d3rlpy-iql", "IQL"), ("eval-d3rlpy-td3bc", "TD3+BC")])
@pytest.mark.parametrize("rule", ["none", "d4rl"])
def test_published_tables_from_the_raw_curves(folder: str, name: str, rule: str) -> None:
    """12 tasks x (final, best) x (mean, std), raw and normalised: every number as it is printed in d3rlpy's table."""
    config = Compare((Path(f"{name}={DATA / folder}"),), normalize=rule, ddof=0, resamples=100)
    scores = compare(config, Progress())["scores"]
    published = list(csv.DictReader((DATA / folder / "published_table.csv").read_text().splitlines()))
    assert len(published) == len(scores["tasks"]) == 12
    unit = "" if rule == "none" else "normalized "
    for row in published:
        task = f"{row['env']}-{row['dataset']}"
        for part, words in (("table", "final"), ("best", "best")):
            expected = f"{row[f'{words} {unit}return']} ± {row[f'{words} {unit}std']}"
            assert scores[part][name][task]["printed"] == expected, (task, words)


@real
def test_reference_aggregates_of_rebrac() -> None:
    """rliable's estimates to six digits; its intervals, from 2,000 resamples, to what those leave open."""
    reference = json.loads((DATA / "eval-rebrac-scores" / "rliable_reference.json").read_text())
    config = Compare((DATA / "eval-rebrac-scores" / "profiles_data.json",), normalize="100")
    scores = compare(config, Progress())["scores"]
    assert len(scores["tasks"]) == 22
    for name, metrics in reference["estimates"].items():
        for metric, expected in metrics.items():
            found = scores["aggregates"][name][metric]
            assert found["estimate"] == pytest.approx(expected["point"], abs=1e-6)
            assert f"{found['estimate']:.3f}" == f"{expected['point']:.3f}"
            for end in ("low", "high"):
                assert found[end] == pytest.approx(expected[end], abs=0.008 if metric == "median" else 0.005)
    for pair, expected in reference["probability_of_improvement"].items():
        assert scores["improvement"][pair.replace(">", " > ")]["estimate"] == pytest.approx(expected, abs=1e-9)


@real
def test_curves_of_td3_at_the_best_mean() -> None:
    facts = json.loads((DATA / "eval-td3-curves" / "facts.json").read_text())
    config = Compare((DATA / "eval-td3-curves",), at="best-mean", ddof=0, digits=2, resamples=100)
    table = compare(config, Progress())["scores"]["table"]["TD3"]
    printed = {task.split("-")[0].replace("2d", ""): cell["printed"] for task, cell in table.items()}
    assert printed["Ant"] == "4372.44 ± 1000.33"
    assert printed["HalfCheetah"] == "9636.95 ± 859.06"
    assert printed["Hopper"] == "3564.07 ± 114.74"
    assert printed["Walker"] == "4682.82 ± 539.64"
    for task, fact in facts.items():
        assert table[f"{task.replace('Walker', 'Walker2d')}-v1"]["mean"] == pytest.approx(fact["max_mean"], abs=6e-4)
        assert table[f"{task.replace('Walker', 'Walker2d')}-v1"]["std"] == pytest.approx(fact["std_ddof0"], abs=6e-4)


@real
def test_seeds_of_tdmpc2_that_end_at_different_steps() -> None:
    cases = 0
    for folder in ("eval-tdmpc2-metaworld", "eval-tdmpc2-other"):
        facts = json.loads((DATA / folder / "facts.json").read_text())
        scores = compare(Compare((DATA / folder,), resamples=100), Progress())["scores"]
        note = next(note for note in scores["notes"] if "different steps" in note)
        cases += int(note.split(" in ")[1].split()[0])
        for name, fact in facts.items():
            algorithm, task = name.removesuffix(".csv").split("/")
            found = scores["table"][algorithm][task]
            assert found["runs"] == len(fact["seeds"])
            if not any("stand twice" in note for note in scores["notes"]):
                assert found["mean"] == pytest.approx(fact["last_mean"], abs=6e-5)
    assert cases == 94


def test_a_folder_with_numbers_picture_and_page(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", two())
    config = Compare((path,), out=tmp_path / "out", adastop=True, precision=0.03)
    result = compare(config, Progress())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.html", "compare.json", "compare.png"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(result))
    from PIL import Image

    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.size[0] > 1000
        assert np.asarray(picture.convert("L")).mean() > 200  # on white
    page = (tmp_path / "out" / "compare.html").read_text()
    iqm = result["scores"]["aggregates"]["good"]["iqm"]
    assert f"{iqm['estimate']:.3f} [{iqm['low']:.3f}, {iqm['high']:.3f}]" in page
    assert "http" not in page
    assert "ddof 1" in page
    again = compare(config, Progress())
    assert again == result
    assert (tmp_path / "out" / "compare.html").read_text() == page


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("algorithm,seed,score\n<script>x,0,1\n<script>x,1,2\n$a_$,0,1\n$a_$,1,3\n")
    compare(Compare((path,), out=tmp_path / "out"), Progress())
    assert "<script>x" not in (tmp_path / "out" / "compare.html").read_text()


def test_text_says_what_is_known(tmp_path: Path) -> None:
    result = compare(Compare((write(tmp_path / "a.npz", two(4)),), precision=0.03, adastop=True), Progress())
    text = as_text(result)
    for part in (
        "over 3 tasks",
        "good > bad",
        "ddof 1",
        "IQM to ± 0.03 takes",
        "note: with 4 runs",
        "undecided: needs",
    ):
        assert part in text, part
    assert result["adastop"]["needs"] == {"good": 1, "bad": 1}
    decided = compare(Compare((write(tmp_path / "b.npz", two()),), adastop=True), Progress())
    assert "good is better" in as_text(decided)
    assert decided["adastop"]["needs"] == {}


def test_runs_needed_shrinks_with_the_precision(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", two())
    coarse, fine = (
        compare(Compare((path,), precision=p), Progress())["scores"]["runs_needed"]["good"] for p in (0.04, 0.02)
    )
    assert fine == pytest.approx(4 * coarse, rel=0.5)
    assert fine > coarse


def test_episodes_needed() -> None:
    for rate, precision in ((0.5, 0.1), (0.9, 0.05), (1.0, 0.02)):
        count = episodes_needed(rate, precision)
        widths = [wilson(round(rate * n), n) for n in (count, count - 1)]
        assert (widths[0].high - widths[0].low) / 2 <= precision < (widths[1].high - widths[1].low) / 2
    assert 85 <= episodes_needed(0.5, 0.1) <= 97  # 1.96^2 / (4 * 0.1^2) - 1.96^2 = 92


def test_tasks_that_not_all_have_are_left_out_of_aggregates(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"X": {"u": [1, 1], "v": [0, 0]}, "Y": {"u": [0, 1]}}))
    scores = compare(Compare((path,)), Progress())["scores"]
    assert scores["tasks"] == ["u"]
    assert scores["aggregates"]["X"]["mean"]["estimate"] == 1.0
    assert set(scores["table"]["X"]) == {"u", "v"}
    assert any("v" in note for note in scores["notes"])
    path.write_text(json.dumps({"X": {"u": [1, 1]}, "Y": {"v": [0, 1]}}))
    with pytest.raises(InputError, match="No task is common"):
        compare(Compare((path,)), Progress())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ddof": 2}, "--ddof"),
        ({"precision": 0.0}, "--precision"),
        ({"reference": "gud"}, "Did you mean 'good'"),
        ({"adastop": True, "group": 1}, "--adastop"),
        ({"at": "first"}, "--at first"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        compare(Compare((write(tmp_path / "a.npz", two()),), **settings), Progress())


def test_the_command_line_gives_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.npz", {"X": np.ones((1, 2)), "Y": np.zeros((1, 2))})
    assert main(["compare", f"{path}", "--adastop", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["scores"]["aggregates"]["X"]["iqm"] == {"estimate": 1.0, "low": None, "high": None}
    assert data["adastop"]["decided"] is False
    assert main(["compare", str(path)]) == 0
    assert "no interval" in capsys.readouterr().out
