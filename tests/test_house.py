"""The map of the house: imports go down, layer by layer, and never in a circle."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "prism_jax"

# From the ground up. A module imports from its own layer and from those below.
LAYERS = (
    ("types", "rng", "errors", "paths", "progress", "control_groups", "environment"),
    ("parallel",),
    ("models",),
    ("core",),
    ("data",),
    ("teachers", "training", "labelling"),
    ("synthesis", "diffusion"),
    ("config",),
    ("analysis",),
    ("stages",),
    ("pipeline", "programs"),
    ("accelerators",),
    ("plan",),
    ("main",),
    ("cells",),
    ("compare",),
    ("audit",),
    ("tools",),
    ("report",),
)


def imports(source: str, modules: set[str]) -> set[str]:
    """The package's modules that a module imports, wherever in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        found |= {name for name in names if name in modules and name != PACKAGE}
    return found


@functools.cache
def house() -> dict[str, set[str]]:
    """Every module of the package, and what it imports."""
    paths = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports(path.read_text("utf-8"), set(paths)) for name, path in paths.items()}


def layer(module: str) -> int:
    """The floor of a module; -1: the package's own front door, which imports lazily."""
    room = module.split(".")[1] if "." in module else None
    return next((i for i, rooms in enumerate(LAYERS) if room in rooms), -1)


def upward(found: dict[str, set[str]]) -> list[str]:
    """Imports that go up."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(found.items())
        for other in sorted(others)
        if layer(other) > layer(module) >= 0
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, and those that need them."""
    left = dict(found)
    while free := [m for m, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_every_room_has_a_floor():
    assert [m for m in house() if "." in m and layer(m) < 0] == []
    there = {m.split(".")[1] for m in house() if "." in m}
    assert {room for rooms in LAYERS for room in rooms} == there


def test_imports_go_down():
    assert upward(house()) == []


def test_there_is_no_circle():
    assert circle(house()) == []


@pytest.mark.parametrize("module, line, check", [
    ("prism_jax.core.views", "from prism_jax.stages import recover", upward),
    ("prism_jax.types", "import prism_jax.parallel", upward),
    ("prism_jax.config.layout", "def f():\n    from prism_jax.config import resolve", circle),
    ("prism_jax.synthesis.recipe", "from prism_jax.synthesis.step import select", circle),
])  # fmt: skip
def test_an_import_that_goes_up_or_round_is_seen(module, line, check):
    found = dict(house())
    found[module] = found[module] | imports(line, set(found))
    assert check(found)


def test_the_contributor_s_map_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    order = text[text.index("From the ground up") :].split("\n\n")[0]
    at = [order.index(f"`{room}`") for rooms in LAYERS for room in rooms]
    assert at == sorted(at)
