"""`embodied report`: one self-contained HTML page of what was run and found. It reads results; it computes none."""

import base64
import dataclasses
import html
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.compare import measure, read_result
from embodied.contracts.errors import InputError
from embodied.contracts.provenance import code_version, package_versions
from embodied.progress import Progress, duration
from embodied.statistics import difference
from embodied.verbs import Touches

LEAD = (
    "Recordings without rewards were scored by a vision-language model, a policy was trained on the scores, "
    "and it was run in simulation and over ROS 2 topics."
)
PICTURES = 10  # in a film strip
# What to draw of metrics.jsonl where it is there, most telling first; at most three per run.
METRICS = ("loss", "actor_loss", "value_loss", "critic_loss", "value", "q", "advantage")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page; each part is there if its input is given.

    Attributes:
        out: HTML file to write.
        title: of the page.
        store: EpisodeStore whose label sets are shown.
        labels: label sets to draw over an episode's frames, the most interesting first.
        camera: whose frames to show.
        audit: JSON that 'embodied label audit --out' wrote.
        runs: training folders for the learning curves, each [NAME=]FOLDER.
        results: JSON files that 'embodied eval --out' wrote.
        deployment: JSON that 'embodied deploy --out' wrote.
        pipeline: output folder of a pipeline whose stages are listed.
    """

    out: Positional[Path]
    title: str = "From recordings to a robot"
    store: Path | None = None
    labels: tuple[str, ...] = ()
    camera: str = "side"
    audit: Path | None = None
    runs: tuple[str, ...] = ()
    results: tuple[Path, ...] = ()
    deployment: Path | None = None
    pipeline: Path | None = None


def touches(config: Report) -> Touches:
    reads = [Path(text.partition("=")[2] or text) for text in config.runs]
    reads += [path for path in (config.store, config.audit, config.deployment) if path]
    reads += [*config.results, *(config.store / "labels" / name for name in config.labels if config.store)]
    return Touches(tuple(reads), (config.out,))


def report(config: Report, progress: Progress) -> dict[str, Any]:
    page = Page(config.title, LEAD)
    audit = _read_json(config.audit, "embodied label audit --out", {"episodes", "labels"})
    deployment = _read_json(config.deployment, "embodied deploy --out", {"episodes", "success", "latency_ms"})
    parts = [
        lambda: labels_section(page, config, audit),
        lambda: success_section(page, config, deployment),
        lambda: film_section(page, config),
        lambda: curves_section(page, config),
        lambda: deployment_section(page, config, deployment),
        lambda: provenance_section(page, config),
    ]
    for done, part in enumerate(parts, start=1):
        part()
        progress(done, len(parts), "drawing")
    page.write(config.out)
    return {"report": str(config.out), "size_mb": round(config.out.stat().st_size / 1e6, 2), **page.findings}


class Page:
    """Tiles and sections, filled one after the other."""

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.findings: dict[str, Any] = {}
        self._tiles: list[str] = []
        self._sections: list[str] = []

    def tile(self, value: str, text: str) -> None:
        self._tiles.append(f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>')

    def section(self, heading: str, *parts: str) -> None:
        self._sections.append(f"<section><h2>{html.escape(heading)}</h2>{''.join(parts)}</section>")

    def html(self) -> str:
        template = string.Template((Path(__file__).parent / "report.html").read_text())
        return template.substitute(
            title=html.escape(self.title),
            lead=html.escape(self.lead),
            tiles="".join(self._tiles),
            sections="".join(self._sections),
        )

    def write(self, path: Path) -> None:
        """The page as a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(self.html())
        temporary.replace(path)


