"""The door: help is quick, work ends in files and one exit code, every mistake in one sentence and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import cifar
from cifar.cli.app import main
from cifar.tracking import cleanup
from cifar.tracking.run_dir import RunDir

TINY = ["--dataset", "stand-in", "--wandb", "disabled", "model=conv", "width=4", "epochs=1", "batch_size=32", "train_size=64"]
TINY += ["val_size=100", "threads=1"]
SWEEP = """
    method: grid
    metric: {name: val/acc, goal: maximize}
    parameters:
      model: {value: conv}
      width: {values: [2, 4]}
      dataset: {value: stand-in}
      epochs: {value: 1}
      batch_size: {value: 32}
      train_size: {value: 64}
      val_size: {value: 100}
"""
COMMANDS = ["train", "sweep", "agent", "report", "models", "profile", "data", "evaluate", "config", "gc", "doctor"]
COMMANDS += ["sweeps list", "sweeps status", "sweeps stop"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no CIFAR-10 but where a test puts it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("CIFAR_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(cifar.__file__).parent.parent))  # for child processes, where it is not installed
    return tmp_path / "work"


def write(name: str, text: str) -> str:
    Path(name).write_text(textwrap.dedent(text))
    return name


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a mistake is answered with; exit code 2 and silence elsewhere are checked here."""
    code = main(list(arguments))
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code
    return capsys.readouterr().out


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """`python -m cifar --help` in under half a second: no torch, wandb, pydantic, numpy or matplotlib."""
    command = [sys.executable, "-X", "importtime", "-m", "cifar", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(cifar.__file__).parent.parent)
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not modules & {"torch", "wandb", "pydantic", "numpy", "matplotlib", "optuna", "yaml"}
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "Usage" in printed(capsys, *command.split(), "--help")


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Commands" in printed(capsys)


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown command": (["trian"], "trian"),
    "unknown option": (["gc", "--dry"], "--dry-run"),
    "missing argument": (["sweep"], "FILE"),
    "bad option value": (["agent", "x", "--workers", "0"], "--workers"),
    "unknown model": (["train", "model=resnt20"], "did you mean 'resnet20'"),
    "unknown key": (["train", "lrr=0.1"], "did you mean 'lr'"),
    "key of another optimizer": (["train", "optimizer=adam", "momentum=0.9"], "'adam' does not take 'momentum'"),
    "wrong type": (["train", "epochs=many"], "epochs = 'many'"),
    "not a pair": (["train", "epochs"], "key=value"),
    "not a pair, like an option": (["train", "--epochs"], "key=value"),
    "unknown experiment": (["train", "--experiment", "worksheet"], "did you mean 'worksheet"),
    "unknown device": (["train", *TINY, "device=abacus"], "device 'abacus'"),
    "unknown run to repeat": (["train", "--from", "nothing"], "no run 'nothing'"),
    "unknown run to resume": (["train", "--resume", "nothing"], "no run 'nothing'"),
    "unknown run to evaluate": (["evaluate", "nothing"], "no run 'nothing'"),
    "trial that is not there": (["train", "--trial", "absent.json"], "absent.json"),
    "W&B without a key": (["train", *TINY, "--wandb", "online"], "wandb login"),
    "unknown sweep to join": (["agent", "nosweep"], "nosweep"),
    "unknown sweep to look into": (["sweeps", "status", "nosweep"], "nosweep"),
    "unknown sweep to report": (["report", "nosweep"], "nosweep"),
    "nothing to report": (["report"], "no runs"),
    "bad budget": (["report", "--budget", "much"], "50M"),
    "sweep file that is not there": (["sweep", "absent.yaml"], "absent.yaml"),
    "unknown network to profile": (["profile", "resnt20"], "did you mean 'resnet20'"),
    "password on the command line": (["agent", "x", "--storage", "postgresql://me:secret@host/db"], "CIFAR_STORAGE"),
    "no network to profile": (["profile", "--time"], "--experiment"),
    "picture that cannot be written": (["data", "--dataset", "stand-in", "--show", "--out", "no/such/a.png"], "--out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str], here: Path, runs: Path
) -> None:
    arguments, said = MISTAKES[case]
    assert said in mistake(capsys, *arguments)
    assert not runs.exists() and list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [["agent", "some-sweep"], ["sweep", "some.yaml"]])
