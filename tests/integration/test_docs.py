"""Every command of the documents: run at tiny sizes, or parsed by the real command line. How each is treated is listed here.

A command that no list names fails `test_every_command_is_treated`. Commands that are run get the overrides of `shrink` behind
their own words, so that what a document says is parsed and bound as it stands, and then made small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.app import app, main
from cifar.sweeps import local, spec
from cifar.tracking.run_dir import RunDir
from helpers.documents import GENERATED, Block, Command, documents, name_of, read_blocks, read_commands
from helpers.local_sweeps import create_local_sweep
from helpers.paths import ROOT

# -- how each command is treated ---------------------------------------------------------------------------------------

# Whole pages are run from top to bottom, with their files.
PAGES = ("docs/tutorial.md", "docs/extending.md")

# Run by each `make test`.
RUN = """
cifar --version
cifar COMMAND -h
cifar config
cifar config --experiment worksheet1 optimizer=sgd
cifar data --show --out augmented.png flip=alternating cutout=8
cifar data --verify
cifar evaluate RUN --split val
cifar gc
cifar gc --days 7
cifar gc --dry-run
cifar models --pretrained
cifar models --pretrained frontier-28m
cifar profile resnet20
cifar profile resnet width=32
cifar report
cifar report --json
cifar sweep my_sweep.yaml --dry-run
cifar sweep worksheet1_tuning --no-agent
cifar sweeps extend SWEEP my_sweep.yaml
cifar sweeps list
cifar sweeps retry SWEEP
cifar sweeps status SWEEP
cifar sweeps stop SWEEP
cifar train model=resnet20 --dry-run
"""

# Run by `make test-slow`: they start processes, or take seconds of training.
RUN_SLOWLY = """
cifar agent SWEEP
cifar agent SWEEP --time-limit 50m
cifar agent SWEEP --workers 2
cifar data
cifar data --show flip=alternating cutout=8
cifar doctor
cifar doctor --json
cifar evaluate RUN --split test
cifar export RUN --onnx network.onnx
cifar export frontier-28m --onnx frontier-28m.onnx
cifar models
cifar models --no-time --json
cifar profile --latency RUN
cifar profile --latency frontier-28m
cifar profile --latency resnet20
cifar profile --latency resnet20 device=cpu threads=1
cifar profile --latency resnet20 device=cpu threads=1 --batch 1 --batch 16
cifar profile --time --experiment worksheet1 batch_size=256
cifar profile --time --experiment worksheet1 compile=on
cifar profile --time --experiment worksheet1 compile=on --together 16
cifar report --budget 50M
cifar report --budget 5M --open
cifar report --split test
cifar report RUN
cifar report SWEEP --all --x flops
cifar report SWEEP --budget 50M
cifar report SWEEP --out my_report
cifar report SWEEP --split test
cifar report runs/RUN/wandb
cifar sweep FILE
cifar sweep architectures
cifar sweep architectures --dry-run
cifar sweep architectures --no-agent
cifar sweep architectures --workers 2
cifar sweep architectures --workers 2 --set epochs=10
cifar sweep my_sweep.yaml
cifar sweep quickstart
cifar sweep quickstart --dry-run
cifar train --experiment NAME compile=on seed=N
cifar train --experiment resnet20
cifar train --experiment resnet20 batch_size=512 lr=0.4
cifar train --experiment worksheet1
cifar train --experiment worksheet1 --wandb disabled
cifar train --experiment worksheet1 --wandb offline
cifar train --experiment worksheet1 epochs=5 seed=1
cifar train --experiment worksheet1 --seeds 0,1,2
cifar train --from RUN seed=1
cifar train --from RUN2 teacher=RUN distill_weight=0.9 distill_temperature=3
cifar train --resume RUN
cifar train --trial FILE.json
cifar train model=resnet20 optimizer=sgd lr=0.1 schedule=cosine epochs=5
cifar train model=resnet20 width=6 optimizer=sgd lr=0.4 epochs=200 teacher=RUN
"""

# Parsed by the command line's own parser and not run: command -> why.
ACCOUNT, GPU = "needs an account on W&B; tests/integration/wandb run it against the protocol server", "needs GPUs"
PRETRAINED = "needs CIFAR-10; tests/unit/cli/test_pretrained.py and tests/integration/test_onnx.py do it with generated images"
TWO_POINTS = "needs two points; tests/unit/report/test_compare.py"
PARSED = {
    "cifar --install-completion": "writes to the settings of the user's shell",
    "cifar agent ENTITY/PROJECT/SWEEP --workers 2": ACCOUNT,
    "cifar agent https://wandb.ai/me/cifar/sweeps/3k9x2m1p": ACCOUNT,
    "cifar agent SWEEP --gpus 0,1 --pack off": GPU,
    "cifar agent SWEEP --gpus all --per-gpu 2": GPU,
    "cifar agent SWEEP --gpus all --per-gpu 2 --time-limit 50m": GPU,
    "cifar agent SWEEP --gpus all --time-limit 50m": GPU,
    "cifar data --mirror URL": "asks the network",
    "cifar evaluate ENTITY/PROJECT/model-SWEEP:best": ACCOUNT,
    "cifar evaluate frontier-28m": PRETRAINED,
    "cifar sweep chosen.yaml --set test=final": "tests/integration/test_agent.py trains such a sweep",
    "cifar train --experiment resnet20 --seeds 0,1,2": "the same with worksheet1 is run",
    "cifar train --from frontier-161m": PRETRAINED,
    "cifar train --from frontier-28m seed=5": PRETRAINED,
    "cifar train model=resnet20 teacher=frontier-28m val_size=0": PRETRAINED,
    "cifar push RUN": ACCOUNT,
    "cifar push SWEEP": ACCOUNT,
    "cifar push SWEEP --project cifar": ACCOUNT,
    "cifar report --publish": ACCOUNT,
    "cifar report ENTITY/PROJECT/SWEEP": ACCOUNT,
    "cifar report ENTITY/PROJECT/SWEEP --publish": ACCOUNT,
    "cifar report me/cifar/x7k2m1pq --publish": ACCOUNT,
    "cifar train --from ENTITY/PROJECT/model-SWEEP:best seed=1": ACCOUNT,
    "cifar report --compare resnet20 worksheet1": TWO_POINTS,
    "cifar report SWEEP --compare RUN RUN": TWO_POINTS,
    "cifar report SWEEP --keep RUN": "needs a run of that sweep; tests/unit/report/test_document.py",
    "cifar report --serve --open": "serves until Ctrl-C; tests/integration/test_explorer.py",
}

# Programs of others, and set-up: what is checked of each is in `check_other`.
OTHERS = ("make", "pip", "wandb", "sbatch", "kubectl", "source", "export", "sed", "python")

TINY = ["epochs=1", "train_size=64", "val_size=100", "batch_size=32", "threads=1", "max_steps=2"]
ONCE = {"test": "never", "compile": "off"}  # of single runs: a sweep refuses the one, and fixes neither


def all_commands() -> list[Command]:
    """Each command once, by its key."""
    found: dict[str, Command] = {}
    for path in documents():
        for command in read_commands(path):
            found.setdefault(normalize(command), command)
    return list(found.values())


def normalize(command: Command) -> str:
    """The key that the lists name: ids of examples are placeholders."""
    key = re.sub(r"\b(a1b2c3d4)\b", "RUN", command.key)
    return re.sub(r"(?<![/\w])(3k9x2m1p|ID)\b", "SWEEP", key)


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_every_command_is_treated() -> None:
    known = {*lines(RUN), *lines(RUN_SLOWLY), *PARSED}
    unknown = [
        f"{c.file}:{c.line}: {normalize(c)}"
        for c in all_commands()
        if c.words[0] == "cifar" and c.file not in PAGES and normalize(c) not in known and len(c.words) > 1
    ]
    assert not unknown, "name them in a list of this file:\n" + "\n".join(unknown)


def test_no_list_names_a_command_that_is_gone() -> None:
    listed = [*lines(RUN), *lines(RUN_SLOWLY), *PARSED]
    assert len(listed) == len(set(listed))
    assert set(listed) <= {normalize(command) for command in all_commands()}


# -- parsed ------------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> dict[str, Any]:
    """Parse a command as the command line does, without running it -> its parameters. Raises for a wrong option or value."""
    import typer

    command: Any = typer.main.get_command(app)
    context, words = None, list(words)
    while getattr(command, "commands", None):
        if words and words[0].startswith("-"):  # an option of the whole program
            assert words[0] in {name for option in command.params for name in option.opts}, words[0]
            return {}
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    context = command.make_context(command.name, words, parent=context)
    return dict(context.params)


@pytest.mark.parametrize("command", [c for c in all_commands() if c.words[0] == "cifar"], ids=lambda c: normalize(c))
def test_every_command_is_parsed(command: Command) -> None:
    words = ["config" if word == "COMMAND" else word for word in command.words[1:]]
    if "-h" not in words and words:
        parse(words)


@pytest.mark.parametrize(
    "wrong", [["sweeps", "status", "X", "--jsn"], ["agent"], ["report", "--split", "x"], ["agent", "X", "--count", "0"]]
)
def test_the_parser_refuses_what_is_wrong(wrong: list[str]) -> None:
    """So that a parsed command shows something. (`train` takes unknown options for keys, as W&B's agent writes them so.)"""
    with pytest.raises(Exception, match=r"(?i)no such option|missing|is not one of|invalid|should be"):
        parse(wrong)


class Parsed(Exception):
    """Raised where a program would begin its work."""


@pytest.mark.parametrize("command", [c for c in all_commands() if c.words[0] in OTHERS], ids=lambda c: c.key)
def test_other_programs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of make exist, extras of pip are declared, benchmarks take their options, files are there."""
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)[0].split()
        assert words[0] in targets
    elif program == "pip":
        check_pip(words)
    elif program == "wandb":
        assert words[0] in ("login", "offline", "sync", "sweep", "agent", "sweep-scheduler")
    elif program in ("sbatch", "kubectl"):
        assert (ROOT / next(word for word in words if word.startswith("docs/"))).exists()
    elif program == "export":
        name = words[0].partition("=")[0]
        assert f"`{name}`" in (ROOT / "docs" / "clusters.md").read_text()
    elif program == "source":
        assert words == [".venv/bin/activate"] and ".venv" in (ROOT / "Makefile").read_text()
    elif program == "python":
        check_python(words, monkeypatch)


def check_pip(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks...` and scripts: their own parser has to take the words."""
    if words[0] != "-m":
        assert (ROOT / words[0]).exists()
        if not words[0].startswith("benchmarks/"):
            return
        module, rest = importlib.import_module(words[0].removesuffix(".py").replace("/", ".")), words[1:]
    elif words[1] == "pytest":
        return
    else:
        name = "benchmarks.__main__" if words[1] == "benchmarks" else words[1]
        module, rest = importlib.import_module(name), words[2:]
    real = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [words[0], *rest])
    with pytest.raises(Parsed):
        module.main()


