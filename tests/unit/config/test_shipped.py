"""The shipped files by name, by their path in a checkout, and from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar.config import shipped
from cifar.config.resolve import find_experiment
from cifar.errors import UserError
from helpers.paths import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["experiments", "sweeps"])
def test_a_checkout_ships_its_folders(kind: str) -> None:
    names, folder = shipped.shipped_names(kind), ROOT / kind
    files = [path for path in folder.rglob("*.yaml") if "studies" not in path.parts]
    assert names == sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files) and len(names) > 5
    for name in names:
        for spelling in (name, f"{kind}/{name}.yaml", f"./{kind}/{name}", f"{kind}/{name}"):
            assert shipped.find_shipped(kind, spelling) == ROOT / kind / f"{name}.yaml"
    for wrong in ("absent", f"{names[0]}.yaml", f"other/{names[0]}.yaml", "", "../pyproject"):
        assert shipped.find_shipped(kind, wrong) is None


def test_a_wheel_has_them_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar/_shipped/experiments"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("lr: 0.5\n")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "cifar")
    assert shipped.shipped_names("experiments") == ["mine"]
    assert find_experiment("mine") == find_experiment("experiments/mine.yaml") == folder / "mine.yaml"


def test_a_file_of_ones_own_comes_first() -> None:
    assert find_experiment("experiments/worksheet1.yaml") == ROOT / "experiments/worksheet1.yaml"
    Path("experiments").mkdir()
    Path("experiments/worksheet1.yaml").write_text("lr: 0.5\n")
    assert find_experiment("experiments/worksheet1.yaml") == Path("experiments/worksheet1.yaml")
    assert find_experiment("worksheet1") == ROOT / "experiments/worksheet1.yaml"


def test_an_unknown_name_suggests_up_to_three() -> None:
    for wrong in ("workshet", "workshet.yaml", "experiments/workshet.yaml"):
        with pytest.raises(UserError, match=rf"unknown experiment '{wrong}': did you mean 'worksheet\d' or 'worksheet\d'\?"):
            find_experiment(wrong)
