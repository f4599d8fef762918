"""The command line: fast, short help, one-to-three-line errors with exit code 2, JSON on request."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embodied.cli import main, overview
from embodied.config import fill, to_json
from embodied.contracts.errors import ConfigError
from embodied.sim_collect import SimCollect
from embodied.verbs import VERBS, Touches

HEAVY = ("torch", "zarr", "mujoco", "open_clip", "scipy", "tyro", "matplotlib", "cyclonedds")


def expect_error(capsys: pytest.CaptureFixture[str], words: list[str], *parts: str) -> None:
    """Run a command that must fail with exit code 2, nothing on standard output, at most three lines, no traceback."""
    code = main(words)
    output = capsys.readouterr()
    assert code == 2, output
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert len(output.err.strip().splitlines()) <= 3, output.err
    assert "Traceback" not in output.err
    for part in parts:
        assert part in output.err, output.err


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    script = f"import sys, embodied.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_and_help_take_half_a_second_at_most() -> None:
    times = []
    for _ in range(3):  # the best of three: other work on this machine is not the command line's fault
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "embodied.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_fits_a_screen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: embodied {verb}" in text
    assert len(text.splitlines()) <= 40
    assert "(required)" not in text or "--" in text or "positional" in text


def test_overview_names_every_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == overview()
    for verb in VERBS:
        assert len(re.findall(rf"^  {verb}  ", text, re.MULTILINE)) == 1
    assert main(["data", "--help"]) == 0
    assert "sim collect" not in capsys.readouterr().out


def test_version_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.match(r"embodied \d+\.\d+\.\d+", capsys.readouterr().out)
    assert main(["info", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["packages"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["no verb 'trian'"]),
        (["data", "imprt"], ["no verb 'data imprt'", "Did you mean 'data import'"]),
        (["info", "--jsno"], ["no option '--jsno'", "Did you mean '--json'"]),
        (["sim", "collect", "robosuite/Lift", "x", "--episode", "3"], ["--episode", "Did you mean '--episodes'"]),
        (["sim", "collect", "robosuite/Lift", "x", "--episodes", "many"], ["--episodes", "many"]),
        (["sim", "collect"], ["ENV"]),
        (["data", "info", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["data", "info", __file__], [Path(__file__).name]),
        (["compare", "/nowhere/result.json"], ["/nowhere/result.json", "no such file"]),
        (["compare", __file__], ["no result of 'embodied eval'"]),
        (["run", "/nowhere/p.yaml"], ["/nowhere/p.yaml"]),
        (["eval", "/nowhere/bundle", "--env", "robosuite/Lift"], ["/nowhere/bundle"]),
        (["eval", "scripted", "--env", "robosuite/Lfit"], ["robosuite/Lfit", "Did you mean 'robosuite/Lift'"]),
        (["label", "truth", "/nowhere/store"], ["/nowhere/store"]),
    ],
)
def test_a_mistake_gets_a_short_error(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(capsys, words, *parts)


def test_a_folder_that_cannot_be_written_is_an_error_not_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import embodied.info

    def full(config: embodied.info.Info, progress: object) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    monkeypatch.setattr(embodied.info, "info", full)
    expect_error(capsys, ["info"], "/some/file", "No space left on device")


def test_json_has_null_where_a_number_is_not_finite(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import embodied.info

    def undefined(config: embodied.info.Info, progress: object) -> dict[str, object]:
        return {"a": float("nan"), "b": [1.5, (float("inf"),)]}

    monkeypatch.setattr(embodied.info, "info", undefined)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, [None]]}


def test_an_interrupt_says_that_the_work_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import embodied.info

    def interrupted(config: embodied.info.Info, progress: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(embodied.info, "info", interrupted)
    assert main(["info"]) == 130
    assert "goes on where" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_keeps_the_form_that_a_pipeline_relies_on(verb: str) -> None:
    import dataclasses

    loaded = VERBS[verb].load()
    assert dataclasses.is_dataclass(loaded.config_type)
    assert loaded.config_type.__dataclass_params__.frozen  # type: ignore[attr-defined]
    required = {
        field.name: ("x",) if "tuple" in str(field.type) else "x"
        for field in dataclasses.fields(loaded.config_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    config = fill(loaded.config_type, required, verb)
    assert isinstance(loaded.touches(config), Touches)
    assert fill(loaded.config_type, to_json(config), verb) == config, "the configuration survives JSON"


def test_fill_converts_and_refuses() -> None:
    config = fill(SimCollect, {"env": "e", "store": "s", "cameras": ["side"]}, "here")
    assert config == SimCollect("e", Path("s"), cameras=("side",))
    with pytest.raises(ConfigError, match=r"here: unknown key 'camera'\. Did you mean 'cameras'"):
        fill(SimCollect, {"env": "e", "store": "s", "camera": "side"}, "here")
    with pytest.raises(ConfigError, match="here: the key 'store' is missing"):
        fill(SimCollect, {"env": "e"}, "here")
    with pytest.raises(ConfigError, match=r"here: Expected `int`.*episodes"):
        fill(SimCollect, {"env": "e", "store": "s", "episodes": "many"}, "here")
    with pytest.raises(ConfigError, match=r"here: .*int 3"):
        fill(SimCollect, {"env": "e", "store": 3}, "here")
