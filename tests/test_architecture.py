"""The rooms of the house: who may import whom, and where torch's private names are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wus_ext"

#: From the ground up: a module imports from its own floor or from below.
FLOORS = [
    {"_build", "_version", "_machine", "_torch"},
    {"functional"},
    {"nn"},
    {"models", "engine"},
    {"distributed", "reference"},
    {"conversion"},
    {"methods"},
    {"profiling"},
    {"training", "integrations"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


class Running(ast.NodeTransformer):
    """Leaves out what is imported for annotations only."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imported(module: Path, *, running: bool = False) -> Iterator[tuple[str, ...]]:
    """Modules of this package that a module imports, as paths of names."""
    package = ("wus_ext", *module.parent.parts)
    tree: ast.AST = ast.parse((PACKAGE / module).read_text())
    for node in ast.walk(Running().visit(tree) if running else tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                if source[:1] == ("wus_ext",):
                    yield (*source[1:], alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "wus_ext":
                    yield tuple(alias.name.split(".")[1:])


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_nothing_is_imported_from_above(module):
    for target in imported(module):
        if not target or target[0] not in LEVEL:
            assert LEVEL[room(module)] > LEVEL["conversion"], f"{module} imports the package itself"
            continue
        assert LEVEL[target[0]] <= LEVEL[room(module)], f"{module} imports {'.'.join(target)}"


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_private_names_of_torch_are_in_one_file(module):
    if module.name == "_torch.py":
        return
    tree = ast.parse((PACKAGE / module).read_text())
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if re.match(r"torch(\.\w+)*\._[a-zA-Z]", name)]


def test_no_circle_inside_a_room():
    for name in ("engine", "conversion", "distributed", "methods", "training"):
        modules = [module for module in MODULES if module.parts[0] == name]
        paths = {module.with_suffix("").parts: module for module in modules}
        graph = {}
        for module in modules:
            targets = {paths.get(t) or paths.get(t[:-1]) for t in imported(module, running=True)}
            graph[module] = targets - {None, module}
        while graph:
            free = [module for module, targets in graph.items() if not targets & graph.keys()]
            assert free, f"these import each other: {sorted(map(str, graph))}"
            for module in free:
                del graph[module]