# -- run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A runs folder with a sweep of three cells (two finished, one open), and an interrupted run."""

    folder: Path
    sweep: str
    run: str
    interrupted: str


SWEEP = """
name: world
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {value: conv}
  width: {values: [2, 4, 6]}
  epochs: {value: 2}
  train_size: {value: 64}
  val_size: {value: 100}
  batch_size: {value: 32}
  threads: {value: 1}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from cifar.training import run
    from cifar.training.loop import RunHooks

    runs = tmp_path_factory.mktemp("world") / "runs"
    backend = create_local_sweep(runs, SWEEP)
    for _ in range(2):
        trial = backend.claim_trial("me")
        assert isinstance(trial, local.Trial)
        settings = spec.resolve_trial(trial.values, backend.info["fixed"])
        about = run.RunMetadata(run_id=trial.run_id, swept=["width"], sweep=backend.id, cell=trial.cell)
        record = run.create_run(settings, runs, about)
        assert run.train_run(settings, record) == "finished"
        backend.finish_trial(trial, "finished", record.read_json("summary")["val/acc"])
    stopped = run.create_run(settings, runs)
    state = run.train_run(settings, stopped, hooks=RunHooks(poll_stop=lambda: "interrupted"))
    assert state == "interrupted"
    return World(runs, backend.id, record.id, stopped.id)


@pytest.fixture
def here(world: World, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, with the world's runs in `runs/` and the files that commands of the documents name."""
    shutil.copytree(world.folder, runs)
    place = tmp_path / "here"
    place.mkdir()
    (place / "runs").symlink_to(runs)
    (place / "my_sweep.yaml").write_text(SWEEP.replace("[2, 4, 6]", "[2, 4, 6, 8]"))
    (place / "FILE.json").write_text(json.dumps({"model": "conv", "width": 4}))
    for name, value in {"BROWSER": "true", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CIFAR_DATA", raising=False)
    monkeypatch.chdir(place)
    yield place


def fill_in(command: str, world: World) -> list[str]:
    """The words behind `cifar`, with names that there are in place of placeholders."""
    run = world.interrupted if "--resume" in command else world.run
    names = {
        "COMMAND": "config",
        "SWEEP": world.sweep,
        "RUN": run,
        "RUN2": run,
        "teacher=RUN": f"teacher={run}",
        "NAME": "worksheet1",
        "FILE": "quickstart",
        "seed=N": "seed=1",
    }
    return [names.get(word, word.replace("/RUN/", f"/{run}/")) for word in shlex.split(command)[1:]]


def shrink(words: list[str]) -> list[str]:
    """The same command at a tiny size: stand-in images, few of them, two steps."""
    name, rest = words[0], words[1:]
    plain = {"train": not {"--resume", "--dry-run"} & set(rest), "sweep": True, "profile": "--time" in rest, "data": True}
    if not plain.get(name):
        return words + (["--workers", "1"] if name == "agent" and "--workers" not in rest else [])
    if name == "train":
        single = [f"{key}={value}" for key, value in ONCE.items()]
        quiet = [] if "--wandb" in rest else ["--wandb", "disabled"]
        return [*words, "--dataset", "stand-in", *quiet, *TINY, *single]
    if name == "data":
        return [*words, "--dataset", "stand-in"]
    if name == "profile":
        pairs = [pair for pair in rest if not pair.startswith("compile=")]
        return [name, *pairs, *TINY, "dataset=stand-in", "--steps", "2"]
    fixed = [word for pair in TINY for word in ("--set", pair)]
    if "my_sweep.yaml" in rest:
        fixed = []  # tiny already
    if "worksheet1_tuning" in rest:
        fixed = ["--set", "train_size=256", "--set", "epochs=1"]  # it sweeps the batch size
    quiet = [
        "--wandb",
        "disabled",
        *([] if "--workers" in rest or {"--dry-run", "--no-agent"} & set(rest) else ["--workers", "1"]),
    ]
    few = ["--count", "2"] if "architectures" in rest and not {"--dry-run", "--no-agent"} & set(rest) else []
    return [*words, "--dataset", "stand-in", *fixed, *quiet, *few]


def check_run(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = fill_in(command, world)
    code = main(shrink(words))
    said = capsys.readouterr()
    assert code == 0, f"cifar {shlex.join(shrink(words))} ended with {code}:\n{said.out[-2000:]}{said.err[-2000:]}"
    if "--json" in words:
        json.loads(said.out)


@pytest.mark.parametrize("command", lines(RUN))
def test_runs(command: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_run(command, world, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", lines(RUN_SLOWLY))
def test_runs_slowly(command: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "/wandb" in command:  # a folder of offline runs
        assert main(shrink(["train", "--experiment", "worksheet1", "--wandb", "offline", "--name", "offline"])) == 0
        made = next(path for path in (here / "runs").glob("*/") if RunDir(path).name.endswith("offline"))
        world = World(world.folder, world.sweep, made.name, world.interrupted)
        capsys.readouterr()
    check_run(command, world, capsys)


# -- whole pages -------------------------------------------------------------------------------------------------------


def read_page(name: str) -> list[Block]:
    return list(read_blocks(ROOT / name))


def write_file(block: Block, folder: Path) -> None:
    """A block whose first line is a comment that begins with a file's name is that file."""
    named = re.match(r"# ([\w/]+\.\w+)", block.text)
    assert named, f"{block.file}:{block.line}: the first line of a file names it"
    file = folder / named[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


@pytest.mark.slow
def test_tutorial_from_top_to_bottom(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, in one session of Python and one folder. Only sizes are smaller, and the images the stand-in's."""
    shutil.rmtree((here / "runs").resolve())
    session: dict[str, Any] = {}
    for block in read_page("docs/tutorial.md"):
        text = block.text.replace("train_size=2000", "train_size=200").replace(
            "train_size: {value: 2000}", "train_size: {value: 200}"
        )
        text = text.replace("--dataset auto", "--dataset stand-in --wandb disabled").replace(
            "{value: auto}", "{value: stand-in}"
        )
        if block.language == "yaml":
            write_file(Block(block.file, block.line, "yaml", text), here)
        elif block.language == "python":
            exec(compile(text, f"{block.file}:{block.line}", "exec"), session)
        elif block.language == "sh":
            for line in text.splitlines():
                run_line(line, capsys)
    cells = next((here / "runs").resolve().glob("sweeps/*/report/report.json"))
    points = json.loads(cells.read_text())["points"]
    assert len(points) == 4 and all(point["n"] == 3 for point in points)


def run_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] != "cifar":
        subprocess.run(line, shell=True, check=True)
        return
    quiet = ["--wandb", "disabled"] if words[1] in ("sweep", "agent") else []
    code = main([*words[1:], *quiet])
    said = capsys.readouterr()
    assert code == 0, f"{line} ended with {code}:\n{said.out[-2000:]}{said.err[-2000:]}"


RUN_COMMANDS = """
import json, sys
from pathlib import Path

from cifar.cli.app import main
from cifar.config.resolve import parse_pairs, resolve_config
from cifar.training import run

runs = Path("runs").resolve()
for words in json.load(sys.stdin):
    if words[0] == "pairs":  # a training alone: the command draws pictures, too
        config = resolve_config(parse_pairs(words[1:]))
        code = run.train_run(config, run.create_run(config, runs)) != "finished"
    else:
        made = sorted(runs.glob("*/run.json"), key=lambda file: file.stat().st_mtime)
        code = main([made[-1].parent.name if word == "RUN" else word for word in words])  # an earlier command's
    if code:
        sys.exit(f"{words} ended with {code}")
print("all of them")
"""


def run_commands(commands: list[list[str]], here: Path) -> None:
    """In one process with the plug-ins of extending.md, which must not stay registered in this one."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS],
        input=json.dumps(commands),
        env={**os.environ, "CIFAR_PLUGINS": str(here / "my_plugins"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("all of them\n"), f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture
def plugins(here: Path) -> Path:
    shutil.rmtree((here / "runs").resolve())
    for block in read_page("docs/extending.md"):
        if block.language in ("python", "yaml"):
            write_file(block, here)
    return here


@pytest.mark.slow
def test_examples_of_every_part_train(plugins: Path) -> None:
    """One training with the network, optimizer, schedule and probe of extending.md, and a report with its figure."""
    parts = ["model=tiny", "optimizer=signum", "schedule=polynomial", "power=1.5", "probes=weight_norm", "probe_every=1"]
    trained = [["pairs", *parts, *TINY, "dataset=stand-in", f"channels={channels}"] for channels in (4, 8)]
    run_commands([*trained, ["report"]], plugins)
    runs = (plugins / "runs").resolve()
    rows = [json.loads(line) for file in runs.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    assert len(rows) == 2 and all(row["weight_norm/0"] > 0 for row in rows)
    assert (runs / "report" / "accuracy_vs_params.png").stat().st_size > 1000
    page = (runs / "report" / "report.html").read_text()
    assert "Accuracy against parameters" in page and "fewer than two points" not in page


@pytest.mark.slow
def test_commands_of_extending(plugins: Path) -> None:
    """All commands of the page, one after the other."""
    commands = []
    for command in read_commands(ROOT / "docs" / "extending.md"):
        words = command.words
        if words[0] == "cifar" and words[1] != "models":
            small = shrink(words[1:])
            if "my_sweep.yaml" in small:
                fixed = [word for pair in TINY if not pair.startswith("seed") for word in ("--set", pair)]
                small = [*words[1:], "--dataset", "stand-in", "--wandb", "disabled", *fixed]
            commands.append(small)
    run_commands(commands, plugins)
    with contextlib.suppress(FileNotFoundError):
        assert not list((plugins / "runs").resolve().glob("*/traceback.txt"))


def test_pages_are_run_whole() -> None:
    """What is said in PAGES of each: every one of their blocks is of a kind that the tests above carry out."""
    for name in PAGES:
        assert {block.language for block in read_page(name)} <= {"sh", "python", "yaml"}
        assert name in [name_of(path) for path in documents()] and name not in GENERATED
