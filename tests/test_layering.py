"""The house stands: who may import whom, rooms flat and without `__init__.py`, imports absolute and namespaced."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("datasets", "vlm_rewards", "policies", "sim", "robot_bridge")
# What each part may import of the project. A name with a dot allows that one module.
MAY_IMPORT: dict[str, set[str]] = {
    "contracts": set(),
    "datasets": {"contracts"},
    "vlm_rewards": {"contracts", "datasets"},
    "policies": {"contracts", "datasets"},
    "sim": {"contracts", "datasets"},
    "robot_bridge": {"contracts", "policies.bundle"},
    "front door": {"contracts", *ROOMS},
}
FRONT_DOOR_NAMES = {"contracts", *ROOMS}


def part_of(path: Path) -> str:
    """The row of `MAY_IMPORT` that a file of the tree belongs to."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "embodied":
        return "contracts" if len(parts) > 2 else "front door"
    return parts[0]


def source_files() -> list[Path]:
    folders = [ROOT / "embodied", ROOT / "embodied" / "contracts", *(ROOT / room for room in ROOMS)]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also those inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}"


def faults(part: str, source: str) -> list[str]:
    """What the imports of one source text break, given the part of the house it stands in."""
    found = []
    for line, name in imported_modules(ast.parse(source)):
        if name.startswith("."):
            found.append(f"{line}: relative import '{name}'")
            continue
        top, *rest = name.split(".")
        if top in ROOMS and top != "datasets":  # plain `datasets` is Hugging Face's package
            found.append(f"{line}: '{name}' is a second copy of embodied.{name}; import that")
        if top != "embodied":
            continue
        room = rest[0] if rest else ""
        if room not in FRONT_DOOR_NAMES:  # `import embodied`, `from embodied import __version__`, a front-door module
            if part not in ("front door", "contracts") or (part == "contracts" and room and room != "__version__"):
                found.append(f"{line}: '{name}' belongs to the front door, which nobody imports")
            continue
        allowed = MAY_IMPORT[part] | {part}
        if room not in allowed and ".".join(rest[:2]) not in allowed:
            found.append(f"{line}: {part} may not import '{name}'")
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert faults(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source", "allowed"),
    [
        ("datasets", "from embodied.contracts.errors import InputError", True),
        ("datasets", "import datasets", True),
        ("policies", "def f():\n    from embodied.sim.render import render", False),
        ("policies", "from policies.iql import IQL", False),
        ("policies", "from .iql import IQL", False),
        ("sim", "from embodied.cli import main", False),
        ("sim", "from embodied import progress", False),
        ("contracts", "import embodied", True),
        ("contracts", "from embodied.datasets.store import EpisodeStore", False),
        ("robot_bridge", "from embodied.policies.bundle import load_policy", True),
        ("robot_bridge", "from embodied.policies import bundle", True),
        ("robot_bridge", "from embodied.policies.networks import StackedMLP", False),
        ("front door", "from embodied.policies.networks import StackedMLP", True),
    ],
)
def test_the_check_itself_tells_right_from_wrong(part: str, source: str, allowed: bool) -> None:
    assert (faults(part, source) == []) is allowed


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_flat_and_has_no_init(room: str) -> None:
    folder = ROOT / room
    assert not (folder / "__init__.py").exists(), "an __init__.py here would hide Hugging Face's `datasets`"
    nested = [p for p in folder.glob("*/**/*.py") if "__pycache__" not in p.parts]
    assert nested == [], "rooms are flat: the wheel would lack these"
    link = ROOT / "embodied" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
