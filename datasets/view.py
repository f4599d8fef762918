"""`data view`: an episode as one self-contained HTML page: its frames beside plots of everything else, in step.

A page loads nothing from elsewhere, holds at most about 15 MB, and says so where it leaves frames out.
"""

import base64
import html
import io
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, LabelError, MissingExtraError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.doctor import row_findings
from embodied.datasets.doctor_checks import clock_findings, end_findings
from embodied.datasets.doctor_columns import element_names
from embodied.datasets.finding import SEVERITIES, Finding
from embodied.datasets.store import EpisodeStore

Progress = Callable[[int, int, str], None]
PICTURE_BYTES = 9_000_000  # of a page, as text
SERIES_BYTES = 4_000_000
MOST_PICTURES = 2_000
WIDEST = 400  # pixels of the longer side
QUALITY = 70
MOST_ELEMENTS = 64  # lines in a plot
OPEN_PLOTS = 8
FRAMES_EXAMINED = 500_000  # a store with more is not searched for jumps before a page is drawn
DEFAULT_PERIOD = 0.05  # [s] per frame while playing an episode without a clock


def write_pages(
    store: EpisodeStore,
    episodes: Sequence[int],
    out: Path,
    progress: Progress = lambda done, total, text: None,
) -> list[Path]:
    """One page per episode: `out` is the file of a single one (`.html`), or a folder, with an index of several.

    Raises:
        InputError: no such episode, or `out` is a store.
        MissingExtraError: there are pictures, and Pillow is not installed.
    """
    for episode in episodes:
        if not 0 <= episode < store.num_episodes:
            raise InputError(f"{store.path} has episodes 0 to {store.num_episodes - 1}; asked for {episode}.")
    single = len(episodes) == 1 and out.suffix.lower() in (".html", ".htm")
    if (out / "zarr.json").exists():
        raise InputError(f"{out} is a store, which is never written to. Name another output.")
    if not single and out.suffix and (out.is_file() or (len(episodes) > 1 and not out.is_dir())):
        raise InputError(f"{out}: {len(episodes)} episodes need a folder, one page each. Name a folder.")
    folder = out.parent if single else out
    folder.mkdir(parents=True, exist_ok=True)
    found = findings_of(store, episodes)
    template = string.Template((Path(__file__).parent / "episode.html").read_text())
    pages, cards = [], []
    for done, episode in enumerate(episodes, start=1):
        data = episode_data(store, episode, found[episode])
        page = out if single else folder / f"episode_{episode:06d}.html"
        title = html.escape(f"Episode {episode} of {Path(store.path).name}")
        _replace(page, template.substitute(title=title, data=_embedded(data)))
        pages.append(page)
        cards.append(_card(page.name, data))
        progress(done, len(episodes), "drawing")
    if len(episodes) > 1:
        template = string.Template((Path(__file__).parent / "episodes.html").read_text())
        title, lead = (
            html.escape(Path(store.path).name),
            html.escape(f"{len(episodes)} of {store.num_episodes} episodes"),
        )
        pages.insert(0, folder / "index.html")
        _replace(pages[0], template.substitute(title=title, lead=lead, cards="".join(cards)))
    return pages


