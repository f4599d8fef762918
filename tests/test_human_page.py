"""The page of `embodied label prefer --annotator human` in a real browser: what is pressed is what is kept."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.preferences import Answer, Segment
from embodied.datasets.preferences import read_preferences
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards.annotator_human import HumanAnnotator, HumanConfig
from embodied.vlm_rewards.answer_log import AnswerLog
from embodied.vlm_rewards.ask import Answers, AskConfig, ask

sys.path.insert(0, str(Path(__file__).parent))
from browser import INSTALL, Browser, Page, find_browser
from made_stores import make_episode, write_store

pytestmark = pytest.mark.skipif(find_browser() is None, reason=INSTALL)
KEYS = {Answer.FIRST: "ArrowLeft", Answer.SECOND: "ArrowRight", Answer.NO_PREFERENCE: " ", Answer.ABSTAINED: "?"}
READY = "document.body.dataset.state == 'pair' && !busy && shown && performance.now() - shown.at > GUARD && shown.id"
# Mean brightness of what stands on the left and on the right.
SEEN = """shown.clips.map(clip => {
  const {width, height} = clip.context.canvas, d = clip.context.getImageData(0, 0, width, height).data;
  let sum = 0; for (let i = 0; i < d.length; i += 4) sum += d[i];
  return sum / (d.length / 4); })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


def rule(left: float, right: float) -> Answer:
    """What the person of these tests says about two brightnesses."""
    if left + right > 200:
        return Answer.ABSTAINED
    if abs(left - right) < 54:
        return Answer.NO_PREFERENCE
    return Answer.FIRST if left > right else Answer.SECOND


def bright_store(folder: Path) -> EpisodeStore:
    """Six episodes, every frame of one brightness."""
    episodes = []
    for index in range(6):
        episode = make_episode(index)
        level = np.random.default_rng(index).integers(20, 240, 31).astype(np.uint8)
        episode.images["side"] = np.broadcast_to(level[:, None, None, None], (31, 8, 8, 3)).copy()  # type: ignore[index]
        episodes.append(episode)
    return EpisodeStore(write_store(folder / "s.zarr", episodes).path)


class Asked:
    """Questions about clips of four frames, put by `ask` in a thread; row k is of brightness k."""

    def __init__(self, folder: Path, pairs: int, name: str = "", **settings: Any) -> None:
        self.log = AnswerLog(folder / "a.sqlite")
        self.annotator = HumanAnnotator(name, HumanConfig(**settings), self.log)
        self.url = self.annotator.server.url
        self.pairs = np.arange(10, 10 + 4 * pairs, 2).reshape(pairs, 2)
        self.result: list[Answers] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        config = AskConfig(both_orders=0.0)
        task = "to put the red ball beside the green box and then close the drawer without touching the lamp"
        self.result.append(ask(self.annotator, task, self.pairs, self._show, config, self.log))

    def _show(self, row: int, frames: bool) -> Segment:
        return Segment(np.arange(row, row + 4), np.full((4, 48, 64, 3), row, np.uint8))

    def records(self) -> list[dict[str, Any]]:
        self._thread.join(20)
        return [record for text in self.result[0].records for record in json.loads(text)]

    def kept(self) -> list[tuple[str, int]]:
        found = self.log._database.execute("SELECT annotator, answer FROM answers ORDER BY at").fetchall()
        return [tuple(row) for row in found]


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def make(pairs: int, name: str = "", **settings: Any) -> Asked:
        made.append(Asked(tmp_path, pairs, name, **settings))
        return made[-1]

    yield make
    for each in made:
        each.annotator.stop()
        each.annotator.close()


def enter(page: Page, url: str, name: str) -> None:
    """Open the page and say who one is."""
    page.open(url)
    page.wait("document.body.dataset.state == 'name' && document.activeElement.id == 'name-field'")
    page.type(name)
    page.press("Enter")
    page.wait(READY)


