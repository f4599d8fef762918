"""What holds for every format: whole or nothing, refusals, which reward is written, which steps there are."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.errors import ConfigError, InputError, LabelError, StoreError
from embodied.contracts.provenance import provenance
from embodied.datasets.exporter import EXPORTERS, export_dataset
from embodied.datasets.importer import import_dataset
from embodied.datasets.outgoing import Outgoing
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import transitions
from embodied.datasets.write_store import StoreWriter

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import add_label, make_episode, make_spec, make_store

FORMATS = ("lerobot", "robomimic", "minari", "d4rl")
NO_PICTURES = {"cameras": ()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = make_store(tmp_path_factory.mktemp("export") / "store")
    add_label(made)
    return EpisodeStore(made.path)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_left_behind_when_the_disk_is_full(store, tmp_path, monkeypatch, format):
    real, calls = EpisodeStore.frames, []

    def frames(self, *arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *arguments)

    options = {"keys": "front"} if format == "d4rl" else {}
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "frames", frames)
        with pytest.raises(StoreError, match=r"No space left while writing .*out"):
            export_dataset(store.path, tmp_path / "out", format, options)
    assert list(tmp_path.iterdir()) == []
    export_dataset(store.path, tmp_path / "out", format, options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REFUSED_BY_THE_SYSTEM = """
import resource, sys
from embodied.contracts.errors import StoreError
from embodied.datasets.exporter import export_dataset
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for format, options in (
    ("d4rl", {"keys": "front"}), ("robomimic", {}), ("minari", {}), ("lerobot", {"images": "embedded"}), ("lerobot", {})
):
    try:
        export_dataset(sys.argv[1], sys.argv[2], format, options)
    except StoreError as error:
        print(error)
