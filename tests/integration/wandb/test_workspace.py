"""What a person finds on W&B without any set-up: panels, columns, and every field of the run's folder."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.app import main
from cifar.integrations.wandb.mirror import Mirror
from helpers import leet
from helpers.leet import end_record, make_record
from helpers.protocol import Run, Server
from helpers.system_fields import assert_shown_as_recorded
from helpers.workspace import automatic_panels, custom_charts, hidden_keys, history_keys, list_columns, summary_keys

PAIRS = (
    "dataset=stand-in", "epochs=2", "max_steps=2", "batch_size=32", "train_size=128", "val_size=64", "threads=1", "device=cpu",
    "probe_every=1", "tta=flip", "test=final",
)  # fmt: skip
MAX_PANELS, MAX_SUMMARY = 25, 30
COMPARED = {
    "run.json", "config.json", "labels.json", "environment.json", "machine.json", "status.json", "summary.json",
    "metrics.jsonl", "histograms.jsonl", "system_metrics.jsonl", "output.log", "requirements.txt", "predictions.npz",
    "weights.pt",
}  # fmt: skip
NOT_SENT = {"mirror.log"}  # what the mirror says of its own work
SHOWN = {
    "train/loss", "train/acc", "train/lr", "train/gradient_norm", "train/update_ratio", "train/zero_gradients",
    "val/loss", "val/acc", "system/seconds", "system/images_per_second", "system/memory_gib",
}  # fmt: skip


def train(server: Server, runs: Path, *words: str) -> tuple[Path, Run]:
    """A run by the command line, mirrored -> its folder, and what the server has of it."""
    assert main(["train", "--wandb", "online", *words]) == 0
    (folder,) = (path.parent for path in runs.glob("*/run.json"))
    return folder, server.runs[folder.name]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_of_a_layer(key: str) -> bool:
    return key.startswith(("gradient_", "update_ratio/", "gradients/", "updates/"))


@pytest.mark.parametrize(
    ("network", "num_layers"),
    [
        (("--experiment", "worksheet1"), 4),
        # scoring the test set takes minutes here; it brings five keys of the summary
        pytest.param(("model=resnet20", "test=never", "tta=none"), 22, marks=pytest.mark.slow),
        pytest.param(("model=resnet56", "test=never", "tta=none"), 58, marks=pytest.mark.slow),
    ],
    ids=["worksheet1", "resnet20", "resnet56"],
)
@pytest.mark.slow
def test_few_panels_and_columns(wandb_server: Server, runs: Path, network: tuple[str, ...], num_layers: int) -> None:
    _, run = train(wandb_server, runs, *PAIRS, *network)
    is_scored = "test=never" not in network
    panels, summary = automatic_panels(run), summary_keys(run)
    print(f"{len(panels)} panels: {sorted(panels)}")
    print(f"{len(summary)} summary: {sorted(summary)}")
    print(f"{len(run.config)} config: {sorted(run.config)}")
    assert panels >= SHOWN and len(panels) <= MAX_PANELS
    assert {f"pictures/{name}" for name in ("curves", "gradient_norms", "weight_updates")} <= panels
    assert custom_charts(run) == {"charts/gradient_norm_by_layer"} and "charts/gradient_norm_by_layer_table" in summary
    layers = {key.partition("/")[2] for key in history_keys(run) if key.startswith("gradient_norm/")}
    assert len(layers) == num_layers and not any(map(is_of_a_layer, panels))
    assert {key for key in history_keys(run) if is_of_a_layer(key)} <= hidden_keys(run) and "epoch" in hidden_keys(run)
    wanted = {
        *({"test/acc", "test/loss"} if is_scored else ()),
        "val/acc",
        "val/loss",
        "best/val/acc",
        "macs",
        "flops",
        "params",
        "seconds",
    }
    assert summary >= {*wanted, "images_per_second", "state", "reason", "epochs"}
    assert len(summary) <= MAX_SUMMARY - 5 * (not is_scored)
    assert not any(map(is_of_a_layer, summary))
    assert run.summary["flops"] == 2 * run.summary["macs"] == 2 * run.config["macs"]
    for cells in (run.config, run.summary):
        assert not [value for value in cells.values() if isinstance(value, str) and value[:1] in ("{", "[")]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 9], ids=["the whole run", "an early end"])
def test_the_chart_is_w_and_b_s_own(tmp_path: Path, server: Server, epochs: int) -> None:
    """What the server gets is what `wandb.Run.log` makes of such a chart, also where there is no row for it to be in."""
    import wandb

    record = make_record(tmp_path, "chart001", epochs=epochs)
    for epoch in (1, 2, 3):
        record.append_row({**leet.row(epoch), "gradient_norm/layers.1.conv1": 0.0})
    end_record(record, "finished" if epochs == 3 else "pruned")
    for _ in range(2):
        mirror = Mirror(record, "online")
        assert mirror.finish()
        mirror.forget()  # the next one opens the run again
    run = server.runs["chart001"]
    table = json.loads(run.files[run.summary["charts/gradient_norm_by_layer_table"]["path"]])
    assert table["columns"] == ["layer", "epoch", "norm"]
    assert [point for point in table["data"] if point[1] == "epoch 3"] == [  # the norms are 1/3 and 1/5
        [1, "epoch 3", pytest.approx(-0.47712125)],
        [3, "epoch 3", pytest.approx(-0.69897)],
    ]
    assert len(table["data"]) == 6, "a norm of zero has no logarithm"

    other = wandb.init(
        id="other001", project="cifar", dir=str(tmp_path), settings=wandb.Settings(console="off"), reinit="create_new"
    )
    line = wandb.plot.line_series(
        [1], [[0.5]], title="log10 of the gradient norm, by layer from input to output", xname="layer"
    )
    line.spec.fields |= {"step": "layer", "lineKey": "epoch", "lineVal": "norm"}
    other.log({"charts/gradient_norm_by_layer": line})
    other.finish()
    sent, wanted = (server.runs[name].raw_config["_wandb"]["value"]["visualize"] for name in ("chart001", "other001"))
    assert sent == wanted


@pytest.mark.slow
@pytest.mark.parametrize("probes", ["probes=all", "probes=none"])
def test_every_field_of_the_folder_is_on_the_server(wandb_server: Server, runs: Path, probes: str) -> None:
    """Nothing of the mirror's code is used here."""
    folder, run = train(wandb_server, runs, "--experiment", "worksheet1", "--tags", "mine", *PAIRS, probes)
    about, config, status, summary = (read(folder, name) for name in ("run", "config", "status", "summary"))
    rows = read_rows(folder)

    history = [
        {key: value for key, value in row.items() if key[0] != "_" and not isinstance(value, dict)} for row in run.history
    ]
    assert history == rows and [row["_step"] for row in run.history] == [1, 2]
    file = folder / "histograms.jsonl"
    lines = {line["epoch"]: line for line in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    assert sorted(lines) == ([1, 2] if probes == "probes=all" else [])
    for row in run.history:
        there = {key: value for key, value in row.items() if isinstance(value, dict) and value["_type"] == "histogram"}
        kinds = {kind: lines[row["epoch"]][kind] for kind in ("gradients", "updates")} if lines else {}
        assert there.keys() == {f"{kind}/{layer}" for kind, layers in kinds.items() for layer in layers}
        for key, value in there.items():
            kind, _, layer = key.partition("/")
            counts, top = kinds[kind][layer]["counts"], kinds[kind][layer]["top"]
            assert value["values"] == [sum(counts[i : i + 2]) for i in range(0, 64, 2)]
            edges = [top / 2**i for i in range(16)]  # each bin is twice as wide as the one nearer to zero
            assert value["bins"] == pytest.approx([*(-edge for edge in edges), 0.0, *reversed(edges)], rel=1e-3, abs=0)

    cost = {name: about["cost"][name] for name in ("macs", "params")}
    assert run.config == {**config, **cost, "cifar_schema": 2}
    numbers = {key: value for key, value in run.summary.items() if key[0] != "_" and not isinstance(value, dict)}
    ends = {"state": status["state"], "reason": status["reason"], "flops": 2 * cost["macs"]}
    assert numbers == {**list_columns(summary), **cost, **ends, "epoch": rows[-1]["epoch"]}
    assert (run.id, run.display_name, run.tags, run.notes) == (folder.name, about["name"], about["tags"], about["command"])
    assert (run.project, run.job_type, run.exits) == (about["project"], "train", [0])

    document = json.loads(run.files["cifar.json"])
    del status["pid"]
    parts = {name: read(folder, name) for name in ("run", "config", "labels", "environment", "summary")}
    content = run.files["metrics.jsonl"]
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    assert content == (folder / "metrics.jsonl").read_bytes()
    assert document == {"schema": 2, **parts, "status": status, "metrics": {"md5": digest, "bytes": len(content)}}
    assert [list(document[name]) for name in parts] == [list(parts[name]) for name in parts], "in the same order"

    pictures = {path.stem: path.read_bytes() for path in (folder / "pictures").glob("*.png")}
    sent = {key.partition("/")[2]: value["path"] for key, value in run.history[-1].items() if key.startswith("pictures/")}
    assert {name: run.files[path] for name, path in sent.items()} == pictures and pictures
    assert run.files["predictions.npz"] == (folder / "predictions.npz").read_bytes()
    assert_shown_as_recorded(run, folder)  # output.log, system_metrics.jsonl, environment.json, machine.json, requirements.txt

    (model,), (dataset,) = (wandb_server.artifacts.made_by(run.id, "model"), wandb_server.artifacts.used_by(run.id))
    assert wandb_server.artifacts.read(model, "weights.pt") == (folder / "weights.pt").read_bytes()
    fingerprint = read(folder, "environment")["data_fingerprint"]
    assert dataset.metadata["data_fingerprint"] == model.metadata["data_fingerprint"] == fingerprint

    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    mine = {name for name in there if not name.startswith(("pictures/", "wandb/"))}
    assert mine - COMPARED <= NOT_SENT, "a file that this test does not know: say here what W&B has of it"
