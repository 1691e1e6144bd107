"""The experiment and sweep files that come with the package: top-level folders of a checkout, copied into a wheel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(kind: str) -> Path:
    """`kind`: "experiments" or "sweeps". A wheel has it inside the package, a checkout beside it."""
    installed = PACKAGE / "_shipped" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def shipped_names(kind: str) -> list[str]:
    """The names of the shipped files, without `.yaml`, sorted. Files in sub-folders keep their folder: `frontier/41m`."""
    folder = shipped_folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in _yaml_files(folder))


def find_shipped(kind: str, name: str) -> Path | None:
    """The file of a shipped experiment or sweep by its name, as in `shipped_names`; None where there is none.

    Also by its path in a checkout: `sweeps/quickstart.yaml` is the shipped file in any folder that has none of that name.
    A bare `quickstart.yaml` is a file of the current folder only, so that a wrong folder is noticed.
    """
    if name.endswith(".yaml") and not name.removeprefix("./").startswith(f"{kind}/"):
        return None
    name = strip_to_name(kind, name)
    return shipped_folder(kind) / f"{name}.yaml" if name in shipped_names(kind) else None


def strip_to_name(kind: str, path: str) -> str:
    """sweeps/quickstart.yaml -> quickstart"""
    return path.removeprefix("./").removeprefix(f"{kind}/").removesuffix(".yaml")


def _yaml_files(folder: Path) -> Iterable[Path]:
    studies = folder / "studies"  # what a study is made of: sweeps and tables, no experiments
    return (path for path in folder.rglob("*.yaml") if studies not in path.parents)
