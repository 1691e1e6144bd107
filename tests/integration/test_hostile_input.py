"""Every reader answers any bytes: with a result or one sentence, soon, in bounded memory, and without harm to other runs.

A fuzzer in this process: valid documents with bytes or values changed, and what may stand in a file's place. `make test` tries
some hundred inputs, the slow suite CIFAR_FUZZ_EXAMPLES (10,000) over all readers together. Both are the same each time.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cifar import registry
from cifar.cli.train import gather_layers
from cifar.config.resolve import parse_pairs, resolve_config
from cifar.data import cifar10, synthetic
from cifar.errors import UserError
from cifar.integrations.wandb import offline, upload
from cifar.integrations.wandb import settings as wandb_settings
from cifar.report import build, facts, html
from cifar.report.aggregate import compare_runs
from cifar.report.load import collect_runs, load_run
from cifar.report.table import runs_table
from cifar.sweeps import local, spec, storage
from cifar.sweeps.storage_errors import redact_url
from cifar.system.disk import cache_folder
from cifar.system.ownership import lease_seconds
from cifar.system.redact import redact
from cifar.system.signals import StopSignals
from cifar.tracking.cleanup import find_leftovers
from cifar.tracking.run_dir import RunDir, find_run_dir, resolve_runs_dir
from cifar.training.checkpoint import resume_from_checkpoint, save_checkpoint
from cifar.training.distributed import init_distributed
from cifar.training.trainer import Trainer
from cifar.training.weights import load_weights
from helpers import fake_runs, hostile
from helpers.hostile import Input, bounded, inputs, place_input

FAST_EXAMPLES, ALL_EXAMPLES = 120, int(os.environ.get("CIFAR_FUZZ_EXAMPLES", "10000"))
MAX_CHECKED_CELLS = 100  # of a sweep; a larger one takes its time, which is bounded by the number of cells
SWEEP = b"""# which?
name: small
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {value: conv4}
  dataset: {value: stand-in}
  epochs: {value: 1}
  lr: {values: [0.1, 0.01]}
