"""A server that speaks OpenAI's chat protocol and misbehaves on schedule. It looks: the brighter picture is better.

Put this folder on `sys.path` to import it; run it as a script for a server process that prints its port.
"""

import base64
import collections
import hashlib
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

HUGE = 100_000_000
Fault = Callable[["Handler", dict[str, Any]], None]


def answer_to(body: dict[str, Any]) -> str:
    """What an honest model says."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):  # the second step, from the text alone
        said = content.split("==========")[1]
        if "further along in the second" in said:
            return "1"
        return "0" if "further along in the first" in said else "-1"
    from PIL import Image

    pictures = []
    for part in content:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            pictures.append(float(np.asarray(Image.open(io.BytesIO(data))).mean()))
    half = len(pictures) // 2
    first, second = np.mean(pictures[:half]), np.mean(pictures[half:])
    which = "second" if second > first else "first"
    one_step = any("single number" in part.get("text", "") for part in content)
    number = f"\n\n{int(second > first)}" if one_step else ""
    return f"Brightness {first:.0f} and {second:.0f}. It is further along in the {which} picture.{number}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Peer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        peer = self.server
        with peer.lock:
            attempt = peer.attempts[key]
            peer.attempts[key] += 1
            peer.requests.append((self.path, self.headers.get("authorization", ""), body))
        time.sleep(peer.delay)
        fault = peer.fault(len(peer.requests), attempt)
        if fault is None:
            self.answer(answer_to(body))
            with peer.lock:
                peer.answered[key] += 1
        else:
            fault(self, body)

    def answer(self, text: str, kind: str = "application/json") -> None:
        message = {
            "model": "peer-1",
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 50},
        }
        self.raw(json.dumps(message).encode(), kind)

    def raw(self, data: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


def status(number: int, **headers: str) -> Fault:
    return lambda handler, body: handler.raw(b'{"error": {"message": "no"}}', status=number, **headers)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then, for ever (bounded)."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.05)
    handler.close_connection = True


def cut(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def huge(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(HUGE))
    handler.end_headers()
    block = b'{"choices": "' + b"x" * 1_000_000
    try:
        for _ in range(HUGE // len(block)):
            handler.wfile.write(block)
    except OSError:
        pass
    handler.close_connection = True


def says(text: str) -> Fault:
    return lambda handler, body: handler.answer(text)


def raw(data: bytes, kind: str = "application/json") -> Fault:
    return lambda handler, body: handler.raw(data, kind)


class Peer(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1.

    Attributes:
        fault: (number of the request, attempt at this very body) -> what to do instead of answering, or None.
        requests: (path, authorization, body) of each; answered: hash of a body -> whole answers sent.
    """

    daemon_threads = True

    def __init__(self, fault: Callable[[int, int], Fault | None] = lambda number, attempt: None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.delay, self.lock = fault, 0.0, threading.Lock()
        self.attempts: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None: ...

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        super().__exit__(*args)
