"""Results side by side: paired differences, overlap, and refusal of what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.compare import Compare, as_text, compare
from embodied.contracts.errors import BundleError, InputError
from embodied.evaluate import Evaluate, _summary, bundles, touches
from embodied.progress import Progress
from embodied.sim.evaluate import EpisodeResult
from embodied.statistics import over_seeds, wilson
from embodied.video import write_mp4


def summary(table: np.ndarray) -> dict[str, Any]:
    runs = [[EpisodeResult("p", i, bool(x), 1.0, 10) for i, x in enumerate(row)] for row in table]
    return _summary([(s, f"p/{s}") for s in range(len(table))], runs)


def write(path: Path, policies: dict[str, np.ndarray], first_seed: int = 0) -> Path:
    states = next(iter(policies.values())).shape[1]
    data = {
        "env": "robosuite/Lift",
        "initial_seeds": list(range(first_seed, first_seed + states)),
        "policies": {name: summary(table) for name, table in policies.items()},
    }
    path.write_text(json.dumps(data))
    return path


def test_summary_has_a_wilson_interval_per_seed_and_one_over_all() -> None:
    table = np.random.default_rng(0).random((5, 20)) < 0.7
    result = summary(table)
    assert result["success"] == over_seeds(table).to_json()
    assert result["seeds"][3]["success"] == table[3].astype(int).tolist()
    assert result["seeds"][3]["interval"] == wilson(int(table[3].sum()), 20).to_json()
    assert summary(table[:1])["success"] == wilson(int(table[0].sum()), 20).to_json()


def test_compare_over_two_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    good, bad = rng.random((5, 50)) < 0.9, rng.random((5, 50)) < 0.3
    first = write(tmp_path / "a.json", {"labels": good})
    second = write(tmp_path / "b.json", {"cloning": bad, "same": good})
    result = compare(Compare((first, second), out=tmp_path / "c.json"), Progress())
    assert result["reference"] == "labels"
    gap = result["against"]["cloning"]
    assert gap["difference"]["estimate"] == pytest.approx(good.mean() - bad.mean())
    assert gap["difference"]["low"] > 0.4
    assert gap["intervals_overlap"] is False
    assert result["against"]["same"]["intervals_overlap"] is True
    text = as_text(result)
    assert "labels - cloning" in text
    assert "do not overlap" in text
    assert json.loads((tmp_path / "c.json").read_text())["against"] == result["against"]
    other = compare(Compare((first, second), reference="cloning"), Progress())
    assert other["against"]["labels"]["difference"]["estimate"] == pytest.approx(bad.mean() - good.mean())


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    table = np.ones((2, 5))
    first = write(tmp_path / "a.json", {"x": table})
    other_states = write(tmp_path / "b.json", {"y": table}, first_seed=7)
    same_name = write(tmp_path / "c.json", {"x": table})
    with pytest.raises(InputError, match="different initial states"):
        compare(Compare((first, other_states)), Progress())
    with pytest.raises(InputError, match="stands in an earlier file"):
        compare(Compare((first, same_name)), Progress())
    with pytest.raises(InputError, match="Valid: x"):
        compare(Compare((first,), reference="z"), Progress())
    with pytest.raises(InputError, match="at least one"):
        compare(Compare(()), Progress())


def test_several_environments_are_the_tasks_of_the_aggregates(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    paths = []
    for env in ("robosuite/Lift", "metaworld/push-v3"):
        path = write(tmp_path / f"{len(paths)}.json", {n: rng.random((4, 20)) < r for n, r in (("a", 0.9), ("b", 0.4))})
        path.write_text(json.dumps(json.loads(path.read_text()) | {"env": env}))
        paths.append(path)
    result = compare(Compare(tuple(paths)), Progress())
    assert result["scores"]["tasks"] == ["robosuite/Lift", "metaworld/push-v3"]
    assert result["scores"]["values"]["a"]["metaworld/push-v3"] == [
        np.mean(seed["success"]) for seed in json.loads(paths[1].read_text())["policies"]["a"]["seeds"]
    ]
    assert result["environments"]["robosuite/Lift"]["against"]["b"]["difference"]["low"] > 0.2
    assert "robosuite/Lift: a " in as_text(result)


def test_aggregates_of_our_own_results_stand_beside_the_paired_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = write(tmp_path / "a.json", {"x": rng.random((5, 20)) < 0.8, "y": rng.random((1, 20)) < 0.5})
    result = compare(Compare((path,), precision=0.05), Progress())
    rates = result["scores"]["values"]["x"]["robosuite/Lift"]
    assert rates == [np.mean(seed["success"]) for seed in json.loads(path.read_text())["policies"]["x"]["seeds"]]
    assert result["scores"]["aggregates"]["y"]["iqm"]["low"] is None
    assert result["scores"]["runs_needed"]["y"] is None
    assert result["episodes_needed"]["x"] > 20
    assert "one run each" in as_text(result)


def test_bundles_of_a_training_folder_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    for seed in (10, 2):
        folder = tmp_path / "run" / f"seed_{seed:03d}"
        folder.mkdir(parents=True)
        (folder / "hashes.json").write_text("{}")
    assert bundles(tmp_path / "run") == [(2, str(tmp_path / "run/seed_002")), (10, str(tmp_path / "run/seed_010"))]
    assert bundles(tmp_path / "run" / "seed_002") == [(None, str(tmp_path / "run/seed_002"))]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="Is its training finished"):
        bundles(tmp_path / "empty")
    with pytest.raises(InputError, match="scripted"):
        bundles(tmp_path / "none", {"scripted": None})


def test_eval_reads_folders_and_not_behaviours() -> None:
    config = Evaluate(("a=/out/policies/x", "scripted", "behaviour=random"), "robosuite/Lift", out=Path("r.json"))
    assert touches(config).reads == (Path("/out/policies/x"),)
    assert touches(config).writes == (Path("r.json"),)


def test_film_has_every_frame_in_the_right_colours(tmp_path: Path) -> None:
    import av

    frames = np.zeros((12, 64, 48, 3), np.uint8)
    frames[:, :, :] = (200, 30, 30)
    frames[6:, :, :] = (30, 30, 200)
    write_mp4(tmp_path / "sub" / "film.mp4", frames, fps=10)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["film.mp4"]
    with av.open(str(tmp_path / "sub" / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 10
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 12
    np.testing.assert_allclose(decoded[2].mean((0, 1)), (200, 30, 30), atol=8)
    np.testing.assert_allclose(decoded[9].mean((0, 1)), (30, 30, 200), atol=8)
