"""The floors of the package: each folder imports from those below it alone, and no two files import each other.

Imports inside functions count too. `docs/architecture.md` draws the floors; its walks from a block to kernels are checked here.
"""

import ast
import re
from pathlib import Path

import pytest
from tree import ROOT

PACKAGE = ROOT / "res2net_fused"
FLOORS = (
    "_native", "_tables", "_timing", "chain", "backends", "ops", "modules", "patching", "models", "testing", "bench", "tuning",
    "cli",
)  # fmt: skip
OUTSIDE = {"__init__", "__main__", "_moved"}  # the public names, and the old ones
FILES = sorted(PACKAGE.rglob("*.py"))
LARGEST = 500  # lines of a file


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(module: str, path: Path) -> set[str]:
    """The package's modules that this one imports, wherever in it; "" is the package itself."""
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "res2net_fused":
            base = (node.module or "").split(".")[1:]
        else:
            continue
        name = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{name}.{alias.name}" if name else alias.name
            found.add(inner if inner in MODULES else name)
    return found - {module}


IMPORTS = {module: imported(module, path) for module, path in MODULES.items()}


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


def test_every_file_is_on_a_floor():
    assert {module.split(".")[0] for module in MODULES if module} == {*FLOORS, *OUTSIDE} - {"__init__"}


@pytest.mark.parametrize("module", [m for m in MODULES if m and m not in OUTSIDE])
def test_imports_go_down(module):
    up = {other for other in IMPORTS[module] if other and other not in OUTSIDE and floor_of(other) > floor_of(module)}
    assert not up, f"{module} imports {', '.join(sorted(up))} from a floor above it"


def test_no_circles():
    """A package's __init__ is reached by importing any of its files; only what it imports by name makes an edge here."""
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, " -> ".join((*way[way.index(module) :], module))
        state[module] = 1
        for other in sorted(IMPORTS[module] & MODULES.keys()):
            visit(other, (*way, module))
        state[module] = 2

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= LARGEST


def test_the_walk_of_the_page_follows_imports():
    """Each arrow from one file to the next in docs/architecture.md is an import, but for kernels that are no Python."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    walks = [re.findall(r"`((?:res2net_fused|csrc)/[\w/.]+)`", line) for line in page.splitlines() if " -> " in line]
    walks = [walk for walk in walks if len(walk) > 1]
    assert len(walks) >= 4, "one walk for each kind of kernel"
    for walk in walks:
        for first, second in zip(walk, walk[1:], strict=False):
            assert (ROOT / second).exists(), second
            if second.endswith(".py") and "/__init__" not in second and "selection.py" not in first:
                name = module_of(ROOT / second)
                reached = IMPORTS[module_of(ROOT / first)]
                assert name in reached, f"{first} does not import {second}"