"""
RANDOM_SWEEP = b"""method: random
run_cap: 3
early_terminate: {type: hyperband, min_iter: 1, eta: 3}
metric: {name: val/acc, goal: maximize}
parameters:
  model: {value: conv4}
  epochs: {value: 9}
  lr: &range {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
  weight_decay: {<<: *range, max: 1.0e-2}
  batch_size: {distribution: q_uniform, min: 32, max: 128, q: 32}
  label_smoothing: {distribution: normal, mu: 0.1, sigma: 0.01}
  optimizer: {values: [{optimizer: sgd, momentum: 0.9}, {optimizer: adam}]}
"""
EXPERIMENT = b"# a claim\nmodel: resnet20\noptimizer: sgd\nlr: 1e-1\nepochs: 5\nnested: {seed: 0x10}\n"


class World:
    """A runs folder with two good runs, a bad one, and two sweeps, of which one is bad."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.file = folder, folder / "runs", folder / "input"
        for name in ("good1", "good2", "bad"):
            fake_runs.write(self.runs, name, model="conv4", epochs=3, layers=2, predictions=name == "bad")
        self.seeds = {path.name: path.read_bytes() for path in (self.runs / "bad").iterdir()}

    def restore(self) -> None:
        """The bad run and the bad sweep as they were written."""
        for name, content in self.seeds.items():
            path = self.runs / "bad" / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
                place_input(Input(content), path)

    @cached_property
    def sweep_files(self) -> dict[str, bytes]:
        path = self.folder / "small.yaml"
        path.write_bytes(SWEEP)
        for name in ("good", "bad"):
            sweep_id = local.create_sweep(spec.read_sweep(path), self.runs, fixed={"dataset": "stand-in"})
            os.rename(self.runs / "sweeps" / sweep_id, self.runs / "sweeps" / f"{name}sweep")
            self.rename_study(f"{name}sweep", sweep_id)
        folder = self.runs / "sweeps" / "badsweep"
        (folder / "push.json").write_text('{"server/entity/project": {"sweep": "x", "runs": {"badsweep-000": 1.5}}}')
        return {name: (folder / name).read_bytes() for name in ("sweep.json", "sweep.yaml", "study.db", "push.json")}

    def rename_study(self, name: str, old: str) -> None:
        import sqlite3

        with sqlite3.connect(self.runs / "sweeps" / name / "study.db") as database:
            database.execute("update studies set study_name = ? where study_name = ?", (name, old))
        database.close()

    def restore_sweep(self) -> Path:
        folder = self.runs / "sweeps" / "badsweep"
        for name, content in self.sweep_files.items():
            place_input(Input(content), folder / name)
        for name in ("study.db-wal", "study.db-shm"):
            hostile.remove(folder / name)
        return folder

    @cached_property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = registry.models["conv4"].build()
        return model

    @cached_property
    def weights(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self.model.state_dict(), buffer)
        return buffer.getvalue()

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(resolve_config({"model": "conv4", "dataset": "stand-in", "epochs": 3, "train_size": 256}), None)

    @cached_property
    def checkpoint(self) -> bytes:
        run = RunDir(self.folder / "resumed")
        run.path.mkdir()
        save_checkpoint(self.trainer, run)
        return (run.path / "checkpoint.pt").read_bytes()


# -- the readers: each is given an input, and raises nothing but UserError ---------------------------------------------


def read_sweep_yaml(world: World, given: Input) -> None:
    place_input(given, world.file)
    check_small_sweep(spec.read_sweep(world.file))


def check_small_sweep(sweep: spec.Sweep) -> None:
    sizes = [len(parameter.values or [0, 0]) for parameter in sweep.parameters]
    if np.prod([float(size) for size in sizes]) <= MAX_CHECKED_CELLS:
        spec.check_sweep(sweep, {}, count=3)
        spec.list_known_trials(sweep, count=3)
    elif sweep.method == "grid":
        spec.list_grid_cells(sweep)


def read_experiment(world: World, given: Input) -> None:
    path = world.folder / "one.yaml"
    place_input(given, path)
    resolve_config({"experiment": str(path)})


def read_pairs(world: World, given: Input) -> None:
    text = given.data.decode("utf-8", "surrogateescape")  # as Python makes arguments of bytes
    resolve_config(parse_pairs([text]))


def read_trial(world: World, given: Input) -> None:
    place_input(given, world.file)
    resolve_config(*(values for _, values in gather_layers([], trial=world.file)))


def read_run_file(name: str) -> Callable[[World, Input], None]:
    def read(world: World, given: Input) -> None:
        world.restore()
        place_input(given, world.runs / "bad" / name)
        read_all_runs(world)

    return read


def read_all_runs(world: World) -> None:
    """What `report`, `runs`, `gc` and `--resume` read. The good runs are there, and the bad one is there or named."""
    collection = collect_runs([str(world.runs)], world.runs)
    known = {run.id for run in collection.runs}
    assert {"good1", "good2"} <= known, collection
    assert "bad" in known | {run.id for run in collection.damaged}
    comparison = compare_runs(collection.runs, damaged=collection.damaged)
    assert {"good1", "good2"} <= {run.id for run in comparison.runs} | {run.id for run in comparison.excluded}
    notes = html.write_sentences(comparison)
    listed = facts.list_facts(comparison)
    json.loads(f"{facts.write_json(comparison, listed)}}}")
    facts.format_json(notes).encode()
    if comparison.points:
        facts.format_csv(listed).encode()
        str([build._format_row(comparison, point) for point in comparison.points])
    provenance = html.describe_provenance(comparison, collection.runs, "command")
    html.render_page(comparison, [], question="", notes=notes, provenance=provenance).encode()
    runs_table(collection.runs)._repr_html_().encode()
    sentences: list[str] = []
    find_leftovers(world.runs, days=0.0, finished=True, damaged=sentences)
    assert find_run_dir("good1", world.runs).name
    bad = RunDir(world.runs / "bad")
    for reading in (bad.check_resumable, lambda: bad.state, lambda: bad.read_outcome("val/acc", ["val/acc", "macs"])):
        try:
            reading()
        except UserError as error:
            check_sentence(error)
    for run in collection.runs:
        if run.id == "bad":
            for entry in registry.figures:
                figure: Any = entry.build()
                if figure.scope == "run":
                    figure.select(run)


def read_sweep_file(name: str) -> Callable[[World, Input], None]:
    def read(world: World, given: Input) -> None:
        place_input(given, world.restore_sweep() / name)
        damaged: list[tuple[str, str]] = []
        listed = [info["id"] for info in local.list_sweeps(world.runs, damaged)]
        assert "goodsweep" in listed
        assert "badsweep" in listed + [name for name, _ in damaged] or not (world.runs / "sweeps" / "badsweep" / name).exists()
        assert local.find_sweep_id("goodsweep", world.runs) == "goodsweep"
        collect_runs(["goodsweep"], world.runs)
        upload.find_pushed_sweep(world.runs / "sweeps" / "badsweep")
        backend = local.LocalBackend("badsweep", world.runs)
        backend.list_cells()
        backend.count_states()

    return read


def read_weights(world: World, given: Input) -> None:
    place_input(given, world.file)
    load_weights(world.model, world.file)


def read_checkpoint(world: World, given: Input) -> None:
    assert world.checkpoint
    run = RunDir(world.folder / "resumed")
    place_input(given, run.path / "checkpoint.pt")
    resume_from_checkpoint(world.trainer, run)


def read_storage_url(world: World, given: Input) -> None:
    text = given.data.decode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.folder)  # a relative path of a SQLite file
        redact_url(text)
        if "@" not in text and "postgresql://" in text:
            text = text.replace("postgresql://", "postgresql://127.0.0.1:1/")  # no other machine is asked
        storage.open_storage(text)


