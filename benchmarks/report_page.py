"""How large the report page is, and how fast it draws and answers, with 10 to 10,000 runs, in headless Chromium.

    python -m benchmarks.report_page [--runs 10 500 2000 10000] [--epochs 100] [--events 30] [--json FILE]

The runs are random: network, learning rate, weight decay, width, momentum and augmentation, one to four seeds, curves with
the noise of measured ones, so that nothing compresses by being smooth. A time is from the input to the end of the next frame,
beside that of a frame in which nothing happens. First paint: from the navigation to the end of the frame in which all points
are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cifar.report import write_report
from cifar.tracking.records import SCHEMA
from helpers.browser import READY, find_chromium, page_url
from helpers.fake_runs import ACCURACY, NETWORKS

NUM_LAYERS = 3
# one frame after an input: the handler, the drawing of the next frame, and what the browser does after it
MEASURE = """async ([kind, count]) => {
  const { view, parts: { scatter } } = explorer, box = scatter.plot.getBoundingClientRect(), times = [];
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  }));
  const act = {
    blank: () => {},
    hover: (i) => scatter.plot.dispatchEvent(new PointerEvent('pointermove', {
      bubbles: true,
      clientX: box.left + 70 + (i * 137) % (box.width - 100),
      clientY: box.top + 20 + (i * 61) % (box.height - 80) })),
    filter: (i) => view.state.set({ text: ['resnet', '', 'vgg', 'lr=0.0'][i % 4] }),
  }[kind];
  for (let i = 0; i < count; i++) {
    await frame();
    const start = performance.now();
    act(i);
    await frame();
    times.push(performance.now() - start);
  }
  return times;
}"""
PAINTED = "new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(() => r(performance.now()))))"


def write_runs(folder: Path, count: int, epochs: int) -> None:
    """`count` run folders; 2 % of the runs have diverged."""
    draws = np.random.default_rng(0)
    epoch = np.arange(1, epochs + 1)
    names = ["epoch", "step", "train/loss", "train/acc", "train/lr", "val/loss", "val/acc", "system/seconds"]
    names += [f"{metric}/layer{i}.conv" for i in range(NUM_LAYERS) for metric in ("gradient_norm", "update_ratio")]
    line = "{" + ",".join(f'"{name}":%{"d" if name in ("epoch", "step") else ".8g"}' for name in names) + "}\n"
    done = 0
    while done < count:
        model = list(NETWORKS)[draws.integers(len(NETWORKS))]
        settings = {
            "lr": float(10 ** draws.uniform(-3, 0)),
            "weight_decay": float(10 ** draws.uniform(-5, -2)),
            "width": float(draws.uniform(0.5, 1.5)),
            "momentum": float(draws.uniform(0.8, 0.99)),
            "augment": ("none", "flip", "flip_crop")[draws.integers(3)],
        }
        mean = ACCURACY[model] - 0.02 * (np.log10(settings["lr"]) + 1.3) ** 2 + 0.03 * (settings["width"] - 1)
        for seed in range(min(int(draws.integers(1, 5)), count - done)):
            has_diverged = draws.random() < 0.02
            share = 1 - np.exp(-3.2 * epoch / epochs)
            accuracy = 0.1 + (mean + draws.normal(0, 0.003) - 0.1) * share / share[-1] + draws.normal(0, 0.006, epochs)
            columns = [
                epoch,
                351 * epoch,
                2.55 - 2.4 * accuracy + draws.normal(0, 0.01, epochs),
                accuracy - 0.02 + 0.05 * share + draws.normal(0, 0.002, epochs),
                settings["lr"] * 0.5 * (1 + np.cos(np.pi * epoch / epochs)),
                2.4 - 2.1 * accuracy + draws.normal(0, 0.02, epochs),
                np.round(accuracy * 5000) / 5000,
                np.full(epochs, 12.5),
            ]
            for layer in range(NUM_LAYERS):
                size = np.exp(draws.normal(0, 0.2, epochs)) * (0.5 + 0.5 / epoch) * 10 ** (-1.5 * (1 - layer / 2))
                columns += [0.3 * size, 3e-3 * size**0.5]
            rows = np.stack(columns, 1)[: epochs // 2 if has_diverged else epochs]
            _write_run(folder / f"r{done:05d}", model, {**settings, "seed": seed, "epochs": epochs}, line, rows, has_diverged)
            done += 1


def _write_run(folder: Path, model: str, settings: dict[str, Any], line: str, rows: Any, has_diverged: bool) -> None:
    macs, params, _ = NETWORKS[model]
    macs, params = round(macs * settings["width"] ** 2), round(params * settings["width"] ** 2)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(line % tuple(row) for row in rows))
    last, epochs = float(rows[-1][6]), settings["epochs"]
    files: dict[str, Any] = {
        "config": {"dataset": "cifar10", "model": model, "optimizer": "sgd", "batch_size": 128, **settings},
        "run": {
            "schema": SCHEMA, "id": folder.name, "created": 1.7e9, "name": f"{model}-{folder.name}", "dataset": "cifar10",
            "official": True, "swept": ["model", *settings][:-1], "cost": {"macs": macs, "params": params, "verified": True},
        },
        "labels": {"layers": [f"layer{i}.conv" for i in range(NUM_LAYERS)]},
        "environment": {},
        "status": {
            "state": "diverged" if has_diverged else "finished", "reason": "the loss is nan" if has_diverged else "",
            "epoch": len(rows), "epochs": epochs,
        },
    }  # fmt: skip
    if not has_diverged:
        files["summary"] = {"val/acc": last, "epochs": epochs, "seconds": 12.5 * epochs * settings["width"], "macs": macs}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def describe(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 1),
        "n": len(ordered),
    }


def measure(browser: Any, count: int, epochs: int, num_events: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), count, epochs)
        start = time.monotonic()
        page_file = write_report([], runs=Path(folder), out=Path(folder) / "out").page
        found: dict[str, Any] = {"runs": count, "epochs": epochs, "report_seconds": round(time.monotonic() - start, 1)}
        found["bytes"] = page_file.stat().st_size
        paints = []
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(page_url(page_file))
            page.wait_for_selector(READY, timeout=120_000)
            paints.append(float(page.evaluate(PAINTED)))
            if len(paints) < 5:
                page.close()
        found["first_paint_ms"] = describe(paints)
        for kind in ("blank", "hover", "filter"):
            found[f"{kind}_ms"] = describe(page.evaluate(MEASURE, [kind, num_events]))
        found["screens"] = round(page.evaluate("document.documentElement.scrollHeight") / 900, 1)
        page.close()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 500, 2000, 10000])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--events", type=int, default=30, help="of each kind [30]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        pages = [measure(browser, count, options.epochs, options.events) for count in options.runs]
        about = {"chromium": browser.version, "cores": len(os.sched_getaffinity(0)), "platform": platform.platform()}
        about["load_average"] = round(os.getloadavg()[0], 1)  # others on the same cores make it slower
        browser.close()
    text = json.dumps({**about, "pages": pages}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