def episode_data(store: EpisodeStore, episode: int, findings: Sequence[Finding] = ()) -> dict[str, Any]:
    """Everything a page shows, JSON-able: arrays are base64 of little-endian float32, bit for bit as in the store."""
    start, rows = int(store.episode_start[episode]), int(store.episode_length[episode])
    flags = {name: store.read(name, start, start + rows) for name in ("step_valid", "terminated", "truncated")}
    times = store.read("timestamp", start, start + rows)
    series = _series(store, start, rows)
    stride = max(1, -(-sum(entry["array"].nbytes for entry in series) * 4 // 3 // SERIES_BYTES))
    notes = [] if stride == 1 else [f"Plots show every {_ordinal(stride)} frame: the episode is long."]
    for entry in series:
        entry["values"] = _base64(entry.pop("array")[::stride], "<f4")
    pictures, note = _pictures(store, episode, start, rows)
    clocked = bool(times.any()) and bool((np.diff(times) >= 0).all()) and bool(np.isfinite(times).all())
    ends = {name: int(np.argmax(flags[name])) if flags[name].any() else -1 for name in ("terminated", "truncated")}
    return {
        "episode": episode,
        "source_id": store.source_ids[episode],
        "instruction": store.instructions[episode],
        "facts": _facts(store, episode, flags, times),
        "findings": [finding.to_json() for finding in findings],
        "rows": rows,
        "stride": stride,
        "period": store.spec.control_dt or DEFAULT_PERIOD,
        "clocked": clocked,
        "time": _base64(times[::stride], "<f8"),
        "valid": _base64(flags["step_valid"][::stride], "u1"),
        "terminated_row": ends["terminated"],
        "truncated_row": ends["truncated"],
        "pictures": pictures,
        "series": series,
        "notes": [*notes, *note],
    }


def findings_of(store: EpisodeStore, episodes: Sequence[int]) -> dict[int, list[Finding]]:
    """The findings of some episodes, worst first: those of the import, and those that their rows show."""
    if store.num_frames <= FRAMES_EXAMINED:
        found = [*store.findings, *row_findings(store)]
    else:
        found = [*store.findings]
        for episode in episodes:
            start, stop = int(store.episode_start[episode]), int((store.episode_start + store.episode_length)[episode])
            names = ("timestamp", "step_valid", "terminated", "truncated")
            rows = {name: store.read(name, start, stop) for name in names}
            found += [*clock_findings(episode, rows["timestamp"], store.spec.control_dt), *end_findings(episode, rows)]
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return {episode: [finding for finding in found if finding.episode == episode] for episode in episodes}


# ---- series --------------------------------------------------------------------------------------


def _series(store: EpisodeStore, start: int, rows: int) -> list[dict[str, Any]]:
    """Observations, action, reward and label sets, in the order in which they are shown."""
    spec, stop = store.spec, start + rows
    found = []
    if spec.action is not None:
        found.append(_entry("action", spec.action, store.read("action", start, stop), steps_only=True))
    if spec.has_reward:
        found.append(_entry("reward", ArraySpec(()), store.read("reward", start, stop), steps_only=True))
    for name in store.label_names():
        try:
            label = store.label(name)
        except LabelError:
            continue  # `data doctor` says why it is refused
        found.append(_entry(f"label {name}", ArraySpec(()), label.score[start:stop]))
        for channel, array in label.channels.items():
            found.append(_entry(f"label {name}, {channel}", ArraySpec(array.shape[1:]), array[start:stop]))
    for key, array in sorted(spec.observations.items(), key=lambda item: item[1].privileged):
        found.append(_entry(key, array, store.read(f"observation/{key}", start, stop)))
    for position, entry in enumerate(found):
        entry["shown"] = entry["shown"] and position < OPEN_PLOTS
    return found


def _entry(name: str, spec: ArraySpec, array: np.ndarray, steps_only: bool = False) -> dict[str, Any]:
    flat = np.asarray(array, np.float32).reshape(len(array), -1)
    names = [name.removeprefix("label ")] if spec.shape == () else element_names(spec)
    said = [f"[{spec.unit}]" if spec.unit else "", "privileged" if spec.privileged else ""]
    if flat.shape[1] > MOST_ELEMENTS:
        said.append(f"the first {MOST_ELEMENTS} of {flat.shape[1]} elements")
    return {
        "name": name,
        "unit": spec.unit,
        "note": ", ".join(filter(None, said)),
        "names": names[:MOST_ELEMENTS],
        "shown": not spec.privileged and flat.shape[1] <= MOST_ELEMENTS,
        "steps_only": steps_only,
        "array": flat[:, :MOST_ELEMENTS],
    }


def _facts(store: EpisodeStore, episode: int, flags: dict[str, np.ndarray], times: np.ndarray) -> list[list[str]]:
    outcome = {1: ("success", "good"), 0: ("failure", "bad")}.get(int(store.success[episode]), ("unknown", ""))
    ended = "terminated" if flags["terminated"].any() else "truncated" if flags["truncated"].any() else "not said"
    facts = [
        ["outcome", *outcome],
        ["frames", str(len(times)), ""],
        ["valid steps", str(int(flags["step_valid"].sum())), ""],
        ["end", ended, ""],
    ]
    if times.any():
        facts.append(["duration", f"{times[-1]:.2f} s", ""])
    if store.spec.control_dt:
        facts.append(["control period", f"{store.spec.control_dt:.4g} s", ""])
    if store.spec.environment:
        facts.append(["environment", store.spec.environment, ""])
    return [*facts, ["store", store.path, ""]]


# ---- pictures ------------------------------------------------------------------------------------


def _pictures(store: EpisodeStore, episode: int, start: int, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Frames of every camera as data URIs, evenly thinned out so that they fit; and a note where they are."""
    cameras = [camera for camera in store.spec.images if store.has_camera(camera)[episode]]
    missing = [camera for camera in store.spec.images if camera not in cameras]
    if not cameras:
        return {"rows": [], "cameras": [], "missing": missing}, []
    probes = np.unique(np.linspace(0, rows - 1, 8).round().astype(int))
    size = sum(np.mean([len(uri) for uri in _encoded(store, c, start + probes)]) for c in cameras)
    most = max(1, min(MOST_PICTURES, int(0.9 * PICTURE_BYTES / size)))
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(int))
    shown = [
        {
            "name": camera,
            "shape": list(store.spec.images[camera].shape),
            "uris": _encoded(store, camera, start + chosen),
        }
        for camera in cameras
    ]
    note = (
        [] if len(chosen) == rows else [f"{len(chosen)} of {rows} frames have a picture here, to keep the page small."]
    )
    return {"rows": chosen.tolist(), "cameras": shown, "missing": missing}, note


def _encoded(store: EpisodeStore, camera: str, rows: np.ndarray) -> list[str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "report", "Showing pictures") from error

    uris = []
    for first in range(0, len(rows), 32):
        for picture in store.read_rows(f"observation/images/{camera}", rows[first : first + 32]):
            image = Image.fromarray(picture)
            image.thumbnail((WIDEST, WIDEST))
            file = io.BytesIO()
            image.save(file, "WEBP", quality=QUALITY, method=1)
            uris.append("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


# ---- pieces --------------------------------------------------------------------------------------


def _card(page: str, data: dict[str, Any]) -> str:
    cameras = data["pictures"]["cameras"]
    outcome, frames = data["facts"][0], data["rows"]
    picture = f'<img alt="" src="{cameras[0]["uris"][len(cameras[0]["uris"]) // 2]}">' if cameras else ""
    count = len(data["findings"])
    findings = f'<span class="warn">{count} finding{"" if count == 1 else "s"}</span>' if count else ""
    words = f"<b>Episode {data['episode']}</b><span class='{outcome[2]}'>{html.escape(outcome[1])}</span>"
    text = html.escape(data["instruction"] or data["source_id"])
    return f'<li><a href="{page}">{picture}<div>{words}{findings}<span>{frames} frames</span>{text}</div></a></li>'


def _embedded(data: dict[str, Any]) -> str:
    """JSON that no text inside can end the script element with, nor begin a comment."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 < number % 100 < 14 else endings.get(number % 10, 'th')}"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
