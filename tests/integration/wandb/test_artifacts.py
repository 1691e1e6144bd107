"""Artifacts: each finished run's model, predictions and use of the dataset, once, however they are sent; and models by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar
from cifar.cli.app import main
from cifar.integrations.wandb import artifact_best, artifact_choice, artifact_settle
from cifar.integrations.wandb.artifact_download import ArtifactPath, parse_artifact_path
from cifar.integrations.wandb.artifacts import CIFAR10_URL
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.registry import models
from cifar.tracking.run_dir import RunDir, list_run_dirs
from helpers.fake_runs import write
from helpers.hosted_sweeps import GRID, start_command
from helpers.processes import wait_for_exit, wait_until
from helpers.protocol import Fault, Server
from helpers.protocol.artifacts import Artifact

ID, BEST = "abcd1234", artifact_best.BEST
BEST_RUN = f"{ID}-001"
ACCURACIES = (0.5, 0.7, 0.7, 0.6)  # the best is the first cell of 0.7


@pytest.fixture
def records(tmp_path: Path) -> list[RunDir]:
    """Finished runs of a sweep, with weights of a real network and predictions."""
    made = []
    for cell, accuracy in enumerate(ACCURACIES):
        made.append(make_run(tmp_path / "runs", f"{ID}-{cell:03d}", accuracy, sweep=ID, cell=cell, predictions=True))
    return made


def make_run(runs: Path, run_id: str, accuracy: float, **about: Any) -> RunDir:
    record = write(runs, run_id, model="worksheet1", accuracy=accuracy, layers=2, **about)
    torch.manual_seed(len(list(runs.iterdir())))
    torch.save(models["worksheet1"].build().state_dict(), record.path / "weights.pt")
    return record


def check_arrived(server: Server, records: list[RunDir], *, best: str = BEST_RUN) -> None:
    """Each run has one model and one predictions artifact, uses the only version of the dataset; `best` is the best."""
    store = server.artifacts
    (dataset,) = store.committed("dataset")
    assert dataset.used_by.sort() is None and dataset.used_by == [record.id for record in records]
    assert dataset.entries["cifar-10-python.tar.gz"]["ref"].startswith(CIFAR10_URL) and dataset.run == ""
    assert len(store.committed("model")) == len(store.committed("predictions")) == len(records)
    for record in records:
        (model,), (predictions,) = store.made_by(record.id, "model"), store.made_by(record.id, "predictions")
        assert store.read(model, "weights.pt") == (record.path / "weights.pt").read_bytes()
        assert json.loads(store.read(model, "config.json")) == record.read_json("config")
        assert json.loads(store.read(model, "run.json")) == record.read_json("run")
        said, summary = model.metadata, record.read_json("summary")
        assert (said["run"], said["val/acc"], said["macs"], said["params"]) == (record.id, summary["val/acc"], 6654464, 1070794)
        assert said["data_fingerprint"] == "c58f30108f718f92" * 4 == dataset.metadata["data_fingerprint"]
        assert f"run-{record.id}" in model.aliases and (BEST in model.aliases) == (record.id == best)
        classes = json.loads(store.read(predictions, "classes.table.json"))
        assert classes["columns"] == ["class", "images", "right", "accuracy"] and classes["data"][0][0] == "airplane"
        mistakes = json.loads(store.read(predictions, "worst_mistakes.table.json"))
        assert len(mistakes["data"]) == 25 and store.read(predictions, mistakes["data"][0][0]["path"])[1:4] == b"PNG"
    latest = [each for each in store.committed("model") if "latest" in each.aliases]
    assert len(latest) == len({each.collection.name for each in store.committed("model")})


def list_own(server: Server) -> list[Artifact]:
    """The artifacts that are not wandb's own, which it makes for the table of a chart."""
    return [artifact for artifact in server.artifacts.by_id.values() if artifact.collection.type != "run_table"]


def push_all(records: list[RunDir]) -> None:
    for record in records:
        assert main(["push", record.id, "--runs-dir", str(record.path.parent)]) == 0


