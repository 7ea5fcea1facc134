"""How the modules of the package import each other: in one direction, and the research from nowhere below."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import beagle

ROOT = Path(beagle.__file__).parent
# from below to above: a module imports from its own line and those above it in this list
LAYERS = [
    {"errors", "limits", "hf", "files", "memory", "threads", "ranks"},
    {"targets"},
    {"drafters"},
    {"decoding"},
    {"model", "meta", "beagle"},
    {"training", "integrations", "serving", "evaluation", "vllm"},
    {"research"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of the package, also inside functions and ``if TYPE_CHECKING``."""
    files = {_name(path): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        used: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{name}: relative import"
                # a module of the folder, or a name in the module
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {module if module in files else node.module for module in full}
        found[name] = {module for module in used if module in files} - {name}
    return found


def _name(path: Path) -> str:
    return ".".join(("beagle", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def part(module: str) -> str:
    """The folder, or the file at the root, of a module."""
    return module.split(".")[1] if "." in module else module


def test_imports_are_found():
    assert "beagle.errors" in imports()["beagle.files"] | imports()["beagle.model"]
    assert len(imports()) > 100
    assert {part(name) for name in imports()} <= set(LEVEL)


def test_only_research_and_its_commands_import_research():
    users = {name for name, used in imports().items() if any(part(module) == "research" for module in used)}
    assert {name for name in users if part(name) != "research"} == {"beagle.cli.research"}


def in_circles() -> set[str]:
    """Modules from which imports lead back to themselves."""
    reached = {name: set(used) for name, used in imports().items()}
    grew = True
    while grew:
        grew = False
        for found in reached.values():
            more = set().union(*(reached[name] for name in found)) - found
            found |= more
            grew |= bool(more)
    return {name for name, found in reached.items() if name in found}


def test_no_circles():
    assert in_circles() == set()


def upward() -> set[tuple[str, str]]:
    return {
        (name, module)
        for name, used in imports().items()
        for module in used
        if module != "beagle" and LEVEL[part(module)] > LEVEL[part(name)] and name != "beagle"
    }


def test_no_imports_from_above():
    assert upward() == set()
