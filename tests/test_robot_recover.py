"""Of a recording that broke off everything up to the break is kept, and the file that was found is never lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied import robot_recover
from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.bag_recover import read_metadata, read_records, recover
from embodied.robot_bridge.bag_writer import CHUNK_BYTES, BagWriter
from embodied.robot_bridge.qos import LATCHED

CONTRACT = {"embodied_contract": {"control_dt": 0.1}}


def state(k: int) -> bytes:
    return m.joint_state(10**18 + k, ["a"], np.array([float(k)]), np.zeros(1))


MESSAGE_BYTES = 31 + len(state(0))  # in a chunk


def numbers(path: Path) -> list[float]:
    return [m.read_joint_state(d).position[0] for t, _, d, _ in read_records(path) if t == "/joint_states"]


def whole(folder: Path, count: int = 500) -> Path:
    writer = BagWriter(folder, CONTRACT, lambda topic: [LATCHED] if topic == "/description" else [])
    writer.write("/description", m.STRING, m.string("<robot/>"), 5)
    for k in range(count):
        writer.write("/joint_states", m.JOINT_STATE, state(k), 10 + k)
    writer.close()
    return writer.path


def broken(folder: Path, keep: int, count: int = 500) -> Path:
    path = whole(folder, count)
    (folder / "metadata.yaml").unlink()
    os.truncate(path, keep)
    return path


def check_reads_with_rosbags(folder: Path, count: int) -> None:
    from rosbags.rosbag2 import Reader

    with Reader(folder) as reader:
        assert reader.message_count == count
        assert len(list(reader.messages())) == count


RECORDER = """
import sys, numpy as np
from pathlib import Path
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.bag_writer import BagWriter
data = m.joint_state(10**18, ["a"], np.zeros(1), np.zeros(1))
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("bag"):
        writer = BagWriter(Path(line.split()[1]), {"embodied_contract": {"control_dt": 0.1}})
        k = 0
        while True:
            position = np.array([float(k)])
            writer.write("/joint_states", m.JOINT_STATE, m.joint_state(10**18 + k, ["a"], position, np.zeros(1)), k + 1)
            k += 1
            print(k, flush=True)
