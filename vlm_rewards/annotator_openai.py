"""An annotator behind any server that speaks OpenAI's chat protocol with images: vLLM, Ollama, llama.cpp, hosted ones.

Every call is entered in a budget before it is sent. Failures of network or server are tried again with growing pauses
and end in an abstention that is not kept, so that a later run asks again; what a model wrote is kept whatever it is.
The key comes from the environment, goes into one header, and stands nowhere else.
"""

import dataclasses
import os
import random
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError
from embodied.contracts.preferences import Segment, Verdict
from embodied.contracts.provenance import hash_json
from embodied.vlm_rewards import chat_protocol, in_stages, vlm_prompts
from embodied.vlm_rewards.answer_log import Budget
from embodied.vlm_rewards.in_stages import Exchange, Failed, Parts

MAX_ANSWER_BYTES = 4_000_000  # a chat answer has a few kB; what sends more is no model
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_STOP = {401: "the key is refused", 403: "the key may not use it", 404: "there is no such model or path"}
_WRONG = {400, 422}  # the request itself; usually all of them then
_PATIENCE = 3  # such refusals before the first answer end the run
_CHARACTERS_PER_TOKEN = 3  # cautious: a token is rather four


@dataclasses.dataclass(frozen=True)
class OpenAIConfig:
    """How a server is asked.

    Attributes:
        url: base URL, to which `/chat/completions` is added, such as http://localhost:11434/v1.
        stages: `two`: describe and compare, then decide from the text; `one`: both at once.
        frames_shown: of each segment, evenly spread.
        temperature: 0 answers every sample alike; raise it to ask several times.
        token_field: how the server calls the limit: max_tokens, or max_completion_tokens.
        leave_out: of temperature and seed, what the server refuses to be told, such as "temperature,seed".
        timeout: seconds for one call, from sending to the last byte.
        attempts: how often a call is tried when server or network fail.
        requests_per_minute: over all workers; 0: no limit.
        price_in, price_out: per million tokens, in any currency; 0: free.
        tokens_per_image: for the estimate of what a call may cost.
        key_variable: name of the environment variable with the key; none is sent where it is not set.
    """

    model: str
    url: str
    stages: str = "two"
    frames_shown: int = 4
    temperature: float = 0.0
    max_tokens: int = 512
    token_field: str = "max_tokens"
    leave_out: str = ""
    timeout: float = 60.0
    attempts: int = 5
    workers: int = 4
    requests_per_minute: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    tokens_per_image: int = 1000
    key_variable: str = "OPENAI_API_KEY"
    pause: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"'{self.url}' is no http(s) URL. Use openai:MODEL@URL, for example @http://localhost:8000/v1."
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"A key does not belong into the URL of '{parts.hostname}'.\nPut it into {self.key_variable}."
            )
        in_stages.check_asking(self.stages, self.frames_shown, self.max_tokens, self.temperature)
        if self.token_field not in ("max_tokens", "max_completion_tokens"):
            raise ConfigError(f"token_field '{self.token_field}' is neither max_tokens nor max_completion_tokens.")
        if unknown := self.left_out - {"temperature", "seed"}:
            raise ConfigError(f"leave_out holds {', '.join(sorted(unknown))}. Valid: temperature, seed.")
        if min(self.attempts, self.workers) < 1 or self.timeout <= 0:
            raise ConfigError("attempts, workers and timeout must be positive.")

    @property
    def left_out(self) -> set[str]:
        return {name.strip() for name in self.leave_out.split(",")} - {""}


def parse_address(text: str) -> tuple[str, str]:
    """MODEL and URL of `MODEL@URL`. ConfigError if it is none."""
    model, at, url = text.partition("@http")
    if not model or not at:
        raise ConfigError(
            f"'openai:{text}' must be openai:MODEL@URL, for example openai:qwen2.5-vl@http://localhost:8000/v1."
        )
    return model, "http" + url


