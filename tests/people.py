"""People at the page of `label prefer`, over HTTP: runs that ask them, and what they say.

Put this folder on `sys.path` to import it.
"""

import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embodied.contracts.preferences import Segment
from embodied.vlm_rewards.annotator_human import HumanAnnotator, HumanConfig
from embodied.vlm_rewards.answer_log import AnswerLog
from embodied.vlm_rewards.ask import Answers, AskConfig, ask

TASK = "to open the drawer"
Say = Callable[..., tuple[int, Any]]


def show(row: int, frames: bool) -> Segment:
    """Three frames, the first pixel of which is the row."""
    pictures = np.full((3, 4, 6, 3), 9, np.uint8)
    pictures[:, 0, 0, 0] = row
    return Segment(np.arange(row, row + 3), pictures if frames else None)


def pairs_of(count: int) -> np.ndarray:
    return np.arange(2 * count).reshape(count, 2)


class Run:
    """`ask` in a thread, with a page, as the command line does it."""

    def __init__(self, folder: Path, pairs: np.ndarray, asking: AskConfig, name: str = "", **settings: Any) -> None:
        self.log = AnswerLog(folder / "answers.sqlite")
        self.said: list[str] = []
        self.annotator = HumanAnnotator(name, HumanConfig(**settings), self.log, self.said.append)
        self.result: list[Answers] = []
        self._thread = threading.Thread(target=self._ask, args=(pairs, asking), daemon=True)
        self._thread.start()

    def _ask(self, pairs: np.ndarray, asking: AskConfig) -> None:
        self.result.append(ask(self.annotator, TASK, pairs, show, asking, self.log))

    def kept(self) -> list[tuple[str, int, str]]:
        """Annotator, answer and record of what is on the disk, in the order of the answers."""
        other = AnswerLog(self.log.path)
        rows = other._database.execute("SELECT annotator, answer, record FROM answers ORDER BY at").fetchall()
        other.close()
        return rows

    def done(self) -> Answers:
        self._thread.join(20)
        return self.result[0]

    def post(self, route: str, **fields: Any) -> tuple[int, Any]:
        return post(self.annotator.server.server_port, route, fields)

    def look(self, name: str) -> dict[str, Any]:
        """What `name` sees as soon as it is not waiting."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            status, view = self.post("look", name=name)
            assert status == 200, view
            if view["state"] != "wait":
                return view
            time.sleep(0.01)
        raise TimeoutError(view)

    def say(self, name: str, answer: str) -> tuple[int, int]:
        """Answer whatever `name` is shown; the rows that it was."""
        view = self.look(name)
        rows = self.rows_shown(view)
        status, after = self.post("answer", name=name, question=view["question"]["id"], answer=answer, seconds=1.5)
        assert status == 200, after
        return rows

    def rows_shown(self, view: dict[str, Any]) -> tuple[int, int]:
        """The rows of the two segments, read from the pictures."""
        found = []
        for side in ("left", "right"):
            status, data = get(self.annotator.server.server_port, f"/picture/{view['question']['id']}/{side}")
            assert status == 200
            found.append(int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0]))
        return found[0], found[1]


def post(port: int, route: str, fields: Any, **headers: str) -> tuple[int, Any]:
    status, data, _ = talk(port, "POST", f"/{route}", json.dumps(fields).encode(), headers)
    return status, json.loads(data) if status == 200 else data.decode()


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    status, data, _ = talk(port, "GET", path, None, headers)
    return status, data


def talk(
    port: int, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    base = {"Host": f"127.0.0.1:{port}"}
    base["Origin"] = f"http://{headers.get('Host', base['Host'])}"
    base["Content-Type"] = "application/json"
    connection.request(method, path, body, {**base, **headers})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, response.headers


@contextlib.contextmanager
def making_runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(pairs: int | np.ndarray = 6, asking: AskConfig | None = None, name: str = "", **settings: Any) -> Run:
        what = pairs_of(pairs) if isinstance(pairs, int) else pairs
        made.append(Run(tmp_path, what, asking or AskConfig(both_orders=0.0), name, **settings))
        return made[-1]

    yield make
    for run in made:
        run.annotator.stop()
        run.annotator.close()
