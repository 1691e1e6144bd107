"""The layers: a file imports only from those above it, and each heavy package has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cifar"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# Layers, top to bottom (what the door is made of comes last). A name is a file or a folder of cifar/.
LAYERS = [
    ["errors"],
    ["registry", "system", "flops", "kernels"],
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
    "wandb_workspaces": ["integrations/wandb/"],
    "thop": ["flops.py"],
    "matplotlib": ["report/", "cli/preview.py"],
    "optuna": ["sweeps/"],
    "sqlalchemy": ["sweeps/"],
    "typer": ["cli/"],
    "rich": ["cli/console.py", "training/callbacks.py", "agent/rich_dashboard.py"],
    "requests": ["data/"],
    "torchvision": [],  # two seconds of import; the tests compare with it
}
NO_TORCH = (
    "errors",
    "registry",
    "config/",
    "tracking/run_dir",
    "tracking/cleanup",
    "report/",
    "sidecar",
    "integrations/",
    "cli/app",
    "cli/sweeps_app",
    "cli/options",
    "cli/console",
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


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500  # phase B splits the longest; then the rule goes
