"""Episode pages: what they embed equals the store, nothing comes from elsewhere, hostile text stays text."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embodied.cli import main
from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets import view
from embodied.datasets.finding import Finding
from embodied.datasets.store import EpisodeStore
from embodied.datasets.view import episode_data, write_pages
from embodied.datasets.view_rerun import write_rerun

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import add_label, make_episode, write_store

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "lift <b>it</b> </script ></script><script>document.title='taken'</script> <!-- <script x & \u2028 \" '"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    episodes = [make_episode(index, steps=20 + index) for index in range(4)]
    episodes[1].instruction = episodes[1].source_id = HOSTILE
    for frame, picture in enumerate(np.asarray(episodes[1].images["side"])):
        picture[:] = 10 * frame  # so that a picture tells its frame
    del episodes[2].images["wrist"]
    found = [Finding("odd", "warning", f"two is odd: {HOSTILE}", "do <i>this</i>", 2)]
    made = write_store(tmp_path_factory.mktemp("view") / "s", episodes, findings=found)
    add_label(made, "clip", np.linspace(-1, 1, made.num_frames, dtype=np.float32))
    return EpisodeStore(made.path)


class Page(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the embedded data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data: dict[str, Any] = json.loads(self.texts["data"]) if "data" in self.texts else {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def array(text: str, dtype: str, columns: int = 1) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(text), dtype)
    return flat.reshape(-1, columns) if columns > 1 else flat


def test_the_embedded_series_are_the_store_bit_for_bit(store: EpisodeStore, tmp_path: Path) -> None:
    (path,) = write_pages(store, [3], tmp_path / "page.html")
    data = Page(path).data
    episode, start = store.episode(3), int(store.episode_start[3])
    assert (data["rows"], data["stride"], data["clocked"]) == (24, 1, True)
    series = {entry["name"]: entry for entry in data["series"]}
    assert list(series) == ["action", "reward", "label clip", "label clip, confidence", "joint_position", "object"]
    joints = series["joint_position"]
    assert (joints["names"], joints["unit"]) == (["shoulder", "elbow", "wrist"], "rad")
    np.testing.assert_array_equal(array(joints["values"], "<f4", 3), episode.observations["joint_position"])
    np.testing.assert_array_equal(array(series["action"]["values"], "<f4", 2), episode.action)
    np.testing.assert_array_equal(array(series["reward"]["values"], "<f4"), episode.reward)
    score = store.label("clip").score[start : start + 24]
    np.testing.assert_array_equal(array(series["label clip"]["values"], "<f4"), score)
    np.testing.assert_array_equal(array(data["time"], "<f8"), episode.timestamp)
    np.testing.assert_array_equal(array(data["valid"], "u1").astype(bool), episode.step_valid)
    assert (data["terminated_row"], data["truncated_row"]) == (22, -1)
    assert not series["object"]["shown"], "what only a simulator knows is hidden until asked for"


def test_every_frame_of_every_camera_is_there(store: EpisodeStore) -> None:
    data = episode_data(store, 1)
    assert data["pictures"]["rows"] == list(range(22))
    cameras = {camera["name"]: camera for camera in data["pictures"]["cameras"]}
    assert set(cameras) == {"side", "wrist"}
    for frame, uri in enumerate(cameras["side"]["uris"]):
        kind, _, text = uri.partition(",")
        assert kind == "data:image/webp;base64"
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert picture.shape == (8, 8, 3)
        assert abs(float(picture.mean()) - 10 * frame) < 4
    missing = episode_data(store, 2)["pictures"]
    assert ([c["name"] for c in missing["cameras"]], missing["missing"]) == (["side"], ["wrist"])


def test_long_episodes_are_thinned_out_and_say_so(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = episode_data(store, 3)
    assert whole["notes"] == []
    picture = sum(len(camera["uris"][0]) for camera in whole["pictures"]["cameras"])
    monkeypatch.setattr(view, "PICTURE_BYTES", 8 * picture)
    monkeypatch.setattr(view, "SERIES_BYTES", 500)
    data = episode_data(store, 3)
    rows = data["pictures"]["rows"]
    assert 4 <= len(rows) <= 8
    assert (rows[0], rows[-1]) == (0, 23)
    assert sum(len(uri) for camera in data["pictures"]["cameras"] for uri in camera["uris"]) < 9 * picture
    assert f"{len(rows)} of 24 frames have a picture" in data["notes"][1]
    stride = data["stride"]
    assert stride > 1
    assert f"every {stride}th frame" in data["notes"][0] or stride < 4
    joints = next(entry for entry in data["series"] if entry["name"] == "joint_position")
    expected = store.episode(3).observations["joint_position"][::stride]
    np.testing.assert_array_equal(array(joints["values"], "<f4", 3), expected)
    assert sum(len(entry["values"]) for entry in data["series"]) < 700


def test_hostile_text_stays_text_and_nothing_is_loaded(store: EpisodeStore, tmp_path: Path) -> None:
    pages = write_pages(store, [1, 2], tmp_path / "pages")
    assert [page.name for page in pages] == ["index.html", "episode_000001.html", "episode_000002.html"]
    scripts = [0, 2, 2]  # the index has none; a page its data and its own
    for path, count in zip(pages, scripts, strict=True):
        text, page = path.read_text(), Page(path)
        assert [tag for tag, _ in page.tags].count("script") == count
        assert "http:" not in text.replace("http-equiv", "")
        assert "https:" not in text
        policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert "default-src 'none'" in policy
        for tag, attributes in page.tags:
            for key in ("src", "href"):
                value = attributes.get(key) or ""
                assert value == "" or value.startswith(("data:image/", "episode_")), (tag, value)
    one, two = Page(pages[1]).data, Page(pages[2]).data
    assert not set("<>&") & set(Page(pages[1]).texts["data"]), "some parsers end a script where others do not"
    assert one["instruction"] == one["source_id"] == HOSTILE
    assert [f["message"] for f in two["findings"]] == [f"two is odd: {HOSTILE}"]
    assert "1 finding<" in pages[0].read_text()
    assert pages[0].read_text().count("<li>") == 2


def test_findings_that_the_rows_show_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [make_episode(index) for index in range(3)]
    episodes[1].observations["joint_position"][17:] += 50
    episodes[2].timestamp[9:] += 1
    store = write_store(tmp_path / "s", episodes)
    found = view.findings_of(store, [1, 2])
    assert [f.check for f in found[1]] == ["jump"]
    assert "frame 17" in found[1][0].message
    assert [f.check for f in found[2]] == ["clock-gap"]
    monkeypatch.setattr(view, "FRAMES_EXAMINED", 10)
    assert {k: [f.check for f in v] for k, v in view.findings_of(store, [1, 2]).items()} == {1: [], 2: ["clock-gap"]}


def test_stores_without_pictures_actions_or_clock(tmp_path: Path) -> None:
    from embodied.contracts.specs import ArraySpec, DatasetSpec
    from embodied.datasets.episode import Episode

    spec = DatasetSpec({"wide": ArraySpec((100,)), "one": ArraySpec(())}, {}, None)
    flags = np.zeros(5, bool)
    rows = {"wide": np.zeros((5, 100), np.float32), "one": np.arange(5, dtype=np.float32)}
    episode = Episode(rows, {}, None, flags, flags, flags, np.zeros(5))
    data = episode_data(write_store(tmp_path / "s", [episode], spec), 0)
    assert (data["clocked"], data["pictures"]["cameras"]) == (False, [])
    series = {entry["name"]: entry for entry in data["series"]}
    assert len(series["wide"]["names"]) == 64
    assert "the first 64 of 100 elements" in series["wide"]["note"]
    assert series["one"]["names"] == ["one"]


def test_verb_and_mistakes(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "page.html"
    assert main(["data", "view", store.path, "--episode", "2", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pages"] == [str(out)]
    assert main(["data", "view", store.path, "--episode", "0,2:4", "--out", str(tmp_path / "many")]) == 0
    assert f"{tmp_path}/many/index.html and 3 pages beside it" in capsys.readouterr().out
    for words, message in (
        (["--episode", "9", "--out", str(out)], "episodes 0 to 3; '9' is not"),
        (["--episode", "0,1", "--out", str(out)], "2 episodes need a folder"),
        (["--episode", "0", "--out", store.path], "read and written by the same command"),
    ):
        assert main(["data", "view", store.path, *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="is a store, which is never written to"):
        write_pages(store, [0], Path(store.path))


def test_without_rerun_its_package_is_named(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingExtraError, match=r"pip install rerun-sdk$"):
        write_rerun(store, 0, tmp_path / "e.rrd")


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_in_a_browser_the_cursor_follows_the_frame(store: EpisodeStore, tmp_path: Path) -> None:
    """Keys, slider and address move cursor, picture and values together; nothing else runs."""
    (path,) = write_pages(store, [1], tmp_path / "page.html")
    probe = """<script>
    var log = [];
    function look(what) {
      log.push([what, document.getElementById("where").textContent, document.querySelector(".cursor").style.left,
                document.querySelector("figure img").src.slice(-40),
                document.querySelector(".legend span").textContent]);
    }
    function press(key, shift) { document.dispatchEvent(new KeyboardEvent("keydown", {key: key, shiftKey: shift})); }
    look("start"); press("ArrowRight"); look("right"); press("ArrowRight", true); look("shift");
    press("End"); look("end"); press("Home"); look("home");
    var slider = document.getElementById("slider"); slider.value = 7; slider.oninput(); look("slider");
    document.body.append(Object.assign(document.createElement("pre"), {id: "log", textContent: JSON.stringify(log)}));
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    dom = subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1] == "Episode 1 of s", "the hostile instruction did not run"
    found = re.search(r'<pre id="log">(.*?)</pre>', dom)
    assert found is not None, dom[-500:]
    log = {entry[0]: entry[1:] for entry in json.loads(html.unescape(found[1]))}
    frames = {what: int(entry[0].split()[1]) for what, entry in log.items()}
    assert frames == {"start": 0, "right": 1, "shift": 11, "end": 21, "home": 0, "slider": 7}
    left = {what: float(entry[1].removesuffix("px")) for what, entry in log.items()}
    width = left["end"] - left["start"]
    assert width > 100
    for what, frame in frames.items():
        assert left[what] == pytest.approx(left["start"] + width * frame / 21, abs=0.2)
    uris = episode_data(store, 1)["pictures"]["cameras"][0]["uris"]
    action = store.episode(1).action
    assert action is not None
    for what, frame in frames.items():
        assert uris[frame].endswith(log[what][2])
        shown = log[what][3].replace("\u2212", "-")
        # The row of the final observation has no action.
        assert shown == "\u2013" if frame == 21 else float(shown) == pytest.approx(float(action[frame, 0]), abs=6e-4)
