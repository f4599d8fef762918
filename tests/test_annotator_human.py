"""A person as annotator: what is kept and when, undo, several people, runs that end and go on."""

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.preferences import Answer, Verdict
from embodied.datasets.preferences import read_preferences
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards import annotator_human, human_server
from embodied.vlm_rewards.annotator_human import HumanAnnotator, HumanConfig
from embodied.vlm_rewards.answer_log import AnswerLog
from embodied.vlm_rewards.ask import AskConfig

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import make_episode, write_store
from people import TASK, Run, making_runs, pairs_of, post, show
from vlm_peer import Peer


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with making_runs(tmp_path) as make:
        yield make


def test_what_is_said_is_kept_before_the_next_pair_and_comes_back_as_it_was_shown(runs: Callable[..., Run]) -> None:
    run = runs(6)
    assert run.said == [f"Compare the pairs at {run.annotator.server.url}"]
    meant = {}
    for number, answer in enumerate(("first", "second", "no_preference", "abstained", "first", "first")):
        view = run.look("Ada")
        assert (view["done"], view["total"], view["question"]["task"]) == (number, 6, TASK)
        rows = run.rows_shown(view)
        meant[min(rows)] = (answer, rows[0] > rows[1])
        run.say("Ada", answer)
        kept = run.kept()
        assert len(kept) == number + 1, "on the disk before the person sees the next pair"
        assert kept[-1][:2] == ("human:Ada", int(Answer[answer.upper()]))
    assert run.look("Ada")["state"] == "finish"
    assert not run.result, "the last answers can still be taken back"
    run.post("finish", name="Ada")
    answers = run.done()
    assert (answers.asked, answers.found, answers.reasons) == (6, 0, {"can't tell": 1})
    for pair, (first, _) in enumerate(pairs_of(6)):
        answer, swapped = meant[first]
        expected = np.zeros((2, 4), int)
        expected[int(swapped), Answer[answer.upper()]] = 1
        np.testing.assert_array_equal(answers.votes[pair], expected)
        (record,) = json.loads(answers.records[pair])
        assert (record["by"], record["swapped"], record["page"]) == ("Ada", swapped, human_server.VERSION)
        assert 0 < record["seconds"] <= 1.5
        sides = [show(int(row), True).content[:16] for row in pairs_of(6)[pair]]
        assert [record["left"], record["right"]] == (sides[::-1] if swapped else sides)
        assert len(record["given"]) == 16


def test_undo_takes_the_answer_out_of_the_log_and_shows_the_pair_again(runs: Callable[..., Run]) -> None:
    run = runs(8)
    assert run.look("Ada")["undo"] == ""
    first = run.say("Ada", "first")
    view = run.look("Ada")
    second = run.rows_shown(view)
    assert len(run.kept()) == 1
    status, again = run.post("undo", name="Ada", question=view["undo"])
    assert status == 200
    assert run.rows_shown(again) == first
    assert (again["done"], again["undo"]) == (0, "")
    assert run.kept() == []
    assert run.post("undo", name="Ada", question=view["undo"])[0] == 409, "once"
    stale = run.post("answer", name="Ada", question=view["question"]["id"], answer="first", seconds=1)
    assert stale[0] == 409, "the pair that was shown when undo was pressed is not shown any more"
    run.say("Ada", "second")
    assert run.rows_shown(run.look("Ada")) == second
    for _ in range(5):
        run.say("Ada", "first")
    for _ in range(3):
        view = run.look("Ada")
        assert run.post("undo", name="Ada", question=view["undo"])[0] == 200
    assert run.look("Ada")["undo"] == "", "no more than three"
    assert [answer for _, answer, _ in run.kept()] == [1, 0, 0]
    for _ in range(5):
        run.say("Ada", "abstained")
    view = run.look("Ada")
    assert view["state"] == "finish"
    run.post("undo", name="Ada", question=view["undo"])
    run.say("Ada", "second")
    run.post("finish", name="Ada")
    answers = run.done()
    assert answers.votes.sum((0, 1)).tolist() == [2, 2, 0, 4]
    assert sorted(answer for _, answer, _ in run.kept()) == [0, 0, 1, 1, 3, 3, 3, 3]


def test_the_last_answers_become_final_by_themselves(runs: Callable[..., Run]) -> None:
    run = runs(2, linger=0.3)
    run.say("Ada", "first")
    run.say("Ada", "first")
    started = time.monotonic()
    assert run.done().asked == 2
    assert time.monotonic() - started < 5


