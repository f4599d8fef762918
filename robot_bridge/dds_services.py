"""Services over DDS as rmw_cyclonedds speaks them.

A service is two topics. Before its fields, a request and its response carry the client's id and a sequence number;
clients pick their own responses by them. The id is the instance handle of the request's writer. Endpoints announce
`serviceid` or `clientid`, 16 bytes that are equal on the reader and the writer of one service or client.
(rmw_fastrtps correlates by an inline quality of service that the wheel cannot reach: with it, use the rclpy transport.)
"""

import itertools
import logging
import queue
import re
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from embodied.contracts.errors import EmbodiedError, TransportError
from embodied.robot_bridge import messages
from embodied.robot_bridge.dds_endpoints import HANDLE, CyclonePublisher, CycloneSubscriber, take

log = logging.getLogger(__name__)
Handler = Callable[[bytes], bytes]

REPLY_READER_S = 0.1  # how long a server waits for a client's reader before it answers into the void, as rmw does
_ID_BYTES = 16


def id_text(identity: bytes) -> str:
    """16 bytes as they stand in user data: hexadecimal numbers with dots between."""
    return ".".join(f"{byte:x}" for byte in identity)


def make_id(participant: bytes, number: int) -> bytes:
    """The id of a participant's `number`th service or client: its GUID prefix, then the number."""
    return participant[:12] + struct.pack(">I", number)


def user_data(key: str, identity: bytes, message_type: str) -> str:
    """What an endpoint of a service (`serviceid`) or a client (`clientid`) announces."""
    return f"{key}={id_text(identity)};typehash={messages.type_hash(message_type)};"


def pack(client: int, sequence: int, body: bytes) -> bytes:
    """A request or response on the wire, from its plain CDR."""
    order = "<" if body[1] else ">"
    return body[:4] + struct.pack(f"{order}Qq", client, sequence) + body[4:]


def unpack(data: bytes) -> tuple[int, int, bytes]:
    """Client id, sequence number and plain CDR."""
    client, sequence = struct.unpack_from("<Qq" if data[1] else ">Qq", data, 4)
    return client, sequence, data[:4] + data[20:]


class Server:
    """One service. Requests are answered on a thread of its own, so that a slow handler stops nothing else.

    Args:
        requests, responses: the endpoints of its two topics.
    """

    def __init__(
        self, name: str, service_type: str, requests: CycloneSubscriber, responses: CyclonePublisher, handler: Handler
    ) -> None:
        self.name, self.service_type, self._handler = name, service_type, handler
        self.requests, self.responses = requests, responses
        self.condition = requests.condition
        self._readers: dict[int, int] = {}  # of the clients answered before: request's writer -> response's reader
        self._inbox: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"service {name}", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Queue what has arrived."""
        for sample, _ in take(self.requests.entity):
            self._inbox.put((sample.data, sample.sample_info.publication_handle & HANDLE))

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            data, publication = item
            client, sequence, request = unpack(data)
            try:
                response = pack(client, sequence, self._handler(request))
            except Exception:
                log.exception("handler of %s", self.name)
                continue
            try:
                self._await_reader(publication)
                self.responses.write(response)
            except EmbodiedError as error:
                log.warning("%s", error)

    def _await_reader(self, publication: int) -> None:
        """Until the client's reader is known: what is written before, it never gets."""
        # Remembered: to look at an endpoint's description takes 60 us, and a service may have many clients.
        if self._readers.get(publication) in self.responses.matches():
            return
        sender = self.requests.entity.get_matched_publication_data(publication)
        deadline = time.monotonic() + REPLY_READER_S
        while sender is not None and time.monotonic() < deadline:
            matched = self.responses.matches()
            for handle in matched:
                reader = self.responses.entity.get_matched_subscription_data(handle)
                if reader is not None and _same_client(sender, reader):
                    self._readers = {p: known for p, known in self._readers.items() if known in matched}
                    self._readers[publication] = handle
                    return
            time.sleep(0.002)

    def close(self) -> None:
        """End the thread; a handler that is running is left alone after a second."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)


def _same_client(writer: Any, reader: Any) -> bool:
    """Whether two endpoints are a client's; by its id, or by the participant where it announces none."""
    ids = [_announced(end, "clientid") for end in (writer, reader)]
    return ids[0] == ids[1] if all(ids) else writer.participant_key == reader.participant_key


def _announced(end: Any, key: str) -> str:
    from cyclonedds.core import Policy

    data = end.qos[Policy.Userdata]
    found = re.search(rf"{key}=([^;]*);", bytes(data.data).decode("utf-8", "replace")) if data is not None else None
    return found.group(1) if found else ""


class Client:
    """One client of a service; calls may come from several threads."""

    def __init__(self, name: str, requests: CyclonePublisher, responses: CycloneSubscriber) -> None:
        self.name, self.requests, self.responses, self.condition = name, requests, responses, responses.condition
        self.client_id = requests.entity.get_instance_handle() & HANDLE
        self._served: tuple[set[int], set[int]] | None = None  # the matched endpoints among which there is a server
        self._sequence, self._pending = itertools.count(1), dict[int, queue.SimpleQueue[bytes]]()

    def drain(self) -> None:
        """Hand responses to the calls that wait for them; others are for other clients, or too late."""
        for sample, _ in take(self.responses.entity):
            client, sequence, body = unpack(sample.data)
            waiting = self._pending.get(sequence)
            if client == self.client_id and waiting is not None:
                waiting.put(body)

    def ready(self) -> bool:
        """Whether one server's two endpoints are known."""
        matched = self.requests.matches(), self.responses.matches()
        if matched != self._served:
            readers, writers = (
                {getattr(describe(handle), "participant_key", None) for handle in handles}
                for describe, handles in (
                    (self.requests.entity.get_matched_subscription_data, matched[0]),
                    (self.responses.entity.get_matched_publication_data, matched[1]),
                )
            )
            self._served = matched if (readers & writers) - {None} else None
        return self._served is not None

    def call(self, request: bytes, timeout_s: float) -> bytes:
        """The response. Raises TransportError."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() >= deadline:
                raise TransportError(f"{self.name}: no server within {timeout_s:g} s. Is its node running?")
            time.sleep(0.005)
        sequence, answer = next(self._sequence), queue.SimpleQueue[bytes]()
        self._pending[sequence] = answer
        try:
            self.requests.write(pack(self.client_id, sequence, request))
            return answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TransportError(f"{self.name}: no answer within {timeout_s:g} s.") from None
        finally:
            del self._pending[sequence]