"""


def test_a_recorder_killed_at_any_moment_loses_at_most_its_last_chunk(tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    lost_most = 0
    for trial, moment in enumerate(draw.uniform(0.001, 0.12, 12)):
        bag = tmp_path / f"bag{trial}"
        child = subprocess.Popen(
            [sys.executable, "-c", RECORDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write(f"bag {bag}\n")
        child.stdin.flush()
        assert child.stdout.readline() == "1\n"
        time.sleep(moment)
        os.kill(child.pid, signal.SIGKILL)
        said = [1, *map(int, child.stdout.read().splitlines()[:-1] or [1])]  # the last line may be cut off
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
        assert not (bag / "metadata.yaml").exists()
        found = recover(bag)
        kept = numbers(bag / f"{bag.name}_0.mcap")
        assert kept == list(range(len(kept)))
        assert found.messages == len(kept)
        lost = said[-1] - len(kept)
        lost_most = max(lost_most, lost)
        assert lost <= CHUNK_BYTES / MESSAGE_BYTES + 1, f"killed after {moment:.3f} s: {lost} of {said[-1]} lost"
        check_reads_with_rosbags(bag, len(kept))
        assert read_metadata(bag / f"{bag.name}_0.mcap") == CONTRACT
    assert lost_most > 0  # the kills did fall into chunks


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.77, 0.95, 0.999])
def test_a_file_cut_anywhere_keeps_what_came_before_in_half_a_chunk_too(tmp_path: Path, share: float) -> None:
    size = whole(tmp_path / "whole").stat().st_size
    keep = round(share * size)
    path = broken(tmp_path / "bag", keep)
    before = path.read_bytes()
    found = recover(tmp_path / "bag")
    kept = numbers(path)
    assert kept == list(range(len(kept)))
    per_message = size / 500  # index and definitions included: more than what a message takes of a chunk
    assert len(kept) >= min(500, (keep - 6000) / per_message)
    assert found.changed
    assert found.messages == sum(1 for _ in read_records(path))
    assert found.damaged == tmp_path / "bag" / "bag_0.mcap.damaged"
    assert (tmp_path / "bag" / "bag_0.mcap.damaged").read_bytes() == before
    check_reads_with_rosbags(tmp_path / "bag", found.messages)
    again = recover(tmp_path / "bag")
    assert (again.changed, again.messages) == (False, found.messages)
    assert sorted(p.name for p in (tmp_path / "bag").iterdir()) == ["bag_0.mcap", "bag_0.mcap.damaged", "metadata.yaml"]


def test_messages_of_the_half_chunk_are_kept(tmp_path: Path) -> None:
    path = whole(tmp_path / "whole", 60)  # one chunk
    data = path.read_bytes()
    at = data.index(state(40)) + len(state(40))
    broken(tmp_path / "bag", at, 60)
    found = recover(tmp_path / "bag")
    assert numbers(tmp_path / "bag" / "bag_0.mcap") == list(range(41))
    assert found.lost_bytes == 0


def test_topics_metadata_and_times_are_copied_as_they_are(tmp_path: Path) -> None:
    from mcap.reader import make_reader

    def content(path: Path) -> list[Any]:
        with open(path, "rb") as file:
            reader = make_reader(file)
            rows: list[Any] = [(vars(s), vars(c), vars(n)) for s, c, n in reader.iter_messages()]
            return [*rows, [(r.name, r.metadata) for r in reader.iter_metadata()]]

    original = whole(tmp_path / "whole")
    path = broken(tmp_path / "bag", original.stat().st_size - 100)  # only the end of the index is missing
    recover(tmp_path / "bag")
    assert content(path) == content(original)
    texts = [(tmp_path / name / "metadata.yaml").read_text() for name in ("bag", "whole")]
    assert texts[0] == texts[1].replace("whole_0", "bag_0")


@pytest.mark.parametrize("content", [b"", b"\x89MCAP", b"\x89MCAP0\r\n", b"\x89MCAP0\r\n" + bytes(3000), bytes(500)])
def test_a_file_of_nothing_becomes_an_empty_bag(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    (folder / "bag_0.mcap").write_bytes(content)
    found = recover(folder)
    assert (found.messages, found.changed) == (0, True)
    assert (folder / "bag_0.mcap.damaged").read_bytes() == content
    check_reads_with_rosbags(folder, 0)
    assert not recover(folder).changed


def test_damage_in_the_middle_costs_the_chunk_it_is_in(tmp_path: Path) -> None:
    path = whole(tmp_path / "bag", 1000)
    (tmp_path / "bag" / "metadata.yaml").unlink()
    data = bytearray(path.read_bytes())
    at = data.index(state(300))
    data[at - 60 : at + 60] = b"\xff" * 120
    path.write_bytes(bytes(data[:-8]))
    recover(tmp_path / "bag")
    kept = numbers(path)
    assert 1000 - CHUNK_BYTES / MESSAGE_BYTES - 1 <= len(kept) < 1000
    assert kept == sorted(kept)
    assert {0.0, 999.0} <= set(kept)


def test_whatever_the_damage_a_readable_bag_comes_of_it(tmp_path: Path) -> None:
    data = whole(tmp_path / "whole", 300).read_bytes()
    draw = np.random.default_rng(0)
    for trial in range(100):
        damaged = bytearray(data[: draw.integers(1, len(data) - 8)])
        for _ in range(draw.integers(0, 12)):
            at, size = int(draw.integers(0, len(damaged))), int(draw.integers(1, 9))
            damaged[at : at + size] = draw.integers(0, 256, size, dtype=np.uint8).tobytes()
        folder = tmp_path / f"bag{trial}"
        folder.mkdir()
        (folder / "bag_0.mcap").write_bytes(bytes(damaged))
        found = recover(folder)
        assert (folder / "bag_0.mcap.damaged").read_bytes() == bytes(damaged)
        again = recover(folder)
        assert (again.changed, again.messages) == (False, found.messages)


def test_an_interrupted_recovery_is_run_again(tmp_path: Path) -> None:
    path = broken(tmp_path / "bag", 20_000)
    before = path.read_bytes()
    (tmp_path / "bag" / ".bag_0.mcap.recovering").write_bytes(b"half of it")
    first = recover(tmp_path / "bag")
    (tmp_path / "bag" / "metadata.yaml").unlink()  # as if it had been killed before its last step
    second = recover(tmp_path / "bag")
    assert (second.messages, second.changed, second.damaged) == (first.messages, True, None)
    assert (tmp_path / "bag" / "bag_0.mcap.damaged").read_bytes() == before
    check_reads_with_rosbags(tmp_path / "bag", first.messages)


def test_a_disk_that_is_full_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = broken(tmp_path / "bag", 60_000)
    before = path.read_bytes()
    script = (
        "import resource, sys; from pathlib import Path; from embodied.robot_bridge.bag_recover import recover\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); recover(Path(sys.argv[1]))"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path.parent)], capture_output=True, text=True)
    assert "OSError" in run.stderr
    assert [p.name for p in path.parent.iterdir()] == ["bag_0.mcap"]
    assert path.read_bytes() == before


def test_a_bag_that_is_being_recorded_is_left_alone(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag")
    writer.write("/joint_states", m.JOINT_STATE, state(0), 1)
    with pytest.raises(InputError, match="still being recorded"):
        recover(tmp_path / "bag")
    writer.close()
    assert not recover(tmp_path / "bag").changed


def test_the_verb_takes_a_bag_or_a_folder_of_them(tmp_path: Path) -> None:
    broken(tmp_path / "bags" / "e0", 30_000)
    whole(tmp_path / "bags" / "e1")
    config = robot_recover.RobotRecover(tmp_path / "bags")
    result = robot_recover.robot_recover(config, None)  # type: ignore[arg-type]
    assert [(Path(bag["folder"]).name, bag["changed"]) for bag in result["bags"]] == [("e0", True), ("e1", False)]
    text = robot_recover.as_text(result)
    assert "e0_0.mcap.damaged" in text
    assert "e1: 501 messages, whole already" in text
    one = robot_recover.robot_recover(robot_recover.RobotRecover(tmp_path / "bags" / "e0"), None)  # type: ignore[arg-type]
    assert [bag["changed"] for bag in one["bags"]] == [False]
    for wrong in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="no bag"):
            robot_recover.robot_recover(robot_recover.RobotRecover(wrong), None)  # type: ignore[arg-type]
