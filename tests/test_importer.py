import dataclasses
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest

from embodied.contracts.errors import InputError, StoreError
from embodied.datasets import importer
from embodied.datasets.finding import Finding
from embodied.datasets.importer import hash_source, import_dataset, recognise


def make_d4rl(path, actions=1.0):
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(12.0)[:, None]
        file["actions"] = np.full((12, 1), actions)
        file["terminals"] = np.arange(12) % 4 == 3
    return path


def set_action(path, value):
    with h5py.File(path, "a") as file:
        actions: Any = file["actions"]
        actions[9] = value


def test_format_is_recognised_and_the_source_remembered(tmp_path):
    path = make_d4rl(tmp_path / "d.hdf5")
    assert recognise(path) == "d4rl"
    calls = []
    store = import_dataset(path, tmp_path / "s", licence="MIT", progress=lambda *a: calls.append(a))
    assert calls == [(1, 3, "importing"), (2, 3, "importing"), (3, 3, "importing")]
    assert store.attributes["source"] == str(path)
    assert store.attributes["licence"] == "MIT"
    provenance = store.attributes["provenance"]
    assert provenance["made_by"] == "data import"
    assert provenance["inputs"] == {"source": hash_source(path)}
    assert provenance["config"] == {"format": "d4rl", "options": {}, "drop_keys": [], "strict": False}


def test_unknown_things_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.hdf5 does not exist"):
        import_dataset(tmp_path / "absent.hdf5", tmp_path / "s")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"of no format known here\. Known: robosuite, robomimic, d4rl"):
        import_dataset(tmp_path / "notes.txt", tmp_path / "s")
    with pytest.raises(InputError, match=r"'d4lr' is unknown. Did you mean 'd4rl'\?"):
        import_dataset(make_d4rl(tmp_path / "d.hdf5"), tmp_path / "s", format="d4lr")


