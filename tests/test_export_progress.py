import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets.exporter import export_dataset
from embodied.datasets.progress_sidecar import read_progress

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import add_label, make_spec, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = make_store(
        tmp_path_factory.mktemp("progress") / "store",
        make_spec(()),
        ((3, True, True), (2, False, False), (4, True, True)),
    )
    add_label(made)
    add_label(made, "dense", scores=np.linspace(-1, 2, made.num_frames, dtype=np.float32))
    return made


FINAL = [3, 10]  # rows of the store that LeRobot has none for


def test_columns_are_lerobots(store, tmp_path):
    result = export_dataset(store.path, tmp_path / "p.parquet", "progress", {"dense": "dense"}, "progress")
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.names == ["index", "episode_index", "frame_index", "progress_sparse", "progress_dense"]
    assert [str(kind) for kind in table.schema.types] == ["int64"] * 3 + ["float"] * 2
    assert table["index"].to_pylist() == list(range(9))
    assert table["episode_index"].to_pylist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert table["frame_index"].to_pylist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    kept = np.delete(np.arange(store.num_frames), FINAL)
    np.testing.assert_array_equal(table["progress_sparse"], store.label("progress").score[kept])
    np.testing.assert_array_equal(table["progress_dense"], store.label("dense").score[kept])
    assert json.loads(table.schema.metadata[b"embodied.provenance"])["progress_sparse"]["label"] == "progress"
    left = [entry["what"] for entry in result["left_out"]]
    assert "scores of 2 final observations" in left
    assert "the meaning of 'dense' as progress" in left
    assert "the meaning of 'progress' as progress" not in left


def test_rows_are_those_of_the_lerobot_export(store, tmp_path):
    export_dataset(store.path, tmp_path / "set", "lerobot")
    export_dataset(store.path, tmp_path / "p.parquet", "progress", label="progress")
    keys = ["index", "episode_index", "frame_index"]
    rows = pq.read_table(tmp_path / "set" / "data" / "chunk-000" / "file-000.parquet", columns=keys)
    assert pq.read_table(tmp_path / "p.parquet", columns=keys).to_pydict() == rows.to_pydict()


def test_scores_come_back_by_key_and_never_by_row(store, tmp_path):
    export_dataset(store.path, tmp_path / "p.parquet", "progress", label="progress")
    table = pq.read_table(tmp_path / "p.parquet")
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    shuffled = shuffled.set_column(0, "index", pa.array(np.zeros(len(table), np.int64)))  # says nothing
    pq.write_table(shuffled, tmp_path / "shuffled.parquet")
    wanted = store.label("progress").score.copy()
    wanted[FINAL] = np.nan
    for name in ("p.parquet", "shuffled.parquet"):
        np.testing.assert_array_equal(read_progress(tmp_path / name, store), wanted)
    pq.write_table(shuffled.slice(0, 4), tmp_path / "part.parquet")
    assert np.isfinite(read_progress(tmp_path / "part.parquet", store)).sum() == 4


def test_a_sidecar_of_another_dataset_is_refused(store, tmp_path):
    def write(name, **columns):
        columns = {"episode_index": [0, 0], "frame_index": [0, 1], "progress_sparse": [0.1, 0.2]} | columns
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    cases = {
        r"episode 3, frame 1 is not in": {"episode_index": [0, 3]},
        r"episode 0, frame 4 is not in": {"frame_index": [0, 4]},
        r"episode 0, frame -1 is not in": {"frame_index": [0, -1]},
        r"episode 0, frame 1 has two rows": {"frame_index": [1, 1]},
        r"its columns are not numbers": {"frame_index": ["a", "b"]},
        r"rows without episode_index or frame_index": {"frame_index": [0, None]},
    }
    for message, columns in cases.items():
        with pytest.raises(InputError, match=message):
            read_progress(write("bad.parquet", **columns), store)
    with pytest.raises(InputError, match=r"lacks 'progress_dense'. Did you mean 'progress_sparse'\?"):
        read_progress(write("sparse.parquet"), store, "progress_dense")
    many = {"episode_index": [0] * 99, "frame_index": [0] * 99, "progress_sparse": [0.0] * 99}
    with pytest.raises(InputError, match=r"has 99 rows; .* has 11 frames"):
        read_progress(write("many.parquet", **many), store)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "sparse.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut.parquet cannot be read"):
        read_progress(tmp_path / "cut.parquet", store)


def test_a_label_set_must_be_named(store, tmp_path):
    with pytest.raises(InputError, match=r"needs a label set: --label NAME. .* has: dense, progress"):
        export_dataset(store.path, tmp_path / "p.parquet", "progress")
    options = {"column": "progress_dense", "dense": "dense"}
    with pytest.raises(ConfigError, match="two label sets for one column"):
        export_dataset(store.path, tmp_path / "p.parquet", "progress", options, "progress")
