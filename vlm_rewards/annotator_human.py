"""An annotator that is a person, or several, at a local web page.

Each open question is shown to one person at a time, under an id of its own: an answer counts only for the pair that
this person was looking at. It is in the log before the next pair is shown, so nothing is lost by a crash, and `compare`
returns it only after the same person has answered a few more: until then undo takes it out of the log and shows the
pair again. Holding back costs open questions (`window`), but the asking side needs to know nothing of undo.
"""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.contracts.preferences import Answer, Segment, Verdict
from embodied.vlm_rewards import human_server
from embodied.vlm_rewards.answer_log import AnswerLog, question_key
from embodied.vlm_rewards.human_server import Conflict, PageServer, sprite_layout, valid_name

_AWAY = 30.0  # [s] without a word from a page, after which others may have its question
_ACTIVE = 60.0  # [s] without an answer, after which nobody waits for this person
_STARVED = 1.0  # [s] without a question, after which answers held back make room
_TICK = 0.25  # [s]
_CANNOT_TELL = "can't tell"


@dataclasses.dataclass(frozen=True)
class HumanConfig:
    """How people are asked.

    Attributes:
        listen: address of the page; 0.0.0.0 lets phones of the network in, with a token.
        port: 0 takes a free one.
        token: for the page; drawn where the network may come in and none is given. Kept nowhere.
        window: questions open at once, over all people; each holds two segments in memory.
        undo: answers a person can take back.
        frames_per_second: of the clips.
        linger: seconds in which the last answers can be taken back, unless 'finish' is pressed.
    """

    listen: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    window: int = 16
    undo: int = 3
    frames_per_second: float = 10.0
    linger: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port {self.port} must lie in [0, 65535].")
        if self.undo < 0 or self.window < self.undo + 2:
            raise ConfigError(f"undo {self.undo} must not be negative, and window {self.window} larger by 2 at least.")
        if not 0.1 <= self.frames_per_second <= 120 or not 0 <= self.linger <= 3600:
            raise ConfigError("frames_per_second must lie in [0.1, 120], linger in [0, 3600] s.")


@dataclasses.dataclass(eq=False)
class _Question:
    """One open question. `given` is the id under which `holder` sees it, or saw it when it was answered."""

    key: str
    task: str
    segments: tuple[Segment, Segment]
    arrived: int
    waiting: int = 0  # calls of compare
    given: str = ""
    holder: str = ""
    verdict: Verdict | None = None
    answered: float = 0.0
    final: bool = False

    @property
    def shown(self) -> tuple[str, str]:
        return self.segments[0].content, self.segments[1].content

    @property
    def pair(self) -> frozenset[str]:
        return frozenset(self.shown)


@dataclasses.dataclass(eq=False)
class _Person:
    """Somebody at a page."""

    name: str
    seen: float
    spoke: float
    question: _Question | None = None
    since: float = 0.0  # when the question was given, or when the wait for one began
    answers: int = 0
    pairs: dict[frozenset[str], int] = dataclasses.field(default_factory=dict)  # pair -> number of the last answer
    said: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    finished: bool = False
    told: bool = False


