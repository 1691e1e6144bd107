"""The course notebooks' way: torchvision's transforms on one image at a time, a DataLoader, Adam, `.item()` each step.

python -m benchmarks.peers.notebook --workers 14                   # answers "epoch" and "test", a line each
python -m benchmarks.peers.notebook --trial --epochs 25 --lr 1e-3  # one whole trial with wandb.init, then it ends
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import serve, synchronize
from cifar import data, registry
from cifar.training.trainer import resolve_device

PLAIN = [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
AUGMENTED = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4), *PLAIN]


class Pictures(Dataset):
    """Image by image through PIL, as torchvision's own CIFAR10 hands them out."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, steps: list[Any]) -> None:
        self.images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # (N, 3, 32, 32) -> (N, 32, 32, 3)
        self.labels, self.transform = labels.tolist(), transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Notebook:
    """Worksheet 1 as its notebook trains it. Batches that are short are trained on, too, as a plain DataLoader has it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = resolve_device(options.device)
        arrays = data.load_dataset(options.dataset, None)
        train, _ = data.split_indices(arrays.train_labels, options.val_size)
        train = train[: options.train_size] if options.train_size else train
        torch.manual_seed(options.seed)
        self.loader = DataLoader(
            Pictures(arrays.train_images[train], arrays.train_labels[train], AUGMENTED),
            batch_size=options.batch_size,
            shuffle=True,
            num_workers=options.workers,
        )
        test = Pictures(arrays.test_images, arrays.test_labels, PLAIN)
        self.test_loader = DataLoader(test, batch_size=options.batch_size, num_workers=options.workers)
        self.model = registry.models["worksheet1"].build(width=options.width).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    def epoch(self) -> dict[str, Any]:
        """One pass over the training images, timed by the wall clock."""
        begun = time.perf_counter()
        self.model.train()
        total, correct, images = 0.0, 0, 0
        for inputs, labels in self.loader:
            inputs, labels = inputs.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            outputs = self.model(inputs)
            loss = F.cross_entropy(outputs, labels)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(labels)
            correct += (outputs.argmax(1) == labels).sum().item()
            images += len(labels)
        synchronize(self.device)
        return {"seconds": time.perf_counter() - begun, "images": images, "loss": total / images, "acc": correct / images}

    @torch.no_grad()
    def test(self) -> dict[str, Any]:
        self.model.eval()
        correct = 0
        for inputs, labels in self.test_loader:
            correct += (self.model(inputs.to(self.device)).argmax(1) == labels.to(self.device)).sum().item()
        return {"acc": correct / len(self.test_loader.dataset)}


def trial(options: argparse.Namespace) -> None:
    """What `wandb agent` starts once a trial: a fresh process, a W&B run, the notebook."""
    import wandb

    run = wandb.init(project="bench", config={"lr": options.lr, "weight_decay": options.weight_decay, "seed": options.seed})
    notebook = Notebook(options)
    seconds = []
    for epoch in range(options.epochs):
        row = notebook.epoch()
        seconds.append(row["seconds"])
        run.log({"epoch": epoch + 1, "train/loss": row["loss"], "train/acc": row["acc"]})
    run.finish()
    print(json.dumps({"epoch_seconds": seconds}), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--train-size", type=int, default=0)
    parser.add_argument("--val-size", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", action="store_true", help="train once, with wandb, and end")
    parser.add_argument("--epochs", type=int, default=25, help="of --trial")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.trial:
        return trial(options)
    notebook = Notebook(options)
    with contextlib.suppress(BrokenPipeError):
        serve(lambda request: notebook.test() if request == "test" else notebook.epoch())


if __name__ == "__main__":
    main()
