import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from embodied.contracts.errors import LabelError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

FRAMES = 25


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    spec = DatasetSpec({"x": ArraySpec((1,))}, {}, None)
    writer = StoreWriter(tmp_path / "s", spec, {"config": {}, "inputs": {}})
    flags = np.zeros(FRAMES, bool)
    writer.write_episode(
        0,
        Episode({"x": np.zeros((FRAMES, 1), np.float32)}, {}, None, flags, flags, flags, np.arange(FRAMES) * 1.0),
    )
    return writer.finish(1)


def provenance(store: EpisodeStore, **changes) -> dict:
    return {
        "labeller": "clip",
        "config": {"goal": "a cube in the air"},
        "dataset_fingerprint": store.fingerprint,
        "code_version": "1",
        "date": "fixed",
    } | changes


SCORES = np.linspace(-1, 1, FRAMES).astype(np.float32)


def label(store: EpisodeStore, name: str, stop_after: int | None = None):
    writer = LabelWriter(store, name, provenance(store), block=10)
    for count, (index, start, stop) in enumerate(writer.blocks()):
        if count == stop_after:
            return None
        writer.write_block(index, SCORES[start:stop], confidence=np.ones(stop - start))
    return writer.finish(failures=0)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_round_trip(store):
    made = label(store, "clip")
    read = store.label("clip")
    assert made is not None
    for result in (made, read):
        np.testing.assert_array_equal(result.score, SCORES)
        np.testing.assert_array_equal(result.channels["confidence"], np.ones(FRAMES))
        assert result.provenance["counts"] == {"failures": 0}
        assert result.provenance["labeller"] == "clip"
        assert result.alignment == "post"
    assert store.label_names() == ["clip"]
    assert EpisodeStore(store.path).fingerprint == store.fingerprint
    assert sorted(p.name for p in Path(store.path).parent.iterdir()) == ["s"]


def test_interrupted_pass_resumes_at_the_first_missing_block_with_the_same_files(store):
    label(store, "whole")
    label(store, "broken", stop_after=1)
    assert store.label_names() == ["whole"]
    writer = LabelWriter(store, "broken", provenance(store, date="later"), block=10)
    assert list(writer.blocks()) == [(1, 10, 20), (2, 20, 25)]
    label(store, "broken")
    labels = Path(store.path) / "labels"
    assert tree(labels / "broken") == tree(labels / "whole")


def test_killed_between_rename_and_tidying_up(store, monkeypatch):
    from embodied.datasets import frame_sets as module

    real = module.shutil.rmtree

    def interrupted(path, **options):
        if Path(path).name == "clip":
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label(store, "clip")
    monkeypatch.undo()
    result = label(store, "clip")
    assert result is not None
    np.testing.assert_array_equal(result.score, SCORES)
    assert not Path(f"{store.path}.labels-partial").exists()


def test_append_only(store):
    label(store, "clip")
    with pytest.raises(LabelError, match="has a label set 'clip' already"):
        LabelWriter(store, "clip", provenance(store))
    with pytest.raises(LabelError, match=r"Did you mean 'clip'\? Valid: clip"):
        store.label("clib")


@pytest.mark.parametrize("key", ["labeller", "config", "dataset_fingerprint", "code_version"])
def test_no_label_without_provenance(store, key):
    bad = provenance(store)
    del bad[key]
    with pytest.raises(LabelError, match=f"lacks {key}"):
        LabelWriter(store, "clip", bad)
    assert not Path(f"{store.path}.labels-partial").exists()


def test_provenance_of_another_dataset_is_refused(store):
    with pytest.raises(LabelError, match="another dataset"):
        LabelWriter(store, "clip", provenance(store, dataset_fingerprint="0" * 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda attributes: attributes.pop("provenance"), "no provenance"),
        (lambda attributes: attributes.pop("alignment"), "no alignment"),
        (lambda attributes: attributes["provenance"].update(dataset_fingerprint="0" * 64), "another dataset"),
    ],
)
def test_a_label_set_of_unknown_or_foreign_origin_is_not_read(store, change, message):
    """For instance one copied over from a store of as many frames."""
    label(store, "clip")
    file = Path(store.path) / "labels" / "clip" / "zarr.json"
    content = json.loads(file.read_text())
    change(content["attributes"])
    file.write_text(json.dumps(content))
    with pytest.raises(LabelError, match=message):
        EpisodeStore(store.path).label("clip")


def test_another_configuration_does_not_resume(store):
    label(store, "clip", stop_after=1)
    with pytest.raises(LabelError, match=r"another configuration.*\n.*rm -r .*labels-partial/clip"):
        LabelWriter(store, "clip", provenance(store, config={"goal": "something else"}), block=10)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_score_names_the_frame(store, value):
    writer = LabelWriter(store, "clip", provenance(store), block=10)
    scores = SCORES[10:20].copy()
    scores[3] = value
    with pytest.raises(LabelError, match="'score' of frame 13 is"):
        writer.write_block(1, scores)
    assert [index for index, _, _ in writer.blocks()] == [0, 1, 2]


def test_wrong_length_missing_block_and_bad_names(store):
    writer = LabelWriter(store, "clip", provenance(store), block=10)
    with pytest.raises(LabelError, match="frames 20 to 24 need one each"):
        writer.write_block(2, SCORES[:10])
    with pytest.raises(LabelError, match="3 of 3 blocks are missing"):
        writer.finish()
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(LabelError, match="no name for a label set"):
            LabelWriter(store, name, provenance(store))


def test_disk_full_leaves_no_label_set(store, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = LabelWriter(store, "clip", provenance(store), block=FRAMES)
    writer.write_block(0, SCORES)
    monkeypatch.setattr(zarr.Group, "create_array", full)
    with pytest.raises(LabelError, match="No space left"):
        writer.finish()
    assert store.label_names() == []
    monkeypatch.undo()
    np.testing.assert_array_equal(writer.finish().score, SCORES)