def read_cifar_batch(world: World, given: Input) -> None:
    images, labels = cifar10.read_batch(given.data, "data_batch_1")
    assert images.shape[1:] == (3, 32, 32) and len(images) == len(labels)


def read_cifar_archive(world: World, given: Input) -> None:
    place_input(given, world.folder / cifar10.ARCHIVE)
    if given.kind in ("", "empty"):
        cifar10._read_archive(world.folder / cifar10.ARCHIVE)
    cifar10._read_verified(world.folder / cifar10.ARCHIVE)


def read_cifar_folder(world: World, given: Input) -> None:
    place_input(given, world.folder / "data" / cifar10.FOLDER / "data_batch_1")
    if cifar10.find_cifar10(world.folder / "data"):
        cifar10._read_verified(world.folder / "data" / cifar10.FOLDER)


def read_stand_in(world: World, given: Input) -> None:
    place_input(given, world.file)
    assert synthetic._read_cache(world.file) is None


def read_wandb_file(world: World, given: Input) -> None:
    file = world.folder / "run-abc.wandb"
    place_input(given, file)
    folders, damaged = offline.unpack_runs([file])
    for _, _, sentence in damaged:
        check_sentence(UserError(sentence))
    for folder in folders:
        load_run(folder)


def read_wandb_value(world: World, given: Input) -> None:
    """An intact file whose values are hostile."""
    read_wandb_file(world, Input(make_offline_run(given.data.decode("utf-8", "replace"))))


def read_netrc(world: World, given: Input) -> None:
    place_input(given, world.file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(world.file))
        wandb_settings.find_credentials()


def read_wandb_settings(world: World, given: Input) -> None:
    place_input(given, world.folder / "wandb-config" / "settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_CONFIG_DIR", str(world.folder / "wandb-config"))
        wandb_settings.server_url()
        wandb_settings.mode_from_environment("auto")


VARIABLES: dict[str, Callable[[], Any]] = {
    "CIFAR_LEASE": lease_seconds,
    "CIFAR_RUNS": resolve_runs_dir,
    "CIFAR_PLUGINS": registry.plugin_directories,
    "CIFAR_DATA": cifar10.find_cifar10,
    "CIFAR_MIRRORS": cifar10.list_urls,
    "CIFAR_PREEMPTIBLE": lambda: StopSignals(started_by_wandb=True),
    "XDG_CACHE_HOME": cache_folder,
    "WORLD_SIZE": lambda: enter(init_distributed()),
    "RANK": lambda: enter(init_distributed()),
    "LOCAL_RANK": lambda: enter(init_distributed()),
    "MASTER_PORT": lambda: enter(init_distributed()),
    "WANDB_MODE": wandb_settings.mode_from_environment,
    "WANDB_BASE_URL": wandb_settings.server_url,
    "NETRC": wandb_settings.find_credentials,
    "WANDB_DIR": wandb_settings.find_credentials,
}


