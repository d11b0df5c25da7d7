"""Imports run one way: read from the source, those inside functions included."""

import ast
from pathlib import Path

import torchsft

ROOT = Path(torchsft.__file__).parent
# What a room may import besides itself, config among them.
ROOMS = {
    "ops": {"config"},
    "precision": {"config", "ops"},
    "models": {"config", "ops", "precision"},
    "data": {"config"},
    "optim": {"checkpoint", "config", "models"},
    "parallel": {"config", "data", "models", "ops", "precision"},
    "metrics": {"config", "data", "models", "parallel"},
    "planning": {"config", "data", "models", "ops", "optim", "parallel"},
    "checkpoint": {"config", "data", "models", "parallel", "precision"},
}


def imports_of(path: Path) -> set[str]:
    """Modules and names of torchsft that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "torchsft"}


def modules() -> dict[str, set[str]]:
    """Every module, and the modules that it imports."""
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = ["torchsft", *path.relative_to(ROOT).with_suffix("").parts]
        paths[".".join(parts).removesuffix(".__init__")] = path
    return {name: imports_of(path) & paths.keys() for name, path in paths.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_each_room_imports_only_what_lies_below_it():
    for module, imported in modules().items():
        room = room_of(module)
        if room in ROOMS:
            rooms = {room_of(name) for name in imported} - {room, ""}
            assert rooms <= ROOMS[room], (module, rooms - ROOMS[room])


def test_no_modules_import_each_other_in_a_circle():
    waiting = modules()
    while waiting:
        free = [
            name for name, imported in waiting.items() if not imported & waiting.keys() - {name}
        ]
        assert free, f"these import each other: {sorted(waiting)}"
        for name in free:
            del waiting[name]