def test_a_double_click_and_somebody_elses_answer_are_refused(runs: Callable[..., Run]) -> None:
    run = runs(4)
    view = run.look("Ada")
    said = {"question": view["question"]["id"], "seconds": 1}
    assert run.post("answer", name="Bob", answer="second", **said)[0] == 409
    both: list[int] = []
    clicks = [
        threading.Thread(target=lambda: both.append(run.post("answer", name="Ada", answer="first", **said)[0]))
        for _ in range(8)
    ]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert sorted(both) == [200] + [409] * 7
    assert run.post("answer", name="Bob", answer="second", **said)[0] == 409
    assert [row[:2] for row in run.kept()] == [("human:Ada", 0)]


def test_several_people_get_different_pairs_and_every_answer_its_author(runs: Callable[..., Run]) -> None:
    run = runs(30, AskConfig(both_orders=0.5))
    author: dict[tuple[int, int], tuple[str, str]] = {}
    problems: list[str] = []

    def person(name: str) -> None:
        rng = random.Random(name)
        while not run.result:
            status, view = run.post("look", name=name)
            if status != 200 or view["state"] in ("over", "finish"):
                run.post("finish", name=name)
                time.sleep(0.01)
            elif view["state"] == "ask":
                rows = run.rows_shown(view)
                answer = rng.choice([a.name.lower() for a in Answer])
                if rows in author:
                    problems.append(f"{rows} twice")
                if rng.random() < 0.2 and view["undo"]:
                    if run.post("undo", name=name, question=view["undo"])[0] == 200:
                        author.pop(next(key for key, value in author.items() if value[0] == view["undo"]))
                    continue  # else others needed the room: it is final
                author[rows] = view["question"]["id"], f"{name} {answer}"
                status, _ = run.post("answer", name=name, question=view["question"]["id"], answer=answer, seconds=0.1)
                if status != 200:
                    problems.append(f"{rows} {status}")

    people = [threading.Thread(target=person, args=(name,)) for name in ("Ada", "Bob", "Cy", "Di")]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join(60)
    assert problems == []
    answers = run.done()
    found = {}
    for pair, text in zip(pairs_of(30), answers.records, strict=True):
        for record in json.loads(text):
            rows = tuple(int(row) for row in (pair[::-1] if record["swapped"] else pair))
            found[rows] = record["given"], f"{record['by']} {record['answer']}"
    assert found == author
    assert len(found) == 45
    assert len({text.split()[0] for _, text in found.values()}) == 4


def test_the_other_order_of_a_pair_comes_late(runs: Callable[..., Run]) -> None:
    run = runs(12, AskConfig(both_orders=1.0))
    seen = [frozenset(run.say("Ada", "first")) for _ in range(24)]
    gaps = [index - seen.index(pair) for index, pair in enumerate(seen) if pair in seen[:index]]
    assert len(gaps) == 12
    assert min(gaps) >= 4


