"""Bad input through the command line: one to three lines that say what to do, exit code 2, nothing half-written."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.claim import claimed
from embodied.cli import main
from embodied.contracts.provenance import provenance
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.labels import LabelWriter
from embodied.datasets.write_store import StoreWriter
from embodied.verbs import Touches

STEPS = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short episodes with one camera and a label set called `good`."""
    path = tmp_path_factory.mktemp("bad") / "store"
    rng = np.random.default_rng(0)
    spec = DatasetSpec(
        {"joint_position": ArraySpec((2,), unit="rad")},
        {"side": ArraySpec((16, 16, 3), dtype="uint8")},
        ActionSpec((2,), names=("a", "b")),
        control_dt=0.1,
        environment="robosuite/Lift",
    )
    writer = StoreWriter(path, spec, provenance("test", {}, {}))
    rows = np.arange(STEPS + 1)
    for index in range(2):
        writer.write_episode(
            index,
            Episode(
                observations={"joint_position": rng.normal(size=(STEPS + 1, 2)).astype(np.float32)},
                images={"side": rng.integers(0, 255, (STEPS + 1, 16, 16, 3), dtype=np.uint8)},
                action=np.where(rows[:, None] < STEPS, rng.uniform(-1, 1, (STEPS + 1, 2)), 0).astype(np.float32),
                step_valid=rows < STEPS,
                terminated=np.zeros(STEPS + 1, bool),
                truncated=rows == STEPS - 1,
                timestamp=rows * 0.1,
                source_id=str(index),
            ),
        )
    made = writer.finish(2)
    record = provenance("test", {}, {}) | {"labeller": "test", "dataset_fingerprint": made.fingerprint}
    label = LabelWriter(made, "good", record)
    label.write_block(0, np.linspace(0, 1, made.num_frames, dtype=np.float32))
    label.finish()
    return path


@pytest.fixture(scope="module")
def bundle(store: Path) -> Path:
    folder = store.parent / "cloned"
    assert main(["train", "bc", str(store), "--out", str(folder), "--seeds", "1", "--steps", "2"]) == 0
    return folder / "seed_000"


def robomimic(path: Path, actions: np.ndarray) -> Path:
    """A robomimic-layout file with one demonstration."""
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo.attrs["num_samples"] = len(actions)
        demo.create_dataset("actions", data=actions)
        demo.create_dataset("dones", data=np.zeros(len(actions), np.int64))
        demo.create_dataset("rewards", data=np.zeros(len(actions)))
        demo.create_dataset("obs/joint_position", data=np.zeros((len(actions), 7)))
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        file["data"].attrs["total"] = len(actions)
    return path


def expect(capsys: pytest.CaptureFixture[str], words: list[object], *parts: str) -> None:
    capsys.readouterr()
    code = main([str(word) for word in words])
    output = capsys.readouterr()
    assert code == 2, output
    assert output.out == ""
    error = output.err[output.err.index("error: ") :]
    assert len(error.strip().splitlines()) <= 3, error
    assert "Traceback" not in output.err
    for part in parts:
        assert part in error, error


