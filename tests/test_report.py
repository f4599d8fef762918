"""The report: one self-contained page that holds what its inputs say. All data here are made up by the fixture."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.contracts.provenance import provenance
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.progress import Progress
from embodied.report import Report, report
from embodied.statistics import over_seeds, wilson
from embodied.video import write_mp4

STEPS, EPISODES, SIZE = 40, 6, 32


def picture(progress: float) -> np.ndarray:
    """A grey table and a red square that rises with progress."""
    image = np.full((SIZE, SIZE, 3), 205, np.uint8)
    image[24:] = (120, 110, 105)
    top = int(18 - 14 * progress)
    image[top : top + 6, 13:19] = (200, 40, 40)
    return image


def make_store(path: Path, rng: np.random.Generator) -> EpisodeStore:
    spec = DatasetSpec(
        {"joint_position": ArraySpec((2,), unit="rad")},
        {"side": ArraySpec((SIZE, SIZE, 3), dtype="uint8")},
        ActionSpec((2,)),
        control_dt=0.1,
    )
    writer = StoreWriter(path, spec, provenance("test", {}, {}))
    labels = []
    for index in range(EPISODES):
        success = index % 3 == 1
        progress = np.clip(np.linspace(-0.2, 1.0 if success else 0.3, STEPS + 1), 0, 1)
        labels.append(np.clip(progress + rng.normal(0, 0.05, STEPS + 1), -1, 2))
        rows = np.arange(STEPS + 1)
        episode = Episode(
            observations={"joint_position": np.stack([progress, progress], 1).astype(np.float32)},
            images={"side": np.stack([picture(p) for p in progress])},
            action=np.where(rows[:, None] < STEPS, 0.1, 0.0).repeat(2, 1).astype(np.float32),
            step_valid=rows < STEPS,
            terminated=np.zeros(STEPS + 1, bool),
            truncated=rows == STEPS - 1,
            timestamp=rows * 0.1,
            success=success,
            source_id=str(index),
        )
        writer.write_episode(index, episode)
    store = writer.finish(EPISODES)
    record = provenance("label clip", {"goals": ["<goal> & more"], "regularization": 0.5, "model": "clip-lift"}, {})
    record |= {"labeller": "clip", "dataset_fingerprint": store.fingerprint}
    label = LabelWriter(store, "clip", record)
    for block, start, stop in label.blocks():
        label.write_block(block, np.concatenate(labels)[start:stop].astype(np.float32))
    label.finish()
    return EpisodeStore(path)


def make_result(rng: np.random.Generator, film: Path) -> dict[str, Any]:
    rates = {"CLIP labels": (0.82, 5), "true reward": (0.9, 5), "cloning": (0.4, 5), "behaviour": (0.25, 1)}
    policies = {}
    for name, (rate, seeds) in rates.items():
        table = (rng.random((seeds, 40)) < rate).astype(int)
        pooled = over_seeds(table) if seeds > 1 else wilson(int(table.sum()), table.size)
        policies[name] = {
            "success": pooled.to_json(),
            "seeds": [
                {
                    "seed": s if seeds > 1 else None,
                    "source": f"{name}/{s}",
                    "success": row.tolist(),
                    "interval": wilson(int(row.sum()), 40).to_json(),
                }
                for s, row in enumerate(table)
            ],
        }
    shown = {"path": str(film), "policy": "CLIP labels/0", "success": [True, True, False]}
    return {"env": "robosuite/Lift", "initial_seeds": list(range(40)), "policies": policies, "film": shown}


def make_metrics(folder: Path, names: list[str], seeds: int, rng: np.random.Generator) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(100, 5001, 100):
        row: dict[str, Any] = {"step": step}
        for scale, name in enumerate(names, start=1):
            values = scale * np.exp(-step / 1500) + rng.normal(0, 0.04, seeds)
            row[name] = values.round(5).tolist() if seeds > 1 else round(float(values[0]), 5)
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Any], str]:
    """A full report over made-up results."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    make_store(root / "store", rng)
    write_mp4(root / "film.mp4", np.stack([picture(p) for p in np.linspace(0, 1, 30)]).repeat(4, 1).repeat(4, 2), 10)
    (root / "success.json").write_text(json.dumps(make_result(rng, root / "film.mp4")))
    correlation = {
        name: {
            "progress": {
                "per_episode": [*np.clip(rng.normal(mean, 0.07, 40), -1, 1).tolist(), None],
                "mean": mean,
                "median": mean,
                "low": mean - 0.03,
                "high": mean + 0.03,
                "pooled": mean,
            }
        }
        for name, mean in {"clip": 0.86, "truth": 0.97}.items()
    }
    (root / "audit.json").write_text(json.dumps({"episodes": [i % EPISODES for i in range(41)], "labels": correlation}))
    deployment = {
        "bundle": "CLIP labels/0",
        "success": wilson(8, 10).to_json(),
        "initial_seeds": list(range(10)),
        "episodes": [{"success": i < 8} for i in range(10)],
        "latency_ms": {
            "observation_to_command": (18 + rng.gamma(3, 2.5, 500)).tolist(),
            "observation_to_chunk": (12 + rng.gamma(3, 2, 500)).tolist(),
        },
        "events": {"chunks": 480, "clamped": 12, "holds": 0},
        "bags": ["bags/episode_0000"],
    }
    (root / "deployment.json").write_text(json.dumps(deployment))
    stages = root / "out" / ".stages"
    stages.mkdir(parents=True)
    for number, name in enumerate(["collect", "pretrain", "label_clip", "train_labels"]):
        marker = {
            "state": "done",
            "key": f"{number}" * 64,
            "verb": name.replace("_", " "),
            "seconds": 31.5 * (number + 1),
            "finished": number,
            "peak_memory_gb": {"self": 1.2, "largest_child": 0.9},
            "config": {"episodes": 200},
        }
        (stages / f"{name}.json").write_text(json.dumps(marker))
    config = Report(
        root / "report.html",
        title="Made-up <data>",
        store=root / "store",
        labels=("clip",),
        audit=root / "audit.json",
        runs=(
            f"encoder={make_metrics(root / 'encoder', ['loss', 'value'], 1, rng)}",
            f"CLIP labels={make_metrics(root / 'iql', ['actor_loss', 'value_loss', 'critic_loss', 'weight'], 5, rng)}",
        ),
        results=(root / "success.json",),
        deployment=root / "deployment.json",
        pipeline=root / "out",
    )
    findings = report(config, Progress())
    return config, findings, config.out.read_text()


