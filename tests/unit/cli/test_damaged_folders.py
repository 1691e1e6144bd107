"""One damaged run or sweep is named, and no command fails for the others."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from cifar.cli.app import main
from cifar.sweeps import local, spec
from helpers import hostile
from helpers.fake_runs import write

SWEEP = "method: grid\nname: grid\nparameters: {model: {value: conv4}, epochs: {value: 1}, lr: {values: [0.1, 0.2]}}\n"


@pytest.fixture
def sweeps(tmp_path: Path, runs: Path) -> dict[str, Path]:
    (tmp_path / "grid.yaml").write_text(SWEEP)
    made = {
        name: local.create_sweep(spec.read_sweep(tmp_path / "grid.yaml"), runs, fixed={"dataset": "stand-in"}) for name in "ab"
    }
    gc.collect()  # a connection to a database that is closed later would write its log over the damage
    return {name: runs / "sweeps" / sweep_id for name, sweep_id in made.items()}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sweep.yaml", b"\xff\xfe"),
        ("sweep.json", b'{"created": 1e300}'),
        ("study.db", b"garbage" * 999),
        *(
            pytest.param(file, content, marks=pytest.mark.slow)
            for file, content in (
                ("sweep.yaml", None),
                ("sweep.yaml", b"method: [1"),
                ("sweep.yaml", b"5"),
                ("sweep.json", b"{"),
                ("sweep.json", b"{}"),
                ("study.db", None),
            )
        ),
    ],
)
def test_a_damaged_sweep_is_listed_beside_the_others(
    sweeps: dict[str, Path], file: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweeps["a"] / file
    path.unlink() if content is None else path.write_bytes(content)
    for name in ("study.db-wal", "study.db-shm") if file == "study.db" else ():
        (sweeps["a"] / name).unlink(missing_ok=True)
    assert main(["sweeps", "list", "--json"]) == 0
    listed = {sweep["id"]: sweep for sweep in json.loads(capsys.readouterr().out)["sweeps"]}
    assert listed[sweeps["b"].name]["trials"] == {"waiting": 2} and not listed[sweeps["b"].name]["error"]
    assert listed[sweeps["a"].name]["error"]
    assert main(["sweeps", "status", sweeps["a"].name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert main(["sweeps", "status", sweeps["b"].name]) == 0


@pytest.mark.parametrize("kind", [*hostile.KINDS, "not UTF-8", "nested"])
@pytest.mark.parametrize("file", ["run.json", "config.json", "status.json", "metrics.jsonl"])
def test_a_damaged_run_is_named_and_the_others_go_on(
    runs: Path, file: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id in ("good", "bad"):
        write(runs, run_id, model="conv4", epochs=2, state="interrupted")
    data = {"not UTF-8": b"\xff", "nested": b"[" * 9999}.get(kind, b"")
    hostile.place_input(hostile.Input(data, "" if data else kind), runs / "bad" / file)
    assert main(["gc", "--dry-run"]) == 0
    assert main(["gc", "--dry-run", "--days", "0"]) == 0
    assert "good" in capsys.readouterr().out
    code = main(["train", "--resume", "bad", "lr=1"])  # refused for its change at the latest
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argument", ["lr=\udcff", "--name=\udcff", "\udcff"])
def test_arguments_that_are_no_text_are_one_sentence(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", argument, "--dry-run"]) == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["abc", "-5", "nan", "0"])
def test_a_wrong_lease_is_said_before_anything_is_opened(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", value)
    assert main(["sweeps", "status", "nowhere1"]) == 2
    assert "CIFAR_LEASE" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["postgresql://u:p@h:abc/db", "sqlite:////dev/zero", "sqlite://", "sqlite:///:memory:", "x"])
def test_a_wrong_storage_is_one_sentence(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CIFAR_STORAGE", url)
    assert main(["sweeps", "status", "nowhere1"]) == 2
    assert "storage" in capsys.readouterr().err
