"""The layers: a file imports only from those above it, each heavy package has one door, and no test file imports another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.paths import PACKAGE, TESTS

FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# Layers, top to bottom (what the command line is made of comes last). A name is a module or a folder at the top of cifar/.
LAYERS = [
    ["errors", "states"],
    ["system"],
    ["registry", "flops", "kernels"],
    ["cost"],
    ["tracking"],
    ["config"],
    ["data", "models", "optim", "probes"],
    ["training"],
    ["sweeps"],
    ["integrations"],
    ["report"],
    ["sidecar"],
    ["agent"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

DOORS = {  # package -> the files that may import it
    "wandb": ["integrations/wandb/"],
    "wandb_workspaces": ["integrations/wandb/report.py"],
    "thop": ["flops/"],
    "matplotlib": ["report/", "cli/preview.py"],
    "optuna": ["sweeps/"],
    "sklearn": ["report/importance.py"],
    "sqlalchemy": ["sweeps/"],
    "typer": ["cli/"],
    "rich": ["cli/console.py", "training/callbacks.py", "agent/rich_dashboard.py"],
    "requests": ["data/"],
    "psutil": ["system/sampler.py", "system/machine.py"],  # by the sidecar only
    "pynvml": ["system/sampler.py"],  # light bindings: a training on a GPU reads its energy counter by them
    "onnx": ["training/onnx_export.py"],  # the extra `onnx`
    "onnxruntime": ["training/onnx_export.py"],
    "torchvision": [],  # two seconds of import; the tests compare with it
}
NO_TORCH = (
    "errors",
    "states",
    "registry",
    "config/",
    "tracking/run_dir",
    "tracking/cleanup",
    "report/",
    "sidecar",
    "integrations/",
    "agent/options",
    "cli/app",
    "cli/completion",
    "cli/console",
    "cli/maintenance",
    "cli/options",
    "cli/report",
    "cli/sweep",
    "cli/train",
    "sweeps/distributions",
    "sweeps/early_stopping",
    "sweeps/objectives",
)


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted name, line) of everything that a file imports, inside functions too; not what only type checkers see."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_point_upwards(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the notebook's helpers import what they need when they are called
    assert top(path) in LEVEL, f"{place(path)} is in no layer; add it to LAYERS where it belongs"
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "cifar" and len(parts) > 1 and parts[1] in LEVEL:
            theirs, ours = LEVEL[parts[1]], LEVEL[top(path)]
            inside = parts[1] == top(path)
            assert inside or theirs < ours, f"{place(path)}:{line} imports {name}, which is not above it"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_heavy_packages_have_one_door(path: Path) -> None:
    for name, line in imports(path):
        package = name.split(".")[0]
        if package in DOORS:
            assert any(place(path).startswith(door) for door in DOORS[package]), f"{place(path)}:{line} imports {package}"
        if package == "torch":
            assert not place(path).startswith(NO_TORCH), f"{place(path)}:{line} imports torch"


def test_train_knows_nothing_of_ours() -> None:
    assert not [name for name, _ in imports(PACKAGE / "training" / "step.py") if name.startswith("cifar")]


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def find_module(name: str, known: set[str]) -> str | None:
    """The module of ours that a dotted name lies in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names of which each imports the next and the last the first, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        cycle = next((found for other in sorted(graph[name]) if (found := visit(other, [*way, name]))), [])
        done.add(name)
        return cycle

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_modules_import_each_other_in_no_cycle() -> None:
    known = {name_module(path) for path in FILES}
    graph = {}
    for path in FILES:
        ours = name_module(path)
        graph[ours] = {found for name, _ in imports(path) if (found := find_module(name, known))} - {ours}
    assert not (cycle := find_cycle(graph)), " -> ".join(cycle)
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"], "it would be found"


def test_few_modules_lie_at_the_top() -> None:
    top_modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(top_modules) <= 8, top_modules


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_file_is_imported(path: Path) -> None:
    """What several test files share is in tests/helpers or a conftest.py."""
    for name, line in imports(path):
        parts = name.split(".")
        ours = parts[0] in ("tests", "unit", "integration", "conftest") or any(part.startswith("test_") for part in parts)
        assert not ours, f"{path.relative_to(TESTS)}:{line} imports {name}"