@pytest.mark.slow
def test_sent_once_with_lineage_and_best(records: list[RunDir], server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    del records[2:]
    push_all(records)
    check_arrived(server, records)
    server.requests.clear()
    push_all(records)
    assert "(0 sent now)" in capsys.readouterr().out
    asked = {request.name for request in server.requests}
    assert not asked & {"CreateArtifact", "UseArtifact", "AddAliases", "UpsertBucket", "artifact_files"}, asked


@pytest.mark.slow
def test_the_right_counts_of_the_tables(records: list[RunDir], server: Server) -> None:
    import numpy as np

    push_all(records[:1])
    (predictions,) = server.artifacts.committed("predictions")
    there = json.loads(server.artifacts.read(predictions, "classes.table.json"))["data"]
    with np.load(records[0].path / "predictions.npz") as arrays:
        label, predicted = arrays["label"], arrays["predicted"]
    for number, (_, images, right, accuracy) in enumerate(there):
        assert images == np.count_nonzero(label == number)
        assert right == np.count_nonzero((label == number) & (predicted == number)) and accuracy == pytest.approx(
            right / images
        )


@pytest.mark.slow
def test_an_offline_sweep_is_the_same_after_wandb_sync_and_push(records: list[RunDir], server: Server) -> None:
    for record in records:  # the second and the last one that was the best lose the alias again
        assert Mirror(record, "offline").finish()
        artifact_settle.settle(pytest.fail)
    folders = [str(next(record.path.glob("wandb/offline-run-*"))) for record in records]
    subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=True, capture_output=True, timeout=100)
    assert len(server.artifacts.committed("model")) == len(records)
    (dataset,) = server.artifacts.committed("dataset")
    assert dataset.used_by == [records[0].id]  # what wandb cannot do offline
    marked = [each.run for each in server.artifacts.committed("model") if BEST in each.aliases]
    assert marked == [BEST_RUN]
    push_all(records)
    check_arrived(server, records)


