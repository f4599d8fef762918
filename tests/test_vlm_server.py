"""A real server, transformers' own, with a model of random weights; and what other real servers do differently."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.preferences import Answer, Segment
from embodied.vlm_rewards.annotator_openai import OpenAIAnnotator, OpenAIConfig
from embodied.vlm_rewards.answer_log import AnswerLog, Budget
from embodied.vlm_rewards.ask import Answers, AskConfig, ask
from embodied.vlm_rewards.chat_protocol import Unreadable, read_answer, refusal_words

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import make_episode, write_store
from tiny_vlm import make_tiny_vlm
from vlm_peer import Fault, Peer, answer_to, raw

pytest.importorskip("httpx2")
TESTS = Path(__file__).parent
PAIRS = np.arange(8).reshape(4, 2)


def show(row: int, frames: bool) -> Segment:
    assert frames
    return Segment(np.array([row]), np.random.default_rng(row).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8))


def put(url: str, model: str, folder: Path, asking: AskConfig, **settings: Any) -> tuple[Answers, Budget]:
    config = OpenAIConfig(model, url, **({"max_tokens": 12, "pause": 0.01, "timeout": 60.0} | settings))
    log = AnswerLog(folder / "answers.sqlite")
    spending = Budget(log, "test")
    annotator = OpenAIAnnotator(config, spending)
    try:
        return ask(annotator, "open the drawer", PAIRS, show, asking, log), spending
    finally:
        annotator.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(URL, name of the model). The server's process ends with the module, and with ours: its standard input closes."""
    for package in ("transformers", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    folder = make_tiny_vlm(tmp_path_factory.mktemp("vlm") / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hub"), "OMP_NUM_THREADS": "1"}
    said = folder.parent / "server.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "tiny_vlm.py"), str(folder), str(port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, said)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()
            process.communicate(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes], said: Path) -> None:
    until = time.monotonic() + 150  # importing torch and transformers on a loaded machine
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                assert json.load(response) == {"status": "ok"}
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not come up:\n{said.read_text()[-2000:]}")


def test_garbage_becomes_counted_abstentions(served: tuple[str, str], tmp_path: Path) -> None:
    asking = AskConfig(both_orders=1.0, samples=2)
    answers, spending = put(*served, tmp_path, asking, temperature=1.0)
    assert answers.votes.sum() == 16
    assert answers.asked == 16
    assert answers.votes[:, :, Answer.ABSTAINED].sum() == sum(answers.reasons.values()) >= 10
    questions = [question for text in answers.records for question in json.loads(text)]
    exchanges = [exchange for question in questions for exchange in question["exchanges"]]
    assert all(question["exchanges"] for question in questions)
    for exchange in exchanges:
        assert exchange["failures"] == []
        assert exchange["tokens"]["prompt"] > 50
        assert 1 <= exchange["tokens"]["completion"] <= 12
        assert exchange["model"].startswith(served[1])
    assert len({exchange["answer"] for exchange in exchanges}) > 8, "it sampled"
    calls = spending.spent()[0]
    assert calls <= 32
    again, spending = put(*served, tmp_path, asking, temperature=1.0)
    assert (again.asked, again.found, spending.spent()[0]) == (0, 16, calls)


def test_a_model_says_the_same_here_and_behind_the_server(served: tuple[str, str], tmp_path: Path) -> None:
    """Greedy, from the same folder: our own way through template, transform and generation is the server's."""
    from embodied.vlm_rewards.annotator_hf import HFAnnotator, HFConfig

    asking = AskConfig(both_orders=0.0)
    remote, _ = put(*served, tmp_path, asking)
    log = AnswerLog(tmp_path / "local.sqlite")
    here = HFAnnotator(HFConfig(served[1], max_tokens=12), Budget(log, "test"))
    local = ask(here, "open the drawer", PAIRS, show, asking, log)
    for mine, theirs in zip(local.records, remote.records, strict=True):
        mine, theirs = json.loads(mine)[0]["exchanges"], json.loads(theirs)[0]["exchanges"]
        assert [(e["answer"], e["tokens"]) for e in mine] == [(e["answer"], e["tokens"]) for e in theirs]
    assert local.reasons == remote.reasons


def test_a_refused_model_is_said_in_the_servers_words(served: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"answers 400 to each question: Server is pinned to .*requested 'another'"):
        put(served[0], "another", tmp_path, AskConfig(both_orders=0.0))


def test_from_the_command_line(
    served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same through `label prefer`, over HTTP and in process: garbage is kept as abstentions, by reason."""
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    store = write_store(tmp_path / "s.zarr", [make_episode(index) for index in range(3)])
    who = {"http": f"openai:{served[1]}@{served[0]}", "local": f"hf:{served[1]}"}
    for name, annotator in who.items():
        flags = ["--name", name, "--annotator", annotator, "--task", "open the drawer", "--pairs", "3", "--json"]
        more = ["--inputs", "none", "--ask", "stages", "one", "max_tokens", "8", "both_orders", "0.0"]
        assert main(["label", "prefer", store.path, *flags, *more]) == 0
        result = json.loads(capsys.readouterr().out)["preferences"]
        sided = 3 - result["counts"]["questions_abstained"]
        assert sum(result["abstentions"].values()) == 3 - sided
        assert result["pairs"] == 3
    assert main(["label", "prefer", store.path, *flags, *more, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 3


def sse(*pieces: str, ends: bool = True) -> bytes:
    def event(delta: dict[str, str], **more: Any) -> str:
        return "data: " + json.dumps({"model": "s", "choices": [{"index": 0, "delta": delta} | more]}) + "\n\n"

    usage = {"model": "s", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    lines = [": ping\n\n", event({"role": "assistant"}), *(event({"content": piece}) for piece in pieces)]
    if ends:
        lines += [event({}, finish_reason="stop"), f"data: {json.dumps(usage)}\n\n", "data: [DONE]\n\n"]
    return "".join(lines).encode()


def test_a_stream_nobody_asked_for_is_read() -> None:
    whole = read_answer(sse("It is ", "the second.\n", "1"), "text/event-stream; charset=utf-8")
    assert whole == {"answer": "It is the second.\n1", "model": "s", "tokens": {"prompt": 7, "completion": 3}}
    for data in (sse("1", ends=False), b"data: {", b"data: [1]\n", b"", b'data: {"error": "no"}\n'):
        with pytest.raises(Unreadable, match="malformed answer"):
            read_answer(data, "text/event-stream")
    with pytest.raises(Unreadable, match="is no JSON"):
        read_answer(b"{}", "text/html")


def test_a_server_that_streams_cut_once_answers_all_the_same(tmp_path: Path) -> None:
    def stream(handler: Any, body: dict[str, Any]) -> None:
        handler.raw(sse(*answer_to(body).splitlines(keepends=True)), "text/event-stream")

    cut = raw(sse("1", ends=False), "text/event-stream")
    with Peer(lambda number, attempt: stream if attempt else cut) as peer:
        answers, _ = put(peer.url, "m", tmp_path, AskConfig(both_orders=0.0), stages="one")
    assert answers.reasons == {}
    bright = np.array([[show(row, True).frames.mean() for row in pair] for pair in PAIRS])  # type: ignore[union-attr]
    assert [json.loads(text)[0]["exchanges"][0]["failures"] for text in answers.records] == [["malformed answer"]] * 4
    asked_swapped = answers.votes.sum(2)[:, 1] == 1
    second = answers.votes[:, :, Answer.SECOND].sum(1) == 1
    np.testing.assert_array_equal(second, (bright[:, 1] > bright[:, 0]) ^ asked_swapped)


def picky(handler: Any, body: dict[str, Any]) -> None:
    """As hosted reasoning models are: other names, no temperature, and they quote the key."""
    for name in ("max_tokens", "temperature", "seed"):
        if name in body:
            key = handler.headers.get("authorization", "")
            words = f"Unsupported parameter: '{name}'.\x1b[31m {key} Use another."
            handler.raw(json.dumps({"error": {"message": words, "code": 9}}).encode(), status=400)
            return
    assert body["max_completion_tokens"] == 12
    handler.answer(answer_to(body))


def test_what_a_server_refuses_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    fault: Fault = picky
    asking = AskConfig(both_orders=0.0, samples=2)
    with Peer(lambda number, attempt: fault) as peer:
        with pytest.raises(InputError, match="Unsupported parameter: 'max_tokens'") as error:
            put(peer.url, "m", tmp_path, asking)
        assert "sk-very-secret" not in str(error.value)
        assert "\x1b" not in str(error.value)
        assert len(peer.requests) <= 3 + 4, "the workers' calls that were on their way"
        before = len(peer.requests)
        settings = {"token_field": "max_completion_tokens", "leave_out": "temperature, seed"}
        answers, _ = put(peer.url, "m", tmp_path, asking, **settings)
        assert answers.reasons == {}
        assert len(peer.requests) - before >= 8 * 1 + 1, "samples are asked one by one though nothing tells them apart"
    with pytest.raises(ConfigError, match="leave_out holds model"):
        OpenAIConfig("m", "http://x", leave_out="model")
    with pytest.raises(ConfigError, match="token_field"):
        OpenAIConfig("m", "http://x", token_field="n")


def test_a_refusal_of_one_question_ends_no_run(tmp_path: Path) -> None:
    """Once it has answered, a 400 is about that question (a filter, say) and is counted."""
    with Peer(lambda number, attempt: raw_400 if number > 2 else None) as peer:
        answers, _ = put(peer.url, "m", tmp_path, AskConfig(both_orders=1.0), stages="one", workers=1)
    assert answers.reasons == {"http 400": 6}


def raw_400(handler: Any, body: dict[str, Any]) -> None:
    handler.raw(b'{"detail": "no"}', status=400)


def test_words_of_refusal_are_one_short_line() -> None:
    assert refusal_words(b'{"error": {"message": "model not found", "type": "x"}}') == "model not found"
    assert refusal_words(b'{"detail": "Server is pinned"}') == "Server is pinned"
    assert refusal_words(b'{"detail": [{"loc": ["seed"]}]}') == '[{"loc": ["seed"]}]'
    assert refusal_words(b"<html>\n  no\x00 </html>") == "<html> no </html>"
    assert refusal_words(b"the key abc is bad", "abc") == "the key [key] is bad"
    assert len(refusal_words(b"x" * 5000)) == 200
    assert refusal_words(b"[" * 100_000)[:3] == "[[["