def enter(context: Any) -> None:
    with context:
        pass


MAX_VARIABLE_BYTES = 131_000  # Linux starts no program with a longer one (MAX_ARG_STRLEN)


def read_variables(world: World, given: Input) -> None:
    given_bytes = given.data[:MAX_VARIABLE_BYTES].replace(b"\0", b"")
    value = given_bytes.decode("utf-8", "surrogateescape")
    for name, reading in VARIABLES.items():
        with pytest.MonkeyPatch.context() as patch:
            if name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
                patch.setenv("WORLD_SIZE", "2")
                if value.strip().isdigit():
                    continue  # it would wait for the other process
            elif name == "WORLD_SIZE" and value.strip().isdigit():
                continue
            patch.setenv(name, value)
            redact("what is printed")  # it looks into every variable
            try:
                reading()
            except UserError as error:
                check_sentence(error)


# -- their inputs --------------------------------------------------------------------------------------------------------


def make_offline_run(value: str, *, is_once: bool = False) -> bytes:
    """A run as wandb writes it, with `value` where JSON is expected: in every place, or in one."""
    from wandb.proto import wandb_internal_pb2 as protocol

    run = protocol.Record()
    run.run.run_id = "abc"
    item = run.run.config.update.add()
    item.key, item.value_json = "cifar", json.dumps("x" if is_once else value)
    row = protocol.Record()
    in_row = "1" if is_once else value
    for key, text in (("epoch", "1"), ("val/acc", in_row), ("", in_row)):
        item = row.history.item.add()
        item.key, item.value_json = key, text
    nested = protocol.Record()
    item = nested.summary.update.add()
    item.nested_key.extend(["cifar", "x"])
    item.value_json = value
    end = protocol.Record()
    end.exit.exit_code = 0
    return hostile.make_wandb_file(*(record.SerializeToString() for record in (run, row, row, nested, end)))


def make_description(status: Any) -> bytes:
    parts = {
        "run": {"name": "n", "cost": {"macs": 1, "params": 1, "verified": True}},
        "config": {"model": "conv4", "epochs": 3},
    }
    return json.dumps({**parts, "labels": {}, "environment": status}).encode()


def make_npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def make_batch(n: int = 4) -> bytes:
    import pickle

    return pickle.dumps({b"data": np.zeros((n, 3072), np.uint8), b"labels": [0] * n}, protocol=2)


def make_archive() -> bytes:
    import gzip
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in cifar10.BATCHES:
            info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    return gzip.compress(buffer.getvalue())


def recompress(strategy: st.SearchStrategy[Input]) -> st.SearchStrategy[Input]:
    import gzip

    return strategy.map(lambda given: Input(gzip.compress(given.data), given.kind))


PAIRS = (
    b"lr=1e-3",
    b"model=resnet20",
    b"depth=100000",
    b"model={model: conv, width: 8}",
    b"epochs=5",
    b"experiment=worksheet1",
)
URLS = (
    b"sqlite:///x.db", b"sqlite:////dev/zero", b"postgresql://u:p@127.0.0.1:1/db", b"postgresql://u:p@127.0.0.1:abc/db", b"sqlite://",
    b"mysql://127.0.0.1/x", b"postgresql://", b"sqlite:///:memory:", b"redis://127.0.0.1:1", b"sqlite:///.", b"sqlite:///small.yaml",
)  # fmt: skip
NUMBERS = (
    b"15",
    b"-5",
    b"nan",
    b"abc",
    b"1e400",
    b"0",
    b"99999999999999999999",
    b"2",
    b"/tmp",
    b"~nobody-here/x",
    b"/dev/zero",
)


@dataclass(frozen=True)
class Target:
    """A reader, its inputs, its share of all examples, and inputs that once went wrong."""

    read: Callable[[World, Input], None]
    make_inputs: Callable[[World], st.SearchStrategy[Input]]
    share: float
    found: tuple[Input, ...] = field(default=())
    has_file: bool = True


