"""The page of `label prefer` over HTTP: who is let in, what is served, what is refused."""

import http.client
import io
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embodied.vlm_rewards import human_server
from embodied.vlm_rewards.human_server import sprite, sprite_layout

sys.path.insert(0, str(Path(__file__).parent))
from people import Run, get, making_runs, post, talk


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with making_runs(tmp_path) as make:
        yield make


ROUTES = [
    ("GET", "/"), ("HEAD", "/"), ("GET", "/picture/abcdefgh/left"), ("GET", "/absent"), ("GET", "/../answers.sqlite"),
    ("POST", "/look"), ("POST", "/answer"), ("POST", "/undo"), ("POST", "/finish"), ("POST", "/absent"), ("POST", "/"),
    ("PUT", "/look"), ("DELETE", "/"), ("OPTIONS", "/look"), ("PATCH", "/answer"), ("TRACE", "/"), ("BREW", "/"),
]  # fmt: skip


@pytest.fixture
def guarded(runs: Callable[..., Run]) -> Run:
    """A page that the network may reach."""
    return runs(4, listen="0.0.0.0")


@pytest.mark.parametrize("token", ["none", "wrong", "part", "another page's"])
def test_nothing_is_said_without_the_token_beyond_loopback(guarded: Run, token: str) -> None:
    server = guarded.annotator.server
    right, port = server.token, server.server_port
    assert len(right) == 32
    assert server.url.endswith(f":{port}/?token={right}")
    given = {"none": "", "wrong": "x" * 32, "part": right[:-1], "another page's": right}[token]
    cookie = "embodied_1" if token == "another page's" else server.cookie
    shown = "" if token == "another page's" else given
    view = guarded.annotator.look("Ada")
    routes = [*ROUTES, ("GET", f"/picture/{view['question']['id']}/left")] if "question" in view else ROUTES
    said = {"name": "Ada", "question": "", "answer": "first", "seconds": 1}
    for method, path in routes:
        for extra in ("", f"?token={shown}"):
            headers = {"Cookie": f"{cookie}={given}"} if given else {}
            status, data, found = talk(port, method, path + extra, json.dumps(said).encode(), headers)
            assert status == 403, (method, path, extra)
            assert data == (b"" if method == "HEAD" else b"Forbidden")
            assert "Set-Cookie" not in found
    assert guarded.kept() == []
    assert "Bob" not in guarded.annotator._people


def test_the_token_is_shown_once_and_then_a_cookie(guarded: Run) -> None:
    server = guarded.annotator.server
    port, token = server.server_port, server.token
    guarded.annotator.look("Ada")
    for path in ("/look", "/answer", "/absent"):
        assert talk(port, "POST", f"{path}?token={token}", b"{}", {})[0] == 403, "only the page takes it"
    status, data, headers = talk(port, "GET", f"/?token={token}", None, {})
    assert (status, b"Which shows more?" in data) == (200, True)
    assert headers["Set-Cookie"] == f"{server.cookie}={token}; Path=/; HttpOnly; SameSite=Strict"
    held = {"Cookie": f'other="a; b; {server.cookie}={token}; last=1'}
    assert talk(port, "GET", "/", None, held)[0] == 200, "whatever other programs of this host keep in cookies"
    assert post(port, "look", {"name": "Ada"}, **held)[0] == 200
    for host in ("192.168.1.20:80", "[fe80::1]:80", "localhost", socket.gethostname()):
        assert talk(port, "GET", "/", None, held | {"Host": host})[0] == 200, host
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "a b", "127.0.0.1@evil"):
        assert talk(port, "GET", "/", None, held | {"Host": host})[0] == 403, host


def test_no_other_site_can_read_or_speak_on_loopback(runs: Callable[..., Run]) -> None:
    run = runs(4)
    port = run.annotator.server.server_port
    view = run.look("Ada")
    own = f"http://127.0.0.1:{port}"
    for host in ("evil.example", f"evil.example:{port}", "192.168.1.20", "169.254.0.1:80", socket.gethostname(), ""):
        if host == "localhost":
            continue
        assert talk(port, "GET", "/", None, {"Host": host})[0] == 403, "a name that somebody points at us"
        assert talk(port, "POST", "/look", b'{"name": "Ada"}', {"Host": host})[0] == 403
    said = {"name": "Ada", "question": view["question"]["id"], "answer": "first", "seconds": 1}
    for origin in ("http://evil.example", "null", "", own + "0", own.replace("http", "https"), "http://127.0.0.1"):
        assert post(port, "answer", said, Origin=origin)[0] == 403, origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"):
        assert post(port, "answer", said, **{"Content-Type": kind})[0] == 415, kind
    assert run.kept() == []
    for path in ("/etc/passwd", "/../../etc/passwd", "/vlm_rewards/ask.py", "/%2e%2e/", "//evil.example/", "/picture/"):
        assert get(port, path)[0] == 404, path
    for path in (f"/picture/{view['question']['id']}/both", "/picture/" + "A" * 16 + "/left", "/picture/../left"):
        assert get(port, path)[0] == 404, path
    assert talk(port, "PUT", "/look", b"{}", {})[0] == 405
    status, page, headers = talk(port, "GET", "/", None, {"Host": f"localhost:{port + 1}"})
    assert status == 200, "as through a tunnel"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]
    assert "Access-Control-Allow-Origin" not in headers
    for text in (b"http://", b"https://", b"//cdn", b"@import", b"eval("):
        assert text not in page, "nothing comes from elsewhere"