@pytest.mark.slow
def test_a_model_by_its_name(records: list[RunDir], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_all(records)
    name = f"me/cifar/model-{ID}:{BEST}"
    there, here = cifar.load(name), torch.load(records[1].path / "weights.pt")
    assert there.state_dict().keys() == here.keys()
    assert all(torch.equal(tensor, here[key]) for key, tensor in there.state_dict().items())
    server.requests.clear()
    cifar.load(f"me/cifar/model-{ID}:run-{BEST_RUN}")  # the same version: its weights are not fetched again
    assert len(server.asked("artifact_files")) == 1  # the manifest
    capsys.readouterr()
    assert main(["train", "--from", name, "seed=7", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "worksheet1" in shown and f"run {BEST_RUN}" in shown
    for wrong in (f"me/cifar/model-{ID}:nothing", "me/other/model:latest", f"me/cifar/predictions-{ID}:latest"):
        assert main(["evaluate", wrong]) == 2
        error = capsys.readouterr().err
        assert wrong in error and "Traceback" not in error


@pytest.mark.slow
def test_a_hostile_model_artifact_is_one_sentence(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    (tmp_path / "weights.pt").write_bytes(b"cos\nsystem\n")
    for name, run_id in (("bad", "../../up"), ("lacking", "ok")):
        with wandb.init(project="p", id=name, reinit="create_new", settings=wandb.Settings(silent=True, console="off")) as run:
            artifact = wandb.Artifact(name, type="model", metadata={"run": run_id})
            artifact.add_file(str(tmp_path / "weights.pt"))
            if name == "bad":
                for file in ("config.json", "run.json", "environment.json"):
                    (tmp_path / file).write_text("{}")
                    artifact.add_file(str(tmp_path / file))
            run.log_artifact(artifact)
    for name in ("bad", "lacking"):
        assert main(["evaluate", f"me/p/{name}:latest"]) == 2
        assert "is no model artifact of this program" in capsys.readouterr().err
    assert not (tmp_path / "up").exists() and not list(tmp_path.rglob("cache/**/weights.pt"))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("me/cifar/model-x:best", ArtifactPath("me", "cifar", "model-x", "best")),
        ("https://wandb.ai/me/cifar/artifacts/model/model-x/v3", ArtifactPath("me", "cifar", "model-x", "v3")),
        ("https://host/me/cifar/artifacts/model/model-x/v3/files", ArtifactPath("me", "cifar", "model-x", "v3")),
        ("https://host/me/cifar/artifacts/model/model-x", ArtifactPath("me", "cifar", "model-x", "latest")),
        ("me/cifar/model-x", None),
        ("me/cifar/../x:best", None),
        ("model-x:best", None),
        ("a1b2c3d4", None),
        ("https://wandb.ai/me/cifar/runs/x:y", None),
        ("", None),
    ],
)
def test_names_of_artifacts(name: str, path: ArtifactPath | None) -> None:
    assert parse_artifact_path(name) == path


@pytest.mark.slow
def test_off_is_kept_with_the_run(
    records: list[RunDir], server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(records[0].path.parent)
    assert main(["push", records[0].id, "--artifacts", "off", "--runs-dir", runs]) == 0
    about = records[1].read_json("run")
    records[1].write_json("run", {**about, "artifacts": "off"})  # as `train --artifacts off` writes it
    push_all(records[1:2])
    assert not list_own(server) and not server.unknown
    assert main(["push", records[1].id, "--artifacts", "on", "--runs-dir", runs]) == 0
    assert [each.run for each in server.artifacts.committed("model")] == [records[1].id]
    push_all(records[:1])  # the switch of an earlier command is gone
    assert [each.run for each in server.artifacts.committed("model")] == [records[1].id, records[0].id]
    monkeypatch.setenv("CIFAR_ARTIFACTS", "maybe")
    assert main(["push", records[0].id, "--runs-dir", runs]) == 2
    assert "CIFAR_ARTIFACTS is 'maybe'; write on or off" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["CreateArtifact", "CommitArtifact", "artifact_files", "UseArtifact", "AddAliases"])
def test_a_full_server_takes_the_run_and_push_the_rest(
    records: list[RunDir], server: Server, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    server.fault = Fault("status", 403, where=where)
    said: list[str] = []
    assert Mirror(records[1], "online", said.append).finish(patience=5.0) and server.runs[BEST_RUN].state == "finished"
    artifact_settle.settle(said.append)
    assert any("`push`" in line for line in said), said
    server.heal()
    push_all(records[1:2])
    check_arrived(server, records[1:2])


@pytest.mark.slow
def test_a_slow_upload_is_waited_for_and_not_begun_again(records: list[RunDir], server: Server) -> None:
    server.fault = Fault("slow", 0.5, where="artifact_files")
    mirror = Mirror(records[1], "online", pytest.fail)
    num_tries = 0
    while not mirror.finish(patience=0.1):
        assert mirror.is_open and server.runs[BEST_RUN].state == "running"
        num_tries += 1
        assert num_tries < 200
    assert num_tries and server.runs[BEST_RUN].state == "finished"
    num_tables = len(server.artifacts.by_id) - len(list_own(server))
    assert len(list_own(server)) == len(server.asked("CreateArtifact")) - num_tables == 3
    push_all(records[1:2])
    check_arrived(server, records[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["CreateArtifact", "artifact_files", "CommitArtifact", "UseArtifact"])
def test_an_upload_that_is_cut_off_is_made_again(records: list[RunDir], server: Server, where: str) -> None:
    server.fault = Fault("hang", where=where)
    mirror = Mirror(records[1], "online", pytest.fail)
    for _ in range(5):
        assert not mirror.finish(patience=0.2) and server.runs[BEST_RUN].state == "running"
    assert server.fault.met
    stop_core()  # as if the process was killed in the middle of it
    mirror.suspend()
    server.heal()
    push_all(records[1:2])
    check_arrived(server, records[1:2])


@pytest.mark.slow
def test_the_switch_of_a_training_is_kept_in_its_record(wandb_server: Server, runs: Path) -> None:
    words = ["model=conv4", "epochs=1", "train_size=256", "val_size=200", "batch_size=64", "--dataset", "stand-in"]
    for option, count in (("off", 0), ("on", 1)):
        code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "train", *words, "--artifacts", option))
        assert code == 0, output
        (record,) = [
            each for each in list_run_dirs(runs) if (each.read_json("run").get("artifacts") == "off") == (option == "off")
        ]
        code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", record.id))
        assert code == 0 and "(0 sent now)" in output, output
        assert [each.run for each in wandb_server.artifacts.committed("model")] == [record.id] * count


@pytest.mark.slow
def test_above_the_limit_the_best_and_the_front_are_sent(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_choice, "MAX_RUNS", 3)
    monkeypatch.setattr(artifact_choice, "NUM_BEST", 2)
    monkeypatch.setattr(artifact_choice, "_KEPT_SECONDS", 0.0)
    made, runs = [], tmp_path / "runs"
    cells = [("resnet56", 0.9), ("resnet20", 0.7), ("resnet20", 0.8), ("worksheet1", 0.6), ("worksheet1", 0.5), ("vgg11", 0.85)]
    for cell, (model, accuracy) in enumerate(cells):
        made.append(
            write(runs, f"s-{cell}", model=model, accuracy=accuracy, sweep="s", cell=cell, layers=1, predictions=cell in (0, 4))
        )
        (made[-1].path / "weights.pt").write_bytes(bytes(8))
    push_all(made)
    # by hand: the best two are 0 (0.9) and 5 (0.85); nobody with fewer MACs beats 2 (0.8) and 3 (0.6)
    assert sorted(each.run for each in server.artifacts.committed("model")) == ["s-0", "s-2", "s-3", "s-5"]
    assert [each.run for each in server.artifacts.committed("predictions")] == ["s-0"]
    monkeypatch.setattr(artifact_choice, "MAX_RUNS", 200)
    monkeypatch.setattr(artifact_choice, "MAX_BYTES", 47)  # of 48
    assert artifact_choice.is_above_limit(made[0]) and not artifact_choice.is_model_wanted(made[4])
    monkeypatch.setattr(artifact_choice, "MAX_BYTES", 48)
    assert artifact_choice.is_model_wanted(made[4])


@pytest.mark.slow
def test_single_runs_have_a_collection_and_stand_in_images_another(tmp_path: Path, server: Server) -> None:
    made = [make_run(tmp_path / "runs", "one", 0.5), make_run(tmp_path / "runs", "two", 0.9, dataset="stand-in")]
    push_all(made)
    there = {each.run: (each.collection.name, sorted(each.aliases)) for each in server.artifacts.committed("model")}
    assert there == {
        "one": ("model", ["best", "latest", "run-one"]),
        "two": ("model-stand-in", ["best", "latest", "run-two"]),
    }


@pytest.mark.slow
def test_runs_that_did_not_finish_have_none(tmp_path: Path, server: Server) -> None:
    for state in ("failed", "diverged", "stopped"):
        record = write(tmp_path / "runs", state, state=state, layers=1)
        (record.path / "weights.pt").write_bytes(b"x")
        push_all([record])
    assert not list_own(server)


def test_what_is_private_of_wandb_is_as_it_was() -> None:
    """artifact_feed.py calls these."""
    import inspect

    import wandb

    assert inspect.signature(wandb.Run._log_artifact).parameters["use_after_commit"].default is False
    assert "use_after_commit=True" in inspect.getsource(wandb.Run.use_artifact)  # which does the same for a draft


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twelve_cells_two_agents_and_one_of_them_killed(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    """Hosted: while it runs, after a push, and the network that a name gives."""
    text = GRID.replace("[0.01, 0.02]", "[0.01, 0.02, 0.05]") + "  seed: {values: [0, 1]}\n  epochs: {value: 3}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    assert wait_for_exit(start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--no-agent"))[0] == 0
    sweep, store = wandb_server.only_sweep(), wandb_server.artifacts
    agents = [start_command(wandb_server, "-m", "cifar", "agent", sweep.id, "--workers", "1") for _ in range(2)]
    wait_until(lambda: len(store.committed("model")) >= 3, 200)
    agents[0].kill()
    code, output = wait_for_exit(agents[1])
    assert code == 0, output
    wait_for_exit(agents[0])
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", sweep.id))
    assert code == 0, output
    finished = [record for record in list_run_dirs(runs) if record.state == "finished"]
    assert len(finished) >= 10
    models_there = store.committed("model")
    assert sorted(each.run for each in models_there) == sorted(record.id for record in finished)
    assert {each.collection.name for each in models_there} == {f"model-{sweep.id}"}
    (dataset,) = store.committed("dataset")
    assert sorted(dataset.used_by) == sorted(record.id for record in finished) and dataset.name == "stand-in:v0"
    highest = max(record.read_json("summary")["val/acc"] for record in finished)
    (best,) = [each for each in models_there if BEST in each.aliases]
    first = min(
        (run for run in finished if run.read_json("summary")["val/acc"] == highest), key=lambda r: r.read_json("run")["created"]
    )
    assert best.run == first.id and best.metadata["val/acc"] == highest
    assert "latest" in models_there[-1].aliases
    before = (
        len(store.by_id),
        {key: value.id for key, value in store.collections[("me", "cifar", best.collection.name)].aliases.items()},
    )
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", sweep.id))
    assert code == 0 and "0 sent now" in output
    aliases = store.collections[("me", "cifar", best.collection.name)].aliases
    assert before == (len(store.by_id), {key: value.id for key, value in aliases.items()})
    load = f"cifar.load('me/cifar/model-{sweep.id}:best').state_dict()"
    ask = f"import cifar, torch; torch.save({load}, {str(tmp_path / 'got.pt')!r})"
    code, output = wait_for_exit(start_command(wandb_server, "-c", ask))
    assert code == 0, output
    got, own = torch.load(tmp_path / "got.pt"), torch.load(runs / best.run / "weights.pt")
    assert got.keys() == own.keys() and all(torch.equal(got[key], own[key]) for key in own)


def test_the_address_of_the_data_is_that_of_the_loader() -> None:
    from cifar.data.cifar10 import URL

    assert CIFAR10_URL == URL