def labels_section(page: Page, config: Report, audit: dict[str, Any] | None) -> None:
    """The label's score over an episode beside its frames, and its rank correlation with true progress."""
    if config.store is None:
        return
    from embodied import report_figures
    from embodied.datasets.store import EpisodeStore

    store = EpisodeStore(config.store)
    labels = {name: store.label(name) for name in config.labels}
    parts = []
    if labels:
        first = next(iter(labels.values()))
        parts.append(paragraph(_described(first)))
        for index in _episodes_to_show(store, audit):
            start, length = int(store.episode_start[index]), int(store.episode_length[index])
            at = np.linspace(0, length - 1, min(PICTURES, length)).round().astype(int)
            frames = np.stack([store.frames(config.camera, start + i, start + i + 1)[0] for i in at])
            scores = {name: label.score[start : start + length] for name, label in labels.items()}
            outcome = {1: "a success", 0: "a failure"}.get(int(store.success[index]), "outcome unknown")
            title = f"episode {index}, {outcome}, camera {config.camera}"
            parts.append(figure(report_figures.label_over_episode(frames, scores, store.spec.control_dt, title)))
    if audit:
        known = {name: checks["progress"] for name, checks in audit["labels"].items() if checks["progress"]}
        if known:
            parts.append(figure(report_figures.correlations(known)))
            parts.append(_audit_table(audit["episodes"], known))
        name = config.labels[0] if config.labels else next(iter(audit["labels"]))
        if name in known:
            mean = known[name]["mean"]
            page.tile(f"{mean:.2f}", f"rank correlation of label '{name}' with true progress, held-out episodes")
            page.findings["label_correlation"] = mean
    page.section("Does the label see progress?", *parts)


def success_section(page: Page, config: Report, deployment: dict[str, Any] | None) -> None:
    """Success of every policy with its interval, and of the deployment."""
    policies: dict[str, Any] = {}
    for path in config.results:
        policies |= read_result(path)["policies"]
    if not policies:
        return
    if measure(policies) != "success":
        raise InputError(
            f"{config.results[0]}: this page shows success, of which the environment has no rule.\n"
            f"A page of returns: embodied compare {config.results[0]} --out FOLDER"
        )
    from embodied import report_figures

    data = read_result(config.results[0])
    for name, policy in list(policies.items())[:3]:
        interval = policy["success"]
        text = f"success of '{name}' [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"
        page.tile(f"{100 * interval['estimate']:.0f} %", text)
    wire = deployment["success"] if deployment else None
    page.findings["success"] = {name: policy["success"] for name, policy in policies.items()}
    text = (
        f"{data['env']}, {len(data['initial_seeds'])} initial states, the same for every policy and training seed. "
        "Bars are 95 % intervals: over training seeds (small ticks) and initial states where there are several seeds, "
        "Wilson's where there is one policy."
    )
    rows = [[name, str(len(policy["seeds"])), *_interval_cells(policy["success"])] for name, policy in policies.items()]
    page.section(
        "Success",
        paragraph(text),
        figure(report_figures.success(policies, wire)),
        table(["policy", "training seeds", "success", "95 % interval"], rows, numbers=(1, 2, 3)),
        details("every training seed", _seed_table(policies)),
    )


def film_section(page: Page, config: Report) -> None:
    """The film that `eval --film` made, inline."""
    parts = []
    for result in map(read_result, config.results):
        film = result.get("film")
        if film is None:
            continue
        path = Path(film["path"])
        if not path.exists():
            raise InputError(f"{path}: the film named in the results is gone. Run 'embodied eval --film' again.")
        data = base64.b64encode(path.read_bytes()).decode()
        said = ", ".join("success" if ok else "failure" for ok in film["success"])
        caption = f"{film['policy']}: the first {len(film['success'])} initial states ({said})"
        video = f'<video controls muted loop playsinline src="data:video/mp4;base64,{data}"></video>'
        parts.append(f"<figure>{video}<figcaption>{html.escape(caption)}</figcaption></figure>")
    if parts:
        page.section("The policy at work", *parts)


