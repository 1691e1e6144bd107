"""How many of the smallest trials 8 workers do in a second: this engine beside Ray Tune and Optuna's `study.optimize`.

    python -m benchmarks.trial_rate [--trials 1000] [--workers 8] [--rounds 1] [--ray-trials 100] [--peers PYTHON] [--json FILE]

`--peers` (or CIFAR_PEERS): the Python of an environment with `ray[tune]` and `optuna`; what it lacks is said and left out.
A trial is the same function in all of them: one step of a small regression, in numpy. Its result is on disk when it ends. The
engine and Optuna have 8 processes on a SQLite file, and on PostgreSQL where CIFAR_POSTGRES names a server or Debian's package
is installed; Ray has 8 CPUs and writes its results into a folder. The clock starts when all processes are ready.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def train_one_step(lr: float, seed: int) -> float:
    """One step of gradient descent on a batch of 64 -> an accuracy."""
    import numpy as np

    draw = np.random.default_rng(seed)
    images, truth = draw.normal(size=(64, 32)), draw.normal(size=32)
    labels, weights = images @ truth > 0, np.zeros(32)
    weights -= lr * images.T @ (1 / (1 + np.exp(-images @ weights)) - labels) / 64
    return float(np.mean((images @ weights > 0) == labels))


# -- peers: run by their own Python, which has no cifar ----------------------------------------------------------------


def run_ray(num_trials: int, num_workers: int, folder: str) -> float:
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> dict[str, float]:
        return {"accuracy": train_one_step(config["lr"], config["seed"])}

    ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
    space = {"lr": 0.1, "seed": tune.grid_search(list(range(num_trials)))}
    tuner = tune.Tuner(trial, param_space=space, run_config=tune.RunConfig(storage_path=folder, verbose=0))
    start = time.perf_counter()
    results = tuner.fit()
    seconds = time.perf_counter() - start
    assert len(results) == num_trials and not results.num_errors
    return seconds


def run_optuna_worker(num_trials: int, url: str, name: str, go: str) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=name, storage=url, sampler=optuna.samplers.RandomSampler())
    print("ready", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    study.optimize(lambda trial: train_one_step(0.1, trial.suggest_int("seed", 0, 10**6)), n_trials=num_trials)


def run_optuna(num_trials: int, num_workers: int, folder: str, url: str) -> float:
    import optuna

    url, name, go = url or f"sqlite:///{folder}/optuna.db", f"rate-{os.getpid()}", f"{folder}/go-optuna"
    study = optuna.create_study(study_name=name, storage=url, direction="maximize")
    own = [str(num_trials // num_workers), url, name, go]
    command = [sys.executable, str(HERE), "optuna-worker", *own]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(num_workers)]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    start = time.perf_counter()
    Path(go).touch()
    assert [worker.wait() for worker in workers] == [0] * num_workers
    seconds = time.perf_counter() - start
    assert len([trial for trial in study.trials if trial.state.is_finished()]) == num_trials // num_workers * num_workers
    Path(go).unlink()
    return seconds


# -- ours --------------------------------------------------------------------------------------------------------------

SWEEP = """
method: grid
metric: {{name: val/acc, goal: maximize}}
parameters:
  model: {{value: conv}}
  lr: {{value: 0.1}}
  seed: {{distribution: int_uniform, min: 0, max: {last}}}
"""


def run_ours(num_trials: int, num_workers: int, folder: Path, url: str) -> tuple[float, dict[str, float]]:
    """-> the seconds, and the memory of an agent in MiB: after its first claim and at most."""
    from helpers.engine_agents import read_claims, start_agents
    from helpers.local_sweeps import create_local_sweep

    runs = Path(tempfile.mkdtemp(dir=folder))
    backend = create_local_sweep(runs, SWEEP.format(last=num_trials - 1), url=url)
    agents = start_agents(num_workers, backend.id, runs, url, HERE)
    start = time.perf_counter()
    (runs / "go").touch()
    assert [agent.wait() for agent in agents] == [0] * num_workers
    seconds = time.perf_counter() - start
    assert backend.count_states() == {"finished": num_trials}
    claims = [claim for claim in read_claims(runs) if "ended" not in claim]
    assert sorted(claim["cell"] for claim in claims) == list(range(num_trials))  # each cell once
    measured = [claim for claim in sorted(claims, key=lambda claim: float(claim["time"])) if "rss_mib" in claim]
    memory = {f"first_{name}": measured[0][name] for name in ("rss_mib", "pss_mib")}
    return seconds, memory | {f"largest_{name}": max(claim[name] for claim in measured) for name in ("rss_mib", "pss_mib")}


def run_peer(python: str, *arguments: object) -> float | None:
    """The seconds of a peer; None where it is not installed."""
    command = [python, str(HERE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        print(f"{arguments[0]} is left out: {last[0]}", file=sys.stderr)
        return None
    seconds = float(done.stdout.splitlines()[-1])
    print(f"{arguments[0]}: {seconds:.1f} s", file=sys.stderr)
    return seconds


def main() -> None:
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests")]
    from benchmarks.sweep_engine import postgres_url

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="this engine and Optuna in turn")
    parser.add_argument("--ray-trials", type=int, default=100, help="of Ray Tune, which takes a second for each")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--peers", default=os.environ.get("CIFAR_PEERS", ""), help="a Python with ray[tune] and optuna")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args()
    size = options.trials, options.workers
    seconds: dict[str, list[float]] = {}
    memory: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, postgres_url() as server:
        databases = {"sqlite": "", **({"postgresql": server} if server else {})}
        for _, (name, url) in itertools.product(range(options.rounds), databases.items()):
            own, memory[name] = run_ours(*size, Path(folder), url)
            seconds.setdefault(f"cifar, {name}", []).append(own)
            print(f"cifar, {name}: {own:.1f} s", file=sys.stderr)
            if options.peers:
                peer_url = url.replace("postgresql://", "postgresql+psycopg2://")
                place = tempfile.mkdtemp(dir=folder)
                if peer := run_peer(options.peers, "optuna", *size, place, peer_url):
                    seconds.setdefault(f"optuna, {name}", []).append(peer)
        if options.peers and (peer := run_peer(options.peers, "ray", options.ray_trials, options.workers, f"{folder}/ray")):
            seconds["ray tune"] = [peer * options.trials / options.ray_trials]
        if not options.peers:
            print("no peers: name the Python of an environment with ray[tune] and optuna by --peers", file=sys.stderr)
    document = {
        "what": f"{options.trials} trials of one step by {options.workers} workers",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "ray_trials": options.ray_trials,  # its seconds are scaled
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "trials_a_second": {name: [round(options.trials / value, 1) for value in each] for name, each in seconds.items()},
        "agent_mib": memory,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ray"]:
        print(run_ray(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    elif sys.argv[1:2] == ["optuna"]:
        print(run_optuna(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]))
    elif sys.argv[1:2] == ["optuna-worker"]:
        run_optuna_worker(int(sys.argv[2]), *sys.argv[3:6])
    else:
        main()
