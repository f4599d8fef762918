"""What servers of OpenAI's chat protocol send back: an answer, whole or in pieces, or words of refusal."""

import json
from typing import Any

MAX_WORDS = 200


class Unreadable(Exception):
    """Bytes that hold no answer. Its text is a reason that can be counted."""


def read_answer(data: bytes, kind: str) -> dict[str, Any]:
    """Text under `answer`, `model`, and `tokens` by `prompt` and `completion`, 0 where not told.

    Args:
        kind: content type. Some servers and gateways stream although nobody asked them to: text/event-stream is read
            too, and must be complete.

    Raises:
        Unreadable
    """
    if "json" not in kind and "event-stream" not in kind:
        raise Unreadable("answer is no JSON")
    try:
        return _read_stream(data) if "event-stream" in kind else _read_message(json.loads(data), "message")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Unreadable("malformed answer") from None


def _read_message(message: dict[str, Any], part: str) -> dict[str, Any]:
    """One JSON object: a whole answer (`part` is `message`) or a piece of one (`delta`)."""
    choices = message["choices"]
    text = choices[0][part].get("content") if choices or part == "message" else ""
    if isinstance(text, list):  # parts
        text = "".join(str(piece.get("text", "")) for piece in text)
    usage = message.get("usage") or {}
    tokens = {key: int(usage.get(f"{key}_tokens") or 0) for key in ("prompt", "completion")}
    return {"answer": str(text or ""), "model": str(message.get("model", "")), "tokens": tokens}


def _read_stream(data: bytes) -> dict[str, Any]:
    """Server-sent events: one JSON object a `data:` line; the last one says why it ended, or `[DONE]` follows."""
    whole: dict[str, Any] = {"answer": "", "model": "", "tokens": {"prompt": 0, "completion": 0}}
    ended = False
    for line in data.decode("utf-8", "replace").splitlines():
        if not line.startswith("data:"):
            continue  # comments, names of events
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            ended = True
            continue
        message = json.loads(text)
        piece = _read_message(message, "delta")
        whole["answer"] += piece["answer"]
        whole["model"] = piece["model"] or whole["model"]
        whole["tokens"] = {key: max(count, piece["tokens"][key]) for key, count in whole["tokens"].items()}
        ended = ended or any(choice.get("finish_reason") for choice in message["choices"])
    if not ended:
        raise ValueError("cut")
    return whole


def refusal_words(data: bytes, secret: str = "") -> str:
    """What a server says about a request it refuses, on one line of at most 200 characters; empty if nothing readable.

    It is text from outside: control characters are gone, and so is `secret` wherever it stands.
    """
    try:
        found = json.loads(data)
        for key in ("error", "detail", "message"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        text = data.decode("utf-8", "replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if secret:
        text = text.replace(secret, "[key]")
    return text[:MAX_WORDS]
