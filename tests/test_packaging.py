"""The wheel holds every module and data file of the tree, and each module imports from the wheel alone."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("datasets", "vlm_rewards", "policies", "sim", "robot_bridge")
DATA_SUFFIXES = {".xml", ".json", ".yaml", ".html", ".css", ".typed", ".safetensors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tracked layout, so that the checkout gets no build folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "embodied", *ROOMS):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source / name)], check=True)
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def tree_files() -> set[str]:
    """Paths inside the package, as the wheel should hold them."""
    folders = {"embodied": ROOT / "embodied", "embodied/contracts": ROOT / "embodied" / "contracts"}
    folders |= {f"embodied/{room}": ROOT / room for room in ROOMS}
    files = set()
    for name, folder in folders.items():
        for path in folder.iterdir():
            if path.suffix == ".py" or (path.is_file() and path.suffix in DATA_SUFFIXES):
                files.add(f"{name}/{path.name}")
    for path in (ROOT / "vlm_rewards" / "clip-lift").glob("*"):
        files.add(f"embodied/vlm_rewards/clip-lift/{path.name}")
    return files


def test_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == tree_files()


def test_every_module_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = sorted(
        path.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in (tmp_path / "embodied").rglob("*.py")
    )
    script = (
        "import importlib, sys\n"
        # The editable install of this checkout must not help out.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path = [{str(tmp_path)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        f"for name in {names!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_every_declared_requirement_is_pinned() -> None:
    """`constraints.txt` is installed with --no-deps, so a requirement it lacks would simply be absent."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wanted = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        wanted += [Requirement(text) for text in texts if extra != "all"]
    for requirement in wanted:
        matching = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(requirement.name)]
        assert matching, f"{requirement} is not in constraints.txt; run `make lock`"
        for pin in matching:
            assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} breaks {requirement}"
