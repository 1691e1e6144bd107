"""A good standard PyTorch loop: persistent workers, pinned memory, prefetch, bf16 autocast, channels-last, fused SGD.

    python -m benchmarks.peers.standard --model resnet20 --feed loader   # answers each line with one epoch
    python -m benchmarks.peers.standard --model resnet20 --feed device   # the same loop, images on the device

No `.item()` in a step: loss and accuracy are summed on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.common import serve, synchronize
from benchmarks.peers.notebook import Pictures
from cifar import data, registry
from cifar.data import MEAN, STD
from cifar.training.trainer import resolve_device

AUGMENTED = [
    transforms.RandomCrop(32, padding=4),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize(MEAN, STD),
]


class FromDevice:
    """Batches from uint8 images on the device: shuffled, flipped and cropped a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = F.pad(images, (4, 4, 4, 4)), labels, batch_size  # black, as PIL pads
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(MEAN, device=images.device).view(shape) * 255
        self.std = torch.tensor(STD, device=images.device).view(shape) * 255
        self.offsets = torch.arange(32, device=images.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self.images.device, len(self.images)
        order = torch.randperm(count, device=device)
        for start in range(0, count - self.batch_size + 1, self.batch_size):
            chosen = order[start : start + self.batch_size]
            corner = torch.randint(9, (2, self.batch_size, 1), device=device)
            rows, columns = corner[0] + self.offsets, corner[1] + self.offsets  # (B, 32)
            mirrored = torch.rand(self.batch_size, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            images = self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, 32, 32, 3)
            images = images.permute(0, 3, 1, 2)  # (B, 3, 32, 32), channels last in memory
            yield (images.float() - self.mean) / self.std, self.labels[chosen]


class Standard:
    def __init__(self, options: argparse.Namespace) -> None:
        self.device = device = resolve_device(options.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        arrays = data.load_dataset(options.dataset, None)
        images, labels = arrays.train_images, arrays.train_labels
        if options.train_size:
            images, labels = images[: options.train_size], labels[: options.train_size]
        self.batches: Any
        if options.feed == "device":
            put = [torch.from_numpy(array.copy()).to(device) for array in (images, labels)]
            self.batches = FromDevice(put[0], put[1], options.batch_size)
        else:
            self.batches = DataLoader(
                Pictures(images, labels, AUGMENTED),
                batch_size=options.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=options.workers,
                persistent_workers=True,
                prefetch_factor=4,
                pin_memory=device.type == "cuda",
            )
        torch.manual_seed(0)
        arguments = {"width": options.width} if options.width else {}
        model = registry.models[options.model].build(**arguments)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )

    def epoch(self, _: str = "") -> dict[str, Any]:
        """One epoch, timed by the wall clock with the device waited for at both ends."""
        self.model.train()
        sums = torch.zeros(2, device=self.device)
        images = 0
        synchronize(self.device)
        begun = time.perf_counter()
        for inputs, labels in self.batches:
            inputs = inputs.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = F.cross_entropy(outputs := self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            sums += torch.stack([loss.detach() * len(labels), (outputs.argmax(1) == labels).sum().float()])
            images += len(labels)
        loss_sum, correct = sums.tolist()
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "images": images, "loss": loss_sum / images, "acc": correct / images}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--feed", choices=("loader", "device"), default="loader")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--train-size", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=0, help="0: the model's own")
    parser.add_argument("--lr", type=float, default=0.1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(Standard(parse()).epoch)