def test_interrupted_import_resumes_without_reading_twice(tmp_path, monkeypatch):
    path = make_d4rl(tmp_path / "d.hdf5")
    whole = import_dataset(path, tmp_path / "whole")
    loaded = []
    real = importer.FORMATS["d4rl"].read

    def read(path, options, fail_at):
        source = real(path, options)

        def load(index):
            if index == fail_at:
                raise KeyboardInterrupt
            loaded.append(index)
            return source.load(index)

        return importer.FORMATS["d4rl"].Source(source.spec, source.num_episodes, load, source.attributes)

    monkeypatch.setattr(importer.FORMATS["d4rl"], "read", lambda p, o: read(p, o, 2))
    with pytest.raises(KeyboardInterrupt):
        import_dataset(path, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(importer.FORMATS["d4rl"], "read", lambda p, o: read(p, o, -1))
    store = import_dataset(path, tmp_path / "s")
    assert loaded == [0, 1, 2]
    assert store.fingerprint == whole.fingerprint


def test_a_changed_source_does_not_continue_the_old_import(tmp_path, monkeypatch):
    path = make_d4rl(tmp_path / "d.hdf5")
    with monkeypatch.context() as patch:
        patch.setattr(importer.StoreWriter, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_dataset(path, tmp_path / "s")
    make_d4rl(path, actions=0.5)
    with pytest.raises(StoreError, match="another configuration"):
        import_dataset(path, tmp_path / "s")


def test_a_bad_episode_is_left_out_and_listed(tmp_path):
    path = make_d4rl(tmp_path / "d.hdf5")
    set_action(path, np.nan)
    store = import_dataset(path, tmp_path / "s")
    assert store.source_ids == ["d.hdf5/episode 0", "d.hdf5/episode 1"]
    assert store.read("observation/observation")[:, 0].tolist() == list(range(8))
    (finding,) = (found for found in store.findings if found.check == "episode-left-out")
    assert (finding.severity, finding.episode) == ("error", 2)
    assert "'action' holds nan at index (1, 0)" in finding.message


def test_findings_count_the_episodes_that_are_kept(tmp_path, monkeypatch):
    path = make_d4rl(tmp_path / "d.hdf5")
    set_action(path, np.nan)
    real = importer.FORMATS["d4rl"].read
    said = tuple(Finding("odd", "note", f"number {index}", episode=index) for index in (None, 0, 1, 2))

    def read(path, options):
        source = real(path, options)
        # The last, bad episode comes first.
        return dataclasses.replace(source, load=lambda index: source.load((index + 2) % 3), findings=said)

    monkeypatch.setattr(importer.FORMATS["d4rl"], "read", read)
    store = import_dataset(path, tmp_path / "s")
    odd = [(found.episode, found.message) for found in store.findings if found.check == "odd"]
    left_out = "episode 0 of the source, which was left out: number 0"
    assert odd == [(None, "number None"), (None, left_out), (0, "number 1"), (1, "number 2")]


def test_a_source_without_a_usable_episode_is_refused_with_the_first_reason(tmp_path):
    path = make_d4rl(tmp_path / "d.hdf5", actions=np.nan)
    with pytest.raises(InputError, match=r"No episode can be used \(and 2 more\).*'d.hdf5/episode 0'.*nan"):
        import_dataset(path, tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["d.hdf5"]


def test_strict_refuses_a_bad_episode_and_the_mended_source_imports(tmp_path):
    path = make_d4rl(tmp_path / "d.hdf5")
    set_action(path, np.nan)
    with pytest.raises(InputError, match="episode 2"):
        import_dataset(path, tmp_path / "s", strict=True)
    assert not (tmp_path / "s.partial").exists()
    set_action(path, 0.0)
    assert import_dataset(path, tmp_path / "s", strict=True).num_episodes == 3


def test_dropped_keys_are_not_in_the_store(tmp_path):
    path = make_d4rl(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file["infos/noise"] = np.full(12, np.nan)
    with pytest.raises(InputError, match="info_noise' holds nan"):
        import_dataset(path, tmp_path / "s")
    assert list(import_dataset(path, tmp_path / "s", drop_keys=["info_noise"]).spec.observations) == ["observation"]
    with pytest.raises(InputError, match=r"no 'noise'. Did you mean 'info_noise'\?"):
        import_dataset(path, tmp_path / "t", drop_keys=["noise"])


def test_a_folder_of_recordings_names_them(tmp_path):
    (tmp_path / "sets" / "a").mkdir(parents=True)
    make_d4rl(tmp_path / "sets" / "a" / "one.hdf5")
    make_d4rl(tmp_path / "sets" / "two.hdf5")
    (tmp_path / "sets" / "clip.mp4").write_bytes(b"")  # a video beside them makes it no folder of videos
    with pytest.raises(
        InputError, match=r"folder of recordings: a/one\.hdf5 \(d4rl\), two\.hdf5 \(d4rl\)\.\nImport one"
    ):
        import_dataset(tmp_path / "sets", tmp_path / "s")


def test_a_url_is_imported_as_the_file_would_be(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    path = make_d4rl(tmp_path / "d.hdf5")
    url = "memory://test-importer/d.hdf5"
    fsspec.filesystem("memory").pipe_file("/test-importer/d.hdf5", path.read_bytes())
    store = import_dataset(url, tmp_path / "s")
    assert store.fingerprint == import_dataset(path, tmp_path / "local").fingerprint
    assert store.attributes["source"] == url
    assert not any((tmp_path / "cache").iterdir())
    with pytest.raises(StoreError, match=r"memory://test-importer/none does not exist"):
        import_dataset("memory://test-importer/none", tmp_path / "t")


def test_hash_of_a_folder_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = hash_source(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    second = hash_source(tmp_path)
    (tmp_path / "a" / "y").write_text("2")
    assert len({first, second, hash_source(tmp_path)}) == 3
