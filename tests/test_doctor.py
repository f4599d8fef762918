"""`data doctor` finds what was done to a store, nothing in a sound one, and repairs into a new store."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets.doctor import examine, leak_findings
from embodied.datasets.doctor_columns import Column, jumps
from embodied.datasets.episode import Episode, end_flags
from embodied.datasets.finding import Finding
from embodied.datasets.importer import FORMATS, import_dataset, recognise
from embodied.datasets.repair import repair
from embodied.datasets.store import EpisodeStore

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import SPEC, add_label, change_array, make_episode, write_store

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def found(store: EpisodeStore, check: str, **options: Any) -> list[Finding]:
    return [finding for finding in examine(store, **options) if finding.check == check]


def one_wrong(path: Path, change: Callable[[Episode], None], at: int = 3, count: int = 6, **spec: Any) -> EpisodeStore:
    """A store whose episode `at` was changed."""
    episodes = [make_episode(index) for index in range(count)]
    change(episodes[at])
    return write_store(path, episodes, dataclasses.replace(SPEC, **spec))


def freeze(images: np.ndarray, first: int, last: int) -> None:
    images[first : last + 1] = images[first]


def test_a_sound_store_has_no_error_and_no_warning(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [make_episode(index) for index in range(8)])
    assert {(f.severity, f.check) for f in examine(store, deep=True)} == {("note", "terminal-at-success")}


# ---- each check, and what it says ----------------------------------------------------------------


def stamps(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Episode], None]:
    def apply(episode: Episode) -> None:
        episode.timestamp = change(episode.timestamp)

    return apply


@pytest.mark.parametrize(
    ("change", "check", "severity", "words"),
    [
        (
            stamps(lambda t: t + 0.5 * (np.arange(31) > 12)),
            "clock-gap",
            "warning",
            "longest 0.6 s at frame 12: about 5",
        ),
        (stamps(lambda t: t * 1.1), "clock-drift", "warning", "0.11 s by its timestamps, 0.1 s by the declared"),
        (stamps(lambda t: t + 0.03 * (np.arange(31) % 2)), "clock-irregular", "warning", "off the usual"),
        (stamps(lambda t: np.where(np.arange(31) == 20, t[19], t)), "clock-repeats", "warning", "1 of 30 steps"),
    ],
)
def test_clocks(change: Any, check: str, severity: str, words: str, tmp_path: Path) -> None:
    store = one_wrong(tmp_path / "s", change)
    (finding,) = found(store, check)
    assert (finding.episode, finding.severity) == (3, severity)
    assert words in finding.message


def test_no_clock_at_all_is_one_note(tmp_path: Path) -> None:
    episodes = [dataclasses.replace(make_episode(i), timestamp=np.zeros(31)) for i in range(3)]
    store = write_store(tmp_path / "s", episodes, dataclasses.replace(SPEC, control_dt=0.0))
    assert [f.episode for f in found(store, "clock-zero")] == [None]
    assert "not declared" in found(store, "control-dt-unknown")[0].message


def test_what_another_program_wrote_is_found(tmp_path: Path) -> None:
    """Our writer refuses these; a store may come from elsewhere."""
    store = write_store(tmp_path / "s", [make_episode(index) for index in range(6)])
    start = store.episode_start

    def set_rows(name: str, row: int, value: Any) -> None:
        def change(values: np.ndarray) -> None:
            values[row] = value

        change_array(store, name, change)

    set_rows("timestamp", start[0] + 5, 0.0)
    set_rows("truncated", start[1] + 29, True)  # where it is terminated too
    set_rows("terminated", start[2] + 10, True)
    set_rows("observation/joint_position", start[3] + 4, (0.0, np.nan, 0.0))
    set_rows("step_valid", start[4] + 30, True)
    store = EpisodeStore(store.path)
    errors = {(f.check, f.episode): f.message for f in examine(store) if f.severity == "error"}
    assert set(errors) == {
        ("clock-backwards", 0),
        ("terminal-and-timeout", 1),
        ("end-inside", 2),
        ("not-finite", 3),
        ("no-successor", 4),
    }
    assert "frame 5, by 0.4 s" in errors["clock-backwards", 0]
    assert "ends at frame 10 and goes on to frame 30" in errors["end-inside", 2]
    assert "element elbow is NaN or infinite in 1 of 31 frames, first 4" in errors["not-finite", 3]
    # Every array that was touched no longer has the bytes that were written.
    changed = {f.message.split("'")[1] for f in found(store, "content-changed", deep=True)}
    assert changed == {"timestamp", "truncated", "terminated", "observation/joint_position", "step_valid"}

    new, done = repair(store, tmp_path / "new")
    assert not [f for f in examine(new, deep=True) if f.severity == "error"]
    assert new.source_ids == ["demo_1", "demo_2 frames 0 to 10", "demo_2 frames 11 to 30", "demo_4", "demo_5"]
    assert new.episode_length.tolist() == [31, 11, 20, 31, 31]
    assert len(done) == 5
    for check in ("not-finite", "clock-backwards", "end-inside", "terminal-and-timeout", "no-successor"):
        assert sum(f"[{check}]" in line for line in done) == 1


def test_deep_hashes_agree_with_the_writer_where_pictures_are_missing(tmp_path: Path) -> None:
    episodes = [make_episode(index) for index in range(4)]
    for index in (0, 2):
        del episodes[index].images["wrist"]
    store = write_store(tmp_path / "s", episodes)
    assert found(store, "content-changed", deep=True) == []
    (missing,) = found(store, "missing-media")
    assert "camera 'wrist' has no pictures in 2 of 4 episodes: 0, 2" in missing.message


@pytest.mark.parametrize("name", ["action", "observation/images/side", "episode/length"])
def test_an_array_that_is_gone_or_cut_off(name: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [make_episode(index) for index in range(3)])
    chunk = max((p for p in (tmp_path / "s" / name / "c").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    assert found(EpisodeStore(store.path), "store-damaged", deep=True)
    chunk.unlink()
    assert any(name in f.message for f in found(EpisodeStore(store.path), "store-damaged"))


def test_counts_that_disagree(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [make_episode(index) for index in range(3)])

    def longer(lengths: np.ndarray) -> None:
        lengths[1] += 7

    (finding,) = found(change_array(store, "episode/length", longer), "count-mismatch")
    assert finding.message == "episodes have 100 frames in all; the store says 93"


def test_jumps_at_lost_ends_are_found_and_cut(tmp_path: Path) -> None:
    """D4RL #77: timeouts out of step with the data, so that an episode runs on into the next."""
    path = tmp_path / "d4rl.hdf5"
    rng = np.random.default_rng(0)
    lengths, timeouts = [50] * 20, np.zeros(1000, bool)
    position = np.concatenate([(-1) ** i * 5.0 + rng.normal(0, 0.05, (n, 2)).cumsum(0) for i, n in enumerate(lengths)])
    timeouts[49::50] = True
    lost = [149, 699]
    timeouts[lost] = False
    with h5py.File(path, "w") as file:
        file["observations"] = position
        file["actions"] = rng.uniform(-1, 1, (1000, 2))
        file["rewards"] = rng.uniform(size=1000)
        file["terminals"] = np.zeros(1000, bool)
        file["timeouts"] = timeouts
    store = import_dataset(path, tmp_path / "s")
    assert [(f.episode, f.severity) for f in found(store, "jump")] == [(2, "error"), (12, "error")]
    assert all("it jumps at frame 50: observation[" in f.message for f in found(store, "jump"))
    new, done = repair(store, tmp_path / "new")
    assert done == ["cut 2 episodes (2, 12) at 2 places [jump]"]
    assert new.episode_length.tolist() == [50] * 20
    assert found(new, "jump") == []
    np.testing.assert_array_equal(new.read("observation/observation"), position.astype(np.float32))
    # The step over the lost end is none any more.
    assert (store.read("step_valid") != new.read("step_valid")).nonzero()[0].tolist() == lost
    assert new.read("truncated").nonzero()[0].tolist() == list(range(49, 1000, 50))
    assert examine(new)[0].check == "repaired" or "repaired" in {f.check for f in examine(new)}


