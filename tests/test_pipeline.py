"""`embodied run`: what is unchanged is skipped, what changed runs with all that depends on it, a kill is survived."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from embodied import verbs
from embodied.contracts.errors import ConfigError, InputError
from embodied.pipeline import Run, fingerprint, load_yaml, run
from embodied.pipeline import as_text as run_text
from embodied.progress import Progress
from embodied.verbs import Touches, Verb

CALLS: list[str] = []


@dataclasses.dataclass(frozen=True)
class Copy:
    """Write the text of `source` and `text` into `target`."""

    target: Path
    source: Path | None = None
    text: str = ""
    fail: bool = False


def touches(config: Copy) -> Touches:
    return Touches((config.source,) if config.source else (), (config.target,), (Path(f"{config.target}.partial"),))


def copy(config: Copy, progress: Progress) -> dict[str, Any]:
    CALLS.append(config.target.name)
    assert not config.target.exists(), "a verb must not find its own output"
    content = (config.source.read_text() if config.source else "") + config.text
    if config.fail:
        raise InputError("asked to fail")
    config.target.write_text(content)
    return {"length": len(content)}


@pytest.fixture(autouse=True)
def _verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "copy_verb", sys.modules[__name__])
    monkeypatch.setitem(verbs.VERBS, "test copy", Verb("copy_verb:copy", "copy"))
    CALLS.clear()


PIPELINE = """
stages:
  a: {verb: test copy, target: "{out}/a", text: one}
  b: {verb: test copy, target: "{out}/b", source: "{out}/a", text: two}
  c: {verb: test copy, target: "{out}/c", text: three}
"""


def write(folder: Path, text: str = PIPELINE) -> Path:
    path = folder / "p.yaml"
    path.write_text(text)
    return path


def go(path: Path, out: Path, *changes: str, plan: bool = False) -> dict[str, Any]:
    return run(Run(path, out, changes, plan), Progress())


def test_runs_in_order_then_skips_everything(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    first = go(path, out)
    assert CALLS == ["a", "b", "c"]
    assert (out / "b").read_text() == "onetwo"
    assert first["stages"]["b"]["result"] == {"length": 6}
    second = go(path, out)
    assert CALLS == ["a", "b", "c"]
    assert {s["state"] for s in second["stages"].values()} == {"skipped"}
    assert second["stages"]["b"]["result"] == {"length": 6}
    assert "skipped" in run_text(second)


def test_a_change_runs_the_stage_and_its_dependants_only(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    go(path, out)
    CALLS.clear()
    go(path, out, "a.text=ONE")
    assert CALLS == ["a", "b"]
    assert (out / "b").read_text() == "ONEtwo"
    CALLS.clear()
    go(path, out, "a.text=ONE", "c.text=THREE")
    assert CALLS == ["c"]


def test_plan_runs_nothing(tmp_path: Path) -> None:
    plan = go(write(tmp_path), tmp_path / "out", plan=True)
    assert CALLS == []
    assert plan["stages"]["a"] == {"state": "to run"}


def test_a_lost_output_is_made_again(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    go(path, out)
    (out / "c").unlink()
    CALLS.clear()
    go(path, out)
    assert CALLS == ["c"]


def test_a_moved_output_folder_stays_cached(tmp_path: Path) -> None:
    path = write(tmp_path)
    go(path, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    CALLS.clear()
    go(path, tmp_path / "moved")
    assert CALLS == []


def test_an_outside_input_counts_by_content(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("x")
    text = 'stages:\n  a: {verb: test copy, target: "{out}/a", source: "{here}/source.txt"}\n'
    path, out = write(tmp_path, text), tmp_path / "out"
    go(path, out)
    os.utime(source, (0, 0))
    go(path, out)
    assert CALLS == ["a"]
    source.write_text("y")
    go(path, out)
    assert CALLS == ["a", "a"]
    assert (out / "a").read_text() == "y"


def test_changed_code_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    go(path, out)
    CALLS.clear()
    monkeypatch.setitem(verbs.VERBS, "test copy", Verb("copy_verb:copy", "copy", ("statistics.py",)))
    go(path, out)
    assert CALLS == ["a", "b", "c"]


def test_code_that_counts_is_what_the_verb_imports() -> None:
    from embodied.pipeline import ROOT, _imported

    def names(verb: str) -> set[str]:
        file = verbs.VERBS[verb].target.split(":")[0].removeprefix("embodied.") + ".py"
        return {path.relative_to(ROOT).as_posix() for path in _imported({ROOT / file})}

    assert {"policies/icvf.py", "policies/networks.py", "datasets/store.py", "contracts/specs.py"} <= names("pretrain")
    assert not any(name.startswith(("sim/", "robot_bridge/", "vlm_rewards/")) for name in names("pretrain"))
    assert "datasets/read_rosbag.py" in names("data import")
    assert not any(name.startswith("sim/") for name in names("label success"))
    assert "sim/suites.py" in names("label clip")  # a sweep asks the simulator for the truth
    assert "sim/robosuite_lift.py" in names("sim collect")
    assert "policies/iql.py" not in names("sim collect")


def test_a_failed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    with pytest.raises(InputError, match="asked to fail"):
        go(path, out, "b.fail=true")
    assert CALLS == ["a", "b"]
    go(path, out)
    assert CALLS == ["a", "b", "b", "c"]


def test_stale_staging_is_cleared_but_a_resumed_stage_keeps_its_own(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    with pytest.raises(InputError):
        go(path, out, "a.fail=true")
    staging = out / "a.partial"
    staging.write_text("half")
    with pytest.raises(InputError):
        go(path, out, "a.fail=true")
    assert staging.exists(), "the same configuration resumes from it"
    go(path, out)
    assert not staging.exists(), "another configuration must not"


def test_what_the_pipeline_did_not_make_is_not_overwritten(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("precious")
    with pytest.raises(ConfigError, match="did not make"):
        go(path, out)
    assert (out / "a").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stages: {a: {verb: test copi, target: x}}",
            "stage 'a': There is no verb 'test copi'. Did you mean 'test copy'",
        ),
        ("stages: {a: {verb: test copy, targt: x}}", "stage 'a': unknown key 'targt'. Did you mean 'target'"),
        ("stages: {a: {verb: test copy}}", "stage 'a': the key 'target' is missing"),
        ("stages: {a: {target: x}}", "the key 'verb' is missing"),
        ("stages: {a: {verb: test copy, target: x, fail: maybe}}", "stage 'a': Expected `bool`"),
        ("stages: {a: {verb: test copy, target: x, text: [1]}}", "stage 'a': Expected `str`"),
        ("stage: {}", "unknown key 'stage'. Did you mean 'stages'"),
        ("stages: []", "'stages' must be a mapping"),
        ("- 1", "a pipeline file is a mapping"),
        ("stages: {a: {verb: test copy", "is not YAML"),
        ("stages:\n  a: {verb: test copy, target: x}\n  a: {verb: test copy, target: y}", "'a' is given twice"),
        (
            'stages:\n  b: {verb: test copy, target: b, source: "{out}/a"}\n  a: {verb: test copy, target: "{out}/a"}',
            "Move 'a' before 'b'",
        ),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        go(write(tmp_path, text), tmp_path / "out")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert CALLS == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["a", "a.text", "=x", "d.text=x", "a.text=["])
def test_a_wrong_change_is_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        go(write(tmp_path), tmp_path / "out", change)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such pipeline file"):
        load_yaml(tmp_path / "none.yaml")


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".stages").mkdir(parents=True)
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from embodied.pipeline import _claimed
        with _claimed(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another run"):
            go(write(tmp_path), out)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    go(write(tmp_path), out)
    assert CALLS == ["a", "b", "c"]


def test_the_shipped_pipeline_is_sound(tmp_path: Path) -> None:
    """Every stage's keys are right, and what it reads is written by an earlier stage or comes with the package."""
    from embodied.pipeline import plan_stages
    from embodied.quickstart import PIPELINE as SHIPPED

    stages = plan_stages(load_yaml(SHIPPED), Run(SHIPPED), tmp_path)
    written: set[Path] = set()
    for stage in stages:
        for path in stage.touches.reads:
            assert SHIPPED.parent in path.parents or any(p in written for p in (path, *path.parents)), (
                stage.name,
                path,
            )
        written |= set(stage.touches.writes)
    names = [stage.verb for stage in stages]
    for verb in (
        "sim collect",
        "pretrain",
        "label clip",
        "train iql",
        "train bc",
        "eval",
        "deploy",
        "data import",
        "report",
    ):
        assert verb in names
    assert names[-1] == "report"
    assert all(tmp_path in path.parents for path in written)


