"""Runs cifar10-airbench, or its faster descendant, from a checkout that AIRBENCH or HIVERGE names; none of their code is here.

    AIRBENCH=~/cifar10-airbench python -m benchmarks.peers.airbench 94   # airbench94_muon.py; answers each line with a run
    AIRBENCH=~/cifar10-airbench python -m benchmarks.peers.airbench 95   # legacy/airbench95.py, which compiles nothing
    AIRBENCH=~/cifar10-airbench python -m benchmarks.peers.airbench 96   # airbench96_faster.py; the first run compiles
    HIVERGE=~/cifar10-speedrun python -m benchmarks.peers.airbench hiverge   # cifar10_speedrun.py: 94 % too

Its file is executed up to its main guard; then its models are made as the guard makes them, and its `main` runs once a
request. Its clock: CUDA events around whitening, training epochs and the final evaluation with 6 views; making batches
is in it, reading the images and the evaluations between epochs are not. It reads `cifar10/{train,test}.pt` in the current
folder, which are written from our images, so it downloads nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = {
    "94": "airbench94_muon.py", "95": "legacy/airbench95.py", "96": "airbench96_faster.py", "hiverge": "cifar10_speedrun.py"
}  # fmt: skip
AIRBENCH = ("AIRBENCH", "https://github.com/KellerJordan/cifar10-airbench")
CHECKOUTS = {
    "94": AIRBENCH,
    "95": AIRBENCH,
    "96": AIRBENCH,
    "hiverge": ("HIVERGE", "https://github.com/hiverge/cifar10-speedrun"),
}
GUARD = 'if __name__ == "__main__":'
CLOCKS = ("time_seconds", "total_time_seconds")


def checkout(row: str) -> Path:
    """The file to run. Raises FileNotFoundError with what to do."""
    variable, address = CHECKOUTS[row]
    named = os.environ.get(variable, "")
    path = Path(named).expanduser().resolve() / FILES[row]
    if not named or not path.exists():
        what = f"{path} does not exist" if named else f"{variable} is not set"
        raise FileNotFoundError(f"{what}; clone {address} and name the folder with {variable}")
    return path


def write_images(folder: Path, dataset: str) -> None:
    """The two files that it would make of torchvision's download: images (N, 32, 32, 3) uint8, labels (N,) int64."""
    import torch

    from cifar import data

    arrays = data.load_dataset(dataset, None)
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": (arrays.train_images, arrays.train_labels), "test": (arrays.test_images, arrays.test_labels)}
    for name, (images, labels) in sets.items():
        content = {
            "images": torch.from_numpy(images.copy()).permute(0, 2, 3, 1).contiguous(),
            "labels": torch.from_numpy(labels.copy()),
            "classes": list(data.CLASSES),
        }
        torch.save(content, folder / f"{name}.pt")


def load(path: Path) -> dict[str, Any]:
    """The names that the file defines, its main guard left out."""
    source = path.read_text()
    assert GUARD in source, f"{path} has no main guard"
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    sys.argv = [str(path)]  # it reads its own text
    exec(compile(source.partition(GUARD)[0], str(path), "exec"), names)
    return names


class Runs:
    """`main` of the file, as often as wanted, and what its last line of each run says."""

    def __init__(self, row: str, path: Path, *, warm_up: bool = True) -> None:
        self.names, self.number, self.last = load(path), 0, dict[str, Any]()
        self.names["print_training_details"] = self._heard
        if row == "96":
            self.run = self._prepare96()
        else:
            self.run = self._prepare95(warm_up) if row == "95" else self._prepare94(warm_up)

    def _heard(self, variables: dict[str, Any], is_final_entry: bool = False) -> None:
        if is_final_entry:
            seconds = next(float(variables[name]) for name in CLOCKS if name in variables)
            self.last = {
                "seconds": seconds,
                "acc": float(variables["tta_val_acc"]),
                "acc_one_view": float(variables["val_acc"]),
            }

    def _prepare94(self, warm_up: bool) -> Callable[[int], Any]:
        import torch

        model = self.names["CifarNet"]().cuda().to(memory_format=torch.channels_last)
        model.compile(mode="max-autotune")
        if warm_up:
            self.names["main"]("warmup", model)
        return lambda number: self.names["main"](number, model)

    def _prepare95(self, warm_up: bool) -> Callable[[int], Any]:
        """Its `main` makes the network itself, and nothing is compiled."""
        run: Callable[[Any], Any] = self.names["main"]
        if warm_up:
            run("warmup")
        return run

    def _prepare96(self) -> Callable[[int], Any]:
        import torch

        hyp, make = self.names["hyp"], self.names["make_net"]
        proxy, training, frozen = make(hyp["proxy"]), make(hyp["net"]), make(hyp["net"])
        proxy[0].bias.requires_grad = False
        frozen[0].bias.requires_grad = False
        models = [torch.compile(model, mode="max-autotune") for model in (proxy, training, frozen)]
        return lambda number: self.names["main"](number, hyp, *models)

    def once(self, _: str = "") -> dict[str, Any]:
        """One run -> its own seconds, test accuracy with 6 views and with one."""
        self.run(self.number)
        self.number += 1
        return self.last


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("row", choices=list(FILES))
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--folder", type=Path, help="where cifar10/*.pt are kept [default: a temporary one]")
    parser.add_argument("--no-warm-up", action="store_true", help="the first run compiles; for the time to a first result")
    options = parser.parse_args()
    try:
        path = checkout(options.row)
    except FileNotFoundError as error:
        sys.exit(str(error))
    import torch

    if not torch.cuda.is_available():
        sys.exit("cifar10-airbench needs CUDA")
    from benchmarks.common import serve

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "cifar10" / "test.pt").exists():
            write_images(folder / "cifar10", options.dataset)
        os.chdir(folder)
        runs = Runs(options.row, path, warm_up=not options.no_warm_up)
        serve(runs.once)
        os.chdir("/")


if __name__ == "__main__":
    main()
