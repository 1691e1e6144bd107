"""Pretrained networks by name: which is found, what is checked before it is used, and each mistake in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import cifar
from cifar.cli.app import main
from cifar.errors import UserError
from cifar.tracking.pretrained import (
    MAX_TRACKED_BYTES,
    find_pretrained,
    find_run_or_pretrained,
    list_pretrained,
    list_pretrained_names,
    read_card,
)
from cifar.tracking.run_dir import RunDir
from helpers import hostile
from helpers.fake_runs import write
from helpers.paths import PACKAGE
from helpers.pretrained import NAME, write_pretrained


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pretrained network that this test's programs know."""
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    return write_pretrained(tmp_path / "zoo")


def test_it_is_loaded_by_name(folder: Path, runs: Path) -> None:
    """The file, read by hand, has the network's weights."""
    loaded = cifar.load(NAME).state_dict()
    there = torch.load(folder / "weights.pt", weights_only=True)
    assert loaded.keys() == there.keys()
    assert all(torch.equal(loaded[name], there[name].to(loaded[name].dtype)) for name in loaded)
    assert torch.float16 in {tensor.dtype for tensor in there.values()}
    assert torch.float16 not in {tensor.dtype for tensor in loaded.values()}
    assert not cifar.load(NAME).training and cifar.load(NAME)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert cifar.load(folder).state_dict().keys() == loaded.keys(), "also by its path"
    assert not list(folder.glob("owner*"))


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_bit_is_refused(place: str, folder: Path) -> None:
    content = bytearray((folder / "weights.pt").read_bytes())
    content[{"start": 0, "middle": len(content) // 2, "end": -1}[place]] ^= 4
    (folder / "weights.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt is damaged: its SHA-256 is .* install the package"):
        cifar.load(NAME)


def test_a_card_with_another_digest_is_refused(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    card["weights"]["sha256"] = "0" * 64
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="says 000000000000"):
        cifar.load(NAME)


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their digest is right; a tensor is missing."""
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    write_pretrained(tmp_path / "zoo", content=(tmp_path / "other.pt").read_bytes())
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    with pytest.raises(UserError, match="does not hold the weights"):
        cifar.load(NAME)


@pytest.mark.parametrize("kind", [kind for kind in hostile.KINDS if "link to nothing" not in kind and kind != "nothing"])
def test_a_damaged_card_is_one_sentence(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.place_input(hostile.Input(kind=kind), folder / "card.json")
    assert main(["evaluate", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "card.json" in err, err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"macs": "many"}, "macs is missing or wrong"),
        ({"accuracy": 1.5}, "accuracy is"),
        ({"accuracy": float("nan")}, "accuracy is"),
        ({"row": None}, "row or weights is missing"),
        ({"row": {"mean": 0.5, "n": -1}}, "row.n is"),
        ({"weights": {"format": "int8", "bytes": 5, "sha256": "../../x"}}, "weights.sha256 is"),
        ({"weights": []}, "row or weights is missing"),
        ({"per_class": {"cat": "half"}}, "per_class is"),
        ({"training": {"epochs": "many"}}, "training is"),
        ({"classes": "cat"}, "classes is"),
    ],
)
def test_a_card_that_lacks_something_says_what(change: dict[str, object], word: str, folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    assert read_card(folder) == card
    (folder / "card.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(UserError, match=f"card.json is damaged .*{word}.*install the package"):
        cifar.load(NAME)


def test_the_others_are_listed_beside_a_damaged_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pretrained(folder.parent, "frontier-whole")
    (folder / "card.json").write_text("{")
    assert main(["models", "--pretrained"]) == 0
    said = capsys.readouterr()
    assert "frontier-tiny/card.json is damaged" in said.err and "frontier-whole" in said.out
    assert main(["models", "--pretrained", NAME]) == 2


def test_missing_weights_say_where_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are not here, as those of a network of the second package; then that package is installed."""
    installed = tmp_path / "site" / "cifar_frontier_weights"
    shutil.copytree(folder, installed / NAME)
    (installed / "__init__.py").write_text("raise SystemExit('it is not imported')")
    (folder / "weights.pt").unlink()
    run = ["dataset=stand-in", "val_size=0", "device=cpu"]
    for words in (
        ["evaluate", NAME],
        ["export", str(folder), "--onnx", str(tmp_path / "x.onnx")],
        ["profile", "--latency", NAME],
        ["train", *run, f"teacher={NAME}", "--wandb", "disabled"],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "the weights of frontier-tiny are not installed" in err and "cifar_frontier_weights-*.whl" in err, err
    assert main(["train", "--from", NAME, "--dry-run"]) == 0, "its configuration is here"
    with pytest.raises(UserError, match="not installed"):
        cifar.load(folder)
    assert not next(each for each in list_pretrained()[0] if each.name == NAME).is_installed
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert cifar.load(NAME)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert next(each for each in list_pretrained()[0] if each.name == NAME).folder == installed / NAME


@pytest.mark.parametrize(
    "name",
    ["frontier-tin", "frontier-tiny/", "../frontier-tiny", "FRONTIER-TINY", "frontier-tiny\n", "frontier\x1b[31m", "a" * 5000],
)
def test_unknown_and_hostile_names_are_one_sentence(
    name: str, folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no run "):
        cifar.load(name)
    for words in (["evaluate", name], ["train", f"--from={name}", "--dry-run"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: no run ") and len(err.splitlines()) == 1 and "\x1b" not in err, err
        assert "frontier-tiny" in err, "it names what there is"
    assert find_pretrained(name) is None


def test_a_folder_with_a_wrong_name_is_no_network(folder: Path) -> None:
    folder.rename(folder.parent / ".hidden")
    assert NAME not in list_pretrained_names() and ".hidden" not in list_pretrained_names()


def test_a_run_of_that_id_comes_first_and_a_run_of_that_name_does_not(folder: Path, runs: Path) -> None:
    write(runs, "abc", name=NAME)
    assert find_run_or_pretrained(NAME, runs).path == folder
    write(runs, NAME)
    assert find_run_or_pretrained(NAME, runs).path == runs / NAME


def test_its_record_is_never_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="pretrained network, whose record stays as it is"):
        RunDir(folder).acquire()
    assert main(["report", str(folder)]) == 2
    assert "models --pretrained frontier-tiny" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder)]) == 2
    assert "to repeat it: python -m cifar train --from frontier-tiny" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_the_package_has_is_whole_and_small() -> None:
    """Every card can be read, every weights file is the one of its card, and all of them have 12 MiB at most."""
    known, problems = list_pretrained()
    assert not problems
    networks = [each for each in known if PACKAGE in each.folder.parents]
    for each in networks:
        assert each.name == each.card["name"] and each.card["row"]["n"] >= 1
        assert RunDir(each.folder).state == "finished" and RunDir(each.folder).read_json("config")["seed"] == min(
            each.card["row"]["seeds"]
        )
        if each.is_installed:
            cifar.load(each.name)
    sizes = [(each.folder / "weights.pt").stat().st_size for each in networks if each.is_installed]
    assert sum(sizes) <= MAX_TRACKED_BYTES
