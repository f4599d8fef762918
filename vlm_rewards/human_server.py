"""The page behind which a person compares two segments: one small HTTP server with the standard library.

It serves the page, the pictures of the pair that someone is looking at, and nothing else. Every request must name a
host that no foreign site can take over (DNS rebinding), every message must be JSON from our own page (CSRF), and beyond
loopback every request must carry the token.
"""

import base64
import hashlib
import hmac
import http.server
import io
import ipaddress
import json
import math
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, LabelError, MissingExtraError
from embodied.contracts.preferences import Answer

MAX_BODY = 4096  # bytes; ours have 150
MAX_CONNECTIONS = 64
MAX_SIDE = 4096  # pixels of a sprite; what phones still decode
_MIN_TOKEN = 16
_PAGE = Path(__file__).with_name("preference_page.html").read_text()
VERSION = hashlib.sha256(_PAGE.encode()).hexdigest()[:12]
_JSON, _HTML, _TEXT = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
_PICTURE = re.compile(r"/picture/([A-Za-z0-9_-]{8,32})/(left|right)")


class Conflict(Exception):
    """What was said concerns a question that is not open to this person any more."""


class Desk(Protocol):
    """Who hands out questions. Each method but `picture` returns what a person's page shows next."""

    def look(self, name: str) -> dict[str, Any]: ...
    def answer(self, name: str, given: str, answer: Answer, seconds: float) -> dict[str, Any]: ...
    def undo(self, name: str, given: str) -> dict[str, Any]: ...
    def finish(self, name: str) -> dict[str, Any]: ...
    def picture(self, given: str, side: int) -> np.ndarray | None: ...


def _hash_of(tag: str) -> str:
    inside = _PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() + "'"