def test_torchrun_starts_no_agents(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in mistake(capsys, *arguments)


SWEEP_MISTAKES = {
    "test metric": (SWEEP.replace("val/acc", "test/acc"), "val/acc"),
    "malformed YAML": (SWEEP + "  - [", "not valid YAML"),
    "unknown key": (SWEEP.replace("width", "witdh"), "did you mean 'width'"),
    "key of another optimizer": (SWEEP + "      momentum: {values: [0.9, 0.8]}\n", "does not take 'momentum'"),
    "wrong type": (SWEEP.replace("[2, 4]", "[2, wide]"), "width"),
    "no validation": (SWEEP.replace("{value: 100}", "{value: 0}"), "val_size"),
    "not a mapping": ("- 1\n- 2\n", "mapping"),
}


@pytest.mark.parametrize("case", SWEEP_MISTAKES)
def test_a_bad_sweep_is_refused_before_anything_is_made(case: str, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    text, said = SWEEP_MISTAKES[case]
    assert said in mistake(capsys, "sweep", write("sweep.yaml", text))
    assert not runs.exists()


def test_a_bad_trial_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[1]"):
        assert "trial.json" in mistake(capsys, "train", "--trial", write("trial.json", text))


@pytest.mark.parametrize("damage", ["corrupt batch", "truncated archive"])
@pytest.mark.parametrize("command", ["train", "sweep", "data"])
def test_damaged_data_is_named_before_anything_is_made(
    damage: str, command: str, capsys: pytest.CaptureFixture[str], here: Path, runs: Path
) -> None:
    if damage == "corrupt batch":
        named = here / "cifar-10-batches-py" / "data_batch_3"
        named.parent.mkdir()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
            (named.parent / name).write_bytes(b"not what it was")
    else:
        named = here / "cifar-10-python.tar.gz"
        named.write_bytes(b"\x1f\x8b\x08" + bytes(1000))
    file = write("sweep.yaml", SWEEP.replace("stand-in", "cifar10"))
    before = sorted(here.rglob("*"))
    options = {"train": ["train", "model=conv", "--wandb", "disabled"], "sweep": ["sweep", file], "data": ["data"]}[command]
    said = mistake(capsys, *options, "--data-dir", str(here))
    assert named.name in said or named.parent.name in said
    assert not runs.exists() and sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_file_in_the_place_of_the_runs_folder(command: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "taken").write_text("a file")
    file = write("sweep.yaml", SWEEP)
    arguments = ["train", *TINY] if command == "train" else ["sweep", file]
    assert "--runs-dir" in mistake(capsys, *arguments, "--runs-dir", str(here / "taken"))
    assert (here / "taken").read_text() == "a file" and len(list(here.iterdir())) == 2


@pytest.mark.slow
def test_no_space_for_the_run_folder(here: Path, runs: Path) -> None:
    """A file-size limit stands for a full disk: the run's first file cannot be written."""
    script = f"""
        import resource, signal, sys
        import cifar.cli.app, cifar.training.run, cifar.training.trainer
        from cifar import data
        data.load("stand-in", None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        sys.exit(cifar.cli.app.main({["train", *TINY]!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and "--runs-dir" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not runs.exists() or not list(runs.iterdir())


# -- work --------------------------------------------------------------------------------------------------------------


def test_a_run_from_its_command_to_its_repetition(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    out = printed(capsys, "train", *TINY, "lr=3e-4", "--name", "[red]mine", "--tags", "a,b")
    record = RunDir(next(runs.iterdir()))
    assert "STAND-IN" in out and "[red]mine" in out and str(record.path) in out
    assert f"python -m cifar train --from {record.id}" in out
    assert record.state == "finished" and {"a", "b"} <= set(record.read_json("run")["tags"])
    assert record.read_json("config")["lr"] == 3e-4
    assert list((record.path / "pictures").glob("*.png")), "a run's folder holds its pictures"

    printed(capsys, "train", "--from", record.id, "--wandb", "disabled")
    again = RunDir(next(path for path in runs.iterdir() if path != record.path))
    assert again.read_json("config") == record.read_json("config")
    assert (again.path / "weights.pt").read_bytes() == (record.path / "weights.pt").read_bytes()

    shown = printed(capsys, "evaluate", record.id)
    assert f"{100 * record.read_json('summary')['val/acc']:.2f} %" in shown
    assert "is finished" in mistake(capsys, "train", "--resume", record.id)
    assert "keeps its values" in mistake(capsys, "train", "--resume", record.id, "lr=1")
    changed = printed(capsys, "train", "--from", record.id, "--dry-run", "optimizer=sgd", "schedule=cosine")
    assert re.search(r"momentum +0.9 +default", changed) and "beta1" not in changed and "MMACs" in changed

    with torch.inference_mode():
        assert cifar.load(record.id)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    table = cifar.runs(record.id)
    assert table[0]["id"] == record.id and "<table>" in table._repr_html_()


def test_a_wandb_trial_keeps_its_ids_and_types(
    capsys: pytest.CaptureFixture[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "run12345")
    trial = write("trial.json", json.dumps({"lr": 1e-5, "conv": {"width": 2.0}, "seed": 1}))
    printed(capsys, "train", "--trial", trial, *[pair for pair in TINY if pair != "width=4"])
    record = RunDir(runs / "run12345")
    assert (record.read_json("run")["sweep"], record.read_json("run")["swept"]) == ("sweep123", ["lr", "width", "seed"])
    assert record.read_json("config")["lr"] == 1e-5 and record.read_json("config")["width"] == 2


def test_ctrl_c_and_resume(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From outside: 130, one line on stderr, a checkpoint, and the command that goes on."""
    long = [pair.replace("epochs=1", "epochs=120") for pair in TINY]
    command = [sys.executable, "-m", "cifar", "train", *long, "max_steps=1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
    try:
        deadline = time.monotonic() + 90
        while not list(runs.glob("*/metrics.jsonl")) or not next(runs.glob("*/metrics.jsonl")).stat().st_size:
            assert time.monotonic() < deadline and child.poll() is None, child.communicate()
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    record = RunDir(next(runs.iterdir()))
    assert child.returncode == 130 and err == "interrupted\n" and record.state == "interrupted"
    assert f"python -m cifar train --resume {record.id}" in out and (record.path / "checkpoint.pt").exists()
    assert "120 epochs" in printed(capsys, "train", "--resume", record.id, "--wandb", "disabled")
    assert [row["epoch"] for row in record.read_rows()] == list(range(1, 121)) and record.state == "finished"


def test_looking_changes_nothing(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    out = printed(capsys, "config", "--experiment", "worksheet1", "epochs=3")
    assert re.search(r"epochs +3 +command line", out) and re.search(r"lr +0.001 +.*worksheet1.yaml", out)
    assert "40,813,184" in printed(capsys, "profile", "resnet20") or "40.81 MMACs" in printed(capsys, "profile", "resnet20")
    assert "no sweeps" in printed(capsys, "sweeps", "list")
    out = printed(capsys, "doctor")
    assert all(word in out for word in ("python", "GPU", "CIFAR-10", "W&B", "runs folder"))
    out = printed(capsys, "data", "--dataset", "stand-in", "--verify", "--show", "cutout=8", "--out", "batch.png")
    assert "as they have to be" in out and Path("batch.png").read_bytes().startswith(b"\x89PNG")
    assert not runs.exists()


@pytest.mark.parametrize("together", [1, 2])
def test_a_steps_time_is_told_operation_by_operation(capfd: pytest.CaptureFixture[str], runs: Path, together: int) -> None:
    network = ["model=conv", "width=4"]
    convolutions = len(re.findall(r"^\S+ +conv ", printed(capfd, "profile", *network), re.M))
    how = [*network, "dataset=stand-in", "val_size=200", "train_size=256", "batch_size=64", "device=cpu", "probe_every=2"]
    out = printed(capfd, "profile", "--time", *how, "--steps", "3", "--together", str(together))
    ms = {
        name.strip(): float(number.replace(",", ""))
        for name, number in re.findall(r"^(.+?)  +(?:\d+  +)?([\d,]+\.\d{3})", out, re.M)
    }
    assert "batch size 64, stand-in images, cpu" in out and "4 steps" in out
    assert ("2 trials side by side" in out) == (together == 2)
    whole = ms["an epoch's beginning"] + 4 * ms["a step"] + 2 * (ms["a step the probes see"] - ms["a step"]) + ms["evaluation"]
    assert ms["an epoch in all"] == pytest.approx(whole, abs=0.02)  # half of the steps are seen
    assert ms["aten::convolution_backward"] > 0 and ms["in all"] > 0 and "100 %" in out
    calls = re.search(r"aten::convolution_backward +(\d+)", out)
    assert calls and int(calls[1]) == convolutions * together > 0
    assert capfd.readouterr().err == "" and not runs.exists()


def test_gc_takes_what_nothing_needs(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    old, day = time.time() - 40 * 86400, 86400
    for name, state, age in [("done", "finished", 40), ("left", "interrupted", 40), ("fresh", "interrupted", 1)]:
        record = RunDir.create(runs, name, {"name": name}, {})
        record.set_status(state)
        (record.path / "checkpoint.pt").write_bytes(b"x" * 1000)
        (record.path / ".summary.json.torn").write_text("{")
        for file in [*record.path.iterdir(), record.path]:
            os.utime(file, (time.time() - age * day,) * 2)
    assert "4 things" in printed(capsys, "gc", "--dry-run") and (runs / "left").exists()
    printed(capsys, "gc")
    assert sorted(path.name for path in runs.iterdir()) == ["done", "fresh"]
    assert not (runs / "done" / "checkpoint.pt").exists() and (runs / "fresh" / "checkpoint.pt").exists()
    assert cleanup.find_leftovers(runs, days=30) == []
    for file in [*(runs / "done").iterdir(), runs / "done"]:
        os.utime(file, (old, old))
    printed(capsys, "gc", "--finished")
    assert [path.name for path in runs.iterdir()] == ["fresh"]


# -- one file per addition ---------------------------------------------------------------------------------------------

PLUGINS = {
    "models/mine.py": """
        from torch import nn
        from cifar.registry import models
        @models.register("mine")
        def mine(*, flavour: int = 1) -> nn.Module:
            "A network of one's own."
            return nn.Sequential(nn.Conv2d(3, flavour, 8, 8), nn.Flatten(), nn.Linear(16 * flavour, 10))
    """,
    "optim/signed.py": """
        from cifar.optim import Group, Optimizer, Parameters
        from cifar.registry import optimizers
        def rule(params, grads, state, hyper):
            for p, g in zip(params, grads, strict=True):
                p.sub_(hyper["lr"] * g.sign())
        @optimizers.register("signed")
        def signed(parameters: Parameters, *, lr: float = 0.01) -> Optimizer:
            "Steps of one size."
            return Optimizer([Group(list(parameters.tensors), list(parameters.tensors.values()), rule, {"lr": lr})])
    """,
    "probes/span.py": """
        from cifar.registry import probes
        @probes.register("span")
        class Span:
            "Largest weight."
            labels = {"span": ("largest weight", "")}
            layers = []
            def start(self, parameters): ...
            def after_update(self, parameters):
                return {"span": max(p.detach().abs().max() for p in parameters.values())}
    """,
    "figures/dots.py": """
        from cifar.registry import figures
        @figures.register("dots")
        class Dots:
            scope, title = "sweep", "Dots"
            def select(self, comparison):
                return [(p.macs, p.mean) for p in comparison.points]
            def draw(self, data, figure):
                figure.subplots().plot(*zip(*data), "o")
    """,
}


@pytest.mark.slow  # test_docs.py trains an addition of each kind in each `make test`
def test_an_addition_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    """A network, an optimizer, a probe and a figure in a folder of one's own: found, and swept by a key of their own."""
    for name, text in PLUGINS.items():
        path = tmp_path / "plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    file = SWEEP.replace("{value: conv}", "{value: mine}").replace("width", "flavour")
    file += "      optimizer: {value: signed}\n      max_steps: {value: 2}\n"
    environment = {**os.environ, "CIFAR_PLUGINS": str(tmp_path / "plugins")}
    command = [sys.executable, "-m", "cifar", "sweep", write("sweep.yaml", file), "--wandb", "disabled"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = next((runs / "sweeps").iterdir())
    assert (sweep / "report" / "dots.png").exists() and "STAND-IN" in done.stdout
    records = [RunDir(runs / f"{sweep.name}-{cell:03d}") for cell in (0, 1)]
    assert [record.read_json("config")["flavour"] for record in records] == [2, 4]
    assert all("span" in next(record.read_rows()) and record.state == "finished" for record in records)
    shutil.rmtree(tmp_path / "plugins")
    assert "flavour" in mistake(capsys, "sweep", "sweep.yaml") or "mine" in mistake(capsys, "sweep", "sweep.yaml")