def test_a_good_import_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = robomimic(tmp_path / "demo.hdf5", np.zeros((20, 7)))
    assert main(["data", "import", str(source), str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1


def test_imports_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "store"
    expect(capsys, ["data", "import", tmp_path / "none.hdf5", target], "none.hdf5")
    whole = robomimic(tmp_path / "whole.hdf5", np.zeros((2000, 7))).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    expect(capsys, ["data", "import", tmp_path / "cut.hdf5", target], "cut.hdf5")
    expect(capsys, ["data", "import", robomimic(tmp_path / "empty.hdf5", np.zeros((0, 7))), target], "demo_0")
    actions = np.zeros((20, 7))
    actions[7, 3] = np.nan
    expect(capsys, ["data", "import", robomimic(tmp_path / "nan.hdf5", actions), target], "demo_0", "nan", "7")
    expect(capsys, ["data", "import", robomimic(tmp_path / "x.hdf5", actions), target, "--format", "d5rl"], "d4rl")
    assert not target.exists()


def test_stores_labels_and_cameras_that_are_not_there(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    expect(capsys, ["data", "info", tmp_path / "none"], "none")
    expect(capsys, ["data", "info", tmp_path], str(tmp_path))
    expect(capsys, ["train", "iql", store, "--reward", "goood", "--out", out], "goood", "Did you mean 'good'")
    expect(capsys, ["train", "iql", store, "--reward", "source", "--out", out], "no reward", "good")
    expect(capsys, ["train", "bc", store, "--out", out, "--keys", "joint_positoin"], "Did you mean 'joint_position'")
    expect(capsys, ["train", "bc", store, "--out", out, "--encoder", tmp_path / "none"], "none")
    expect(
        capsys, ["train", "bc", store, "--out", out, "--settings", "learning_rat", "1"], "Did you mean 'learning_rate'"
    )
    expect(capsys, ["pretrain", store, "--out", out, "--camera", "wrist"], "wrist", "side")
    expect(capsys, ["label", "clip", store, "--name", "x", "--goal", "up", "--camera", "wrist"], "wrist", "side")
    expect(capsys, ["label", "truth", store], "cube_position")
    expect(capsys, ["label", "audit", store, "godo"], "Did you mean 'good'")
    assert not (out / "train.json").exists()
    assert not (store / "labels" / "x").exists()


def test_a_pipeline_with_an_unknown_key(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"stages: {{clone: {{verb: train bc, store: {store}, out: '{{out}}/bc', sedes: 3}}}}")
    expect(capsys, ["run", path, "--out", tmp_path / "out"], "p.yaml", "'clone'", "'sedes'", "Did you mean 'seeds'")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("stages: {a: {verb: 3}}", "3 is no verb"),
        ("stages: {a: {verb: [x]}}", "is no verb"),
        ("stages: {1: {verb: info}}", "stage name 1"),
        ("stages: {../../a: {verb: info}}", "stage name '../../a'"),
        ("{out: [5], stages: {a: {verb: info}}}", "'out' is [5]"),
        ("stages: {a: {verb: data info, store: STORE}, a: {verb: info}}", "given twice"),
        ("stages: {a: {verb: train bc, store: STORE, out: STORE}}", "read and written"),
        ("stages: {a: {verb: data info, store: DAMAGED}}", "DAMAGED is not an EpisodeStore"),
    ],
)
def test_pipelines_that_are_refused(
    content: str,
    part: str,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("STORE").symlink_to(store)
    Path("DAMAGED").mkdir()
    (Path("DAMAGED") / "zarr.json").write_text('{"zarr_format"')
    Path("p.yaml").write_text(content)
    expect(capsys, ["run", "p.yaml", "--out", "out"], part)


def test_a_stage_that_is_no_mapping_cannot_be_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("stages: {a: hello}")
    expect(capsys, ["run", path, "--set", "a.store=3"], "stage 'a' is no mapping")


def test_outputs_that_are_inputs_or_in_a_store(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(store.rglob("*"))
    expect(capsys, ["train", "bc", store, "--out", store], "read and written")
    expect(capsys, ["pretrain", store, "--camera", "side", "--out", store / "labels" / "x"], "lies in the store")
    result = tmp_path / "result.json"
    result.write_text("{}")
    expect(capsys, ["compare", result, "--out", result], "read and written")
    assert sorted(store.rglob("*")) == files
    assert result.read_text() == "{}"


def test_two_commands_on_one_output(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with claimed(Touches(writes=(out,))):
        expect(capsys, ["train", "bc", store, "--out", out, "--steps", "2"], str(out), "another command")
    assert main(["train", "bc", str(store), "--out", str(out), "--seeds", "1", "--steps", "2"]) == 0


def test_paths_that_the_system_refuses(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    source = robomimic(tmp_path / "demo.hdf5", np.zeros((20, 7)))
    expect(capsys, ["data", "import", source, file / "store"], str(file), "Not a directory")
    expect(capsys, ["train", "bc", store, "--out", file / "out", "--steps", "2"], str(file), "Not a directory")


def test_damaged_or_foreign_hdf5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "store"
    expect(capsys, ["data", "import", robomimic(tmp_path / "flat.hdf5", np.zeros(20)), target], "(N, A)", "(20,)")
    text = robomimic(tmp_path / "text.hdf5", np.full((20, 7), b"a"))
    expect(capsys, ["data", "import", text, target], "not an array of numbers")
    good = robomimic(tmp_path / "good.hdf5", np.zeros((20, 7)))
    expect(capsys, ["data", "import", good, target, "--options", "control_dt", "0.1"], "no option 'control_dt'")
    with h5py.File(good, "a") as file:
        file["data"].attrs["env_args"] = "[1]"
        del file["data/demo_0/actions"]
        file.create_group("data/demo_0/actions")
    expect(capsys, ["data", "import", good, target], "'actions' is a group")
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        file.update({"observations": np.zeros((20, 3)), "actions": np.zeros(20), "terminals": np.zeros(20, bool)})
    expect(capsys, ["data", "import", tmp_path / "d4rl.hdf5", target], "(N, A)", "(20,)")
    assert not target.exists()


@pytest.mark.parametrize(
    "setting",
    [
        ("batch_size", "0"),
        ("learning_rate", "-1"),
        ("learning_rate", "nan"),
        ("hidden_sizes", "8,0"),
        ("discount", "2"),
        ("expectile", "5"),
        ("inverse_temperature", "-1"),
        ("reward_quantiles", "-0.1,0.9"),
    ],
)
def test_settings_out_of_range(
    setting: tuple[str, str], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    expect(capsys, ["train", "iql", store, "--reward", "good", "--out", out, "--settings", *setting], setting[0])
    assert not out.exists()


def test_results_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work, not after it."""
    (tmp_path / "file").write_text("")
    words = ["eval", "random", "--env", "robosuite/Lift"]
    expect(capsys, [*words, "--out", tmp_path], "is a folder")
    expect(capsys, [*words, "--film", tmp_path], "is a folder")
    expect(capsys, [*words, "--out", tmp_path / "file" / "x.json"], "file: File exists")
    expect(capsys, [*words, "--episodes", "1", "--workers", "-1"], "--workers")
    expect(capsys, ["robot", "sim", "--cameras", "front"], "no camera 'front'")
    expect(capsys, ["robot", "sim", "--image-size", "0"], "image size of 0")
    for horizon in ("0", "-1", "nan"):
        expect(capsys, ["deploy", tmp_path, "--horizon", horizon], "--horizon")


def test_a_report_of_swapped_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "success.json"
    result.write_text('{"env": "x", "initial_seeds": [], "policies": {}}')
    expect(capsys, ["report", tmp_path / "r.html", "--audit", result], "embodied label audit --out", "lacks")
    expect(capsys, ["report", tmp_path / "r.html", "--deployment", result], "embodied deploy --out", "lacks")
    assert not (tmp_path / "r.html").exists()


def test_stores_that_are_damaged(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zarr alone reads a chunk that is gone as zeros."""
    for damage, part in {
        "action/c": "chunks of 'action' are gone",
        "observation/images/side/c": "chunks of 'observation/images/side' are gone",
        "action": "array 'action' is gone",
        "labels": "group 'labels' is gone",
    }.items():
        damaged = tmp_path / damage.replace("/", "_")
        shutil.copytree(store, damaged)
        shutil.rmtree(damaged / damage)
        expect(capsys, ["data", "info", damaged], str(damaged), part)
        words = ["label", "clip", damaged, "--name", "x", "--goal", "cube", "--regularization", "0"]
        if "images" in damage:
            expect(capsys, words, part)
    attributes = json.loads((store / "zarr.json").read_text())
    del attributes["attributes"]["spec"]
    (tmp_path / "action" / "zarr.json").write_text(json.dumps(attributes))
    expect(capsys, ["data", "info", tmp_path / "action"], "lack 'spec'")


@pytest.mark.parametrize(("redirection", "code"), [("| head -c 0", 141), ("> /dev/full", 2), (">&-", 0), ("2>&-", 0)])
def test_standard_output_that_is_closed_or_full(redirection: str, code: int) -> None:
    program = f"{sys.executable} -c 'import sys; from embodied.cli import main; sys.exit(main([\"--help\"]))'"
    script = f"(sleep 0.3; {program}) {redirection}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == (1 if "full" in redirection else 0), ended.stderr


@pytest.mark.parametrize("verb", [["train", "bc"], ["pretrain", "--camera", "side"]])
@pytest.mark.parametrize("device", ["nope", "cuda:99"])
def test_a_device_that_is_not_there(
    verb: list[str], device: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, str(store), "--out", str(tmp_path / "out"), "--steps", "1", "--device", device]) == 2
    error = capsys.readouterr().err.strip()
    assert f"--device: '{device}' cannot be used here. There is: cpu" in error
    assert "Traceback" not in error


def test_bundles_that_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", bundle, "--env", "robosuite/Lift", "--episodes", "1"]
    contract = bundle / "contract.json"
    original = contract.read_text()
    contract.write_text(original + " ")
    expect(capsys, words, "contract.json", "altered")
    expect(capsys, ["deploy", bundle, "--env", "robosuite/Lift"], "contract.json", "altered")
    data = json.loads(original)
    del data["normalizer"]["joint_position"]
    contract.write_text(json.dumps(data))
    hashes = bundle / "hashes.json"
    kept = hashes.read_text()
    from embodied.contracts.provenance import hash_file

    hashes.write_text(json.dumps(json.loads(kept) | {"contract.json": hash_file(contract)}))
    expect(capsys, words, "normaliser", "'joint_position'")
    contract.write_text(original)
    hashes.write_text(kept)
    (bundle / "model.safetensors").rename(bundle / "away")
    expect(capsys, words, "model.safetensors is missing")
    (bundle / "away").rename(bundle / "model.safetensors")
    for name, content in {
        "model.safetensors": (bundle / "model.safetensors").read_bytes()[:100],
        "config.json": json.dumps({"kind": "policy", "schema": 1}).encode(),
        "hashes.json": b"[]",
    }.items():
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content)
        if name != "hashes.json":
            hashes.write_text(json.dumps(json.loads(kept) | {name: hash_file(bundle / name)}))
        expect(capsys, words, str(bundle), "cannot be read as a bundle")
        (bundle / name).write_bytes(whole)
        hashes.write_text(kept)


def test_a_bundle_that_does_not_fit_the_environment(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(capsys, ["eval", bundle, "--env", "robosuite/Lift", "--episodes", "1"], "joint_position", "(2,)")


def test_learning_data_are_normalised_and_privileged_keys_left_out(store: Path) -> None:
    from embodied.datasets.store import EpisodeStore
    from embodied.progress import Progress
    from embodied.train import learning_data

    opened = EpisodeStore(store)
    data, contract = learning_data(opened, (), "good", None, Progress())
    np.testing.assert_allclose(data.observations.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.observations.std(0), 1, atol=1e-4)
    assert list(contract.observations) == ["joint_position"]
    score = opened.label("good").score
    np.testing.assert_array_equal(data.reward, score[data.frame + 1])
    assert len(data.frame) == 2 * STEPS
    spec = opened.spec.observations["joint_position"]
    opened.spec.observations["joint_position"] = dataclasses.replace(spec, privileged=True)
    from embodied.contracts.errors import InputError

    with pytest.raises(InputError, match="no observation that a robot could know"):
        learning_data(opened, (), "good", None, Progress())