_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    f"style-src {_hash_of('style')}; script-src {_hash_of('script')}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def sprite_layout(frames: int, height: int, width: int) -> dict[str, int]:
    """How frames lie in one picture: `columns`, and `width` and `height` of each, shrunk to fit MAX_SIDE."""
    columns = max(1, min(frames, round(math.sqrt(frames * height / width))))
    rows = -(-frames // columns)
    scale = min(1.0, MAX_SIDE / (columns * width), MAX_SIDE / (rows * height))
    return {"columns": columns, "width": max(1, int(width * scale)), "height": max(1, int(height * scale))}


def sprite(frames: np.ndarray) -> tuple[str, bytes]:
    """Media type and bytes of one picture with all frames (T, H, W, 3) uint8, row by row: PNG, or JPEG where large."""
    from PIL import Image

    count, height, width, _ = frames.shape
    layout = sprite_layout(count, height, width)
    size = layout["width"], layout["height"]
    columns = layout["columns"]
    sheet = Image.new("RGB", (columns * size[0], -(-count // columns) * size[1]))
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture, (index % columns * size[0], index // columns * size[1]))
    kind, buffer = ("PNG" if sheet.width * sheet.height <= 1_000_000 else "JPEG"), io.BytesIO()
    sheet.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return f"image/{kind.lower()}", buffer.getvalue()


def valid_name(name: object) -> str:
    """A person's name without blanks around it, or an empty text where it is none: 1 to 40 printable characters."""
    text = name.strip() if isinstance(name, str) else ""
    return text if 0 < len(text) <= 40 and text.isprintable() else ""


class _Failed(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20  # [s] for what a client sends next
    server_version, sys_version = "embodied", ""
    server: "PageServer"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # whatever the method: the token comes first
            return self._reply
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: an address may hold the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self._send(int(code), _TEXT, http.HTTPStatus(code).phrase.encode())

    def _reply(self) -> None:
        headers: dict[str, str] = {}
        try:
            body = self._body()
            self._admit(headers)
            status, kind, data = self._route(body)
        except _Failed as failure:
            self.close_connection = True
            status, kind, data = failure.status, _TEXT, str(failure).encode()
        except Conflict as conflict:
            status, kind, data = 409, _TEXT, str(conflict).encode()
        except LabelError as error:  # the disk is full, say: nothing was recorded
            status, kind, data = 503, _TEXT, str(error).encode()
        self._send(status, kind, data, headers)

    def _send(self, status: int, kind: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {**_HEADERS, **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _body(self) -> bytes:
        """What the client sent. Raises _Failed where its length is unknown or too large."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) > 1:
            raise _Failed(400, "One Content-Length, please.")
        length = lengths[0] if lengths else "0"
        if not (length.isascii() and length.isdecimal()) or len(length) > 9:
            raise _Failed(400, "Content-Length is no length.")
        if int(length) > MAX_BODY:
            raise _Failed(413, "Too long.")
        try:
            body = self.rfile.read(int(length))
        except (ConnectionError, TimeoutError):
            body = b""
        if len(body) < int(length):
            raise _Failed(400, "Cut short.")
        return body

    def _admit(self, headers: dict[str, str]) -> None:
        """Let pass who asks our own address with the token; puts a cookie into `headers` where the address holds it."""
        if not self.server.is_our_host(self.headers.get("Host", "")):
            raise _Failed(403, "Forbidden")
        if not (token := self.server.token):
            return
        cookies = [part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";")]
        held = [value for name, _, value in cookies if name == self.server.cookie]
        if held and hmac.compare_digest(held[0].encode(), token.encode()):
            return
        address = urlsplit(self.path) if self.path.startswith("/?") else None
        shown = parse_qs(address.query).get("token", [""])[0] if address else ""
        if self.command != "GET" or not hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode()):
            raise _Failed(403, "Forbidden")
        headers["Set-Cookie"] = f"{self.server.cookie}={token}; Path=/; HttpOnly; SameSite=Strict"

    def _route(self, body: bytes) -> tuple[int, str, bytes]:
        path = self.path.partition("?")[0]
        if self.command in ("GET", "HEAD"):
            if path == "/":
                return 200, _HTML, _PAGE.encode()
            if found := _PICTURE.fullmatch(path):
                frames = self.server.desk.picture(found[1], ("left", "right").index(found[2]))
                if frames is not None:
                    return 200, *sprite(frames)
        elif self.command == "POST" and path in ("/look", "/answer", "/undo", "/finish"):
            return 200, _JSON, json.dumps(self._tell(path, body)).encode()
        elif self.command != "POST":
            raise _Failed(405, "Method not allowed")
        raise _Failed(404, "Not found")

    def _tell(self, path: str, body: bytes) -> dict[str, Any]:
        """What one message of the page leads to."""
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise _Failed(403, "Forbidden")
        if self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != _JSON:
            raise _Failed(415, "JSON, please.")
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            raise _Failed(400, "This is no JSON.") from None
        fields = {"/answer": {"name", "question", "answer", "seconds"}, "/undo": {"name", "question"}}
        if not isinstance(said, dict) or said.keys() != fields.get(path, {"name"}):
            raise _Failed(400, "Other fields were expected.")
        desk, name = self.server.desk, self.server.only_name or valid_name(said["name"])
        if not name:
            if path == "/look" and said["name"] == "":
                return {"state": "name"}
            raise _Failed(400, "A name has 1 to 40 characters.")
        if path == "/look":
            return desk.look(name)
        if path == "/finish":
            return desk.finish(name)
        given = said["question"]
        if not isinstance(given, str):
            raise _Failed(400, "The question is a text.")
        if path == "/undo":
            return desk.undo(name, given)
        names, seconds = {answer.name.lower(): answer for answer in Answer}, said["seconds"]
        if not isinstance(said["answer"], str) or said["answer"] not in names:
            raise _Failed(400, f"An answer is one of {', '.join(names)}.")
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
            raise _Failed(400, "Seconds are a number.")
        return desk.answer(name, given, names[said["answer"]], float(seconds))


def _is_loopback(listen: str) -> bool:
    return listen == "localhost" or ipaddress.ip_address(listen).is_loopback


class PageServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves the page of `desk` from threads of its own until it is closed.

    Args:
        listen: address to listen on; anything beyond loopback needs a token, which is drawn where none is given.
        port: 0 takes a free one.
        only_name: the name of everybody at this page, or empty: each is asked.

    Raises:
        ConfigError: the address is none, or the token is too short.
        InputError: the address or port cannot be had.
        MissingExtraError: pillow is not installed.
    """

    daemon_threads, allow_reuse_address, allow_reuse_port = True, True, False
    request_queue_size = 32

    def __init__(
        self, desk: Desk, listen: str = "127.0.0.1", port: int = 0, token: str = "", only_name: str = ""
    ) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pillow", "vlm", "showing pictures to a person") from error
        try:
            self._loopback = _is_loopback(listen)
        except ValueError:
            raise ConfigError(f"listen '{listen}' is no address. Use 127.0.0.1, or 0.0.0.0 for the network.") from None
        if token and not re.fullmatch(rf"[A-Za-z0-9_-]{{{_MIN_TOKEN},100}}", token):
            raise ConfigError(
                f"A token has {_MIN_TOKEN} to 100 letters, digits, - and _. Leave it out to have one drawn."
            )
        self.desk, self.only_name = desk, only_name
        self.token = token or ("" if self._loopback else secrets.token_urlsafe(24))
        self.address_family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            super().__init__((listen, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"Cannot listen on {listen}, port {port}: {error}.\nName another with --ask port N, or leave it out."
            ) from None
        # Cookies are shared by all ports of a host; two pages at once must not overwrite each other's.
        self.cookie = f"embodied_{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True, name="preference page")
        self._thread.start()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the resolver for a name, which may take long
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where a person finds the page, with the token."""
        host = self.server_name
        if host in ("0.0.0.0", "::"):
            host = _own_address()
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_port}/" + (f"?token={self.token}" if self.token else "")

    def is_our_host(self, host: str) -> bool:
        """Whether a Host header names us. No foreign name is accepted, so that no site can point its name at us.

        The port may differ, as through a tunnel.
        """
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?", host)
        if not found:
            return False
        name = found[1].strip("[]").lower()
        if name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            own = socket.gethostname().lower()
            return not self._loopback and name in (own, f"{own.partition('.')[0]}.local")
        return address.is_loopback or not self._loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; our own mistakes are."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def _own_address() -> str:
    """This machine's address in its network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address that is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
