"""What was chosen by time on this GPU, kept on disk beside torch.compile's cache.

The choices are constants of compiled code. If each process timed anew, a near tie could go the other way, and the code would
have to be compiled again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cifar import kernels


class Choices:
    """Choices by name, of one GPU model; values are what JSON can hold."""

    def __init__(self) -> None:
        self.by_device: dict[str, dict[str, Any]] = {}

    def find(self, name: str, device: torch.device) -> Any:
        """The choice of this name, None if it has not been made."""
        return self._open(device)[1].get(name)

    def get(self, name: str, device: torch.device, choose: Callable[[], Any]) -> Any:
        """The choice of this name; `choose()` where none has been made yet, which is noted on disk."""
        gpu, known = self._open(device)
        if name not in known:
            known |= self._read(gpu)  # by another process, which compiles ahead, meanwhile
        if name not in known:
            known[name] = choose()
            self._write(gpu, self._read(gpu) | known)
        return known[name]

    def _open(self, device: torch.device) -> tuple[str, dict[str, Any]]:
        """The GPU model and its choices."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        if gpu not in self.by_device:
            self.by_device[gpu] = self._read(gpu)
        return gpu, self.by_device[gpu]

    def _path(self, gpu: str) -> Path | None:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # set by cifar.training.compile
        if not folder or gpu == "cpu":
            return None
        name = f"{gpu} {torch.__version__} {kernels.digest_sources()}".replace("/", "-")
        return Path(folder) / "cifar" / f"choices {name}.json"

    def _read(self, gpu: str) -> dict[str, Any]:
        path = self._path(gpu)
        if path is not None:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(path.read_text())
                if isinstance(found, dict):
                    return found
        return {}

    def _write(self, gpu: str, known: dict[str, Any]) -> None:
        path = self._path(gpu)
        if path is not None:
            with contextlib.suppress(OSError):  # a full disk: they are chosen again by the next process
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.{os.getpid()}")
                part.write_text(json.dumps(known))
                part.replace(path)


CHOICES = Choices()