class HumanAnnotator:
    """People at a page, which it serves until it is closed.

    Args:
        name: everybody's name at this page, kept with every answer; empty: each person is asked for one.
        log: where answers are kept the moment they are given; the one that `ask` uses.
        say: is told the address.

    Raises:
        ConfigError, InputError: a name, address or port that will not do.
        MissingExtraError: pillow is not installed.
    """

    sees = True

    def __init__(
        self, name: str, config: HumanConfig, log: AnswerLog, say: Callable[[str], None] = lambda text: None
    ) -> None:
        if name and not valid_name(name):
            raise ConfigError("human:NAME: a name has 1 to 40 printable characters.")
        self.name = f"human:{name}" if name else "human"
        # Whoever answers at this page, the question is answered; another NAME is another opinion.
        self.identity: Mapping[str, Any] = {"annotator": "human", "name": name}
        self.workers = config.window
        self._config, self._log = config, log
        self._changed = threading.Condition()
        self._open: dict[str, _Question] = {}
        self._people: dict[str, _Person] = {}
        self._held: list[_Question] = []  # answered, oldest first, not yet final
        self._known = self._total = self._arrived = 0
        self._inside = self._returned = 0  # calls of compare
        self._stopped = self._over = False
        self.server = PageServer(self, config.listen, config.port, config.token, name)
        say(f"Compare the pairs at {self.server.url}")

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        """What a person says. Waits for one; after `stop` it returns at once, not final."""
        key = question_key(self, task, first, second, sample)
        with self._changed:
            question = self._open.get(key)
            if question is None:
                if (known := self._log.find(key)) is not None:
                    self._returned += 1
                    return known
                self._arrived += 1
                question = self._open[key] = _Question(key, task, (first, second), self._arrived)
            self._inside += 1
            question.waiting += 1
            while not (question.final or self._stopped):
                self._settle(time.monotonic())
                if not question.final:
                    self._changed.wait(_TICK)
            self._inside -= 1
            self._returned += 1
            self._open.pop(key, None)
            return question.verdict or Verdict(Answer.ABSTAINED, "nobody answered", final=False)

    def watch(self, known: int, total: int) -> None:
        """So many questions of `total` need no asking; 0 begins anew."""
        with self._changed:
            self._known, self._total = known, total
            if not known:
                self._returned = 0

    def stop(self) -> None:
        """Nobody waits for answers any more; those that were given are kept."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Say goodbye to the pages that are open, and stop serving."""
        with self._changed:
            complete = not self._stopped
            self._stopped = self._over = True
            self._changed.notify_all()
            until = time.monotonic() + (3.0 if complete else 0.0)
            while (now := time.monotonic()) < until and any(not p.told for p in self._present(now)):
                self._changed.wait(_TICK)
        self.server.close()

    # What the server calls, from its threads.

    def look(self, name: str) -> dict[str, Any]:
        """What this person's page shows: the same pair as before, or the next one."""
        with self._changed:
            now = time.monotonic()
            person = self._people.setdefault(name, _Person(name, now, now, since=now))
            person.seen = now
            if person.question is None and not self._stopped and (chosen := self._choose(person, now)):
                self._give(chosen, person, now)
            self._settle(now)
            return self._view(person, now)

    def answer(self, name: str, given: str, answer: Answer, seconds: float) -> dict[str, Any]:
        """Keep what a person said about the pair shown to them as `given`. Conflict if that is not open to them."""
        with self._changed:
            now = time.monotonic()
            person = self._person(name, now)
            question = person.question
            if question is None or question.given != given or self._stopped:
                raise Conflict("This pair is not open any more.")
            record = {
                "by": name,
                "seconds": round(min(seconds, now - person.since), 3),
                "left": question.shown[0][:16],
                "right": question.shown[1][:16],
                "given": given,
                "page": human_server.VERSION,
                "at": time.time(),
            }
            reason = _CANNOT_TELL if answer is Answer.ABSTAINED else ""
            verdict = Verdict(answer, reason, True, record)
            self._log.keep(question.key, verdict, f"human:{name}")
            kept = self._log.find(question.key)
            question.verdict, question.answered = kept or verdict, now
            person.question, person.since, person.spoke, person.finished = None, now, now, False
            if kept != verdict:  # another run asked the same, and its answer came first
                self._release(question)
                raise Conflict("This pair was answered elsewhere meanwhile.")
            self._held.append(question)
            person.answers += 1
            person.pairs[question.pair] = person.answers
            person.said.add(question.shown)
            self._settle(now)
        return self.look(name)

    def undo(self, name: str, given: str) -> dict[str, Any]:
        """Take back a person's last answer, about `given`, and show the pair again. Conflict if it is final."""
        with self._changed:
            now = time.monotonic()
            person = self._person(name, now)
            mine = [question for question in self._held if question.holder == name]
            if not mine or mine[-1].given != given or self._stopped:
                raise Conflict("This answer cannot be taken back any more.")
            question = mine[-1]
            self._log.forget(question.key)
            self._held.remove(question)
            question.verdict = None
            person.answers, person.spoke = person.answers - 1, now
            person.pairs.pop(question.pair, None)
            person.said.discard(question.shown)
            if person.question is not None:
                person.question.holder = person.question.given = ""
            self._give(question, person, now)
            return self._view(person, now)

    def finish(self, name: str) -> dict[str, Any]:
        """This person takes nothing back any more."""
        with self._changed:
            self._person(name, time.monotonic()).finished = True
        return self.look(name)

    def picture(self, given: str, side: int) -> np.ndarray | None:
        """(T, H, W, 3) uint8 of one side of the pair that is shown under `given`, or None."""
        with self._changed:
            for question in self._open.values():
                if question.given == given and question.verdict is None:
                    return question.segments[side].frames
        return None

    # Under the lock.

    def _person(self, name: str, now: float) -> _Person:
        """Somebody who has looked before."""
        if (person := self._people.get(name)) is None:
            raise Conflict("This name has not been here.")
        person.seen = now
        return person

    def _present(self, now: float) -> list[_Person]:
        return [person for person in self._people.values() if person.seen > now - _AWAY]

    def _give(self, question: _Question, person: _Person, now: float) -> None:
        if (before := self._people.get(question.holder)) is not None and before.question is question:
            before.question, before.since = None, now
        question.holder, question.given = person.name, secrets.token_urlsafe(12)
        person.question, person.since, person.finished = question, now, False

    def _choose(self, person: _Person, now: float) -> _Question | None:
        """The next pair for a person: one that they have not seen, that nobody else has before them, in order.

        The other order of a pair comes as late as it can. The same order again, for a second opinion, goes to somebody
        else where somebody else is there.
        """
        free, busy = [], set()
        others = [other for other in self._present(now) if other is not person and other.spoke > now - _ACTIVE]
        for question in self._open.values():
            if question.verdict is not None:
                continue
            if question.holder and self._people[question.holder].seen > now - _AWAY:
                busy.add(question.pair)
            elif question.shown not in person.said or all(question.shown in other.said for other in others):
                free.append(question)
        return min(free, key=lambda q: (person.pairs.get(q.pair, 0), q.pair in busy, q.arrived), default=None)

    def _release(self, question: _Question) -> None:
        question.final = True
        self._open.pop(question.key, None)
        if question in self._held:
            self._held.remove(question)
        self._changed.notify_all()

    def _settle(self, now: float) -> None:
        """Let go of answers that nobody can take back any more, or that must make room for questions."""
        people = self._present(now)
        for name in self._people:
            mine = [question for question in self._held if question.holder == name]
            for question in mine[: max(0, len(mine) - self._config.undo)]:
                self._release(question)
        if self._comes_more():
            room = max(0, self._config.window - 2 * len(people))
            starved = any(person.question is None and person.since < now - _STARVED for person in people)
            for question in self._held[: max(len(self._held) - room, 1 if starved else 0)]:
                self._release(question)
        elif not self._unanswered():
            for question in list(self._held):
                person = self._people[question.holder]
                if person.finished or now - person.spoke >= self._config.linger:
                    self._release(question)

    def _comes_more(self) -> bool:
        return self._known + self._returned + self._inside < self._total

    def _answered(self) -> int:
        open_ = sum(question.waiting for question in self._open.values() if question.verdict is None)
        return self._known + self._returned + self._inside - open_

    def _unanswered(self) -> bool:
        return any(question.verdict is None for question in self._open.values())

    def _view(self, person: _Person, now: float) -> dict[str, Any]:
        """What a page needs to know."""
        mine = [question for question in self._held if question.holder == person.name]
        view: dict[str, Any] = {
            "name": person.name,
            "fixed_name": bool(self.server.only_name),
            "done": self._answered(),
            "total": self._total,
            "mine": person.answers,
            "undo": mine[-1].given if mine and not self._stopped else "",
        }
        if self._stopped:
            person.told = True
            self._changed.notify_all()
            return view | {"state": "over", "complete": self._over and self._answered() >= self._total}
        if person.question is not None:
            question = person.question
            pictures = []
            for segment in question.segments:
                assert segment.frames is not None
                count, height, width, _ = segment.frames.shape
                pictures.append({"frames": count, **sprite_layout(count, height, width)})
            shown = {"id": question.given, "task": question.task, "pictures": pictures}
            return view | {"state": "ask", "question": shown, "fps": self._config.frames_per_second}
        if mine and not self._unanswered() and not self._comes_more():
            left = max(0.0, self._config.linger - (now - person.spoke))
            return view | {"state": "finish", "closes": round(left, 1)}
        return view | {"state": "wait"}