def curves_section(page: Page, config: Report) -> None:
    """Learning curves of every training run."""
    from embodied import report_figures

    runs, metrics = {}, {}
    for text in config.runs:
        name, _, folder = text.rpartition("=")
        name = name or Path(folder).name
        runs[name] = _read_metrics(Path(folder) / "metrics.jsonl")
        numeric = [key for key in runs[name][-1] if key not in ("step", "time", "seconds")]
        chosen = [key for key in METRICS if key in numeric] or numeric
        metrics[name] = chosen[:3]
    if runs:
        text = "A thin line per training seed, a thick one for their mean. All seeds of a run are trained at once."
        page.section("Learning", paragraph(text), figure(report_figures.learning_curves(runs, metrics)))


def deployment_section(page: Page, config: Report, deployment: dict[str, Any] | None) -> None:
    """Latencies over the wire, and what the safety filter saw."""
    if not deployment:
        return
    from embodied import report_figures

    success = deployment["success"]
    if success is None:
        raise InputError(
            "The deployment has no verdicts (it was run without --env); the report cannot show its success."
        )
    page.findings["success_over_the_wire"] = success
    text = (
        f"The policy drove a simulated robot in another process through ROS 2 topics and a safety filter: "
        f"{len(deployment['episodes'])} episodes, success {_percent(success)}."
    )
    parts = [paragraph(text + _beside_in_process(deployment, config.results))]
    samples = {name: values for name, values in deployment["latency_ms"].items() if len(values) > 1}
    if samples:
        parts.append(figure(report_figures.latencies(samples)))
        name, values = next(iter(samples.items()))
        page.tile(
            f"{np.quantile(values, 0.99):.1f} ms", f"99th percentile of {name.replace('_', ' ')}, over ROS 2 topics"
        )
    facts = deployment.get("events", {})
    if facts:
        parts.append(table(["safety filter", "count"], [[k, str(v)] for k, v in facts.items()], numbers=(1,)))
    if deployment.get("bags"):
        bags = "\n".join(deployment["bags"])
        parts.append(
            details("recordings (rosbag2 MCAP; 'embodied data import' reads them)", f"<pre>{html.escape(bags)}</pre>")
        )
    page.section("Over ROS 2 topics", *parts)


def provenance_section(page: Page, config: Report) -> None:
    """Stages with times and memory, versions, and the configuration of each stage."""
    versions = {"embodied": code_version(), **package_versions()}
    parts = []
    if config.pipeline:
        markers = [
            json.loads(path.read_text()) | {"name": path.stem} for path in (config.pipeline / ".stages").glob("*.json")
        ]
        done = sorted((m for m in markers if m["state"] == "done"), key=lambda m: m["finished"])
        rows = [
            [m["name"], m["verb"], duration(m["seconds"]), f"{m['peak_memory_gb']['self']:.1f} GB", m["key"][:12]]
            for m in done
        ]
        total = sum(m["seconds"] for m in done)
        page.findings["seconds"] = round(total, 1)
        page.tile(duration(total), f"for all {len(done)} stages before this page")
        parts.append(table(["stage", "verb", "time", "peak memory up to its end", "key"], rows, numbers=(2, 3)))
        configs = json.dumps({m["name"]: {"verb": m["verb"], **m["config"]} for m in done}, indent=1)
        parts.append(details("the whole configuration", f"<pre>{html.escape(configs)}</pre>"))
    parts.append(table(["package", "version"], [[k, v] for k, v in versions.items()]))
    page.section("What was run", *parts)


# ---- pieces of HTML ---------------------------------------------------------------------------------


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def table(head: list[str], rows: list[list[str]], numbers: tuple[int, ...] = ()) -> str:
    def row(cells: list[str], tag: str) -> str:
        marked = [(' class="number"' if i in numbers else "", html.escape(cell)) for i, cell in enumerate(cells)]
        return "<tr>" + "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in marked) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(head, "th")}{body}</table></div>'


