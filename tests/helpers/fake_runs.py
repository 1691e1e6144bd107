"""Record folders as runs leave them, with plausible numbers, for the tests of what reads them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from cifar.tracking.histograms import append_histograms
from cifar.tracking.run_dir import RunDir

NETWORKS: dict[str, tuple[float, int, int]] = {  # macs, params, layers
    "worksheet1": (6_654_464, 1_070_794, 4),
    "shufflenet_v2_x0.5": (10_900_000, 352_042, 18),
    "mobilenet_v2": (87_980_000, 2_236_682, 53),
    "resnet20": (40_813_184, 272_474, 22),
    "resnet56": (125_747_840, 855_770, 58),
    "worksheet2": (161_173_504, 9_556_554, 8),
    "vgg11": (153_290_000, 9_756_426, 9),
    "preact_resnet18": (557_000_000, 11_171_146, 21),
}
ACCURACY = dict(zip(NETWORKS, (0.61, 0.66, 0.712, 0.745, 0.782, 0.751, 0.77, 0.824), strict=True))


def rows(model: str, epochs: int, seed: int, accuracy: float, layers: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng([seed, epochs, layers])
    result = []
    for epoch in range(1, epochs + 1):
        share = 1 - math.exp(-3.2 * epoch / epochs)
        acc = 0.1 + (accuracy - 0.1) * share / (1 - math.exp(-3.2)) + noise.normal(0, 0.006)
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": 351 * epoch,
            "train/loss": 2.3 - 2.4 * acc + 0.25,
            "train/acc": acc - 0.02 + 0.05 * share,
            "train/lr": 0.1 * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) + 1e-6,
            "val/loss": 2.3 - 2.1 * acc + 0.1,
            "val/acc": acc,
            "system/seconds": 12.5,
        }
        for i in range(layers):
            depth = 10 ** (-1.5 * (1 - i / max(layers - 1, 1)))
            size = depth * (0.5 + 0.5 / epoch) * math.exp(noise.normal(0, 0.2))
            row[f"gradient_mean/layer{i}.conv"] = 1e-3 * size
            row[f"gradient_max/layer{i}.conv"] = 6e-2 * size
            row[f"gradient_norm/layer{i}.conv"] = 0.3 * size
            row[f"update_ratio/layer{i}.conv"] = 3e-3 * size**0.5 * row["train/lr"] / 0.1 + 1e-6
        result.append(row)
    return result


def write(
    runs: Path,
    run_id: str,
    *,
    model: str = "resnet20",
    seed: int = 0,
    epochs: int = 5,
    sweep: str = "",
    cell: int | None = None,
    state: str = "finished",
    reason: str = "",
    accuracy: float | None = None,
    dataset: str = "cifar10",
    verified: bool = True,
    swept: tuple[str, ...] = ("model", "seed"),
    name: str = "",
    test: float | None = None,
    views: int = 1,
    one_view: float | None = None,
    layers: int | None = None,
    predictions: bool = False,
    done: int | None = None,
    tags: tuple[str, ...] = (),
    measured: dict[str, float] | None = None,
    **config: Any,
) -> RunDir:
    """One run folder; `done` epochs of it are written (all, where it is finished). `measured`: more numbers of its summary."""
    macs, params, depth = NETWORKS.get(model, (1e7, 100_000, 4))
    accuracy = ACCURACY.get(model, 0.5) + np.random.default_rng([seed, 7]).normal(0, 0.006) if accuracy is None else accuracy
    values = {
        "dataset": dataset,
        "model": model,
        "optimizer": "sgd",
        "lr": 0.1,
        "epochs": epochs,
        "batch_size": 128,
        "seed": seed,
    }
    official = dataset == "cifar10"
    cost = {"macs": macs, "params": params, "verified": verified, "note": "" if verified else "thop 9.1 M, torch 9.9 M MACs"}
    run = {"name": name or f"{model}-{seed}", "sweep": sweep, "cell": cell, "swept": list(swept), "dataset": dataset,
           "official": official, "cost": cost, "command": f"python -m cifar train --from {run_id}"}  # fmt: skip
    run |= {"tags": [*tags, dataset, model]} if tags else {}
    record = RunDir.create(runs, run_id, run, {**values, **config})
    layers = depth if layers is None else layers
    record.write_json("labels", {"layers": [f"layer{i}.conv" for i in range(layers)]})
    record.write_json(
        "environment",
        {
            "versions": {"python": "3.12.3", "torch": "2.15.0"},
            "device": "Some CPU",
            "threads": 2,
            "git": {"commit": "0123456789abcdef" * 2, "dirty": True},
            "data_fingerprint": "c58f30108f718f92" * 4,
        },
    )
    done = epochs if state == "finished" else epochs // 2 if done is None else done
    written = rows(model, epochs, seed, accuracy, layers)[:done]
    if written:
        written[-1]["val/acc"] = accuracy if state == "finished" else written[-1]["val/acc"]
        from json import dumps  # one write instead of one fsync a row

        (record.path / "metrics.jsonl").write_text("".join(dumps(row) + "\n" for row in written))
    if state == "finished":
        tested = {"test/acc": test, "test/loss": 1.0, "test/views": views} if test is not None else {}
        tested |= {"test/acc_one_view": one_view} if one_view is not None else {}
        record.write_json(
            "summary",
            {
                "val/acc": accuracy,
                "epochs": epochs,
                "seconds": 12.5 * epochs + seed,
                "macs": macs,
                **tested,
                **(measured or {}),
            },
        )
    record.set_status(state, reason=reason, epoch=done, epochs=epochs)
    if predictions:
        write_predictions(record.path)
        write_histograms(record, layers)
    return record


def write_histograms(record: RunDir, layers: int) -> None:
    """Of the last epoch: the same bell for the gradients of all layers, and a wider one for the updates of each next layer."""
    bell = [int(1000 * math.exp(-((i - 22) ** 2) / 20)) for i in range(32)]

    def histograms(factor: int) -> dict[str, Any]:
        tops = [2.0 ** (-10 + factor * i % 20) for i in range(layers)]
        return {f"layer{i}.conv": {"top": top, "counts": [*reversed(bell), *bell]} for i, top in enumerate(tops)}

    epoch = [row["epoch"] for row in record.read_rows()][-1]
    append_histograms(record, {"epoch": epoch, "steps": 8, "gradients": histograms(0), "updates": histograms(3)})


def write_predictions(path: Path, n: int = 5000) -> None:
    noise = np.random.default_rng(0)
    label = noise.integers(0, 10, n)
    near = np.array([8, 9, 4, 5, 7, 3, 3, 4, 0, 1])
    wrong = noise.random(n) < 0.24
    predicted = np.where(wrong, np.where(noise.random(n) < 0.5, near[label], noise.integers(0, 10, n)), label)
    index = noise.permutation(45000)[:n]
    worst = np.flatnonzero(predicted != label)[:25]
    y, x = np.mgrid[:32, :32] / 31
    images = np.stack([np.stack([np.sin(9 * x * c + k), np.cos(7 * y + k), x * y]) for k, c in enumerate(noise.random(25))])
    np.savez_compressed(path / "predictions.npz", split=np.array("val"), index=index, label=label, predicted=predicted,
                        confidence=noise.random(n).astype(np.float32) * 0.1 + 0.9, worst_index=index[worst],
                        worst_images=((images + 1) * 127).astype(np.uint8))  # fmt: skip


def sweep_folder(runs: Path, sweep: str = "abcd1234", text: str = "") -> None:
    (runs / "sweeps" / sweep).mkdir(parents=True)
    text = (
        text
        or "# Which network is worth its multiply-adds?\n# scientific: model; nuisance: seed\nname: quickstart\nmethod: grid\n"
    )
    (runs / "sweeps" / sweep / "sweep.yaml").write_text(text)


def quickstart(runs: Path, *, seeds: int = 3, sweep: str = "abcd1234", **options: Any) -> None:
    """A sweep over all networks and some seeds, with one network trained once and some runs that did not finish."""
    sweep_folder(runs, sweep)
    cells = [(model, seed) for model in NETWORKS for seed in range(1 if model == "vgg11" else seeds)]
    for cell, (model, seed) in enumerate(cells):
        write(runs, f"{sweep}-{cell:03d}", model=model, seed=seed, sweep=sweep, cell=cell, predictions=cell == 0, **options)
    n = len(cells)
    write(runs, f"{sweep}-{n:03d}", model="vgg11", seed=1, sweep=sweep, cell=n, state="running", **options)
    write(
        runs,
        f"{sweep}-{n + 1:03d}",
        model="vgg11",
        seed=2,
        sweep=sweep,
        cell=n + 1,
        state="diverged",
        reason="loss is nan",
        **options,
    )


if __name__ == "__main__":
    import sys

    os.umask(0o022)
    quickstart(Path(sys.argv[1]), epochs=12)