"""


def test_a_write_that_the_system_refuses_ends_in_a_line(tmp_path):
    """HDF5 itself would crash the process when it ends: it cannot write back what it holds."""
    spec = make_spec(("front",), side=64)
    store = make_store(tmp_path / "store", spec, ((90, True, True),))
    (tmp_path / "to").mkdir()
    command = [sys.executable, "-c", REFUSED_BY_THE_SYSTEM, store.path, str(tmp_path / "to" / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("No space left while writing") == 5
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("format", EXPORTERS)
def test_nothing_is_left_behind_when_interrupted(store, tmp_path, format):
    def interrupt(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_dataset(store.path, tmp_path / "out", format, {}, "progress", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_written_anew(store, tmp_path):
    (tmp_path / "out.export-partial" / "data").mkdir(parents=True)
    (tmp_path / "out.export-partial" / "data" / "old.parquet").write_text("half")
    result = export_dataset(store.path, tmp_path / "out", "minari")
    assert set(result["files"]) == {"data/main_data.hdf5", "data/metadata.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_target_is_kept(store, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"out exists already.\nExports never overwrite"):
        export_dataset(store.path, tmp_path / "out", "d4rl")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        export_dataset(store.path, tmp_path / "dangling", "d4rl")


def test_unknown_things_are_named(store, tmp_path):
    with pytest.raises(InputError, match=r"'lerobt' is unknown. Did you mean 'lerobot'\? Valid: d4rl, lerobot, minari"):
        export_dataset(store.path, tmp_path / "out", "lerobt")
    with pytest.raises(ConfigError, match=r"export to d4rl has no option 'key'. Did you mean 'keys'\?"):
        export_dataset(store.path, tmp_path / "out", "d4rl", {"key": "a"})
    with pytest.raises(ConfigError, match=r"'compress' is 'gzp'. Did you mean 'gzip'\?"):
        export_dataset(store.path, tmp_path / "out", "robomimic", {"compress": "gzp"})
    with pytest.raises(LabelError, match="no label set 'progres'"):
        export_dataset(store.path, tmp_path / "out", "d4rl", label="progres")
    with pytest.raises(StoreError, match="does not exist"):
        export_dataset(tmp_path / "none", tmp_path / "out", "d4rl")
    with pytest.raises(InputError, match="is remote; exports are written to a local path"):
        export_dataset(store.path, "s3://bucket/out", "d4rl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["robomimic", "minari", "d4rl"])
def test_a_store_without_actions_is_refused(tmp_path, format):
    video = make_store(tmp_path / "store", make_spec(action=False, reward=False))
    with pytest.raises(InputError, match=f"has no actions; {format} cannot hold action-free video"):
        export_dataset(video.path, tmp_path / "out", format)


@pytest.mark.parametrize("format", ["minari", "d4rl"])
def test_a_store_without_reward_needs_a_label_or_zeros(tmp_path, format):
    bare = make_store(tmp_path / "store", make_spec((), reward=False))
    with pytest.raises(InputError, match=r"no reward, and .* cannot do without.\n.*it has: none"):
        export_dataset(bare.path, tmp_path / "out", format)
    result = export_dataset(bare.path, tmp_path / "out", format, {"reward": "zero"})
    assert any("absence of a reward" in left["what"] for left in result["left_out"])
    add_label(bare)
    export_dataset(bare.path, tmp_path / "labelled", format, label="progress")


@pytest.mark.parametrize("alignment", ["post", "pre"])
def test_a_label_is_paid_as_transitions_pays_it(tmp_path, alignment):
    episodes = ((4, True, True), (3, False, True), (5, True, False), (2, False, False))
    made = make_store(tmp_path / "store", make_spec((), reward=False), episodes)
    add_label(made, alignment=alignment, scores=np.random.default_rng(0).normal(size=made.num_frames))
    outgoing = Outgoing(made, "progress")
    assert outgoing.counts.tolist() == [4, 3, 5, 2]
    assert outgoing.has_final.tolist() == [True, False, True, False]
    written = {}
    for steps in outgoing.episodes():
        assert steps.reward is not None
        start = int(made.episode_start[steps.number])
        written |= {start + row: value for row, value in enumerate(steps.reward)}
    index = transitions(made, "progress")
    np.testing.assert_array_equal([written[frame] for frame in index.frame], index.reward)
    # The last step of a cut episode without a final observation is no transition: its own score stands there.
    assert set(written) - set(index.frame.tolist()) == {made.num_frames - 1}


def test_an_unmarked_end_keeps_its_actions(tmp_path):
    spec = make_spec((), reward=False)
    writer = StoreWriter(tmp_path / "store", spec, provenance("made", {}, {}))
    for index, final in enumerate((True, False)):
        episode = make_episode(spec, index, 4, final)
        episode.truncated[:] = False
        writer.write_episode(index, episode)
    outgoing = Outgoing(writer.finish(2))
    assert outgoing.counts.tolist() == [4, 4]
    assert outgoing.has_final.tolist() == [True, False]


def test_steps_that_are_not_valid_are_counted(tmp_path):
    spec = make_spec((), reward=False)
    writer = StoreWriter(tmp_path / "store", spec, provenance("made", {}, {}))
    episode = make_episode(spec, 0, 6)
    episode.step_valid[2:4] = False
    writer.write_episode(0, episode)
    store = writer.finish(1)
    result = export_dataset(store.path, tmp_path / "out", "robomimic")
    assert "'step_valid' of 2 steps" in [left["what"] for left in result["left_out"]]


def test_a_camera_without_pictures_is_black_and_listed(tmp_path):
    made = make_store(tmp_path / "store", missing=("wrist",))
    result = export_dataset(made.path, tmp_path / "out", "robomimic")
    assert "absence of camera 'wrist' in 3 episodes" in [left["what"] for left in result["left_out"]]


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_pass_in_blocks(tmp_path, monkeypatch, format):
    made = make_store(tmp_path / "store", make_spec(("image",)))
    options = {"d4rl": {"keys": "image"}, "lerobot": {"images": "embedded"}}.get(format, {})
    with monkeypatch.context() as patch:
        patch.setattr("embodied.datasets.store.BLOCK_BYTES", 3 * 32 * 32 * 3)
        assert len(list(made.episode(0).images["image"].blocks())) == 2  # type: ignore[union-attr]
        export_dataset(made.path, tmp_path / "out", format, options)
    found = import_dataset(tmp_path / "out", tmp_path / "found")
    for number in range(3):
        wanted = np.asarray(made.episode(number).images["image"])
        np.testing.assert_array_equal(
            found.episode(number).images["image"], wanted[: len(wanted) - (format == "lerobot")]
        )


def test_the_command_line_prints_files_and_what_is_left_out(store, tmp_path, capsys):
    assert main(["data", "export", store.path, str(tmp_path / "out.hdf5"), "--format", "d4rl"]) == 0
    text = capsys.readouterr().out
    assert "out.hdf5" in text
    assert "cameras front, wrist: d4rl has one observation array" in text
    arguments = [store.path, str(tmp_path / "demo.hdf5"), "--format", "robomimic", "--options", "next_obs", "none"]
    assert main(["data", "export", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["episodes"], result["steps"]) == (3, 15)
    assert {"what": "final observations of 3 episodes", "reason": "next_obs=none"} in result["left_out"]
    assert main(["data", "export", store.path, str(tmp_path / "out.hdf5"), "--format", "d4rl"]) == 2
    assert "exists already" in capsys.readouterr().err