def of_run(name: str, share: float, *found: bytes, is_json: bool = True) -> Target:
    def make_inputs(world: World) -> st.SearchStrategy[Input]:
        return inputs(world.seeds[name], is_json=is_json)

    return Target(read_run_file(name), make_inputs, share, tuple(map(Input, found)))


def of_sweep(name: str, share: float, *found: bytes, is_json: bool = False) -> Target:
    return Target(
        read_sweep_file(name), lambda world: inputs(world.sweep_files[name], is_json=is_json), share, tuple(map(Input, found))
    )


TARGETS: dict[str, Target] = {
    "sweep file": Target(
        read_sweep_yaml,
        lambda _: inputs(SWEEP, RANDOM_SWEEP),
        0.16,
        tuple(
            Input(SWEEP.replace(b"lr: {values: [0.1, 0.01]}", text) + tail)
            for text, tail in (
                (b"lr: {values: [" + b"0.5, " * 100_000 + b"1]}", b""),
                (b"lr: {distribution: [a]}", b""),
                (b"lr: {distribution: log_normal, mu: 1000}", b""),
                (b"lr: {min: -" + b"9" * 400 + b", max: " + b"9" * 400 + b"}", b""),
                (b"lr: {min: 0, max: 99999999999999999999}", b""),
                (b"lr: {value: 2020-13-45}", b""),
                (b"lr: {values: [0.1]}", b"  seed: {distribution: int_uniform, min: 0, max: 10}\nrun_cap: 999999999999\n"),
                (b"lr: {values: [0.1]}", b"early_terminate: {type: hyperband, max_iter: 9, s: 999999999999, eta: 1.0000001}\n"),
                (b"[a]: 1", b""),
                (b"? {a: b}\n  : 1", b""),
            )
        )
        + tuple(
            Input(RANDOM_SWEEP.replace(b"run_cap: 3", b"run_cap: %d" % n).replace(b"mu: 0.1", b"mu: 1.0e+300"))
            for n in (3, 10**12)
        ),
    ),
    "experiment": Target(read_experiment, lambda _: inputs(EXPERIMENT), 0.10),
    "key=value": Target(
        read_pairs,
        lambda _: inputs(*PAIRS, is_file=False),
        0.10,
        (Input(b"lr=\xff"), Input(b"a=" + b"[" * 100_000), Input(b"lr=2020-13-45"), Input(b"seed=" + b"9" * 5000)),
        has_file=False,
    ),
    "trial": Target(read_trial, lambda _: inputs(b'{"lr": 0.1, "model": "conv4", "epochs": 2.0}', is_json=True), 0.06),
    "run.json": of_run(
        "run.json",
        0.07,
        b'{"schema": 2}',
        b'{"name": "x", "created": 1e300}',
        b'{"cost": {"params": 1e400}}',
        b'{"name": "x", "cost": null}',
    ),
    "config.json": of_run("config.json", 0.06),
    "status.json": of_run("status.json", 0.05, b'{"state": "running", "epoch": Infinity}', b'{"state": "running", "pid": "x"}'),
    "summary.json": of_run("summary.json", 0.04, b'{"seconds": "x"}', b'{"test/views": 0.5, "test/acc": true}'),
    "labels.json": of_run("labels.json", 0.03, b'{"layers": null}', b'{"layers": [[]]}'),
    "environment.json": of_run("environment.json", 0.02),
    "metrics.jsonl": of_run(
        "metrics.jsonl",
        0.06,
        b'{"epoch":Infinity}\n',
        b"[]\n",
        b'{"epoch":1,"val/acc":true}\n',
        b'{"epoch":1,"val/acc":"0.5"}\n',
        b'{"epoch":1,"gradient_norm/\\ud800":1}\n',
        is_json=False,
    ),
    "predictions.npz": of_run(
        "predictions.npz",
        0.03,
        make_npz(label=np.zeros(3), predicted=np.zeros(2)),
        make_npz(
            **{name: np.full(3, 77) for name in ("index", "label", "predicted", "confidence", "worst_index", "worst_images")}
        ),
        is_json=False,
    ),
    "sweep.json": of_sweep("sweep.json", 0.02, b"{}", b'{"id": "badsweep", "created": "x"}', is_json=True),
    "sweep.yaml": of_sweep("sweep.yaml", 0.01, b"\xff\xfe"),
    "study.db": of_sweep("study.db", 0.015),
    "push.json": of_sweep("push.json", 0.01, b'{"a/b/c": 5}', b'{"a": {"sweep": "x"}}', is_json=True),
    "weights.pt": Target(read_weights, lambda world: inputs(world.weights), 0.03),
    "checkpoint.pt": Target(read_checkpoint, lambda world: inputs(world.checkpoint), 0.02),
    "storage": Target(read_storage_url, lambda _: inputs(*URLS, is_file=False), 0.02, tuple(map(Input, URLS)), has_file=False),
    "CIFAR batch": Target(read_cifar_batch, lambda _: inputs(make_batch(), is_file=False), 0.05, has_file=False),
    "CIFAR archive": Target(
        read_cifar_archive, lambda _: inputs(make_archive()) | recompress(inputs(bytes(3000), is_file=False)), 0.02
    ),
    "CIFAR folder": Target(read_cifar_folder, lambda _: inputs(make_batch()), 0.01),
    "stand-in cache": Target(read_stand_in, lambda _: inputs(make_npz(train_images=np.zeros(3))), 0.02),
    ".wandb": Target(read_wandb_file, lambda _: inputs(make_offline_run("1")), 0.03),
    "values in .wandb": Target(
        read_wandb_value,
        lambda _: (
            inputs(b"1", make_description({}), make_description([1]), is_json=False, is_file=False)
            | st.sampled_from(hostile.HOSTILE_VALUES).map(lambda value: Input(json.dumps(value).encode()))
        ),
        0.03,
        has_file=False,
    ),
    "netrc": Target(read_netrc, lambda _: inputs(b"machine api.wandb.ai login user password 0123456789\n"), 0.01),
    "W&B settings": Target(read_wandb_settings, lambda _: inputs(b"[default]\nmode = offline\nbase_url = http://x\n"), 0.01),
    "variables": Target(
        read_variables, lambda _: inputs(*NUMBERS, is_file=False), 0.03, tuple(map(Input, NUMBERS)), has_file=False
    ),
}


