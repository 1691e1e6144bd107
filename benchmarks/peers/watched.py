"""`wandb.watch` on a plain loop: batches on the device, SGD, an offline run; each request times steps with or without it.

python -m benchmarks.peers.watched --model resnet20 --every 50   # answers "plain" and "watched", a line each
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
import wandb

from benchmarks.common import serve, synchronize
from benchmarks.peers.standard import FromDevice
from cifar import data, registry
from cifar.training.trainer import resolve_device


class Watched:
    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.device = options, resolve_device(options.device)
        arrays = data.load_dataset(options.dataset, None)
        put = [torch.from_numpy(a.copy()).to(self.device) for a in (arrays.train_images, arrays.train_labels)]
        self.batches = FromDevice(put[0], put[1], options.batch_size)
        self.endless = iter(())
        arguments = {"width": options.width} if options.width else {}
        self.model = registry.models[options.model].build(**arguments).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.run = wandb.init(project="bench", dir=folder, mode="offline")
        self._steps(3, watched=False)  # kernels are chosen and loaded

    def _batch(self) -> Any:
        found = next(self.endless, None)
        if found is None:
            self.endless = iter(self.batches)
            found = next(self.endless)
        return found

    def _steps(self, count: int, watched: bool) -> None:
        for step in range(count):
            inputs, labels = self._batch()
            loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if watched and step % self.options.every == 0:
                self.run.log({"loss": loss.item()})

    def measure(self, request: str) -> dict[str, Any]:
        """Seconds of `steps` steps."""
        watched = request == "watched"
        if watched:
            self.run.watch(self.model, log="all", log_freq=self.options.every)
        synchronize(self.device)
        begun = time.perf_counter()
        self._steps(self.options.steps, watched)
        synchronize(self.device)
        seconds = time.perf_counter() - begun
        if watched:
            self.run.unwatch(self.model)
        return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="worksheet1")
    parser.add_argument("--every", type=int, default=50, help="steps between two looks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BrokenPipeError):
        watched = Watched(parser.parse_args(), folder)
        serve(watched.measure)
        watched.run.finish()


if __name__ == "__main__":
    main()
