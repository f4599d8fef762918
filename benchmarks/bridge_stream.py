"""What the bridge's wire delivers between two processes on one host: joint states at 500 Hz and two cameras at 30 Hz.

    python benchmarks/bridge_stream.py

Reliable joint states of 7 joints and best-effort raw images of 640 x 480, for 6 s. Counts what arrives whole and in
order, the time from before encoding to the receiver's callback, and the CPU time of each side. Also the time to encode
and decode one image. Run it on an otherwise idle machine; the result says how loaded it was.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from record import write_result

from embodied.robot_bridge import messages
from embodied.robot_bridge.processes import free_domain
from embodied.robot_bridge.qos import SENSOR_DATA, QosProfile
from embodied.robot_bridge.transport import open_transport

JOINTS = tuple(f"joint{j}" for j in range(7))
JOINT_HZ, CAMERA_HZ = 500, 30
CAMERAS = ("left", "right")
SHAPE = (480, 640, 3)
STATES = QosProfile(100)  # deep enough that a late dispatcher loses none


def image_topic(camera: str) -> str:
    return f"/camera/{camera}/image_raw"


def receive(kind: str, domain: int, pipe: Connection) -> None:
    """Child process: takes everything until told to end; sends back (topic, age [ns]) in order, and its CPU time."""
    arrived: list[tuple[str, int]] = []

    def on(topic: str, stamp: Callable[[bytes], int]) -> Callable[[bytes, int], None]:
        return lambda data, received_ns: arrived.append((topic, received_ns - stamp(data)))

    transport = open_transport("receiver", kind, domain)
    transport.subscriber(
        "/joint_states",
        messages.JOINT_STATE,
        STATES,
        on("/joint_states", lambda d: messages.read_joint_state(d).stamp_ns),
    )
    for camera in CAMERAS:
        topic = image_topic(camera)
        transport.subscriber(topic, messages.IMAGE, SENSOR_DATA, on(topic, lambda d: messages.read_image(d)[0]))
    pipe.send("ready")
    pipe.recv()
    before, started = time.process_time(), time.monotonic()
    pipe.recv()
    pipe.send((arrived, (time.process_time() - before) / (time.monotonic() - started)))
    transport.close()


def send(publishers: dict[str, Any], seconds: float) -> dict[str, int]:
    """Publish on schedule; returns how many of each were sent. Stamps are of the monotonic clock, which both share."""
    pixels = [np.random.default_rng(k).integers(0, 256, SHAPE, np.uint8) for k in range(8)]
    sent = dict.fromkeys(publishers, 0)
    zeros, start = np.zeros(len(JOINTS)), time.monotonic()
    dues = {topic: 0.0 if topic == "/joint_states" else k / CAMERA_HZ / 2 for k, topic in enumerate(publishers)}
    while min(dues.values()) < seconds:
        topic = min(dues, key=lambda name: dues[name])
        time.sleep(max(0.0, start + dues[topic] - time.monotonic()))
        now_ns = time.monotonic_ns()
        if topic == "/joint_states":
            data = messages.joint_state(now_ns, JOINTS, zeros, zeros)
        else:
            data = messages.image(now_ns, "camera", pixels[sent[topic] % len(pixels)])
        publishers[topic].write(data)
        sent[topic] += 1
        dues[topic] = sent[topic] / (JOINT_HZ if topic == "/joint_states" else CAMERA_HZ)
    return sent


def codec() -> dict[str, float]:
    """Median time to encode and to decode one image [us]."""
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    data = messages.image(1, "camera", pixels)

    def median_us(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return round(statistics.median(times) * 1e6, 1)

    return {
        "image_encode_us": median_us(lambda: messages.image(1, "camera", pixels)),
        "image_decode_us": median_us(lambda: messages.read_image(data)),
    }


def measure(kind: str, seconds: float) -> dict[str, Any]:
    domain = free_domain()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=receive, args=(kind, domain, there), daemon=True)
    child.start()
    transport = open_transport("sender", kind, domain)
    try:
        publishers: dict[str, Any] = {
            "/joint_states": transport.publisher("/joint_states", messages.JOINT_STATE, STATES)
        }
        for camera in CAMERAS:
            publishers[image_topic(camera)] = transport.publisher(image_topic(camera), messages.IMAGE, SENSOR_DATA)
        here.recv()
        while not all(p.matched == 1 for p in publishers.values()):
            time.sleep(0.01)
        time.sleep(1.0)  # a volatile subscription takes part from the publisher's first heartbeat on
        here.send("start")
        before, started = time.process_time(), time.monotonic()
        sent = send(publishers, seconds)
        sender_cpu = (time.process_time() - before) / (time.monotonic() - started)
        time.sleep(0.5)
        here.send("end")
        arrived, receiver_cpu = here.recv()
    finally:
        transport.close()
        child.join(5)
    figures: dict[str, Any] = {"transport": kind, "seconds": seconds}
    for name, topics in (("joint_states", ["/joint_states"]), ("images", [image_topic(c) for c in CAMERAS])):
        ages = np.array([age for topic, age in arrived if topic in topics]) * 1e-6
        figures[name] = {
            "sent": sum(sent[topic] for topic in topics),
            "arrived": len(ages),
            "one_way_median_ms": round(float(np.median(ages)), 3),
            "one_way_p99_ms": round(float(np.quantile(ages, 0.99)), 3),
        }
    figures["cpu_share"] = {"sender": round(sender_cpu, 3), "receiver": round(receiver_cpu, 3)}
    return figures | codec()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="dds", choices=["dds", "rclpy"], help="rclpy: a sourced ROS 2")
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    name = "bridge_stream" if options.transport == "dds" else "bridge_stream_rclpy"
    write_result(name, measure(options.transport, options.seconds))