def test_wrapping_angles_flipped_quaternions_and_grippers_are_no_jumps() -> None:
    rng = np.random.default_rng(0)
    rows = 400
    angle = (np.cumsum(rng.normal(0.05, 0.02, rows)) + np.pi) % (2 * np.pi) - np.pi
    half = np.linspace(0.1, 0.9, rows) + rng.normal(0, 0.002, rows)
    quaternion = np.stack([np.cos(half), np.sin(half)], 1) * np.where(np.arange(rows) == 200, -1, 1)[:, None]
    gripper = (np.arange(rows) // 40 % 2).astype(float)
    array = np.concatenate([angle[:, None], quaternion, gripper[:, None]], 1).astype(np.float32)
    column = Column(ArraySpec((4,)), rows)
    column.add(array)
    column.add_steps(array)
    assert np.isfinite(column.jump_limit()[:3]).all()
    assert jumps({"x": array}, {"x": column}, {"x": column.jump_limit()}) == []
    array[300:, 0] += 3
    (jump,) = jumps({"x": array}, {"x": column}, {"x": column.jump_limit()})
    assert (jump.row, jump.alone) == (300, False)
    assert "x[0] by" in jump.text


def test_columns_and_actions(tmp_path: Path) -> None:
    def change(episode: Episode) -> None:
        episode.observations["joint_position"][:, 1] = 0.5
        episode.observations["object"][:] = 2.0
        assert episode.action is not None
        episode.action[:, 0] = 0.0

    episodes = [make_episode(index) for index in range(4)]
    for episode in episodes:
        change(episode)
    assert episodes[2].action is not None
    episodes[2].action[5:11, 1] = (1.2, -1.5, 1.0, 1.0, 1.0, 1.0)
    store = write_store(tmp_path / "s", episodes)
    assert found(store, "dead-action")[0].message == "action element left of 2 never changes"
    constant = [f.message for f in found(store, "constant-column")]
    assert constant == ["'joint_position': element elbow never changes", "'object' never changes"]
    (outside,) = found(store, "action-range")
    assert outside.message == "2 of 120 actions (1.7 %) lie outside [-1, 1]: right by up to 0.5"
    new, done = repair(store, tmp_path / "new", drop_constant=True)
    assert (list(new.spec.observations), len(done)) == (["joint_position"], 1)


def test_action_bounds_of_the_spec_count(tmp_path: Path) -> None:
    action = ActionSpec((2,), names=("left", "right"), low=(-0.5, -0.5), high=(0.5, 0.5))
    store = one_wrong(tmp_path / "s", lambda episode: None, action=action)
    actions = store.read("action")[store.read("step_valid")]
    outside = int((np.abs(actions) > 0.5).any(1).sum())
    assert found(store, "action-range")[0].message.startswith(f"{outside} of 180 actions")


def test_the_action_among_the_observations(tmp_path: Path) -> None:
    observations = SPEC.observations | {"copied": ArraySpec((2,), names=("left", "right"))}
    episodes = [make_episode(index) for index in range(3)]
    for episode in episodes:
        assert episode.action is not None
        episode.observations["copied"] = episode.action.copy()
    spec = dataclasses.replace(SPEC, observations=observations)
    store = write_store(tmp_path / "s", episodes, spec)
    assert [f.message for f in found(store, "action-in-observation")] == [
        "the observation 'copied' is the action itself, at every step"
    ]
    episodes[1].observations["copied"][7, 0] += 0.1
    assert found(write_store(tmp_path / "t", episodes, spec), "action-in-observation") == []


def test_ends_success_and_rewards(tmp_path: Path) -> None:
    def all_alike(terminated: bool, success: bool | None) -> list[Episode]:
        episodes = [make_episode(index) for index in range(4)]
        for episode in episodes:
            episode.step_valid, episode.terminated, episode.truncated = end_flags(30, 31, terminated)
            episode.success, episode.reward = success, np.zeros(31, np.float32)
        return episodes

    limit = write_store(tmp_path / "limit", all_alike(True, False))
    assert "all after 31 frames" in found(limit, "terminated-at-limit")[0].message
    assert found(limit, "success-constant")[0].message == "all 4 episodes fail"
    assert found(limit, "terminal-at-failure")
    zero = found(limit, "constant-reward")
    assert zero[0].message == "the recorded reward is zero at every step, although episodes terminate"
    endless = all_alike(False, None)
    for episode in endless:
        episode.truncated[:] = False
    store = write_store(tmp_path / "endless", endless)
    assert found(store, "no-ends")
    assert found(store, "success-unknown")
    mixed = [make_episode(index) for index in range(4)]
    mixed[2].success = True
    message = found(write_store(tmp_path / "mixed", mixed), "success-ends-differ")[0].message
    assert message == "2 of 3 successful episodes are terminated, the others are not"
    odd = [make_episode(index) for index in range(4)]
    for row, episode in ((29, odd[1]), (5, odd[0])):
        assert episode.reward is not None
        episode.reward[row] = 1.0 - episode.reward[row]
    (finding,) = found(write_store(tmp_path / "odd", odd), "reward-terminal")
    assert "1 steps that are not terminal, and 1 terminal steps do not get it (1 do)" in finding.message


@pytest.mark.parametrize(("first", "last"), [(0, 30), (9, 21)])
def test_frozen_and_black_cameras(first: int, last: int, tmp_path: Path) -> None:
    def change(episode: Episode) -> None:
        images = np.array(episode.images["side"])
        freeze(images, first, last)
        episode.images = {"side": images, "wrist": np.full_like(images, 3)}

    store = one_wrong(tmp_path / "s", change)
    (frozen,) = found(store, "frozen-camera")
    (black,) = found(store, "black-frames")
    which = "the whole episode" if last - first == 30 else "frames 9 to 21"
    assert f"'side' shows one and the same picture for {which} ({last - first + 1} frames)" in frozen.message
    assert (frozen.episode, frozen.severity, black.episode) == (3, "warning", 3)
    assert "camera 'wrist' is black" in black.message


def test_a_still_picture_of_a_still_robot_is_only_noted(tmp_path: Path) -> None:
    def change(episode: Episode) -> None:
        freeze(episode.images["side"], 5, 25)  # type: ignore[arg-type]
        freeze(episode.observations["joint_position"], 5, 25)

    assert found(one_wrong(tmp_path / "s", change), "frozen-camera")[0].severity == "note"


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    episodes = [make_episode(index) for index in range(5)]
    again = dataclasses.replace(make_episode(1), source_id="another name", reward=np.ones(31, np.float32))
    other_view = make_episode(2)
    other_view.images["side"] = 255 - np.asarray(other_view.images["side"])
    store = write_store(tmp_path / "s", [*episodes, again, other_view])
    assert [(f.episode, f.message) for f in found(store, "duplicate-episode")] == [
        (5, "it holds the same data as episode 1")
    ]
    held_out = write_store(tmp_path / "t", [make_episode(7), make_episode(3), make_episode(0)])
    (leak,) = leak_findings([store, held_out])
    assert leak.severity == "error"
    assert leak.message.startswith("2 of 3 episodes of ")
    assert leak.message.endswith(": 1 = 3, 2 = 0")
    assert list(leak_findings([store, write_store(tmp_path / "u", [make_episode(8)])])) == []
    new, done = repair(store, tmp_path / "new")
    assert done == ["left out 1 episode (5), there already [duplicate-episode]"]
    assert (new.num_episodes, found(new, "duplicate-episode")) == (6, [])


def test_labels(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [make_episode(index) for index in range(3)])
    rng = np.random.default_rng(0)
    add_label(store, "good", rng.normal(size=93).astype(np.float32))
    add_label(store, "flat", np.full(93, 0.5, np.float32))
    add_label(store, "clipped", np.clip(rng.normal(1, 1, 93), 0, 1).astype(np.float32) * (np.arange(93) % 3 == 0))
    add_label(store, "foreign", np.arange(93, dtype=np.float32))
    path = Path(store.path) / "labels" / "foreign" / "zarr.json"
    path.write_text(path.read_text().replace(store.fingerprint, "0" * 64))
    labels = {f.check: f.message for f in examine(EpisodeStore(store.path)) if f.check.startswith("label")}
    assert set(labels) == {"label-constant", "label-saturated", "label-refused"}
    assert "'flat' is 0.5 everywhere" in labels["label-constant"]
    assert "'foreign' is refused: its provenance names another dataset" in labels["label-refused"]


def test_short_odd_and_wordless_episodes(tmp_path: Path) -> None:
    episodes = [make_episode(0, steps=400), *(make_episode(i) for i in range(1, 6)), make_episode(7, steps=1)]
    episodes[2].instruction = ""
    store = write_store(tmp_path / "s", episodes)
    assert [f.episode for f in found(store, "short-episode")] == [6]
    assert [f.message.split(": over")[0] for f in found(store, "length-outlier")] == [
        "1 of 7 episodes",
        "1 of 7 episodes",
    ]
    assert found(store, "instruction-missing")[0].message == "1 episodes have no instruction: 2"


def test_findings_of_the_import_are_shown_again_and_said_once(tmp_path: Path) -> None:
    episodes = [make_episode(index) for index in range(3)]
    del episodes[1].images["wrist"]
    recorded = [
        Finding("frame-count", "warning", "info.json says 5 frames, the files hold 93"),
        Finding("missing-media", "warning", "no video", episode=1),
    ]
    store = write_store(tmp_path / "s", episodes, findings=recorded)
    shown = examine(store)
    assert all(finding in shown for finding in recorded)
    assert len([f for f in shown if f.check == "missing-media"]) == 1


def test_nothing_left_to_repair_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [make_episode(0)])

    def nan(values: np.ndarray) -> None:
        values[3] = np.nan

    with pytest.raises(InputError, match=r"nothing would be left.*left out 1 episode \(0\) \[not-finite\]"):
        repair(change_array(store, "observation/object", nan), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


# ---- the verb ------------------------------------------------------------------------------------


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = write_store(tmp_path / "sound", [make_episode(index) for index in range(4)])
    warned = one_wrong(tmp_path / "warned", stamps(lambda t: t * 1.1))
    assert main(["data", "doctor", sound.path, "--strict"]) == 0
    assert main(["data", "doctor", warned.path]) == 0
    assert main(["data", "doctor", warned.path, "--strict"]) == 1
    text = capsys.readouterr().out
    assert "warning  clock-drift\n           episode 3: a step takes 0.11 s" in text
    assert main(["data", "doctor", sound.path, warned.path, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] is True
    assert result["between_stores"][0]["check"] == "split-leak"
    finding = next(f for f in result["stores"][warned.path]["findings"] if f["check"] == "clock-drift")
    assert set(finding) == {"check", "severity", "message", "advice", "episode"}


def test_repeated_findings_are_summarised_for_people_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [make_episode(index) for index in range(9)]
    for episode in episodes:
        episode.timestamp = episode.timestamp * 1.1
    store = write_store(tmp_path / "s", episodes)
    assert main(["data", "doctor", store.path]) == 0
    text = capsys.readouterr().out
    assert text.count("a step takes") == 3
    assert "and 6 more (episodes 3, 4, 5, 6, 7, 8); --json lists all" in text
    assert main(["data", "doctor", store.path, "--json"]) == 0
    assert capsys.readouterr().out.count("a step takes") == 9


def test_the_verb_repairs_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "s", [make_episode(0), make_episode(1), make_episode(0)])
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert main(["data", "doctor", store.path, "--repair", str(tmp_path / "new")]) == 0
    assert "left out 1 episode (2), there already [duplicate-episode]" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before
    new = EpisodeStore(tmp_path / "new")
    assert new.num_episodes == 2
    record = new.attributes["provenance"]
    assert record["inputs"] == {"parent_0": store.fingerprint}
    assert [entry["fingerprint"] for entry in record["lineage"]] == [store.fingerprint]
    assert main(["data", "doctor", store.path, new.path, "--repair", str(tmp_path / "x")]) == 2
    assert main(["data", "doctor"]) == 2


# ---- real recordings -----------------------------------------------------------------------------


def imported(name: str, tmp_path: Path, episodes: int | None = None) -> EpisodeStore:
    """A real recording, or its first episodes: all of one takes longer to import than to examine."""
    source = DATA / name
    if not source.exists():
        pytest.skip(f"{source} is absent")
    if episodes is None:
        return import_dataset(source, tmp_path / source.name)
    recording = FORMATS[recognise(source)].read(source, {})
    found = [recording.load(index) for index in range(episodes)]
    return write_store(tmp_path / source.name, found, recording.spec, recording.findings)


def test_the_bridge_splits_leak(tmp_path: Path) -> None:
    stores = [imported("rlds-bridge-debug", tmp_path), imported("rlds-bridge-debug-val", tmp_path)]
    (leak,) = leak_findings(stores)
    assert leak.message.startswith("25 of 25 episodes")
    assert [f for store in stores for f in found(store, "duplicate-episode")] == []


def test_the_stale_count_and_unnamed_joints_of_reachy(tmp_path: Path) -> None:
    store = imported("lerobot-v30-reachy2-novideo", tmp_path)
    assert any("14,983" in f.message and "899" in f.message for f in examine(store))
    assert "'state' (19), 'action' (19)" in found(store, "unnamed-joints")[0].message


def test_the_missing_videos_of_g1(tmp_path: Path) -> None:
    store = imported("lerobot-v21-g1-real", tmp_path, episodes=4)
    assert any("97 of 100 episodes" in f.message for f in found(store, "missing-media"))
    assert not store.has_camera("cam_high").any()
    assert found(store, "unnamed-joints") == []
    assert [f for f in examine(store) if f.severity == "error"] == []


def test_the_rewards_of_maze2d_are_all_zero(tmp_path: Path) -> None:
    store = imported("hdf5-d4rl-style/maze2d-umaze-v1.hdf5", tmp_path)
    assert "zero at every step" in found(store, "constant-reward")[0].message


def test_the_reset_in_the_middle_of_pushball(tmp_path: Path) -> None:
    """500 steps of one episode, then the ball stands elsewhere, and no flag says so."""
    store = imported("hdf5-d4rl-style/dataset_expert_1000.hdf5", tmp_path)
    (jump,) = found(store, "jump")
    assert (jump.episode, jump.severity) == (0, "error")
    row = int(jump.message.split("frame ")[1].split(":")[0])
    observation = store.read("observation/observation")
    steps = np.abs(np.diff(observation, axis=0)).max(1)
    assert int(np.argmax(steps[: store.episode_length[0] - 1])) == row - 1


def test_sound_recordings_raise_no_false_alarm(tmp_path: Path) -> None:
    store = imported("hdf5-d4rl-hopper-sac-replay/hopper-replay.hdf5", tmp_path, episodes=300)
    assert {f.check for f in examine(store) if f.severity != "note"} <= {"short-episode"}


def test_the_two_clocks_of_the_bag(tmp_path: Path) -> None:
    source = DATA / "rosbag2-sim-jointstate-imu"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        "clock: {topic: /joint_states}\n"
        "observations:\n"
        "  arm: {topic: /joint_states, field: position, unit: rad,\n"
        "        joints: [arm_1_link_joint, arm_2_link_joint, arm_3_link_joint]}\n"
        "action: {next: arm}\n"
    )
    store = import_dataset(source, tmp_path / "s", options={"mapping": str(mapping)})
    assert [f.severity for f in found(store, "two-clocks")] != []
    assert store.spec.observations["arm"].names == ("arm_1_link_joint", "arm_2_link_joint", "arm_3_link_joint")


def test_terminal_and_timeout_of_one_step(tmp_path: Path) -> None:
    path = tmp_path / "both.hdf5"
    rng = np.random.default_rng(0)
    ends = np.zeros(60, bool)
    ends[19::20] = True
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(60, 3)).cumsum(0)
        file["actions"] = rng.uniform(-1, 1, (60, 2))
        file["rewards"] = rng.uniform(size=60)
        file["terminals"], file["timeouts"] = ends, ends
    store = import_dataset(path, tmp_path / "s")
    assert any(f.check == "terminal-and-timeout" for f in examine(store))
    assert int(store.read("terminated").sum()) == 3
    assert int(store.read("truncated").sum()) == 0