def test_the_page_is_self_contained(made: tuple[Report, dict[str, Any], str]) -> None:
    _, _, page = made
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(s.startswith(("data:", "#")) for s in sources), [s[:60] for s in sources if s[:5] != "data:"][:5]
    assert not re.search(r"@import|url\(['\"]?http|<script|<link", page)
    assert 'src="data:video/mp4;base64,' in page


def test_ids_are_unique_so_that_figures_do_not_share_clip_paths(made: tuple[Report, dict[str, Any], str]) -> None:
    _, _, page = made
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]*)', page))
    assert used <= set(ids)


def test_it_says_what_its_inputs_say(made: tuple[Report, dict[str, Any], str]) -> None:
    config, findings, page = made
    success = json.loads(config.results[0].read_text())["policies"]
    for name, policy in success.items():
        assert f"<td>{name}</td>" in page
        assert f"{100 * policy['success']['estimate']:.1f} %" in page
    assert findings["success"]["cloning"] == success["cloning"]["success"]
    assert findings["label_correlation"] == 0.86
    assert findings["success_over_the_wire"]["estimate"] == 0.8
    assert findings["seconds"] == pytest.approx(31.5 * 10)
    assert findings["size_mb"] < 5
    for text in (
        "Does the label see progress?",
        "mean 0.86",
        "train labels",
        "torch",
        "the whole configuration",
        "500",
    ):
        assert text in page
    interval = success["CLIP labels"]["seeds"][0]["interval"]
    inside = interval["low"] <= 0.8 <= interval["high"]
    assert f"s lies {'inside' if inside else 'outside'} that interval" in page
    in_process = np.array(success["CLIP labels"]["seeds"][0]["success"][:10])
    gap = 100 * (0.8 - in_process.mean())
    assert f"From the 10 initial states that both ran, wire minus process is {gap:+.0f} points [" in page


def test_text_is_escaped(made: tuple[Report, dict[str, Any], str]) -> None:
    _, _, page = made
    assert "Made-up &lt;data&gt;" in page
    assert "&lt;goal&gt; &amp; more" in page
    assert "<goal>" not in page


def test_one_strip_of_a_success_and_one_of_a_failure(made: tuple[Report, dict[str, Any], str]) -> None:
    _, _, page = made
    assert page.count("a success, camera side") == 1
    assert page.count("a failure, camera side") == 1
    assert page.count("data:image/png;base64") == 20


def test_parts_without_input_are_left_out(tmp_path: Path) -> None:
    report(Report(tmp_path / "r.html"), Progress())
    page = (tmp_path / "r.html").read_text()
    assert "<h2>What was run</h2>" in page
    assert page.count("<h2>") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audit": Path("/nowhere/audit.json")}, "embodied label audit --out"),
        ({"results": (Path("/nowhere/r.json"),)}, "embodied eval"),
        ({"runs": ("x=/nowhere",)}, "no learning curve"),
        ({"deployment": Path(__file__)}, "is not JSON"),
    ],
)
def test_a_missing_input_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        report(Report(tmp_path / "r.html", **change), Progress())
    assert list(tmp_path.iterdir()) == []
