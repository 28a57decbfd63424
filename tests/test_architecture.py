"""The house keeps its floors: imports go down or stay in their room, and the light paths stay light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import weightsmith

PACKAGE = Path(weightsmith.__file__).parent
GROUND = ("errors", "registry", "runs", "tensors", "checkpoints", "testbed", "evaluation")
WINGS = ("training", "merging", "compression", "alignment", "multimodal", "agents")
FACE = ("reports", "recipes", "cli")


def allowed(room: str) -> set[str]:
    """Rooms that `room` may import besides itself."""
    if room in GROUND:
        return set(GROUND[: GROUND.index(room)])
    if room in WINGS:
        return set(GROUND)
    return set(GROUND) | set(WINGS) | set(FACE[: FACE.index(room)])


def imported_rooms(module: Path) -> set[str]:
    """First path component below `weightsmith` of everything a module imports, lazily or not."""
    rooms = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "weightsmith"
                else [f"weightsmith.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("weightsmith.")}
    return rooms - {"__version__"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in GROUND)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_or_stay_in_the_room(module):
    room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_rooms(module) - {room} <= allowed(room)


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {*GROUND, *WINGS, *FACE}


@pytest.mark.parametrize(
    "light",
    [
        "weightsmith",
        "weightsmith.registry",
        "weightsmith.cli.main",
        "weightsmith.runs",
        "weightsmith.checkpoints",
        "weightsmith.merging",
        "weightsmith.merging.engine",
        "weightsmith.recipes",
        "weightsmith.testbed",
    ],
)
def test_a_light_module_imports_neither_torch_nor_transformers(light):
    program = f"import sys, {light}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


LAZY = sorted(path for path in PACKAGE.rglob("__init__.py") if "_HOMES = {" in path.read_text())


@pytest.mark.parametrize("init", LAZY, ids=lambda path: str(path.parent.relative_to(PACKAGE)))
def test_a_name_that_loads_late_is_no_modules_name(init):
    """Importing the module would put it in the place of what the room exports."""
    room = importlib.import_module(".".join(["weightsmith", *init.parent.relative_to(PACKAGE).parts]))
    modules = {path.stem for path in init.parent.iterdir() if path.name != "__pycache__"}
    assert not modules & set(room._HOMES)