def garbage(rng: random.Random, view: dict[str, Any]) -> bytes:
    """A body that is no valid answer: noise, or a valid one with something wrong."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    said: dict[str, Any] = {"name": "Ada", "question": view["question"]["id"], "answer": "first", "seconds": 1.0}
    odd: list[Any] = [
        None, True, -1, 1e308, 10**300, float("nan"), float("inf"), [], {}, "", "x" * 50, "\ud800", "\x00", "first\n",
        ["first"], {"a": 1}, 0, 1, "FIRST", "skip",
    ]  # fmt: skip
    if kind == 1:
        key = rng.choice(list(said))
        said[key] = rng.choice(odd[1:] if key != "seconds" else [value for value in odd if value not in (0, 1)])
        if key == "seconds" and type(said[key]) in (int, float) and 0 <= said[key] < 1e9:
            said[key] = "1"
        if key == "name":  # a name is a name: then somebody else answers Ada's question
            said["name"] = rng.choice(["Bob", *odd])
        return json.dumps(said).encode()
    if kind == 2:
        del said[rng.choice(list(said))]
        return json.dumps(said).encode()
    if kind == 3:
        said["question"] = "".join(rng.choice("abcXYZ019-_") for _ in range(16))
        return json.dumps(said).encode()
    if kind == 4:
        text = bytearray(json.dumps(said).encode())
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(b'{}[]",:\\\x00\xff')
        return bytes(text) if text != json.dumps(said).encode() else b""
    return rng.choice(
        [b"[" * 4000, b'{"name":' * 400, b"9" * 4000, b"null", b'"', b"\xef\xbb\xbf{}", b"{}", b"x" * 9000]
    )


def test_no_malformed_message_crashes_or_is_recorded(
    runs: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run, rng = runs(4), random.Random(3)
    port, view = run.annotator.server.server_port, run.look("Ada")
    routes = ("/answer", "/answer", "/answer", "/undo", "/nothing")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    statuses: dict[int, int] = {}
    for number in range(2000):
        body = garbage(rng, view)
        route = rng.choice(routes)
        connection.request("POST", route, body, headers)
        response = connection.getresponse()
        response.read()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert response.status in (400, 404, 409, 413), (route, body, number)
    assert statuses[400] > 500
    assert statuses[409] > 100
    connection.close()
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(rng.choice([b"", b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "]))
            raw.sendall(
                rng.choice([rng.randbytes(60), b"-1\r\n\r\n", b"5\r\n\r\n{", b"1\r\nContent-Length: 2\r\n\r\n{}"])
            )
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert run.kept() == []
    assert run.look("Ada")["question"]["id"] == view["question"]["id"]
    assert run.annotator._people.keys() == {"Ada"}
    assert "Traceback" not in capfd.readouterr().err
    run.say("Ada", "second")
    assert [row[:2] for row in run.kept()] == [("human:Ada", 1)]


def test_idle_connections_do_not_keep_people_out(runs: Callable[..., Run]) -> None:
    run = runs(4)
    port = run.annotator.server.server_port
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    assert run.look("Ada")["state"] == "ask"
    idle += [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    time.sleep(0.3)
    assert threading.active_count() < human_server.MAX_CONNECTIONS + 60
    for connection in idle:
        connection.close()
    assert run.look("Ada")["state"] == "ask"


def test_all_frames_of_a_clip_are_in_its_picture() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (23, 20, 30, 3), dtype=np.uint8)
    kind, data = sprite(frames)
    layout, sheet = sprite_layout(23, 20, 30), np.asarray(Image.open(io.BytesIO(data)))
    assert kind == "image/png"
    assert (layout["width"], layout["height"]) == (30, 20)
    for index, frame in enumerate(frames):
        y, x = index // layout["columns"] * 20, index % layout["columns"] * 30
        np.testing.assert_array_equal(sheet[y : y + 20, x : x + 30], frame)
    for count, height, width in ((1, 64, 64), (1, 6000, 4000), (500, 480, 640), (3, 10, 4000), (1000, 84, 84)):
        layout = sprite_layout(count, height, width)
        assert layout["columns"] * layout["width"] <= human_server.MAX_SIDE
        assert -(-count // layout["columns"]) * layout["height"] <= human_server.MAX_SIDE
        assert layout["width"] / layout["height"] == pytest.approx(width / height, rel=0.1)
    big = np.zeros((60, 240, 320, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None, None, None] * 4
    kind, data = sprite(big)
    layout, sheet = sprite_layout(60, 240, 320), np.asarray(Image.open(io.BytesIO(data)))
    assert kind == "image/jpeg"
    middle = sheet[layout["height"] // 2 :: layout["height"], layout["width"] // 2 :: layout["width"], 0].ravel()[:60]
    np.testing.assert_allclose(middle, np.arange(60) * 4, atol=2)