def test_second_opinions_are_of_somebody_else_while_somebody_else_is_there(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(5, AskConfig(both_orders=0.0, samples=2))
    run.look("Bob")
    mine = [run.say("Ada", "first") for _ in range(5)]
    assert len(set(mine)) == 5
    assert run.post("look", name="Ada")[1]["state"] == "wait"
    his = [run.say("Bob", "second") for _ in range(5)]
    assert set(mine) == set(his)
    for name in ("Ada", "Bob"):
        run.post("finish", name=name)
    answers = run.done()
    assert all({record["by"] for record in json.loads(text)} == {"Ada", "Bob"} for text in answers.records)
    assert (answers.votes.sum(1)[:, :2] == 1).all()
    monkeypatch.setattr(annotator_human, "_ACTIVE", 0.2)
    alone = runs(np.array([[100, 101]]), AskConfig(both_orders=0.0, samples=2))
    alone.look("Ada")
    alone.say("Ada", "first")
    alone.say("Ada", "second")


def test_who_goes_away_leaves_the_pair_to_others(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotator_human, "_AWAY", 0.3)
    run = runs(1)
    view = run.look("Ada")
    assert run.post("look", name="Bob")[1]["state"] == "wait"
    time.sleep(0.4)
    taken = run.look("Bob")
    assert run.rows_shown(taken) == tuple(pairs_of(1)[0][:: 1 if run.rows_shown(taken)[0] == 0 else -1])
    late = run.post("answer", name="Ada", question=view["question"]["id"], answer="first", seconds=1)
    assert late[0] == 409
    run.say("Bob", "second")
    assert [row[:2] for row in run.kept()] == [("human:Bob", 1)]


def test_the_same_pictures_twice_are_one_question(runs: Callable[..., Run]) -> None:
    run = runs(np.array([[0, 1], [0, 1], [2, 3]]), AskConfig(both_orders=1.0))
    for _ in range(4):
        run.say("Ada", "second")
    run.post("finish", name="Ada")
    assert run.done().votes[:, :, Answer.SECOND].tolist() == [[1, 1]] * 3
    assert len(run.kept()) == 4


def test_more_people_than_room_never_stand_still(runs: Callable[..., Run]) -> None:
    run = runs(20, window=3, undo=1)
    people, number = ("Ada", "Bob", "Cy", "Di", "Ed"), 0
    until = time.monotonic() + 20
    while number < 20:
        assert time.monotonic() < until
        for name in people:
            if run.post("look", name=name)[1]["state"] == "ask":
                run.say(name, "first")
                number += 1
    for name in people:
        run.post("finish", name=name)
    assert run.done().votes.sum() == 20


WORKER = """
import numpy as np
from embodied.contracts.preferences import Segment
from embodied.vlm_rewards.annotator_human import HumanAnnotator, HumanConfig
from embodied.vlm_rewards.answer_log import AnswerLog
from embodied.vlm_rewards.ask import AskConfig, ask
show = lambda row, frames: Segment(np.array([row]), np.full((1, 4, 6, 3), row, np.uint8))
log = AnswerLog({log!r})
person = HumanAnnotator("ada", HumanConfig(), log, lambda text: print(text, flush=True))
try:
    answers = ask(person, {task!r}, np.arange(16).reshape(8, 2), show, AskConfig(both_orders=0.0), log)
    print(answers.found, answers.votes[:, :, 0].sum(), flush=True)
finally:
    person.close()
"""


def test_a_run_that_was_killed_or_interrupted_goes_on_with_the_next_pair(tmp_path: Path) -> None:
    code = WORKER.format(task=TASK, log=str(tmp_path / "a.sqlite"))

    def start() -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, int(process.stdout.readline().rstrip("/\n").rpartition(":")[2])

    def answer_until(port: int, number: int) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            view = post(port, "look", {"name": ""})[1]
            if view["done"] >= number:
                return
            if view["state"] == "ask":
                said = {"name": "", "question": view["question"]["id"], "answer": "first", "seconds": 0}
                assert post(port, "answer", said)[0] == 200
        raise TimeoutError

    for number, end in ((3, signal.SIGKILL), (6, signal.SIGINT)):
        process, port = start()
        answer_until(port, number)
        process.send_signal(end)
        started = time.monotonic()
        errors = process.communicate(timeout=20)[1]
        assert time.monotonic() - started < 5, "it does not wait for the person"
        assert process.returncode != 0
        assert ("KeyboardInterrupt" in errors) == (end == signal.SIGINT)
    process, port = start()
    answer_until(port, 8)
    assert post(port, "finish", {"name": ""})[0] == 200
    assert process.communicate(timeout=20)[0].strip() == "6 8"
    assert process.returncode == 0


def test_a_full_disk_records_nothing_and_says_so(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs(4)
    view = run.look("Ada")
    run.log._database.execute("PRAGMA query_only = ON")
    said = {"name": "Ada", "question": view["question"]["id"], "answer": "first", "seconds": 1}
    status, text = run.post("answer", **said)
    assert (status, "Cannot write" in text) == (503, True)
    run.log._database.execute("PRAGMA query_only = OFF")
    assert run.look("Ada")["question"]["id"] == view["question"]["id"]
    assert run.post("answer", **said)[0] == 200


def test_another_run_that_asks_the_same_keeps_its_answer(runs: Callable[..., Run]) -> None:
    run = runs(3)
    view = run.look("Ada")
    (question,) = [q for q in run.annotator._open.values() if q.given == view["question"]["id"]]
    other = AnswerLog(run.log.path)
    other.keep(question.key, Verdict(Answer.NO_PREFERENCE, "", True, {"by": "Bob"}), "human:Bob")
    said = {"name": "Ada", "question": view["question"]["id"], "answer": "first", "seconds": 1}
    assert run.post("answer", **said)[0] == 409
    assert [row[:2] for row in run.kept()] == [("human:Bob", 2)]
    run.say("Ada", "first")
    run.say("Ada", "first")
    run.post("finish", name="Ada")
    assert run.done().votes.sum((0, 1)).tolist() == [2, 0, 1, 0]


def test_closing_says_goodbye_and_frees_the_port(runs: Callable[..., Run]) -> None:
    run = runs(1)
    port = run.annotator.server.server_port
    run.say("Ada", "first")
    run.post("finish", name="Ada")
    run.done()
    seen: list[dict[str, Any]] = []
    closing = threading.Thread(target=run.annotator.close)
    closing.start()
    while not seen or seen[-1]["state"] != "over":
        seen.append(run.post("look", name="Ada")[1])
    closing.join(10)
    assert not closing.is_alive()
    assert seen[-1]["complete"] is True
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    late = run.annotator.compare(TASK, show(1, True), show(2, True))
    assert (late.answer, late.final) == (Answer.ABSTAINED, False)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("x" * 41, {}, ConfigError, "human:NAME: a name has 1 to 40"),
        ("a\nb", {}, ConfigError, "human:NAME: a name has 1 to 40"),
        ("ada", {"listen": "everywhere"}, ConfigError, "listen 'everywhere' is no address"),
        ("ada", {"listen": "203.0.113.9"}, InputError, "Cannot listen on 203.0.113.9, port 0"),
        ("ada", {"port": 70000}, ConfigError, "port 70000 must lie"),
        ("ada", {"token": "secret"}, ConfigError, "A token has 16 to 100"),
        ("ada", {"window": 3}, ConfigError, "window 3 larger by 2"),
        ("ada", {"frames_per_second": 0.0}, ConfigError, "frames_per_second must lie"),
    ],
)
def test_settings_that_will_not_do_are_named(
    tmp_path: Path, name: str, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        HumanAnnotator(name, HumanConfig(**settings), AnswerLog(tmp_path / "a.sqlite"))


def test_a_taken_port_is_named(runs: Callable[..., Run], tmp_path: Path) -> None:
    port = runs(1).annotator.server.server_port
    with pytest.raises(InputError, match=f"port {port}: .*in use"):
        HumanAnnotator("ada", HumanConfig(port=port), AnswerLog(tmp_path / "a.sqlite"))


def test_a_given_name_is_everybodys_and_another_name_is_another_opinion(
    runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = runs(2, name="ada")
    assert run.look("Mallory")["name"] == "ada"
    run.say("", "first")
    assert run.kept()[0][0] == "human:ada"
    other = HumanAnnotator("bob", HumanConfig(), run.log)
    other.close()
    assert (run.annotator.name, other.name) == ("human:ada", "human:bob")
    assert run.annotator.identity != other.identity
    assert "token" not in json.dumps(dict(run.annotator.identity))


def test_a_person_answers_what_a_model_is_unsure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    store = write_store(tmp_path / "s.zarr", [make_episode(index) for index in range(3)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Peer() as peer:
        flags = [
            "--name",
            "p",
            "--task",
            TASK,
            "--annotator",
            f"openai:m@{peer.url}",
            "--pairs",
            "8",
            "--inputs",
            "none",
        ]
        ours = ["person_share", "0.5", "both_orders", "0.0", "stages", "one", "port", str(port), "linger", "0.1"]
        words = ["label", "prefer", store.path, *flags, "--person", "human:ada", "--ask", *ours]
        codes: list[int] = []
        running = threading.Thread(target=lambda: codes.append(main(words)), daemon=True)
        running.start()
        answered: set[str] = set()
        until = time.monotonic() + 30
        while running.is_alive() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                view = post(port, "look", {"name": ""})[1]
                if view["state"] == "ask":
                    assert view["total"] == 4
                    question = view["question"]["id"]
                    said = {"name": "", "question": question, "answer": "no_preference", "seconds": 1}
                    assert post(port, "answer", said)[0] == 200
                    answered.add(question)
            time.sleep(0.02)
        running.join(5)
    assert codes == [0]
    found = read_preferences(EpisodeStore(store.path), "p")
    records = [json.loads(text) for text in found.records]
    assert {r["given"] for record in records for r in record if r.get("by") == "ada"} == answered
    assert len(answered) == 4
    assert [len(record) for record in records] == [1 + int(who) for who in found.annotator]
    assert found.votes[found.annotator == 1].sum((0, 1)).tolist() == [0, 0, 4, 0]
    assert found.annotators[1] == "human:ada"
