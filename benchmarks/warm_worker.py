"""How long a warm worker idles: from a trial's last evaluation to the first optimizer step of the next one.

    python benchmarks/warm_worker.py [--trials 24] [--model conv] [--json FILE]

An agent with one worker, pictures and the (offline) W&B mirror on, trains a grid of one architecture. A plug-in probe and a
patched `evaluate` in the worker write down the times; both trials and everything between them are the real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITNESS = """
import os, time
from cifar.training import trainer
from cifar.registry import probes

def tell(what):
    file = os.open(os.environ["WARM_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what} {os.getpid()} {time.monotonic()}\\n".encode())
    os.close(file)

if not hasattr(trainer, "evaluate_unwatched"):
    trainer.evaluate_unwatched = trainer.evaluate

    def evaluate(*arguments, **options):
        found = trainer.evaluate_unwatched(*arguments, **options)
        tell("evaluated")
        return found

    trainer.evaluate = evaluate

@probes.register("warm")
class Warm:
    labels, layers = {}, []

    def __init__(self, *, warm: int = 0) -> None:
        self.first = True

    def start(self, parameters):
        pass

    def after_update(self, parameters, before=None):
        if self.first:
            self.first = False
            tell("stepped")
"""
SWEEP = """
method: grid
metric: {{name: val/acc, goal: maximize}}
parameters:
  model: {{value: {model}}}
  seed: {{values: {seeds}}}
  epochs: {{value: 2}}
  train_size: {{value: 512}}
  val_size: {{value: 500}}
  batch_size: {{value: 64}}
  probes: {{value: warm}}
"""


def gaps(log: str) -> list[float]:
    """Seconds from the last `evaluated` before each `stepped` of a process that is not its first."""
    found, last, seen = [], {}, set()
    for line in log.splitlines():
        what, pid, moment = line.split()
        if what == "evaluated":
            last[pid] = float(moment)
        elif pid in seen:
            found.append(float(moment) - last[pid])
        else:
            seen.add(pid)
    return found


def measure(trials: int, model: str) -> dict[str, object]:
    """Run the sweep in a folder of its own -> what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "plugins" / "probes").mkdir(parents=True)
        (place / "plugins" / "probes" / "warm.py").write_text(WITNESS)
        (place / "sweep.yaml").write_text(SWEEP.format(model=model, seeds=list(range(trials))))
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")},
            "CIFAR_PLUGINS": str(place / "plugins"), "WARM_LOG": str(place / "log"), "CIFAR_RUNS": str(place / "runs"),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "cifar", "sweep", str(place / "sweep.yaml"), "--workers", "1", "--no-report"]
        subprocess.run(
            [*command, "--dataset", "stand-in", "--wandb", "offline"], env=environment, cwd=place, check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = sorted(gaps((place / "log").read_text()))
        (example, *_) = place.glob("runs/*/environment.json")
        where = json.loads(example.read_text())
    quarter = statistics.quantiles(seconds, n=4)
    return {
        "what": "seconds from a trial's last evaluation to the next one's first optimizer step",
        "device": where["device"],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "versions": where["versions"],
        "model": model,
        "mirror": "offline",
        "n": len(seconds),
        "median_seconds": round(statistics.median(seconds), 4),
        "quartiles_seconds": [round(quarter[0], 4), round(quarter[2], 4)],
        "range_seconds": [round(seconds[0], 4), round(seconds[-1], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--model", default="conv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args()
    text = json.dumps(measure(options.trials, options.model), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
