"""A real headless browser for tests: Chromium, told what to do over its DevTools pipe. No package is needed.

Put this folder on `sys.path` to import it.
"""

import base64
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

INSTALL = "no Chromium; apt-get install -y --no-install-recommends chromium"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, "Enter": 13, "Tab": 9, " ": 32}


@functools.cache
def find_browser() -> str | None:
    """Path of an installed Chromium that starts, or None."""
    for name in _NAMES:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path  # Ubuntu's package holds a stub that only knows how to ask for a snap
    return None


class Browser:
    """One Chromium process; a context manager."""

    def __init__(self) -> None:
        program = find_browser()
        assert program is not None, INSTALL
        self._profile = tempfile.mkdtemp(prefix="browser")
        hears, self._out = os.pipe()
        self._in, says = os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}", "about:blank",
        ]  # fmt: skip
        # The browser reads descriptor 3 and writes 4.
        line = f'exec "$0" "$@" 3<&{hears} 4>&{says} {hears}<&- {says}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *flags],
            pass_fds=(hears, says),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(hears)
        os.close(says)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        until = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                return None
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result. Events that come meanwhile go to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        until = time.monotonic() + 60
        while (answer := self._receive(until - time.monotonic())) is not None:
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(method)

    def page(self, width: int = 1280, height: int = 800, phone: bool = False, dark: bool = False) -> "Page":
        """A new window of somebody else: cookies and storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        scale = 2 if phone else 1
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        if phone:
            page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page


class Page:
    """One window."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def reload(self) -> None:
        self.call("Page.reload")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """The first value of an expression that counts as true. TimeoutError names the expression."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if value := self.run(script):
                    return value
            except AssertionError:  # the page is just being loaded
                pass
            time.sleep(0.02)
        raise TimeoutError(f"{script}\n{self.run('document.body && document.body.innerText')}")

    def press(self, key: str, modifiers: int = 0, repeat: bool = False) -> None:
        """One stroke of a key as `KeyboardEvent.key` names it."""
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        code = _KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        stroke = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=repeat, **stroke, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str, times: int = 1) -> None:
        """Click into the middle of an element."""
        place = self.run(
            f"(e => {{ const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call(
                    "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=count
                )

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Every address asked for so far."""
        self.run("0")  # events that are on their way
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent" and event.get("sessionId") == self._session
        ]

    def complaints(self) -> list[str]:
        """What the page's console complains about: errors, and what the content security policy refused."""
        self.run("0")
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [e["params"]["exceptionDetails"] for e in mine if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"] for e in mine if e["method"] == "Log.entryAdded"]
        return [str(t) for t in thrown] + [f"{e.get('url')}: {e['text']}" for e in logged if e["level"] == "error"]