def test_fingerprint_of_a_folder_sees_names_sizes_and_times(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("1")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    time.sleep(0.01)
    (folder / "x").write_text("2")
    assert fingerprint(folder) != before
    assert fingerprint(tmp_path / "none") == "absent"


def exit_code(result: dict[str, Any]) -> int:
    return int(result["length"] == 13)


def test_a_stage_that_ends_with_an_exit_code_stops_the_pipeline(tmp_path: Path) -> None:
    """As `data doctor` does where it finds an error: nothing is built on a store that is not sound."""
    file = tmp_path / "p.yaml"
    stages = [
        "  a: {verb: test copy, target: '{out}/a', text: thirteenchars}",
        "  b: {verb: test copy, target: '{out}/b'}",
    ]
    file.write_text("\n".join(["stages:", *stages]))
    with pytest.raises(InputError, match=r"Stage 'a' \(test copy\) ended with exit code 1"):
        run(Run(file, out=tmp_path / "out"), Progress())
    assert not (tmp_path / "out" / "b").exists()


def test_fingerprint_of_what_lies_at_a_url() -> None:
    system = fsspec.filesystem("memory")
    place = Path("memory://test-pipeline/in")
    assert fingerprint(place) == "absent"
    system.pipe_file("/test-pipeline/in/a", b"1")
    first = fingerprint(place)
    system.pipe_file("/test-pipeline/in/b", b"22")
    assert fingerprint(place) not in (first, "absent")
    system.pipe_file("/test-pipeline/in/zarr.json", b'{"attributes": {"fingerprint": "abc"}}')
    assert fingerprint(place) == "abc"