# -- the checks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def check_sentence(error: UserError) -> None:
    text = str(error)
    assert text.strip() and "Traceback" not in text and len(text) < 5000, text
    text.encode()


def check_answer(world: World, target: Target, given: Input) -> None:
    with bounded():
        try:
            target.read(world, given)
        except UserError as error:
            check_sentence(error)


def fuzz(world: World, name: str, total: int) -> None:
    target = TARGETS[name]
    strategy = target.make_inputs(world)
    num_examples = max(3, round(total * target.share / sum(each.share for each in TARGETS.values())))

    @settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def check(given: Input) -> None:
        check_answer(world, target, given)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_answers_some_hostile_inputs(name: str, world: World) -> None:
    for found in TARGETS[name].found:
        check_answer(world, TARGETS[name], found)
    fuzz(world, name, FAST_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_answers_many_hostile_inputs(name: str, world: World) -> None:
    fuzz(world, name, ALL_EXAMPLES)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.has_file])
def test_what_stands_in_a_files_place_is_answered(name: str, world: World) -> None:
    for kind in hostile.KINDS:
        check_answer(world, TARGETS[name], Input(kind=kind))


def big_inputs() -> list[tuple[str, str]]:
    """(target, document). Three documents a target, each one for a fourth of the targets; CIFAR_FUZZ_BIG=all: every pair."""
    documents = list(hostile.BIG_DOCUMENTS)
    if os.environ.get("CIFAR_FUZZ_BIG") == "all":
        return [(name, document) for name in TARGETS for document in documents]
    return [(name, documents[(k + 4 * j) % len(documents)]) for k, name in enumerate(TARGETS) for j in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "document"), big_inputs())
def test_ten_megabytes_are_answered(name: str, document: str, world: World) -> None:
    content = hostile.BIG_DOCUMENTS[document]()
    if name == "values in .wandb":  # what is measured is the reading, not how long it takes to make such a file
        name, content = ".wandb", make_offline_run(content.decode("utf-8", "replace"), is_once=True)
    start = time.process_time()
    check_answer(world, TARGETS[name], Input(content))
    print(f"{name}, {document}: {time.process_time() - start:.2f} s")