def test_a_session_by_keyboard_is_kept_as_it_was_pressed(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    store, page, pairs = bright_store(tmp_path), browser.page(), 10
    flags = ["--name", "p", "--task", "to be bright", "--annotator", "human:ada", "--pairs", str(pairs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "embodied.cli", "label", "prefer", store.path, *flags, "--inputs", "none", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert url, line + process.stderr.read()
        page.open(url[0])
        pressed: dict[str, Answer] = {}
        while page.wait(f"document.body.dataset.state == 'finish' ? 'all' : {READY}") != "all":
            question = page.run("shown.id")
            assert page.run("document.getElementById('task').textContent") == "to be bright"
            assert page.run("document.getElementById('who').textContent") == "ada"
            assert page.run("document.getElementById('count').textContent") == f"{len(pressed)} of 15"
            if len(pressed) == 4:  # reloading loses nothing: the same pair, the same count
                page.reload()
                page.wait(READY)
                assert page.run("shown.id") == question
                assert page.run("document.getElementById('count').textContent") == "4 of 15"
            seen = page.run(SEEN)
            if len(pressed) == 7:  # a slip of the finger
                page.press(KEYS[rule(*seen).swapped] if rule(*seen) < 2 else "ArrowLeft")
                page.wait(f"{READY} && shown.id != '{question}'")
                page.press("Backspace")
                page.wait(f"{READY} && view.done == 7")
                assert page.run(SEEN) == seen
                question = page.run("shown.id")
            pressed[question] = rule(*seen)
            page.press(KEYS[pressed[question]])
            page.wait(f"!busy && view.done == {len(pressed)}")
        page.press("Enter")
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert page.wait("document.body.dataset.state == 'over' && document.getElementById('over-title').textContent") == (
        "Thank you"
    )
    assert page.complaints() == []
    found = read_preferences(EpisodeStore(store.path), "p")
    assert found.annotators == ("human:ada",)
    records = [record for text in found.records for record in json.loads(text)]
    assert {record["given"]: Answer[record["answer"].upper()] for record in records} == pressed
    assert {record["by"] for record in records} == {"ada"}
    assert all(0.2 < record["seconds"] < 300 for record in records)
    level = store.read_rows("observation/images/side", np.arange(store.num_frames))[:, 0, 0, 0].astype(float)
    expected = np.zeros((pairs, 2, 4), int)
    for pair, text in enumerate(found.records):
        for record in json.loads(text):
            shown = level[[found.first[pair], found.second[pair]]]
            left, right = shown[::-1] if record["swapped"] else shown
            expected[pair, int(record["swapped"]), rule(left, right)] += 1
    np.testing.assert_array_equal(found.votes, expected)
    assert (expected.sum((0, 1)) > 0).all(), "every key was pressed"
    counts = json.loads(out)["preferences"]["counts"]
    assert [counts[f"questions_{answer.name.lower()}"] for answer in Answer] == expected.sum((0, 1)).tolist()


def test_two_people_at_once_get_different_pairs_and_each_answer_its_author(
    browser: Browser, asked: Callable[..., Asked]
) -> None:
    run, people = asked(8), {"Ada": browser.page(), "Bob": browser.page(375, 740, phone=True)}
    for name, page in people.items():
        enter(page, run.url, name)
    said: dict[str, tuple[str, str]] = {}
    while True:
        states = {name: page.run("document.body.dataset.state") for name, page in people.items()}
        on_screen = [page.run("shown && shown.id") for name, page in people.items() if states[name] == "pair"]
        if not on_screen:
            break
        assert len(set(on_screen)) == len(on_screen)
        for name, page in people.items():
            if states[name] == "pair":
                question = page.wait(READY)
                levels = page.run(SEEN)
                said[question] = name, "first" if levels[0] > levels[1] else "second"
                if name == "Ada":
                    page.press("ArrowLeft" if levels[0] > levels[1] else "ArrowRight")
                else:
                    page.click(f"[data-answer={said[question][1]}]")
                page.wait(f"!busy && (!shown || shown.id != '{question}')")
    for page in people.values():
        page.wait("document.body.dataset.state == 'finish'")
        page.click("[data-do=finish]")
    records = run.records()
    assert {record["given"]: (record["by"], record["answer"]) for record in records} == said
    assert len(said) == 8
    assert {name for name, _ in said.values()} == {"Ada", "Bob"}
    for record, (first, second) in zip(records, run.pairs, strict=True):
        assert (record["answer"] == "second") == ((second > first) != record["swapped"])


def test_slips_count_once(browser: Browser, asked: Callable[..., Asked]) -> None:
    run, page = asked(6, "ada"), browser.page()
    page.open(run.url)
    page.wait(READY)
    page.click("[data-answer=first]", times=3)
    page.wait("!busy && view.done == 1")
    page.wait(READY)
    assert page.run("view.done") == 1, "the second click of a double click is not about the next pair"
    page.press("ArrowRight", repeat=True)
    page.press("ArrowRight", modifiers=2)
    page.press("x")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert run.kept() == [("human:ada", 0)], "a key held down, Ctrl and other keys say nothing"
    page.press(" ")
    page.wait("!busy && view.done == 2")
    assert run.kept()[-1] == ("human:ada", 2), "after a click, the space bar is the key for 'the same' again"
    page.wait(READY)
    page.run("document.querySelector('[data-answer=second]').focus()")
    page.press(" ")
    page.wait("!busy && view.done == 3")
    assert run.kept()[-1] == ("human:ada", 1), "with the focus on a button it presses that"
    page.wait(READY)
    page.press("u")
    page.wait("!busy && view.done == 2")
    assert len(run.kept()) == 2
    page.wait(READY)
    page.run(
        "answer('first'); new Promise(done => { "
        "const again = () => busy ? setTimeout(again, 1) : done(answer('first')); again(); })"
    )
    page.wait("!busy")
    assert page.run("view.done") == 3, "a pair just shown takes no answer yet: nobody has seen it"


def test_without_a_connection_nothing_is_lost_or_said_twice(browser: Browser, asked: Callable[..., Asked]) -> None:
    run, page = asked(4, "ada"), browser.page()
    page.open(run.url)
    page.wait(READY)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.press("ArrowRight")
    note = page.wait("!document.getElementById('note').hidden && document.getElementById('note').textContent")
    assert note.startswith("No connection to the program")
    page.press("ArrowLeft")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait("!busy && view.done == 1 && document.getElementById('note').hidden")
    assert run.kept() == [("human:ada", 1)]
    run.annotator.stop()
    page.wait("document.body.dataset.state == 'over'")
    assert page.run("document.getElementById('over-title').textContent") == "The program has stopped"


def test_clips_play_in_step_and_can_be_stopped(browser: Browser, asked: Callable[..., Asked]) -> None:
    run, page = asked(2, "ada", frames_per_second=20.0), browser.page()
    page.open(run.url)
    page.wait(READY)
    drawn = page.run(
        "new Promise(done => { const seen = []; const watch = () => { seen.push(shown.clips.map(c => c.drawn)); "
        "seen.length < 90 ? requestAnimationFrame(watch) : done(seen); }; requestAnimationFrame(watch); })"
    )
    assert all(left == right for left, right in drawn)
    assert {left for left, _ in drawn} == {0, 1, 2, 3}
    page.press("p")
    stopped = page.run("shown.clips[0].drawn")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("shown.clips[0].drawn") == stopped
    assert page.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"


CANVASES = "document.querySelectorAll('.clip canvas')"
MISFITS = """[
  document.documentElement.scrollWidth > innerWidth, document.documentElement.scrollHeight > innerHeight,
  ...[...document.querySelectorAll('button, input')].map(e => [e.innerText || e.id, e.getBoundingClientRect()])
    .filter(([_, b]) => b.width > 0 && (b.width < 44 || b.height < 44 || b.right > innerWidth || b.left < 0))
    .map(([text, b]) => `${text}: ${b.width} x ${b.height}`)]"""
# Contrast of every visible text with what lies behind it (WCAG 2), the worst first.
CONTRAST = """(() => {
  const lin = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * lin(r) + 0.7152 * lin(g) + 0.0722 * lin(b);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  return [...document.querySelectorAll('h1, h1 *, p, button:not(:disabled), output')]
    .filter(e => e.innerText && e.getBoundingClientRect().width > 2)
    .map(e => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.innerText]; })
    .sort((a, b) => a[0] - b[0]); })()"""


@pytest.mark.parametrize(
    ("width", "height", "phone", "dark"),
    [(320, 640, True, False), (390, 844, True, True), (740, 360, True, False), (1280, 800, False, True)],
)
def test_every_screen_fits_and_can_be_read_and_touched(
    browser: Browser, asked: Callable[..., Asked], width: int, height: int, phone: bool, dark: bool
) -> None:
    run, page = asked(2), browser.page(width, height, phone, dark)

    def check(one_screen: bool = True) -> None:
        assert page.run("innerWidth") == width
        misfits = page.run(MISFITS)
        assert misfits[0] is False, "no scrolling sideways"
        assert not (misfits[1] and one_screen)
        assert misfits[2:] == [], "big enough for a thumb"
        contrast, text = page.run(CONTRAST)[0]
        assert contrast >= 4.5, text

    page.open(run.url)
    page.wait("document.body.dataset.state == 'name'")
    check()
    enter(page, run.url, "Maximiliane von und zu Hohenstein")
    check()
    boxes = page.run(f"[0, 1].map(k => {CANVASES}[k].getBoundingClientRect()).map(b => [b.x, b.y, b.width])")
    assert boxes[0][0] + boxes[0][2] <= boxes[1][0], "side by side"
    assert boxes[0][1] == boxes[1][1]
    if phone and width < height:
        page.click("#larger")
        check(one_screen=False)
        stacked = page.run(f"(b => Math.min(b.width, b.height * 4 / 3))({CANVASES}[0].getBoundingClientRect())")
        assert stacked > 1.3 * boxes[0][2], "larger"
        bottom = page.run("document.querySelector('.tools').getBoundingClientRect().bottom")
        assert bottom <= height, "the buttons stay where the thumb is"
    unnamed = page.run(
        "[...document.querySelectorAll('button, canvas, input, [role]')].filter(e => !(e.textContent.trim()"
        " || e.getAttribute('aria-label') || e.getAttribute('role') == 'alert' || (e.labels && e.labels.length)))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == [], "a screen reader has a name for everything"
    for done in (1, 2):
        page.wait(READY)
        page.click("[data-answer=no_preference]")
        page.wait(f"!busy && view.done == {done}")
    page.wait("document.body.dataset.state == 'finish'")
    check()
    page.click("#finish [data-do=finish]")
    run.records()
    threading.Thread(target=run.annotator.close).start()
    page.wait("document.body.dataset.state == 'over'")
    check()
    origin = run.url.rstrip("/")
    assert {re.match(r"data:|http://[^/]*", url)[0] for url in page.requests()} <= {origin, "data:"}  # type: ignore[index]
    assert page.complaints() == []


def test_the_network_comes_in_with_the_token_only(browser: Browser, asked: Callable[..., Asked]) -> None:
    run = asked(3, listen="0.0.0.0")
    server = run.annotator.server
    local = f"http://127.0.0.1:{server.server_port}/"
    page, stranger = browser.page(), browser.page()
    enter(page, f"{local}?token={server.token}", "Ada")
    assert page.run("location.href") == local, "the token does not stay in the address"
    assert page.run("document.cookie") == "", "nor where a script could read it"
    cookies = page.call("Network.getCookies")["cookies"]
    assert [(c["value"], c["httpOnly"], c["sameSite"]) for c in cookies] == [(server.token, True, "Strict")]
    page.reload()
    page.wait(READY)
    assert page.run("view.name") == "Ada"
    page.press("ArrowLeft")
    page.wait("!busy && view.done == 1")
    for url in (local, f"{local}?token={'x' * 32}"):
        stranger.open(url)
        assert stranger.wait("document.body && document.body.innerText") == "Forbidden"
    assert run.kept() == [("human:Ada", 0)]