# ---- pieces of content ------------------------------------------------------------------------------


def _described(label: Any) -> str:
    config = label.provenance["config"]
    words = [f"Label set '{label.name}', made by '{label.provenance['labeller']}'"]
    if config.get("goals"):
        words.append(f"goal “{'”, “'.join(config['goals'])}”")
    if config.get("baselines"):
        words.append(f"baseline “{'”, “'.join(config['baselines'])}”")
    if "regularization" in config:
        words.append(f"regularization {config['regularization']:g}")
    if config.get("model"):
        words.append(f"model {config['model']}")
    return "; ".join(words) + "."


def _episodes_to_show(store: Any, audit: dict[str, Any] | None) -> list[int]:
    """A success and a failure, among the held-out episodes where these are known. The first of each, not the best."""
    candidates = audit["episodes"] if audit else range(store.num_episodes)
    chosen = []
    for outcome in (1, 0):
        match = [i for i in candidates if store.success[i] == outcome]
        chosen += match[:1]
    return chosen or [int(next(iter(candidates)))]


def _percent(interval: dict[str, float]) -> str:
    return f"{100 * interval['estimate']:.0f} % [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"


def _beside_in_process(deployment: dict[str, Any], results: tuple[Path, ...]) -> str:
    """The same bundle's success in process, whether the wire's lies in its interval, and the paired difference."""
    outcomes = {
        seed: episode["success"]
        for seed, episode in zip(deployment["initial_seeds"], deployment["episodes"], strict=False)
    }
    for path in results:
        result = read_result(path)
        for policy in result["policies"].values():
            for trained in policy["seeds"]:
                if trained["source"] != deployment["bundle"]:
                    continue
                in_process = dict(zip(result["initial_seeds"], trained["success"], strict=True))
                interval, wire = trained["interval"], deployment["success"]["estimate"]
                where = "inside" if interval["low"] <= wire <= interval["high"] else "outside"
                text = (
                    f" In process the same bundle reached {_percent(interval)}; the wire's lies {where} that interval."
                )
                if shared := [seed for seed in outcomes if seed in in_process]:
                    wired, unwired = (np.array([ran[s] for s in shared]) for ran in (outcomes, in_process))
                    gap = [100 * v for v in dataclasses.astuple(difference(wired, unwired))]
                    text += (
                        f" From the {len(shared)} initial states that both ran, wire minus process is "
                        f"{gap[0]:+.0f} points [{gap[1]:+.0f}, {gap[2]:+.0f}]."
                    )
                return text
    return ""


def _audit_table(episodes: list[int], audits: dict[str, Any]) -> str:
    names = list(audits)
    rows = []
    for position, episode in enumerate(episodes):
        values = [audits[name]["per_episode"][position] for name in names]
        rows.append([str(episode), *("progress constant" if v is None else f"{v:.3f}" for v in values)])
    numbers = tuple(range(1, len(names) + 1))
    return details("Spearman correlation of every held-out episode", table(["episode", *names], rows, numbers))


def _seed_table(policies: dict[str, Any]) -> str:
    rows = [
        [name, "" if seed["seed"] is None else str(seed["seed"]), *_interval_cells(seed["interval"])]
        for name, policy in policies.items()
        for seed in policy["seeds"]
    ]
    return table(["policy", "seed", "success", "95 % interval (Wilson)"], rows, numbers=(1, 2, 3))


def _interval_cells(interval: dict[str, float]) -> list[str]:
    return [f"{100 * interval['estimate']:.1f} %", f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}"]


def _read_json(path: Path | None, maker: str, keys: set[str]) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or not keys <= set(data):
            raise InputError(f"{path} is not what '{maker}' writes: it lacks {', '.join(sorted(keys))}.")
        return data
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. Make it: {maker} {path}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError):
        lines = []
    if not lines:
        raise InputError(f"{path}: no learning curve can be read there. Is its training finished?")
    return lines