class OpenAIAnnotator:
    """Asks a server.

    Raises:
        MissingExtraError: httpx2 is not installed.
    """

    sees = True

    def __init__(self, config: OpenAIConfig, budget: Budget) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError("httpx2", "vlm", "asking a vision-language model") from error
        self._httpx, self.config, self._budget = httpx2, config, budget
        self.workers = config.workers
        self.name = f"openai:{config.model}@{config.url}"
        decides = ("model", "url", "stages", "frames_shown", "temperature", "max_tokens")
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key in decides}
        if config.left_out:
            settings["left_out"] = sorted(config.left_out)
        self.identity: Mapping[str, Any] = {"annotator": "openai", **in_stages.VERSIONS, **settings}
        self._key = os.environ.get(config.key_variable, "")
        limits = httpx2.Limits(max_connections=config.workers)
        # No redirects: they would carry the key elsewhere. No proxies or netrc from the environment for this host only.
        self._client = httpx2.Client(timeout=config.timeout, limits=limits, follow_redirects=False)
        self._gate, self._next = threading.Lock(), 0.0
        self._answered, self._wrong = False, 0
        self._jitter = random.Random(0)

    def close(self) -> None:
        self._client.close()

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        c = self.config
        return in_stages.compare_in_stages(
            task, first, second, c.stages, c.frames_shown, c.model, lambda parts: self._exchange(parts, sample)
        )

    def upper_cost(self, parts: Parts) -> float:
        """What a call may cost at most, by our estimate of its tokens."""
        c = self.config
        characters = sum(len(part.get("text", "").encode()) for part in parts)
        tokens_in = characters / _CHARACTERS_PER_TOKEN + in_stages.count_pictures(parts) * c.tokens_per_image + 100
        return (tokens_in * c.price_in + c.max_tokens * c.price_out) / 1e6

    def _exchange(self, parts: Parts, sample: int) -> Exchange:
        """One step's question and answer, asked for unless it is known."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": parts if in_stages.count_pictures(parts) else parts[0]["text"]}],
            "temperature": self.config.temperature,
            self.config.token_field: self.config.max_tokens,
            "seed": sample,
        }
        left_out = sorted(self.config.left_out)
        key = hash_json(["exchange", self.config.url, body, *left_out])
        body = {name: value for name, value in body.items() if name not in left_out}
        at_most = self.upper_cost(parts)
        return in_stages.exchange_once(self._budget.log, key, parts, lambda: self._persist(body, at_most))

    def _persist(self, body: dict[str, Any], at_most: float) -> dict[str, Any]:
        """The answer to `body`, tried until it comes. Raises Failed, BudgetSpent."""
        started, failures = time.time(), []
        for attempt in range(self.config.attempts):
            self._wait_turn()
            try:
                with self._budget.call(at_most) as booked:
                    answer = self._call(body, booked)
                cost = booked.get("cost", at_most)
                seconds = round(time.time() - started, 3)
                return answer | {"at": started, "seconds": seconds, "cost": cost, "failures": failures}
            except Failed as failure:
                failures.append(str(failure))
                if not failure.again or attempt == self.config.attempts - 1:
                    raise
                pause = self.config.pause * 2**attempt * (0.5 + self._jitter.random())
                time.sleep(min(failure.wait if failure.wait is not None else pause, self.config.timeout))
        raise AssertionError("unreachable")

    def _wait_turn(self) -> None:
        """Keep to the rate."""
        if not self.config.requests_per_minute:
            return
        with self._gate:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60 / self.config.requests_per_minute
        time.sleep(max(0.0, turn - now))

    def _call(self, body: dict[str, Any], booked: dict[str, Any]) -> dict[str, Any]:
        """One HTTP request. Books its cost where the server says or implies what it was."""
        url = self.config.url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        deadline = time.monotonic() + self.config.timeout
        try:
            with self._client.stream("POST", url, json=body, headers=headers) as response:
                status, kind = response.status_code, response.headers.get("content-type", "")
                if status != 200:
                    booked["cost"] = 0.0  # servers do not charge for refusals
                    raise self._refused(status, response, deadline)
                received = bytearray()
                for piece in response.iter_bytes():
                    received += piece
                    if len(received) > MAX_ANSWER_BYTES:
                        raise Failed("answer too large", again=False)
                    if time.monotonic() > deadline:
                        raise Failed("too slow", again=True)
        except self._httpx.TimeoutException:
            raise Failed("too slow", again=True) from None
        except self._httpx.HTTPError as error:
            if isinstance(error, self._httpx.ConnectError):
                booked["cost"] = 0.0  # nothing was sent
            raise Failed("connection failed", again=True) from None
        try:
            answer = chat_protocol.read_answer(bytes(received), kind)
        except chat_protocol.Unreadable as error:
            raise Failed(str(error), again=True) from None
        self._answered = True
        if any(answer["tokens"].values()):
            prices = {"prompt": self.config.price_in, "completion": self.config.price_out}
            booked["cost"] = sum(count * prices[key] for key, count in answer["tokens"].items()) / 1e6
        return answer

    def _refused(self, status: int, response: Any, deadline: float) -> Exception:
        url, model = self.config.url, self.config.model
        if status in _STOP:
            return InputError(f"{url} answers {status}: {_STOP[status]}.\nAsked for '{model}'.")
        if status in _WRONG and not self._answered:
            with self._gate:
                self._wrong += 1
            if self._wrong >= _PATIENCE:
                said = bytearray()
                for piece in response.iter_bytes():
                    said += piece
                    if len(said) > 10_000 or time.monotonic() > deadline:
                        break
                return InputError(
                    f"{url} answers {status} to each question: {chat_protocol.refusal_words(bytes(said), self._key)}\n"
                    f"Asked for '{model}'. The settings token_field and leave_out change what is sent."
                )
        wait = response.headers.get("retry-after", "")
        seconds = min(float(wait), 60.0) if wait.replace(".", "", 1).isdigit() else None
        return Failed(f"http {status}", again=status in _TRY_AGAIN, wait=seconds)


def estimate(config: OpenAIConfig, questions: int) -> dict[str, float]:
    """Calls, tokens and cost of so many questions if every answer has full length; for a dry run."""
    stages = vlm_prompts.STAGES[config.stages]
    images = 2 * config.frames_shown * config.tokens_per_image
    tokens_in = images + 300 + (config.max_tokens + 400 if stages == 2 else 0)
    tokens_out = config.max_tokens * stages
    return {
        "calls": questions * stages,
        "tokens_in": questions * tokens_in,
        "tokens_out": questions * tokens_out,
        "cost": questions * (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6,
    }
